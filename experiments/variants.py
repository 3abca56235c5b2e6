"""train.py with one thing changed that is no option of it:

python -m experiments.variants fast --steps 3000 --out runs/evaluate/flow-3-fast

plain   a frame's position is its plain index in the stage, not that times the stride
fast    digits that move three times as fast
first   only the noisiest stage is trained

The weights of all but `fast` have a format of their own: sample.py refuses them, in place of making bad clips of them.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils.data import Dataset

import checkpoint
import model
import train
from cli import Parser
from data import MovingDigits, open_data

VARIANTS = "plain", "fast", "first"
FAST = tuple(3 * speed for speed in MovingDigits.speeds)


def plain_index(frames: int, _stride: int, device: torch.device | str | None = None) -> torch.Tensor:
    """In place of `model.temporal_positions`."""
    return torch.arange(frames, device=device)


def noisiest(_step: int, args: Namespace) -> int:
    """In place of `train.draw_stage`."""
    return args.stages - 1


def fast_data(*args, **options) -> Dataset:
    """In place of `train.open_data`. The speed is the dataset's own, so that processes of the loader know it."""
    data = open_data(*args, **options)
    data.speeds = FAST
    return data


@contextmanager
def varied(name: str | None) -> Iterator[None]:
    """In this context `name` is the case: one of VARIANTS, or None for nothing."""
    changes = {
        "fast": [(train, "open_data", fast_data)],
        "plain": [(model, "temporal_positions", plain_index), (checkpoint, "FORMAT", "plain")],
        "first": [(train, "draw_stage", noisiest), (checkpoint, "FORMAT", "first")],
    }
    model.positions_of.cache_clear()
    with ExitStack() as stack:
        stack.callback(model.positions_of.cache_clear)
        for change in changes[name] if name else []:
            stack.enter_context(mock.patch.object(*change))
        yield


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="experiments.variants", description=__doc__)
    parser.add_argument("variant", choices=VARIANTS, help="what is changed; options of train.py follow")
    parser.epilog = "example: python -m experiments.variants fast --steps 3000"
    args, options = parser.parse_known_args(argv)
    alone = ["--workers", "0"] if args.variant == "first" else []  # a worker might draw the usual stages
    with varied(args.variant):
        train.main([*options, *alone])


if __name__ == "__main__":
    main()
