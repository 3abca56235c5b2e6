"""What a claim's scores are of: the runs it trains, the ways it samples them, and the scores of that, kept in
cells.json so that nothing is trained or scored twice."""

import argparse
import datetime
import json
import math
import statistics
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

import sample
import train
from checkpoint import Weights, load_weights, make_pyramid
from cli import SAMPLING, choose_device, generator_for, use_bf16
from data import height_width
from experiments.metrics import JUDGE, REAL, digest, digit_metrics, real_clips, sample_clips, scores_of, spread
from experiments.report import commit, write_json
from model import DiT, DiTConfig
from tpdiff import Generators, Pyramid, randn, split_steps, upsample

REAL_ENDS = 10**6  # the first of them that sampling goes on from; below are the reference and the judged

# Every run that a claim needs: options of train.py. A training step of three stages takes 0.63 to 0.68 times as long as
# one of vanilla (of two stages about 0.8, of four 0.54), so all runs have about equal time, but for -long, which have
# four times as much; `training` measures it for three.
SPACE = "--stages 3 --pyramid space --batch 32 16 4 --steps 2300"  # small clips take as long as a large one, so more
SPACE_TIME = "--stages 3 --pyramid space-time --batch 32 16 4 --steps 3300"
RUNS = {
    "flow-3": "--mode flow --stages 3 --steps 3000 --seed 1",
    "flow-1": "--mode flow --stages 1 --steps 1900 --seed 1",
    "ddim-3": "--mode ddim --stages 3 --steps 3000 --seed 1",
    "ddim-1": "--mode ddim --stages 1 --steps 1900 --seed 1",
    "flow-3-seed-2": "--mode flow --stages 3 --steps 3000 --seed 2",
    "flow-1-seed-2": "--mode flow --stages 1 --steps 1900 --seed 2",
    "ddim-3-seed-2": "--mode ddim --stages 3 --steps 3000 --seed 2",
    "ddim-1-seed-2": "--mode ddim --stages 1 --steps 1900 --seed 2",
    "flow-3-space": f"--mode flow {SPACE} --seed 1",
    "flow-3-space-seed-2": f"--mode flow {SPACE} --seed 2",
    "ddim-3-space": f"--mode ddim {SPACE} --seed 1",
    "ddim-3-space-seed-2": f"--mode ddim {SPACE} --seed 2",
    "flow-3-space-time": f"--mode flow {SPACE_TIME} --seed 1",
    "flow-3-space-time-seed-2": f"--mode flow {SPACE_TIME} --seed 2",
    "ddim-3-space-time": f"--mode ddim {SPACE_TIME} --seed 1",
    "ddim-3-space-time-seed-2": f"--mode ddim {SPACE_TIME} --seed 2",
    "flow-3-nearest": "--mode flow --stages 3 --steps 3000 --seed 1 --align nearest",
    "flow-3-none": "--mode flow --stages 3 --steps 3000 --seed 1 --align none",
    "ddim-3-none": "--mode ddim --stages 3 --steps 3000 --seed 1 --align none",
    "flow-3-none-seed-2": "--mode flow --stages 3 --steps 3000 --seed 2 --align none",
    "flow-2": "--mode flow --stages 2 --steps 2460 --seed 1",
    "flow-2-seed-2": "--mode flow --stages 2 --steps 2460 --seed 2",
    "flow-4": "--mode flow --stages 4 --steps 3500 --seed 1",
    "flow-3-odds": "--mode flow --stages 3 --steps 3640 --seed 1 --stage-odds 4 2 1",
    "flow-3-odds-seed-2": "--mode flow --stages 3 --steps 3640 --seed 2 --stage-odds 4 2 1",
    "flow-3-long": "--mode flow --stages 3 --steps 12000 --seed 1",
    "flow-1-long": "--mode flow --stages 1 --steps 7600 --seed 1",
    "flow-3-long-seed-2": "--mode flow --stages 3 --steps 12000 --seed 2",
    "flow-1-long-seed-2": "--mode flow --stages 1 --steps 7600 --seed 2",
    "flow-2-long": "--mode flow --stages 2 --steps 9840 --seed 1",
    "flow-3-none-long": "--mode flow --stages 3 --steps 12000 --seed 1 --align none",
    "flow-3-none-long-seed-2": "--mode flow --stages 3 --steps 12000 --seed 2 --align none",
    "ddim-3-long": "--mode ddim --stages 3 --steps 12000 --seed 1",
    "ddim-1-long": "--mode ddim --stages 1 --steps 7600 --seed 1",
    "flow-1-shift": "--mode flow --stages 1 --steps 1900 --seed 1 --shift 3",
    "flow-1-shift-seed-2": "--mode flow --stages 1 --steps 1900 --seed 2 --shift 3",
}
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


