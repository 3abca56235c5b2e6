"""The claims' figures: curves with their spread, and clips side by side."""

import statistics
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from data import tile, to_images


def pyplot():
    """matplotlib's pyplot, which opens no window. Raises ValueError without matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("the figures need matplotlib: pip install matplotlib") from None
    pyplot.switch_backend("Agg")
    return pyplot


def draw_curves(
    curves: dict[str, list], x_label: str, y_label: str, path: Path, centre: Callable = statistics.mean
) -> None:
    """Curves of (x, values), both axes logarithmic: the values' centre, their mean over seeds or the median of
    quartiles, and their range as a band. What names have before their first comma has one colour."""
    figure, axes = pyplot().subplots(figsize=(7, 4), layout="constrained")
    dashes = {name.split(", ")[0]: iter(("-", "--", ":")) for name in curves}
    colours = {name: f"C{number}" for number, name in enumerate(dashes)}
    for name, points in curves.items():
        x, values = zip(*sorted(points), strict=True)
        group = name.split(", ")[0]
        style = {"color": colours[group], "linestyle": next(dashes[group]), "marker": "o", "markersize": 4}
        axes.plot(x, [centre(v) for v in values], label=name, **style)
        axes.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colours[group], alpha=0.2)
    axes.set(xlabel=x_label, ylabel=y_label, xscale="log", yscale="log")
    from matplotlib.ticker import LogLocator

    for axis in (axes.xaxis, axes.yaxis):  # 0.6 and 200, in place of powers of ten
        axis.set_minor_locator(LogLocator(subs=(2, 3, 4, 6)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    places = sorted({x for points in curves.values() for x, _ in points})
    if len(places) <= 4:  # room to name just these
        axes.set_xticks(places)
        axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=120)


def draw_clips(pictures: dict[str, Tensor], columns: int, path: Path) -> None:
    """Clips (B, C, T, H, W) under their names, one below the other, every second frame to the right."""
    rows = -(-len(pictures) // columns)
    images = {name: to_images(clips)[:, ::2] for name, clips in pictures.items()}
    count, shown, *frame = next(iter(images.values())).shape
    size = (0.35 * shown * columns, (0.35 * count + 0.25) * rows)
    figure, grid = pyplot().subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes, (name, frames) in zip(grid.flat, images.items(), strict=True):
        axes.imshow(tile(frames.reshape(-1, *frame), shown, scale=1))
        axes.set_title(name, fontsize=8)
        axes.axis("off")
    figure.savefig(path, dpi=120)
