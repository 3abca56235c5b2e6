"""Four systems on real clips in equal training time: vanilla diffusion, and pyramids in time, in space and in both.

  python -m experiments.emoji                                         the clips
  python -m experiments.real train --seconds 7200                     the runs, each with as much time
  python -m experiments.real scores                                   their held-out losses and distances
  python -m experiments.real distance                                 what the distance says of damaged real clips
  python -m experiments.real names                                    the same for how often clips are named rightly
  python -m experiments.real copies                                   whether samples repeat training clips

All systems have the same model, optimizer and data. A batch is larger at a smaller stage, up to eight times. The
pyramids in space train their smallest and cheapest stage twice as often as the others. Runs and their kept weights
stay, and a stopped run is continued. The distance uses an image network's features.
"""

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor

import sample
import train
from checkpoint import SHIPPED, Weights, load_weights, make_pyramid, weight_file
from cli import (
    Parser,
    choose_device,
    keep_memory,
    non_negative_int,
    one_sentence,
    positive_int,
    real_number,
    whole_number,
)
from data import FolderClips
from experiments.claims import time_to
from experiments.figures import draw_bars, draw_clips, draw_curves, pyplot
from experiments.metrics import (
    NAMED,
    add_command,
    distances_to,
    load_efficientnet,
    naming,
    picture_features,
    placed_features,
    real_clips,
)
from experiments.report import provenance, publish, spread
from experiments.runs import run_train, seconds_a_step
from tpdiff import split_steps

SYSTEMS = {
    "vanilla": "--stages 1",
    "time": "",
    "space": "--pyramid space --stage-odds 2 1 1",
    "space-time": "--pyramid space-time --stage-odds 2 1 1",
}
BATCHES = {"vanilla": (1,), "time": (4, 2, 1), "space": (8, 4, 1), "space-time": (8, 4, 1)}  # in batches of stage 0
COMMON = "--labels folder --size 64 --width 192 --depth 6 --heads 6 --convolution --warmup 200 --ema 0.999"
COMMON += " --sample-number 0"
SHARES = (25, 50, 75, 100)  # percent of a run after which its weights are kept
STEPS = (3, 6, 9, 15, 30)
NO_MEMORY = "not enough memory: a smaller --batch needs less"


def train_words(system: str, seed: int, args: argparse.Namespace) -> list[str]:
    """Options of train.py, all but those that depend on the time."""
    words = [*COMMON.split(), *SYSTEMS[system].split(), "--batch", *(str(args.clips * n) for n in BATCHES[system])]
    words += ["--seed", str(seed), "--data", str(args.data / "train")]
    return words + shlex.split(args.options)