SCORES = ["judge's distance", "legible", "kept", "straight", "off track, px", "flicker, of real"]
FRONT = ["run", "steps", "solver", "full-rate calls", *SCORES]
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
    true_end: int = 0  # not 0: sampling goes on from real clips, noised to that stage's end; see `finish`


def train_words(run: str, args: argparse.Namespace) -> list[str]:
    """A run's options for train.py as words."""
    return RUNS[run].split() + (TINY.split() if args.smoke else [])


def train_options(run: str, args: argparse.Namespace) -> argparse.Namespace:
    """The same as train.py reads them."""
    return train.make_parser().parse_args(train_words(run, args))


def trained(run: str, percent: int, args: argparse.Namespace) -> Path:
    """The weights of a run after a share of its steps, a multiple of 5%. The run is made now unless it is there.

    Raises ValueError if its folder holds a run with other options."""
    folder, steps = args.runs / run, train_options(run, args).steps
    words = [*train_words(run, args), "--keep-interval", str(steps // 20)]
    path, note = folder / f"weights-{steps * percent // 100}.pt", folder / "options.txt"
    begun = (folder / "checkpoint.pt").exists()
    if begun and (not note.exists() or note.read_text().split() != words):
        raise ValueError(f"{folder} is not the run of train.py {' '.join(words)}: move it away")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(" ".join(words) + "\n")
        run_train(words, folder)
    return path


def run_train(words: list[str], out: Path) -> None:
    """train.py as a process of its own, resumed if there is a checkpoint."""
    words = [*words, "--resume"] if (out / "checkpoint.pt").exists() else words
    child = subprocess.Popen([sys.executable, train.__file__, *words, "--out", out])
    with suppress(KeyboardInterrupt):  # the terminal told the child too, and it saves first
        child.wait()
    if code := child.wait():
        again = "; the same command goes on from its checkpoint" if (out / "checkpoint.pt").exists() else ""
        raise SystemExit(f"train.py ended with {code}{again}")


def clips_of(cell: Cell, args: argparse.Namespace, seed: int, number: int) -> Tensor:
    """`number` clips of a cell, of all classes in turn; of the run "real", real ones that no reference holds."""
    if cell.run == "real":
        return real_clips(args.reference + seed * number, number)
    weights = load_weights(trained(cell.run, cell.percent, args), choose_device())
    if args.compile:
        compiled = compiled_model(weights.model.config)
        compiled.load_state_dict(weights.model.state_dict())
        weights.model = compiled
    if cell.true_end:
        return finish(weights, cell, args.batch, seed, number)
    pyramid = weights.make_pyramid(RENOISING[cell.renoising])
    return sample_clips(weights, pyramid, cell.steps, cell.solver, args.batch, seed, number)


@cache
def compiled_model(config: DiTConfig) -> DiT:
    """One for all weights of a shape, as compiling takes a minute or more; a graph for each stage and batch size."""
    model = DiT(config).to(choose_device()).eval()
    model.compile_blocks()
    return model


@torch.no_grad()
def finish(weights: Weights, cell: Cell, batch: int, seed: int, number: int) -> Tensor:
    """Real clips, noised to the true end of a stage, and sampled from there with their own labels. Of vanilla: noised
    to where the next of three stages starts, and all steps from there."""
    pyramid, clips = weights.make_pyramid(RENOISING[cell.renoising]), []
    end, t_start = min(cell.true_end, len(pyramid) - 1), make_pyramid(weights.mode, 3)[cell.true_end - 1].t_start
    counts, device = (
        split_steps(cell.steps, len(pyramid), pyramid.lengths)[::-1],
        next(weights.model.parameters()).device,
    )
    for indices in torch.arange(number).split(batch):
        x0, labels = zip(*(REAL[REAL_ENDS + seed * number + index] for index in indices.tolist()), strict=True)
        x0, labels = torch.stack(x0).to(device), torch.tensor(labels, device=device)
        generators = [generator_for(seed, SAMPLING, index) for index in indices.tolist()]
        noise = randn(pyramid.shape(x0.shape, end), generators, device)
        x_start, x = pyramid.endpoints(x0, noise, end)
        predict = sample.make_predict(weights.model, labels, 1.0, use_bf16("auto", device))
        if end == 0:  # vanilla
            x, _, _ = pyramid.interpolate(x_start, x, 0, torch.full((len(x0),), t_start))
            x = pyramid.integrate(predict, x, 0, *counts, cell.solver, t_start)
        for k in reversed(range(end)):
            x = pyramid.integrate(predict, pyramid.renoise(x, k + 1, generators), k, counts[k], cell.solver)
        clips.append(x.cpu())
    return torch.cat(clips)


def measured(cell: Cell, args: argparse.Namespace) -> dict[str, list[float]]:
    """A cell's metrics, each a list over the sampling seeds, from cells.json in --out or now. What is there counts as
    long as the weights, the judge and the numbers are those it is of."""
    path, name = args.out / "cells.json", str(cell)
    files = [JUDGE] if cell.run == "real" else [JUDGE, trained(cell.run, cell.percent, args)]
    what = {"files": [digest(file) for file in files], "metrics": METRICS}
    what |= {"number": args.number, "seeds": args.seeds, "real": args.reference}

    def read() -> dict:
        return json.loads(path.read_text()) if path.exists() else {}

    found = read().get(name, {})
    if {key: found.get(key) for key in what} != what:
        found = what | {"date": str(datetime.date.today()), "commit": commit()}
        found |= scores_of(partial(clips_of, cell, args), partial(digit_metrics, reference=args.reference), args)
        write_json(path, read() | {name: found})  # read again: another process may have added to it
    return found


def pyramid_of(run: str, args: argparse.Namespace) -> Pyramid:
    """The pyramid that a run is trained on."""
    options = train_options(run, args)
    return make_pyramid(options.mode, options.stages, options.pyramid, options.shift)


def step_counts(cell: Cell, args: argparse.Namespace) -> list[int]:
    """Solver steps by stage, noisiest first."""
    pyramid = pyramid_of(cell.run, args)
    return split_steps(cell.steps, len(pyramid), pyramid.lengths)


def full_rate_calls(cell: Cell, args: argparse.Namespace) -> float:
    """What a clip costs, in network calls at the full frame rate."""
    options = train_options(cell.run, args)
    shape = (1, 1, options.frames, *height_width(options.size or 32))
    return sample.full_rate_steps(step_counts(cell, args), pyramid_of(cell.run, args), shape)


def front_row(cell: Cell, args: argparse.Namespace) -> list:
    """A row under FRONT: quality and cost."""
    counts, calls = "-".join(map(str, step_counts(cell, args))), f"{full_rate_calls(cell, args):.4g}"
    return [cell.run, counts, cell.solver, calls, *scores_row(cell, args)]


def scores_row(cell: Cell, args: argparse.Namespace) -> list[str]:
    """A cell's SCORES; its flicker as a multiple of real clips'."""
    found, real = measured(cell, args), statistics.mean(measured(Cell("real"), args)["flicker"])
    scores = [spread(found[metric]) for metric in ("judge_distance", "legible", "kept", "straight", "off_track")]
    return [*scores, spread([value / real for value in found["flicker"]])]
