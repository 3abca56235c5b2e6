"""Scores on real clips, and whether they can be trusted: what they say of clips that are damaged on purpose, and
whether samples repeat training clips. Most are commands of experiments.real."""

import argparse
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import sample
import train
from checkpoint import Weights, load_weights, make_pyramid, weight_file
from cli import choose_device
from data import FolderClips
from experiments.figures import draw_bars, draw_clips, figure_class
from experiments.metrics import (
    NAMED,
    digest,
    distances_to,
    load_efficientnet,
    naming,
    picture_features,
    placed_features,
    real_clips,
    sample_clips,
)
from experiments.report import publish
from experiments.runs import METRICS, kept


def sampled(
    weights: Weights, labels: Tensor, args, steps: int | tuple[int, ...], solver: str = "euler", guidance: float = 1.0
) -> Tensor:
    """A clip (C, T, H, W) for each of the labels; its noise depends on its number alone."""
    options = steps, solver, args.batch, args.seed, len(labels), labels, guidance
    return sample_clips(weights, make_pyramid(weights), *options).to(choose_device())


class Scored:
    """What weights of some `runs` score on the clips of one split of --data: taken from real-cells.json of --out, or
    measured now. Clips are sampled with the labels of training clips. The loss is without labels, on at least 64 clips.
    Raises DataError if there is no such split."""

    def __init__(self, split: str, runs: dict[Path, argparse.Namespace], args: argparse.Namespace):
        self.args, self.device = args, choose_device()
        shape = next((options.frames, options.size) for options in runs.values())
        self.clips = FolderClips(args.data / split, *shape)
        self.seen = FolderClips(args.data / "train", *shape, labels=True)
        clips, labels = zip(*(self.seen[number] for number in range(args.number)), strict=True)
        self.train_clips, self.labels = torch.stack(clips).to(self.device), torch.tensor(labels)
        reference = real_clips(0, min(args.reference, 4 * len(self.clips.sources)), self.clips).to(self.device)
        self.network = load_efficientnet().to(self.device)
        self.distances = distances_to(reference, {"distance": partial(picture_features, self.network)})
        self.what = f"{args.number} clips, seed {args.seed}, {len(reference)} real ones"
        self.depends = {"data": [each.digests_without(0)[0] for each in (self.seen, self.clips)], "metrics": METRICS}

    @cached_property
    def named(self) -> Callable:
        """Takes minutes to make on a CPU."""
        return naming(self.seen, partial(placed_features, self.network), self.device)

    def floor(self) -> float:
        """Distance of real training clips."""
        return self.distances(self.train_clips)["distance"]

    def after_training(self, file: Path, weights: Weights, options: argparse.Namespace) -> dict:
        """Distance of samples of --steps steps, how many are named rightly, and held-out losses, stage 0 first. Raises
        ValueError if these cannot be measured."""

        def measure() -> dict:
            clips = sampled(weights, self.labels, self.args, self.args.steps)
            losses = train.held_out_loss(weights.model, make_pyramid(weights), self.clips, options)
            if losses is None:  # why was said
                raise ValueError("a held-out loss cannot be measured; the scores before it are kept")
            return self.distances(clips) | {"named": self.named(clips, self.labels), "losses": losses}

        return self.score(file, f"{self.args.steps} steps of euler, names, loss", measure)

    def after_sampling(self, file: Path, weights: Weights, steps: tuple[int, ...], solver: str) -> float:
        """Distance of samples that are made in this way."""

        def measure() -> dict:
            return self.distances(sampled(weights, self.labels, self.args, steps, solver))

        return self.score(file, f"{'-'.join(map(str, steps))} steps of {solver}", measure)["distance"]

    def score(self, file: Path, what: str, measure: Callable[[], dict]) -> dict:
        """What `measure` returns for the weights of a file, said; or what it returned before."""

        def now() -> dict:
            found = measure()
            print(f"{file}, {what}: {found}", flush=True)
            return found

        name = f"{', '.join(file.relative_to(self.args.runs).parts)}, {what}: {self.what}"
        return kept(self.args.out / "real-cells.json", name, self.depends | {"files": [digest(file)]}, now)


