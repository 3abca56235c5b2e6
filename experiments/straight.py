"""Why sampled digits hardly ever move straight: networks beside the best that any network can do.

At the noisiest stage of flow in time x_t = (1 - t) x0 + t noise. The best answer there is the mean of all clips that a
noisy one may have come from. By Bayes' rule a clip weighs exp(-|x_t - (1 - t) x0|^2 / (2 t^2)). The clips are those of
a digit on a million random paths. Late in the stage few of these count; then the mean is over new paths near them.
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
from experiments.asked import others, scored, weights_of
from experiments.figures import draw_bars, draw_curves
from experiments.metrics import REAL, spread
from experiments.runs import LATER, stored, variant_of
from experiments.variants import ALONE
from tpdiff import Pyramid, randn

PATHS, BEST, NEAR = 10**6, 20, 5000  # random paths; the most probable ones; new ones near each of those
FEW = 100  # where the random paths count for fewer, there are new ones
APART = 0.25  # pixels between the places at which a digit is drawn
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
    """(N NEAR, 4): paths a little beside each of `best` (N, 4)."""
    beside = torch.rand(len(best) * NEAR, 4, generator=torch.Generator().manual_seed(0), dtype=best.dtype) - 0.5
    return best.repeat_interleave(NEAR, 0) + beside * torch.tensor([0.6, 0.6, 0.3, 0.3])


@cache
def pictures(label: int) -> Tensor:
    """(P, H W): the digit in every place, row by row."""
    down_across = [np.minimum(np.arange(0, room + APART, APART), room) for room in rooms(label)]
    y, x = (places.ravel() for places in np.meshgrid(*down_across, indexing="ij"))
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


def probabilities(fit: Tensor, shown: Tensor, paths: Tensor) -> Tensor:
    """(N,) of paths, where `fit` (T, P) is the logarithm of a picture's in a frame. None is faster or slower than the
    data's."""
    speed = paths[:, 2:].norm(dim=1) / REAL.short
    allowed = (REAL.speeds[0] <= speed) & (speed <= REAL.speeds[1])
    return sum(map(torch.take, fit, shown)).double().where(allowed, -torch.inf).softmax(0)


def exact_clip(x: Tensor, t: float, label: int, stride: int = 4) -> Tensor:
    """The mean of x0 (1, T, H, W), given the label and x_t = (1 - t) x0 + t noise, in its frames at this stride."""
    drawn, paths, shown = pictures(label), random_paths(label), random_places(label, stride)
    fit = ((1 - t) * x[0].flatten(1) @ drawn.T - (1 - t) ** 2 / 2 * drawn.square().sum(1)) / t**2
    weights = probabilities(fit, shown, paths)
    if 1 / weights.square().sum() < FEW:
        paths = paths_near(paths[weights.topk(BEST).indices])
        shown = places(paths, label, stride)
        weights = probabilities(fit, shown, paths)
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
    later = weights_of(LATER if run == EXACT or variant_of(run) in ALONE else run, args)
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
    """A run's loss at the noisiest stage at each of TIMES, on real clips and noise that is not aligned. No network's is
    lower than that of EXACT."""
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
    many, from noise and from a later stage's true start; of a short run; and of models of the noisiest stage alone,
    with batches four times as large as those of the shipped weights: one as wide as the shipped one, a wider one, and
    the best possible one. And how near the losses at the noisiest stage are to the least possible."""
    rows, bars, alone = [], {}, {"first": "trained alone", "first-wide": "alone and 1.5 times as wide"}
    cases = [("vanilla", "shipped-flow-1", 0, 9), ("vanilla", "shipped-flow-1", 0, 30)]
    ways = (2, 3), (2, 10), (2, 30), (1, 10), (0, 10)
    cases += [("pyramid in time", "shipped-flow-3", *way) for way in ways]
    cases += [("short run", "flow-3", first, 10) for first in (2, 1, 0)]
    cases += [(f"stage 2 {title}", f"flow-3-{end}", 2, 10) for end, title in alone.items()]
    cases += [("stage 2 exact", EXACT, 2, 10), ("real", "real", 0, 0)]
    for title, run, first, steps in cases:
        make = partial(others, REAL, args.reference)
        if run != "real":
            make = partial(from_true_start, run, first, steps, args)
        name, of = f"{run}, stage {first} from its true start, {steps} steps a stage", LATER if run == EXACT else run
        found = stored(name, of, make, partial(scored, reference=args.reference), args)
        names = ("judge_distance", "legible", "one_digit", "straight", "off_track")
        begin = "noise" if first == 2 or title == "vanilla" else f"true start of stage {first}" * (title != "real")
        rows.append([run, begin, steps or "", *(spread(found[name]) for name in names)])
        if title != "real":
            begun, each = begin.replace("true", "the true"), " a stage" * (title != "vanilla")
            bars[f"{title}, from {begun}, {steps} steps{each}"] = [mean(found["off_track"])]
    title, label = "How far digits are from a straight path", "pixels, at the worst frame"
    draw_bars(bars, title, label, args.out / "straight.png", mean(found["off_track"]))
    compared = {"short run": "flow-3", "shipped": LATER, **{title: f"flow-3-{end}" for end, title in alone.items()}}
    compared = {title: losses(run, args) for title, run in (compared | {"least possible": EXACT}).items()}
    curves = {title: [(t, [loss]) for t, loss in zip(TIMES, each, strict=True)] for title, each in compared.items()}
    title, labels = "The noisiest stage of flow in time", ("time t; 1 is noise", "loss")
    draw_curves(curves, title, *labels, args.out / "straight-loss.png", from_zero=True)
    scores = ["judge's distance", "legible", "one digit", "straight", "off track, px"]
    table = [[title, *(f"{loss:.4f}" for loss in each)] for title, each in compared.items()]
    header = ["loss of stage 2", *(f"t = {t}" for t in TIMES)]
    return [(["run", "begun at", "steps a stage", *scores], rows), (header, table)]
