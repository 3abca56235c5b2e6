"""Why sampled digits hardly ever move straight: networks beside the best that any network can do.

At the noisiest stage of the pyramid in time (flow), x_t = (1 - t) x0 + t noise. The best answer there is the mean of
all clips that a noisy one may have come from. By Bayes' rule a clip weighs exp(-|x_t - (1 - t) x0|^2 / (2 t^2)). The
clips are those of a digit on a million random paths. Late in the stage few of these count; then the mean is over new
paths near the best. So this is an approximation, by a finite number of paths, and digits drawn a quarter of a pixel
apart. Its loss is a little above the least possible one.
"""

import argparse
from functools import cache, partial
from statistics import mean

import numpy as np
import torch
from torch import Tensor

import sample
from checkpoint import make_pyramid
from cli import SAMPLING, choose_device, generator_for, use_bf16
from data import bounce, draw_digit
from experiments.figures import draw_bars, draw_curves
from experiments.metrics import REAL, digit_metrics, other_clips
from experiments.report import spread
from experiments.runs import LATER, SCORES, stored, variant_of, weights_of
from tpdiff import Pyramid, randn

PATHS, BEST, NEAR = 10**6, 200, 10**5  # random paths; the most probable of them; new ones near those
FEW = 20  # where the random paths count for fewer, there are new ones
CELL = 0.6, 0.6, 0.3, 0.3  # of paths, its size: start in pixels and velocity in pixels a frame, down and across
APART = 0.25  # pixels between the places at which a digit is drawn; divides 1
TIMES = 0.95, 0.9, 0.85, 0.8, 0.75, 0.7  # at which losses are compared
EXACT = "exact"


def rooms(label: int) -> list[int]:
    """How far a digit's corner can move, down and across."""
    return [REAL.short - length for length in REAL.glyphs[label].shape]


@cache
def random_paths(label: int) -> Tensor:
    """(PATHS, 4), as `MovingDigits.tracks` draws them: start and velocity, each down and across."""
    random = np.random.default_rng(label)
    starts = [random.uniform(0, room, PATHS) for room in rooms(label)]
    speed = REAL.short * random.uniform(*REAL.speeds, PATHS)
    angle = random.uniform(0, 2 * np.pi, PATHS)
    return torch.from_numpy(np.stack([*starts, speed * np.sin(angle), speed * np.cos(angle)], axis=1))