def train_systems(args: argparse.Namespace) -> None:
    """Train every system of --systems with every seed of --training-seeds for --seconds. All seeds of a system have as
    many steps as its first. What a run took is said where it is 5% off."""
    for seed, system in itertools.product(args.training_seeds, args.systems):
        folder = args.runs / f"{system}-seed-{seed}"
        note, words = folder / "options.txt", train_words(system, seed, args)
        begun = {path: shlex.split(path.read_text()) for path in sorted(args.runs.glob(f"{system}-seed-*/options.txt"))}
        for path, old in begun.items():
            number = path.parent.name.rpartition("-")[2]
            parse = train.make_parser().parse_args
            if parse(old) != parse([*train_words(system, int(number), args), *old[-4:]]):  # --steps, --keep-interval
                raise ValueError(f"{path.parent} was begun with other options: move it away")
        if note in begun:
            words = begun[note]
        else:
            others = list(begun.values())
            steps = train.make_parser().parse_args(others[0]).steps if others else 0
            pace = args.seconds / steps if steps else seconds_a_step(train_words(system, 0, args), args.trial)
            steps = steps or max(len(SHARES), int(args.seconds / pace))
            steps -= steps % len(SHARES)
            words += ["--steps", str(steps), "--keep-interval", str(steps // len(SHARES))]
            folder.mkdir(parents=True, exist_ok=True)
            note.write_text(shlex.join(words) + "\n")
        if not (folder / f"weights-{train.make_parser().parse_args(words).steps}.pt").exists():
            run_train(words, folder)
        took = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
        if abs(took / args.seconds - 1) > 0.05:
            print(f"{folder.name} trained for {took:.0f} s, not {args.seconds:.0f}", file=sys.stderr)


def sampled(weights: Weights, labels: Tensor, args, steps: int, solver: str = "euler", guidance: float = 1.0) -> Tensor:
    """A clip (C, T, H, W) for each of the labels; its noise depends on its number alone."""
    clips, pyramid = [], make_pyramid(weights)
    for numbers in torch.arange(len(labels)).split(args.batch):
        part, first = labels[numbers], numbers[0].item()
        options = steps, solver, guidance, args.seed
        clips.append(sample.generate(weights, pyramid, part, len(part), *options, first=first))
    return torch.cat(clips)


def finished_runs(folder: Path) -> dict[Path, argparse.Namespace]:
    """The folders of runs that are done, and their options. Raises ValueError if there are none or clips differ."""
    runs = {}
    for note in sorted(folder.glob("*-seed-*/options.txt")):
        options = train.make_parser().parse_args(shlex.split(note.read_text()))
        kept = [note.parent / f"weights-{options.steps * share // 100}.pt" for share in SHARES]
        if all(path.exists() for path in kept):
            runs[note.parent] = options
        else:
            print(f"{note.parent} is passed over: it is not done", file=sys.stderr)
    if not runs:
        raise ValueError(f"{folder} holds no finished runs: python -m experiments.real train makes them")
    if len({(options.frames, options.size) for options in runs.values()}) > 1:
        raise ValueError(f"the runs in {folder} make clips of different frames or sizes")
    return runs


def scores(args: argparse.Namespace) -> None:
    """Distance of every run to held-out clips over its training time, how many clips are named rightly, and its
    held-out loss; and the distance over the cost of sampling. Clips are sampled with the labels of training clips. The
    loss is without labels, on at least 64 clips. Stages of different systems have different targets, so compare it
    within a system only."""
    pyplot()  # says what to install, if anything
    args.out.mkdir(parents=True, exist_ok=True)
    runs, device = finished_runs(args.runs), choose_device()
    shape = next((options.frames, options.size) for options in runs.values())
    held_out = FolderClips(args.data / "held-out", *shape)
    seen = FolderClips(args.data / "train", *shape, labels=True)
    labels = torch.tensor([seen[number][1] for number in range(args.number)])
    real = real_clips(0, min(args.reference, 4 * len(held_out.sources)), held_out).to(device)
    network = load_efficientnet().to(device)
    distance = distances_to(real, {"distance": partial(picture_features, network)})
    named = naming(seen, partial(placed_features, network), device)
    rows, front, curves, costs, pictures, ends = [], [], {}, {}, {}, {}
    for folder, options in runs.items():
        system, seed = folder.name.split("-seed-")
        seconds = {row["step"]: row["seconds"] for row in map(json.loads, (folder / "metrics.jsonl").open())}
        curve = curves[f"{system}, seed {seed}"] = []
        ends.setdefault(system, []).append(curve)
        for share in SHARES:
            step = options.steps * share // 100
            weights = load_weights(folder / f"weights-{step}.pt", device)
            clips, pyramid = sampled(weights, labels, args, args.steps), make_pyramid(weights)
            curve.append((seconds[step], [found := distance(clips)["distance"]]))
            losses = train.held_out_loss(weights.model, pyramid, held_out, options) or []
            losses = ", ".join(f"{loss:.4f}" for loss in losses)
            head = [folder.name, step, f"{seconds[step]:.0f}"]
            rows.append([*head, f"{found:.0f}", *named(clips, labels), losses])
            print(rows[-1], flush=True)
        if system not in pictures:
            pictures[system] = sampled(weights, labels[:8], args, 30).cpu()
            for solver, steps in itertools.product(("euler", "ab2"), STEPS):
                one = distance(sampled(weights, labels, args, steps, solver))["distance"]
                counts = split_steps(steps, weights.stages, pyramid.lengths)
                calls = sample.full_rate_steps(counts, pyramid, (1, *real.shape[1:]))
                front.append([system, "-".join(map(str, counts)), solver, f"{calls:.3g}", f"{one:.0f}"])
                costs.setdefault(f"{system}, {solver}", []).append((calls, [one]))
    train_clips = torch.stack([seen[number][0] for number in range(args.number)]).to(device)
    floor = distance(train_clips)["distance"]
    rows.append(["real training clips", "", "", f"{floor:.0f}", "", "", ""])
    tables = [(["run", "steps", "seconds", "distance", *NAMED, "held-out loss by stage, 0 first"], rows)]
    tables += [(["system", "steps", "solver", "full-rate calls", "distance"], front), gains(ends)]
    publish(tables, args.made_by, args.out / "real.json")
    title, y_label = "Real clips: quality against {}", "distance to held-out clips"
    draw_curves(
        curves, title.format("training"), "seconds of training", y_label, args.out / "real-training.png", real=floor
    )
    draw_curves(
        costs, title.format("cost"), "full-rate network calls", y_label, args.out / "real-sampling.png", real=floor
    )
    pictures["real"] = train_clips[:8].cpu()
    draw_clips(pictures, "Real clips: samples of each system, the same noises", args.out / "real-clips.png")


def gains(ends: dict[str, list]) -> tuple[list, list]:
    """Each pyramid beside vanilla, the means over the seeds: the distance after all the time, and how much of it the
    pyramid needs to reach vanilla's. Nothing without vanilla."""
    header = ["system", "distance at the end", "of vanilla's", "share of vanilla's time to reach its last distance"]
    if "vanilla" not in ends:
        return header, []
    curves = {}
    for system, runs in ends.items():
        times = [mean(run[index][0] for run in runs) for index in range(len(SHARES))]
        curves[system] = [(time, [run[index][1][0] for run in runs]) for index, time in enumerate(times)]
    (time, values), rows = curves["vanilla"][-1], []
    for system, curve in curves.items():
        reached = time_to(mean(values), curve)
        at_most = "at most " if reached == curve[0][0] else ""
        share = "not reached" if reached is None else f"{at_most}{reached / time:.2f}"
        rows.append([system, spread(curve[-1][1], ".0f"), f"{mean(curve[-1][1]) / mean(values):.2f}", share])
    return header, rows


def damages(generator: torch.Generator) -> dict[str, tuple[Callable, tuple]]:
    """Ways to damage clips (B, C, T, H, W), and how strongly."""

    def blurred(clips: Tensor, size: int) -> Tensor:
        frames = clips.transpose(1, 2).flatten(0, 1)
        small = F.interpolate(frames, scale_factor=1 / size, mode="area")
        return F.interpolate(small, frames.shape[-2:], mode="bilinear").unflatten(0, (len(clips), -1)).transpose(1, 2)

    def scattered(clips: Tensor, share: float) -> Tensor:  # patches of 4x4 swap with others up to two away
        clips, patches = clips.clone(), clips.shape[-1] // 4
        for clip in clips:
            for y in range(patches):
                for x in range(patches):
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


def validate(args: argparse.Namespace) -> None:
    """How far damaged real clips are from others, of other files, by several distances; and samples of --checkpoint. A
    good distance grows with every damage and falls as a model gets better."""
    pyplot()  # says what to install, if anything
    args.out.mkdir(parents=True, exist_ok=True)
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


def names(args: argparse.Namespace) -> None:
    """How often a clip is named rightly, after the nearest training clip: damaged training clips, their own files
    apart, and samples of --checkpoint by solver steps and guidance. A good score falls with every damage and rises as
    samples get better. All clips have labels that two training clips or more have."""
    pyplot()  # says what to install, if anything
    args.out.mkdir(parents=True, exist_ok=True)
    weights, device = load_weights(weight_file(args.checkpoint), choose_device()), choose_device()
    known, rows = FolderClips(args.data / "train", weights.frames, weights.size, labels=True), []
    folders = [known.class_name(source) for source in known.sources]
    order = torch.randperm(len(folders), generator=torch.Generator().manual_seed(args.seed)).tolist()
    own = [number for number in order if folders.count(folders[number]) > 1][: args.number]
    if not own:
        raise ValueError(f"{args.data / 'train'} holds no label with two clips or more, which this compares")
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
    """Whether samples repeat training clips: how far samples and held-out clips are from the nearest window of any
    training clip, of the splits train and settings. The root mean square difference on frames of 16x16 pixels, whose
    range is -1 to 1. The picture shows the samples that are nearest to a training clip, each with it."""
    pyplot()  # says what to install, if anything
    args.out.mkdir(parents=True, exist_ok=True)
    weights = load_weights(weight_file(args.checkpoint), choose_device())
    shape = weights.frames, weights.size
    parts = [FolderClips(args.data / name, *shape, labels=True) for name in ("train", "settings")]
    names = [part.classes[part[number][1]] for number in range(args.number) for part in parts]
    known = [name for name in names if name in weights.classes]
    labels = sample.choose_labels(weights.classes, args.number, known[: args.number])
    held_out = real_clips(0, args.number, FolderClips(args.data / "held-out", *shape))
    made = sampled(weights, labels, args, args.steps, args.solver, guidance=2.0).cpu()

    def small(clips: Tensor) -> Tensor:
        frames = F.adaptive_avg_pool2d(clips.transpose(1, 2).flatten(0, 1), 16)
        return frames.unflatten(0, (len(clips), -1)).flatten(1)

    queries = small(torch.cat([made, held_out]))
    nearest, windows = torch.full((len(queries),), torch.inf), [None] * len(queries)
    for data, source in ((part, source) for part in parts for source in part.sources):
        clips = torch.stack([data.window(source, start) for start in range(source.frames - data.span + 1)])
        distances, starts = torch.cdist(queries, small(clips)).min(1)
        for index in (distances < nearest).nonzero().flatten().tolist():
            nearest[index], windows[index] = distances[index], clips[starts[index]].clone()
    nearest = nearest.view(2, -1) / queries.shape[1] ** 0.5
    rows = []
    for name, values in zip(("samples", "held-out clips"), nearest, strict=True):
        rows.append([name, *(f"{values.quantile(share).item():.3f}" for share in (0, 0.1, 0.5, 0.9))])
    order = nearest[0].argsort()[:6].tolist()
    pictures = {"samples": made[order], "nearest training clips": torch.stack([windows[index] for index in order])}
    draw_clips(pictures, "Samples that are nearest to a training clip", args.out / "copies.png")
    header = ["distance from the nearest training clip", "least", "10th percentile", "median", "90th percentile"]
    publish([(header, rows)], args.made_by, args.out / "copies.json")


def make_parser() -> Parser:
    parser = Parser(prog="experiments.real", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    functions = {"train": train_systems, "scores": scores, "distance": validate, "names": names, "copies": copies}
    train_, scores_, distance_, names_, copies_ = (add_command(commands, *each) for each in functions.items())
    train_("--seconds", type=real_number(1, 10**7), default=7200.0, help="training time of a run")
    trial = "a third of the steps of a trial run, which tells how many steps fit into --seconds"
    train_("--trial", type=positive_int, default=50, help=trial)
    train_("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), help="which of the four")
    train_("--training-seeds", type=positive_int, nargs="+", default=[1, 2], help="seeds of the runs")
    train_("--clips", type=positive_int, default=16, help="clips of a step at stage 0, where they have all frames")
    train_("--options", default="", help="further options of train.py for all runs: --options='--workers 4' [none]")
    scores_("--number", type=whole_number(2), default=192, help="clips that are sampled for each distance")
    distance_("--number", type=whole_number(2), default=192, help="clips to damage, to compare with, and to sample")
    names_("--number", type=whole_number(2), default=192, help="clips to damage, and samples of each kind")
    copies_("--number", type=whole_number(2), default=192, help="samples, and held-out clips beside them")
    for add in (scores_, distance_, names_, copies_):
        add("--out", type=Path, default=Path("experiments/results"), help="folder of the tables and pictures")
        add("--batch", type=positive_int, default=8, help="clips sampled at once; a GPU wants more")
        add("--seed", type=non_negative_int, default=0, help="of the noise that clips are sampled from")
    scores_("--reference", type=whole_number(2), default=400, help="held-out clips, at most four windows a clip")
    distance_("--checkpoint", type=Path, nargs="*", default=[], help="weights whose samples are compared too")
    for add in (scores_, distance_, copies_):
        add("--steps", type=positive_int, default=30, help="solver steps, where they are not compared")
    for add in (names_, copies_):
        add("--checkpoint", type=Path, default=SHIPPED / "emoji.pt", help="whose samples these are [weights/emoji.pt]")
    for add in (distance_, copies_):
        add("--solver", choices=["euler", "ab2"], default="euler", help="as in sample.py")
    for add in (train_, scores_, distance_, names_, copies_):
        add("--data", type=Path, default=Path("data/emoji64"), help="folder that experiments.emoji made")
    for add in (train_, scores_):
        add("--runs", type=Path, default=Path("runs/real"), help="folder of the runs")
    return parser


def main(argv: list[str] | None = None) -> None:
    keep_memory()
    parser, words = make_parser(), sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    args.made_by = provenance("experiments.real", words)
    with one_sentence(parser, NO_MEMORY):
        args.function(args)


if __name__ == "__main__":
    main()
