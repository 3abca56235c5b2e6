"""What a claim's scores are of: the runs it trains, the ways it samples them, and the scores of that. They stay in
cells.json, so that nothing is trained or scored twice."""

import argparse
import datetime
import itertools
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

import sample
import train
from checkpoint import SHIPPED, Weights, load_weights, make_pyramid
from cli import choose_device
from experiments.metrics import JUDGE, digest, digit_metrics, other_clips, sample_clips, scores_of
from experiments.report import commit, processor, spread, write_json
from experiments.variants import VARIANTS, varied
from tpdiff import Generators, Pyramid, randn, split_steps, upsample

# Every run that a claim needs: options of train.py. Planned for equal time within a mode, but for those of one stage
# alone, as if a step of three stages took 0.63 times as long as one of vanilla; `training` measures what it takes.
SPACE = "--stages 3 --batch 32 16 4 --pyramid"  # small clips take as long as a large one, so more
KINDS = {"1": ("--stages 1", 1900), "3": ("--stages 3", 3000)}
KINDS |= {"3-space": (f"{SPACE} space", 2300), "3-space-time": (f"{SPACE} space-time", 3300)}
SEEDS = {"": "seed 1", "-seed-2": "seed 2"}  # of training
OPTIONS = {}
for mode, (name, (words, steps)) in itertools.product(("flow", "ddim"), KINDS.items()):
    OPTIONS[f"{mode}-{name}"] = f"--mode {mode} {words} --steps {steps}"
    OPTIONS[f"{mode}-{name}-twice"] = f"--mode {mode} {words} --steps {2 * steps}"
OPTIONS |= {f"flow-3-{kind}": OPTIONS["flow-3"] for kind in ("plain", "fast")}  # see variants.py
OPTIONS |= {"flow-1-fast": OPTIONS["flow-1"]}
OPTIONS |= {f"flow-3-{kind}": f"{OPTIONS['flow-3']} --align {kind}" for kind in ("nearest", "none")}
OPTIONS |= {"flow-3-1-1-2": f"{OPTIONS['flow-3']} --ends 0.75 0.5 0"}
OPTIONS |= {"flow-3-2-1-1": f"{OPTIONS['flow-3']} --ends 0.5 0.25 0"}
OPTIONS |= {"flow-3-first": "--mode flow --stages 3 --steps 4000 --batch 16"}
OPTIONS |= {"flow-3-first-wide": f"{OPTIONS['flow-3-first']} --width 144 --heads 6"}
RUNS = {run + seed: f"{words} --seed {1 if not seed else 2}" for run, words in OPTIONS.items() for seed in SEEDS}
RUNS |= {f"shipped-{mode}-{n}": f"--mode {mode} --stages {n} --seed 1" for mode in ("flow", "ddim") for n in (3, 1)}
RUNS |= {"shipped-flow-3-space-time": "--mode flow --stages 3 --pyramid space-time --batch 32 16 4 --seed 1"}
CLIP = 1, 1, 16, 32, 32  # of all runs: B, C, T, H, W
TINY = "--steps 20 --width 16 --depth 1 --heads 2 --batch 2 --sample-interval 1000"  # of --smoke


class WithoutNoise(Pyramid):
    """Renoising that scales as Eq. 15 does, and adds nothing: the frames of a pair start with the same noise."""

    def renoise(self, x_end: Tensor, k: int, generator: Generators = None, frames: int | None = None) -> Tensor:
        return self[k - 1].gamma_start / self[k].gamma_end * upsample(x_end, self.factor, frames)


class PlainNoise(WithoutNoise):
    """As much noise as in Eq. 15, independent in the two frames of a pair: its g is 0 where the paper has -1."""

    def renoise(self, x_end: Tensor, k: int, generator: Generators = None, frames: int | None = None) -> Tensor:
        x, share = super().renoise(x_end, k, None, frames), 1 - 1 / math.prod(self.factor)
        return x + self[k - 1].sigma_start * math.sqrt(share) * randn(x.shape, generator, x.device, x.dtype)