def paths_near(best: Tensor) -> Tensor:
    """About NEAR paths (N, 4), spread evenly over the cells that hold one of `best` (B, 4)."""
    size = torch.tensor(CELL, dtype=best.dtype)
    cells = (best / size).floor().unique(dim=0).repeat_interleave(NEAR // len(best), 0)
    return (cells + torch.rand(cells.shape, generator=torch.Generator().manual_seed(0), dtype=best.dtype)) * size


def log_density(paths: Tensor, label: int) -> Tensor:
    """(N,) the logarithm of the density of the data's paths, but for a constant: starts are even within the room, and
    so are speeds and angles."""
    starts, speed = paths[:, :2], paths[:, 2:].norm(dim=1)
    slowest, fastest = (REAL.short * each for each in REAL.speeds)
    within = (starts >= 0).all(1) & (starts <= torch.tensor(rooms(label))).all(1)
    return (-speed.log()).where(within & (slowest <= speed) & (speed <= fastest), -torch.inf)


@cache
def pictures(label: int) -> Tensor:
    """(P, H W): the digit in every place, row by row."""
    down_across = [np.arange(0, room + APART, APART) for room in rooms(label)]
    y, x = (axis.ravel() for axis in np.meshgrid(*down_across, indexing="ij"))
    return torch.from_numpy(draw_digit(REAL.glyphs[label], y, x, REAL.size) * 2 - 1).flatten(1)


def places(paths: Tensor, label: int, stride: int) -> Tensor:
    """(T, N): which of the pictures each frame of a stage shows."""
    (down, across), frames, at = rooms(label), -(-REAL.frames // stride), []
    for room, start, velocity in zip((down, across), *paths.numpy().T.reshape(2, 2, -1), strict=True):
        at.append(np.rint(bounce(start[:, None], velocity[:, None] * stride, frames, room).T / APART).astype(np.int64))
    return torch.from_numpy(at[0] * (int(across / APART) + 1) + at[1])


@cache
def random_places(label: int, stride: int) -> Tensor:
    """(T, PATHS): `places` of the random paths."""
    return places(random_paths(label), label, stride)


def probabilities(fit: Tensor, shown: Tensor, density: Tensor | float = 0.0) -> Tensor:
    """(N,) of paths that show the pictures `shown` (T, N). `fit` (T, P) is the logarithm of how probable a picture is
    in a frame, `density` that of the paths themselves where they are not drawn by it."""
    return (sum(map(torch.take, fit, shown)).double() + density).softmax(0)


def exact_clip(x: Tensor, t: float, label: int, stride: int) -> Tensor:
    """The mean of x0 (1, T, H, W), given the label and x_t = (1 - t) x0 + t noise, in its frames at this stride."""
    drawn, shown = pictures(label), random_places(label, stride)
    fit = ((1 - t) * x[0].flatten(1) @ drawn.T - (1 - t) ** 2 / 2 * drawn.square().sum(1)) / t**2
    weights = probabilities(fit, shown)
    if 1 / weights.square().sum() < FEW:
        paths = paths_near(random_paths(label)[weights.topk(BEST).indices])
        shown = places(paths, label, stride)
        weights = probabilities(fit, shown, log_density(paths, label))
    mixed = torch.stack([torch.zeros(len(drawn)).index_add_(0, number, weights.float()) for number in shown])
    return (mixed @ drawn).view(x.shape)


def exact_velocity(pyramid: Pyramid, labels: Tensor, x: Tensor, t: Tensor, k: int) -> Tensor:
    """In place of a network's prediction at the noisiest stage k: the mean of v_k (Eq. 13), given x_t and labels."""
    stage, time, pairs = pyramid[k], t[0].item(), zip(x.cpu(), labels.tolist(), strict=True)
    x0 = torch.stack([exact_clip(clip, time, label, stage.stride[0]) for clip, label in pairs])
    return (stage.t_start - stage.t_end) / time * (x - x0.to(x))


@torch.inference_mode()
def from_true_start(run: str, first: int, steps: int, args: argparse.Namespace, seed: int, number: int) -> Tensor:
    """Clips (B, C, T, H, W) sampled from stage `first` on, which starts where real clips take it (Eq. 7) and not where
    the stages before have led. `steps` at each stage. The noisiest stage starts from noise, as always. A run of that
    stage alone, and EXACT, leave the later ones to the weights of LATER."""
    later = weights_of(LATER if run == EXACT or variant_of(run) == "first" else run, args)
    own = None if run == EXACT else weights_of(run, args).model
    pyramid, clips, device = make_pyramid(later), [], choose_device()
    for numbers in torch.arange(args.reference + seed * number, args.reference + (seed + 1) * number).split(args.batch):
        x0, labels = zip(*(REAL[index] for index in numbers.tolist()), strict=True)
        x0, labels = torch.stack(x0).to(device), torch.tensor(labels).to(device)
        generators = [generator_for(seed, SAMPLING, index) for index in numbers.tolist()]
        x, _ = pyramid.endpoints(x0, randn(pyramid.shape(x0.shape, first), generators, device), first)
        for k in reversed(range(first + 1)):
            model = own if k == len(pyramid) - 1 else later.model
            network = model and sample.make_predict(model, labels, 1.0, use_bf16("auto", device))
            x = pyramid.integrate(network or partial(exact_velocity, pyramid, labels), x, k, steps)
            x = pyramid.renoise(x, k, generators) if k else x
        clips.append(x.cpu())
    return torch.cat(clips)


@torch.inference_mode()
def losses(run: str, args: argparse.Namespace) -> list[float]:
    """A run's loss at the noisiest stage at each of TIMES, on real clips and noise that is not aligned. On average
    no network's is lower than that of EXACT."""
    network = None if run == EXACT else weights_of(run, args).model
    pyramid, found, device = make_pyramid(weights_of(LATER, args)), [], choose_device()
    clips, labels = zip(*(REAL[args.reference + index] for index in range(args.number)), strict=True)
    clips, labels = torch.stack(clips).to(device), torch.tensor(labels).to(device)
    stage = pyramid[len(pyramid) - 1]
    for time in TIMES:
        errors, place = [], (time - stage.t_end) / (stage.t_start - stage.t_end)
        generator = torch.Generator().manual_seed(0)
        for x0, y in zip(clips.split(args.batch), labels.split(args.batch), strict=True):
            noise = randn(pyramid.shape(x0.shape, stage.index), generator, device)
            ends = pyramid.endpoints(x0, noise, stage.index)
            x, target, t = pyramid.interpolate(*ends, stage.index, torch.full((len(x0),), place))
            where = (x, t, stage.index)
            said = network(*where, y) if network else exact_velocity(pyramid, y, *where)
            errors += (said - target).square().flatten(1).mean(1).tolist()
        found.append(mean(errors))
    return found


def straight(args: argparse.Namespace) -> list:
    """Where a digit leaves its straight path: clips of the shipped weights of flow, with few solver steps and with
    many, from noise and from a later stage's true start; of a short run; of models of the noisiest stage alone, with
    batches four times as large as those of the shipped weights, one as wide and a wider one; and of the best possible
    answer there. And how far the losses at the noisiest stage are from the least possible one."""
    rows, bars = [], {}
    alone = {"flow-3-first": "stage 2 alone", "flow-3-first-wide": "stage 2 alone, wider", EXACT: "stage 2 exact"}
    cases = [("vanilla, long", "shipped-flow-1", 0, steps) for steps in (9, 30)]
    long, short = "time, long", "time, short"
    cases += [(long, LATER, *way) for way in ((2, 3), (2, 10), (2, 30), (1, 10), (0, 10))]
    cases += [(short, "flow-3", first, 10) for first in (2, 1, 0)]
    cases += [(title, run, 2, 10) for run, title in alone.items()]
    for title, run, first, steps in [*cases, ("real", "real", 0, 0)]:
        name, make = "draws", partial(other_clips, args.reference, in_turn=False)  # the samples here show their digits
        if run != "real":
            name = f"{run}, stage {first} from its true start, {steps} steps a stage"
            make = partial(from_true_start, run, first, steps, args)
        of = LATER if run == EXACT else run
        found = stored(name, of, make, partial(digit_metrics, reference=args.reference), args)
        names = ("judge_distance", "legible", "one_digit", "straight", "off_track")
        begin = "noise" if first == 2 or run == "shipped-flow-1" else f"true start of stage {first}" * (title != "real")
        shown = "real, the same digits" if run == "real" else run
        rows.append([shown, begin, steps or "", *(spread(found[name]) for name in names)])
        if title != "real":
            bars[f"{title}, {begin}, {steps} steps"] = found["off_track"]
    title, label = "How far digits stray from a straight path", "pixels, at the worst frame"
    draw_bars(bars, title, label, args.out / "straight.png", mean(found["off_track"]), "one sampling seed")
    curves, table = {}, []
    for run, title in ({"flow-3": short, LATER: long} | alone).items():
        found = losses(run, args)
        curves[title] = [(t, [loss]) for t, loss in zip(TIMES, found, strict=True)]
        table.append([run, *(f"{loss:.4f}" for loss in found)])
    title, labels = "Losses at the noisiest stage", ("time t; 1 is noise", "loss")
    draw_curves(curves, title, *labels, args.out / "straight-loss.png", from_zero=True)
    header = ["loss of stage 2", *(f"t = {t}" for t in TIMES)]
    return [(["run", "begun at", "steps a stage", *SCORES[: len(names)]], rows), (header, table)]