def damages(generator: torch.Generator) -> dict[str, tuple[Callable, tuple]]:
    """Ways to damage clips (B, C, T, H, W), and how strongly."""

    def blurred(clips: Tensor, size: int) -> Tensor:
        frames = clips.transpose(1, 2).flatten(0, 1)
        small = F.interpolate(frames, scale_factor=1 / size, mode="area")
        return F.interpolate(small, frames.shape[-2:], mode="bilinear").unflatten(0, (len(clips), -1)).transpose(1, 2)

    def scattered(clips: Tensor, share: float) -> Tensor:  # patches of 4x4 swap with others up to two away
        clips, patches = clips.clone(), clips.shape[-1] // 4
        for clip, y, x in product(clips, range(patches), range(patches)):
            if torch.rand((), generator=generator) < share:
                step = torch.randint(-2, 3, (2,), generator=generator)
                row, column = (torch.tensor([y, x]) + step).clamp(0, patches - 1).tolist()
                one, other = clip[..., 4 * y :, 4 * x :], clip[..., 4 * row :, 4 * column :]
                one, other = one[..., :4, :4], other[..., :4, :4]
                one[:], other[:] = other.clone(), one.clone()
        return clips

    def noisy(clips: Tensor, deviation: float) -> Tensor:
        return (clips + deviation * torch.randn(clips.shape, generator=generator)).clamp(-1, 1)

    def frozen(clips: Tensor, share: float) -> Tensor:
        count = round(share * len(clips))
        return torch.cat([clips[:count, :, :1].expand_as(clips[:count]), clips[count:]])

    kinds = {"blurred, pixels": (blurred, (2, 4, 8)), "patches scattered, share": (scattered, (0.1, 0.3, 1.0))}
    return kinds | {"noise, deviation": (noisy, (0.05, 0.1, 0.2)), "frozen, share of clips": (frozen, (0.3, 0.6, 1.0))}


def distance(args: argparse.Namespace) -> None:
    """How far damaged real clips are from others, of other files, by several distances; and samples of --checkpoint. A
    good distance grows with every damage and falls as a model gets better."""
    figure_class()  # says what to install, if anything
    models = {path: load_weights(weight_file(path), choose_device()) for path in args.checkpoint}
    seen = FolderClips(args.data / "train", 16, 64, labels=True)
    names = [seen.classes[seen[number][1]] for number in range(args.number)]
    labels = {path: sample.choose_labels(weights.classes, args.number, names) for path, weights in models.items()}
    halves = [FolderClips(args.data / "held-out", 16, 64, held_out=0.5, validation=half) for half in (False, True)]
    network, (reference, clips) = load_efficientnet(), (real_clips(0, args.number, half) for half in halves)
    features = {f"block {n} of 16": partial(picture_features, network, blocks=n) for n in (5, 11, 16)}
    features["16x16 pixels"] = lambda clip: F.adaptive_avg_pool2d(clip.transpose(0, 1), 16).mean(0).flatten()
    distances, rows = distances_to(reference, features), []

    def add(name: str, strength, clips: Tensor) -> None:
        found = distances(clips)
        rows.append([name, strength, *(f"{found[kind]:.3g}" for kind in features)])
        print(rows[-1], flush=True)

    add("none", "", clips)
    for name, (damage, strengths) in damages(torch.Generator().manual_seed(0)).items():
        for strength in strengths:
            add(name, strength, damage(clips, strength))
    add("clips of the training split", "", torch.stack([seen[number][0] for number in range(args.number)]))
    for path, weights in models.items():
        made = sampled(weights, labels[path], args, args.steps, args.solver).cpu()
        add(f"samples of {path}", f"{weights.step} steps", made)
    (_, _, real, *_), *others = ((*row[:2], float(row[3])) for row in rows)
    bars = {" ".join(map(str, words)).strip(): [value] for *words, value in others}
    draw_bars(bars, "How far clips are from held-out ones", "distance, block 11", args.out / "distance.png", real)
    publish([(["damage", "strength", *features], rows)], args.made_by, args.out / "distance.json")


