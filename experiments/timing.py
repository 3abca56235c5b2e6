"""How long functions take that take turns, so that a slow moment of the machine falls on all alike."""

import time
from collections.abc import Callable, Hashable
from statistics import median

import torch


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(functions: dict[Hashable, Callable], repeats: int) -> dict[Hashable, list[float]]:
    """Seconds of each function, called in turn `repeats` times after two calls to warm up: name -> sorted list."""
    seconds = {name: [] for name in functions}
    for turn in range(-2, repeats):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: sorted(values) for name, values in seconds.items()}


def quartiles(seconds: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of sorted seconds."""
    count = len(seconds)
    return seconds[count // 4], median(seconds), seconds[(3 * count) // 4]


def in_milliseconds(seconds: list[float]) -> str:
    """Median and, in brackets, the quartiles, if there is more than one measurement."""
    low, middle, high = (value * 1e3 for value in quartiles(seconds))
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]" if len(seconds) > 1 else f"{middle:.1f}"