class HalfNoise(WithoutNoise):
    """Eq. 15 with half of its noise."""

    def renoise(self, x_end: Tensor, k: int, generator: Generators = None, frames: int | None = None) -> Tensor:
        return (super().renoise(x_end, k, None, frames) + Pyramid.renoise(self, x_end, k, generator, frames)) / 2


SCORES = ["judge's distance", "legible", "one digit", "straight", "off track, px", "flicker, of real"]
FRONT = ["run", "steps", "solver", "full-rate calls", *SCORES]
LATER = "shipped-flow-3"  # does the later stages where a run is of the noisiest alone
METRICS = 1  # raised when the same clips would score otherwise
RENOISING = {"paper": Pyramid, "plain noise": PlainNoise, "half the noise": HalfNoise, "no noise": WithoutNoise}


@dataclass(frozen=True)
class Cell:
    """What one number of a table is measured on: clips of a run after a share of its steps, sampled in one way."""

    run: str
    steps: tuple[int, ...] | int = 30  # as `Pyramid.sample` takes them
    solver: str = "euler"
    percent: int = 100
    renoising: str = "paper"


IN_TURN, RANDOM = Cell("real, digits in turn"), Cell("real, random digits")  # samples have them in turn


def training_seeds(args: argparse.Namespace) -> dict[str, str]:
    """SEEDS; with --smoke the first alone."""
    return dict(list(SEEDS.items())[: 1 if args.smoke else None])


def train_words(run: str, args: argparse.Namespace) -> list[str]:
    """A run's options for train.py as words."""
    return RUNS[run].split() + (TINY.split() if args.smoke else [])


def train_options(run: str, args: argparse.Namespace) -> argparse.Namespace:
    """The same as train.py reads them."""
    return train.make_parser().parse_args(train_words(run, args))