def some_with_twins(labels: list[str], classes: Sequence[str], args: argparse.Namespace) -> list[int]:
    """Numbers of at most --number files, drawn from those with a label of `classes` that another file has, too."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed)).tolist()
    found = [number for number in order if labels.count(labels[number]) > 1 and labels[number] in classes]
    if not found:
        raise ValueError(f"{args.data} holds no known label with two clips or more, which this compares")
    return found[: args.number]


def names(args: argparse.Namespace) -> None:
    """How often a clip is named rightly, after the nearest training clip: damaged training clips, their own files
    apart, and samples of --checkpoint by solver steps and guidance. A good score falls with every damage and rises as
    samples get better. All clips have labels that two training clips or more have."""
    figure_class()  # says what to install, if anything
    weights, device = load_weights(weight_file(args.checkpoint), choose_device()), choose_device()
    known, rows = FolderClips(args.data / "train", weights.frames, weights.size, labels=True), []
    folders = [known.class_name(source) for source in known.sources]
    own = some_with_twins(folders, known.classes, args)
    wanted = [folders[number] for number in own]
    labels = torch.tensor([known.classes.index(name) for name in wanted])
    named = naming(known, partial(placed_features, load_efficientnet().to(device)), device)
    real = torch.stack([known.window(known.sources[number], 0) for number in own])

    def add(name: str, strength, clips: Tensor, own: Tensor | None = None) -> None:
        rows.append([name, strength, *named(clips, labels, own)])
        print(rows[-1], flush=True)

    add("real training clips", "", real, torch.tensor(own))
    for name, (damage, strengths) in damages(torch.Generator().manual_seed(0)).items():
        for strength in strengths:
            add(name, strength, damage(real, strength), torch.tensor(own))
    asked = sample.choose_labels(weights.classes, len(own), wanted)
    for guidance, steps in ((1.0, 9), (2.0, 3), (2.0, 9), (2.0, 15)):
        clips = sampled(weights, asked, args, steps, "ab2", guidance).cpu()
        add(f"samples of {args.checkpoint.name}, guidance {guidance:g}, steps", steps, clips)
    bars = {f"{name} {strength}".strip(): [float(share)] for name, strength, share, _ in rows[1:]}
    title, share = "Clips whose nearest training clip has their label", float(rows[0][2])
    draw_bars(bars, title, "share of clips", args.out / "names.png", share)
    publish([(["clips, damage", "strength", *NAMED], rows)], args.made_by, args.out / "names.json")


@torch.no_grad()
def copies(args: argparse.Namespace) -> None:
    """Whether samples repeat training clips: how far clips are from the nearest window of any training clip, of the
    splits train and settings. Compared are samples; training clips of the same labels, each with its own file apart;
    and held-out clips, which have other labels. The distance is the root mean square difference on frames of 16x16
    pixels, whose range is -1 to 1. The picture shows the samples that are nearest to a training clip, each with it."""
    figure_class()  # says what to install, if anything
    weights = load_weights(weight_file(args.checkpoint), choose_device())
    shape = weights.frames, weights.size
    parts = [FolderClips(args.data / name, *shape, labels=True) for name in ("train", "settings")]
    files = [(part, source, part.class_name(source)) for part in parts for source in part.sources]
    labels = [label for _, _, label in files]
    own = some_with_twins(labels, weights.classes, args)
    real = torch.stack([data.window(source, 0) for data, source, _ in (files[each] for each in own)])
    held_out = real_clips(0, len(own), FolderClips(args.data / "held-out", *shape))
    labels = sample.choose_labels(weights.classes, len(own), [labels[each] for each in own])
    made = sampled(weights, labels, args, args.steps, args.solver, guidance=2.0).cpu()

    def small(clips: Tensor) -> Tensor:
        frames = F.adaptive_avg_pool2d(clips.transpose(1, 2).flatten(0, 1), 16)
        return frames.unflatten(0, (len(clips), -1)).flatten(1)

    queries, apart = small(torch.cat([made, real, held_out])), torch.tensor([-1] * len(own) + own + [-1] * len(own))
    nearest, windows = torch.full((len(queries),), torch.inf), [None] * len(queries)
    for number, (data, source, _) in enumerate(files):
        clips = torch.stack([data.window(source, start) for start in range(source.frames - data.span + 1)])
        distances, starts = torch.cdist(queries, small(clips)).min(1)
        distances = distances.where(apart != number, torch.inf)
        for index in (distances < nearest).nonzero().flatten().tolist():
            nearest[index], windows[index] = distances[index], clips[starts[index]].clone()
    nearest = nearest.view(3, -1) / queries.shape[1] ** 0.5
    rows, compared = [], ("samples", "training clips of these labels", "held-out clips of other labels")
    for name, values in zip(compared, nearest, strict=True):
        rows.append([name, *(f"{values.quantile(share).item():.3f}" for share in (0, 0.1, 0.5, 0.9))])
    order = nearest[0].argsort()[:6].tolist()
    pictures = {"samples": made[order], "nearest training clips": torch.stack([windows[index] for index in order])}
    draw_clips(pictures, "Samples that are nearest to a training clip", args.out / "copies.png")
    header = ["distance from the nearest training clip", "least", "10th percentile", "median", "90th percentile"]
    publish([(header, rows)], args.made_by, args.out / "copies.json")
