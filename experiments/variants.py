"""train.py with one thing changed that is no option of it:

python -m experiments.variants fast --steps 3000 --out runs/evaluate/flow-3-fast

plain   a frame's position is its plain index in the stage, not that times the stride
fast    digits that move three times as fast
first   only the noisiest stage is trained
joint   the same, and where the model attends over the frames of a patch, it attends over all patches of all frames

The weights of all but `fast` have a format of their own: sample.py refuses them, in place of making bad clips of them.
"""

import sys
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

POSITIONS, ATTEND = model.positions_of, model.Attention.forward
ALONE = "first", "joint"  # of one stage alone
VARIANTS = "plain", "fast", *ALONE
FAST = tuple(3 * speed for speed in MovingDigits.speeds)


def plain_index(frames: int, _stride: int, device: torch.device | str | None = None) -> torch.Tensor:
    """In place of `model.temporal_positions`."""
    return torch.arange(frames, device=device)


def noisiest(_step: int, args: Namespace) -> int:
    """In place of `train.draw_stage`."""
    return args.stages - 1


def joint_positions(*shape) -> tuple[torch.Tensor, ...]:
    """In place of `model.positions_of`: half of the temporal attention's channels are turned by place."""
    embedding, space, time = POSITIONS(*shape)
    both = [time[..., ::2, :].expand(-1, space.shape[1], *[-1] * 4), space[..., ::2, :].expand(len(time), *[-1] * 5)]
    return embedding, space, torch.cat(both, dim=-2)


def joint_attention(self: model.Attention, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """In place of `model.Attention.forward`: the temporal attention is over all tokens of the clip."""
    if self.dim == 2:
        return ATTEND(self, x, rotation)
    return ATTEND(self, x.flatten(1, 2)[:, :, None], rotation.flatten(0, 1)[:, None]).view(x.shape)


def fast_data(*args, **options) -> Dataset:
    """In place of `train.open_data`. The speed is the dataset's own, so that processes of the loader know it."""
    data = open_data(*args, **options)
    data.speeds = FAST
    return data


@contextmanager
def varied(name: str | None) -> Iterator[None]:
    """In this context `name` is the case: one of VARIANTS, or None for nothing."""
    changes = {
        None: [],
        "fast": [(train, "open_data", fast_data)],
        "plain": [(model, "temporal_positions", plain_index)],
    }
    changes["first"] = [(train, "draw_stage", noisiest)]
    changes["joint"] = [(model, "positions_of", joint_positions), (model.Attention, "forward", joint_attention)]
    changes["joint"] += changes["first"]
    changes |= {case: [*changes[case], (checkpoint, "FORMAT", case)] for case in ("plain", *ALONE)}
    POSITIONS.cache_clear()
    try:
        with ExitStack() as stack:
            for change in changes[name]:
                stack.enter_context(mock.patch.object(*change))
            yield
    finally:
        POSITIONS.cache_clear()


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="experiments.variants", description=__doc__)
    parser.add_argument("variant", choices=VARIANTS, help="what is changed; options of train.py follow")
    parser.epilog = "example: python -m experiments.variants fast --steps 3000"
    args, options = parser.parse_known_args(words)
    alone = ["--workers", "0"] if args.variant in ALONE else []  # a worker might draw the usual stages
    with varied(args.variant):
        train.main([*options, *alone])


if __name__ == "__main__":
    main()