def trained(run: str, percent: int, args: argparse.Namespace) -> Path:
    """The weights of a run after a share of its steps, a multiple of 5%. The run is made now unless it is there or
    shipped. Raises ValueError if its folder holds a run with other options."""
    if run.startswith("shipped") and not args.smoke:
        return SHIPPED / f"{run.removeprefix('shipped-')}.pt"
    folder, steps = args.runs / run, train_options(run, args).steps
    words = [*train_words(run, args), "--keep-interval", str(steps // 20)]
    path, note = folder / f"weights-{steps * percent // 100}.pt", folder / "options.txt"
    begun, parse = (folder / "checkpoint.pt").exists(), train.make_parser().parse_args
    if begun and (not note.exists() or parse(note.read_text().split()) != parse(words)):
        raise ValueError(f"{folder} is not the run of train.py {' '.join(words)}: move it away")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(" ".join(words) + "\n")
        run_train(words, folder, variant_of(run))
    return path


def variant_of(run: str) -> str | None:
    """What of experiments/variants.py a run is, if anything."""
    return next((name for name in VARIANTS if name in run.split("-")), None)


def seconds_a_step(words: list[str], trial: int) -> float:
    """Of train.py with these options, by the last two thirds of a short run; in the first caches are cold. Of a stage's
    steps it takes the median, and each stage counts as often as it is trained in a long run."""
    options, seconds = train.make_parser().parse_args(words), defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        run_train([*words, "--steps", str(3 * trial), "--log-interval", "1", "--sample-number", "0"], run)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for before, row in itertools.pairwise(rows[trial - 1 :]):
        for k in (k for k, loss in enumerate(row["loss_by_stage"]) if loss is not None):  # none of a skipped step
            seconds[k].append(row["seconds"] - before["seconds"])
    if len(seconds) < options.stages:
        raise ValueError(f"a trial of {3 * trial} steps is too short: it did not train all stages")
    odds = (options.stage_odds or [1] * options.stages)[::-1]
    return sum(odds[k] * statistics.median(each) for k, each in seconds.items()) / sum(odds[k] for k in seconds)


def run_train(words: list[str], out: Path, variant: str | None = None) -> None:
    """train.py, or a variant of it, as a process of its own, resumed if there is a checkpoint."""
    words = [*words, "--resume"] if (out / "checkpoint.pt").exists() else words
    what = ["-m", "experiments.variants", variant] if variant else [train.__file__]
    child = subprocess.Popen([sys.executable, *what, *words, "--out", out])
    stop = []

    def pass_on(number: int, _frame) -> None:  # the child saves first
        stop.append(128 + number)
        child.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        with suppress(KeyboardInterrupt):  # the terminal told the child too
            child.wait()
        code = child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if code := code or sum(stop[:1]):
        again = "; the same command goes on from its checkpoint" if (out / "checkpoint.pt").exists() else ""
        raise SystemExit(f"train.py ended with {code}{again}")


def weights_of(run: str, args: argparse.Namespace, percent: int = 100) -> Weights:
    """A run's weights after a share of its steps; those of most variants have a format of their own."""
    with varied(variant_of(run)):
        return load_weights(trained(run, percent, args), choose_device())


def clips_of(cell: Cell, args: argparse.Namespace, seed: int, number: int) -> Tensor:
    """`number` clips of a cell, of all classes in turn; or real ones that no reference holds."""
    if cell in (IN_TURN, RANDOM):
        return other_clips(args.reference, seed, number, in_turn=cell == IN_TURN)
    weights = weights_of(cell.run, args, cell.percent)
    pyramid = make_pyramid(weights, RENOISING[cell.renoising])
    with varied(variant_of(cell.run)):
        return sample_clips(weights, pyramid, cell.steps, cell.solver, args.batch, seed, number)


def measured(cell: Cell, args: argparse.Namespace) -> dict[str, list[float]]:
    """A cell's metrics, each a list over the sampling seeds."""
    make, metrics = partial(clips_of, cell, args), partial(digit_metrics, reference=args.reference)
    return stored(str(cell), cell.run, make, metrics, args, cell.percent)


def stored(
    name: str, run: str, make: Callable, metrics: Callable, args: argparse.Namespace, percent: int = 100
) -> dict:
    """`scores_of` clips of a run, from cells.json in --out or now. They depend on the weights and the judge."""
    name = f"{name}: {args.number} clips, seeds {args.seeds}, {args.reference} real ones"
    files = [JUDGE] if run in ("real", IN_TURN.run, RANDOM.run) else [JUDGE, trained(run, percent, args)]
    files += [trained(LATER, 100, args)] if variant_of(run) == "first" else []
    depends = {"files": [digest(file) for file in files], "metrics": METRICS}
    return kept(args.out / "cells.json", name, depends, partial(scores_of, make, metrics, args))


def kept(path: Path, name: str, depends: dict, make: Callable[[], dict]) -> dict:
    """The scores of this name in a JSON file; or those that `make` returns, which are added to it. What is there counts
    as long as all that it depends on is the same."""

    def read() -> dict:
        return json.loads(path.read_text()) if path.exists() else {}

    found = read().get(name, {})
    if {key: found.get(key) for key in depends} != depends:
        made = {"date": str(datetime.date.today()), "commit": commit(), "machine": processor()}
        found = depends | made | make()
        write_json(path, read() | {name: found})  # read again: another process may have added to it
    return {key: value for key, value in found.items() if key not in (*depends, "date", "commit", "machine")}


def cost(cell: Cell, args: argparse.Namespace) -> tuple[str, float]:
    """Solver steps by stage, noisiest first, and what a clip costs: network calls at the full frame rate."""
    pyramid = make_pyramid(train_options(cell.run, args))
    counts = split_steps(cell.steps, len(pyramid), pyramid.lengths)
    return "-".join(map(str, counts)), sample.full_rate_steps(counts, pyramid, CLIP)


def front_row(cell: Cell, args: argparse.Namespace) -> list:
    """A row under FRONT: quality and cost."""
    counts, calls = cost(cell, args)
    return [cell.run, counts, cell.solver, f"{calls:.4g}", *scores_row(cell, args)]


def scores_row(cell: Cell, args: argparse.Namespace) -> list[str]:
    """A cell's SCORES; its flicker as a multiple of real clips'."""
    found, real = measured(cell, args), statistics.mean(measured(RANDOM, args)["flicker"])
    scores = [spread(found[metric]) for metric in ("judge_distance", "legible", "one_digit", "straight", "off_track")]
    return [*scores, spread([value / real for value in found["flicker"]])]
