"""What the printed paper and its reviewers ask for beyond the paper's claims, measured on moving digits, in short runs
of flow. Each of QUESTIONS is a sub-command of experiments.claims."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import product
from statistics import mean

import torch
from torch import Tensor

import sample
from checkpoint import Weights, make_pyramid
from cli import SAMPLING, generator_for, use_bf16
from data import MovingDigits
from experiments.figures import draw_bars, draw_curves
from experiments.metrics import REAL, digit_metrics, digit_scores, load_judge, other_clips, real_clips, sample_clips
from experiments.report import spread
from experiments.runs import (
    FRONT,
    IN_TURN,
    SEEDS,
    Cell,
    clips_of,
    cost,
    front_row,
    measured,
    stored,
    training_seeds,
    weights_of,
)
from experiments.variants import FAST
from model import DiT
from tpdiff import Pyramid, randn, split_steps, upsample


def draw_cells(
    cells: dict[str, list[Cell]], title: str, metric: tuple[str, str], name: str, args: argparse.Namespace
) -> None:
    """Bars of a metric, given with its label, of cells of one or more training seeds by what they are called."""
    bars = {called: [mean(measured(cell, args)[metric[0]]) for cell in each] for called, each in cells.items()}
    draw_bars(bars, title, metric[1], args.out / f"{name}.png", mean(measured(IN_TURN, args)[metric[0]]))


def rows_of(runs: list[str], args: argparse.Namespace, percent: int = 100) -> list:
    """All scores of runs with nine Euler steps, and of each training seed."""
    cells = [Cell(run + seed, 9, percent=percent) for run in runs for seed in training_seeds(args)]
    return [(FRONT, [front_row(cell, args) for cell in cells])]


def placing(args: argparse.Namespace) -> list:
    """Where the stages end: lengths in the ratio 1-1-1, 1-1-2 and 2-1-1, noisiest stage first, beside vanilla, after
    half of the training. Nine Euler steps, which cost more the longer the last stage is."""
    return rows_of(["flow-3", "flow-3-1-1-2", "flow-3-2-1-1", "flow-1"], args, 50)


def positions(args: argparse.Namespace) -> list:
    """Frames at the position of their index times the stride, as the printed paper is reported to have it, against
    their plain index."""
    return rows_of(["flow-3", "flow-3-plain"], args)


@cache
def real_data(frames: int, fast: bool = False) -> MovingDigits:
    """Real clips of this many frames, usual or fast."""
    data = MovingDigits(frames, seed=REAL.seed)
    data.speeds = FAST if fast else data.speeds
    return data


def longer(args: argparse.Namespace) -> list:
    """Clips of 32 frames by models trained on 16, beside clips of 16: the pyramids and vanilla, nine Euler steps."""
    rows, systems = [], ("flow-1", "flow-3", "flow-3-space-time")
    runs = [run + seed for run in systems for seed in training_seeds(args)]
    for run, frames in product([*runs, "real"], (16, 32)):
        metrics = partial(digit_metrics, reference=args.reference, data=real_data(frames))
        if run == "real":
            make = partial(other_clips, args.reference, data=real_data(frames))
        else:
            weights = replace(weights_of(run, args), frames=frames)
            make = partial(sample_clips, weights, make_pyramid(weights), 9, "euler", args.batch)
        name = f"{run}, {frames} frames" + ", digits in turn" * (run == "real")
        found = stored(name, run, make, metrics, args)
        names = ("judge_distance", "legible", "one_digit", "straight")
        rows.append([run, frames, *(spread(found[name]) for name in names)])
    return [(["run", "frames", "judge's distance", "legible", "one digit", "straight"], rows)]


def fast(args: argparse.Namespace) -> list:
    """Digits three times as fast, in training and in sampling: the time pyramid and vanilla, nine Euler steps."""
    rows = []
    for run, quick, seed in product(("flow-1", "flow-3"), (False, True), training_seeds(args)):
        name = run + "-fast" * quick + seed
        metrics = partial(digit_metrics, reference=args.reference, data=real_data(16, quick))
        found = stored(f"{name}, by speed", name, partial(clips_of, Cell(name, 9), args), metrics, args)
        rows.append([name, *(spread(found[metric]) for metric in ("judge_distance", "legible", "one_digit"))])
    make = partial(other_clips, args.reference, data=real_data(16, True))
    found = stored("real, fast, digits in turn", "real", make, metrics, args)  # as the last runs, which are fast
    rows.append(["real, fast", *(spread(found[metric]) for metric in ("judge_distance", "legible", "one_digit"))])
    return [(["run", "judge's distance", "legible", "one digit"], rows)]


def traits(clips: Tensor) -> dict[str, Tensor]:
    """Of each clip (B, 1, T, 32, 32): the digit; in which of 4x4 parts of where digits can be it is in the middle; and
    in which of eight directions it moves there. Whole numbers (B,)."""
    labels, places = load_judge().read(clips)
    middle = places.shape[1] // 2
    y, x = (places[:, middle] / torch.tensor([12.0, 15.5]) * 4).long().clamp(0, 3).unbind(-1)
    dy, dx = (places[:, middle + 1] - places[:, middle - 1]).unbind(-1)
    directions = ((torch.atan2(dy, dx) / torch.pi + 1) * 4).long() % 8
    return {"digits": labels.mode(dim=1).values, "places": 4 * y + x, "directions": directions}


def overlaps(clips: Tensor, reference: int) -> dict[str, float]:
    """How much of the traits' histograms is that of real clips (1: all), and the share of real clips that have a clip
    nearer than their fifth nearest real one, by the judge's features (coverage, arXiv 2002.09797)."""
    found, real = traits(clips), real_clips(0, reference)
    shares = {}
    for name, wanted in traits(real).items():
        own, theirs = (torch.bincount(each, minlength=16) / len(each) for each in (found[name], wanted))
        shares[name] = torch.minimum(own, theirs).sum().item()
    features = load_judge().features(real[: len(clips)])
    sixth = min(6, len(features))  # the nearest is the clip itself
    radius = torch.cdist(features, features).kthvalue(sixth, dim=1).values
    nearest = torch.cdist(features, load_judge().features(clips)).amin(1)
    shares["coverage"] = (nearest < radius).double().mean().item()
    return shares | {"legible": digit_scores(load_judge(), clips)["legible"]}


def unlabelled(weights: Weights, batch: int, seed: int, number: int) -> Tensor:
    """Clips sampled without a label, nine Euler steps."""
    labels = torch.full((number,), weights.model.null_label)
    return sample_clips(weights, make_pyramid(weights), 9, "euler", batch, seed, number, labels)


def diversity(args: argparse.Namespace) -> list:
    """What aligning noise with clips costs in diversity, by models trained with alignment, with the nearest of eight
    noises and without: the digits of clips that are sampled without a label, and the places and directions of clips
    with labels."""
    rows, metrics = [], partial(overlaps, reference=args.reference)
    runs = [run + seed for run in ("flow-3", "flow-3-nearest", "flow-3-none") for seed in training_seeds(args)]
    for run in [*runs, "real"]:
        free = asked = partial(other_clips, args.reference, in_turn=False)
        if run != "real":
            free = partial(unlabelled, weights_of(run, args), args.batch)
            asked = partial(clips_of, Cell(run, 9), args)
        without = stored(f"{run}, diversity", run, free, metrics, args)
        labelled = stored(f"{run}, diversity, labelled", run, asked, metrics, args)
        of_labelled = (labelled[name] for name in ("places", "directions", "coverage"))
        shares = without["digits"], *of_labelled, without["legible"], labelled["legible"]
        rows.append([run, *map(spread, shares)])
    header = ["run", "digits", "places", "directions", "coverage", "legible without labels", "legible with labels"]
    return [(header, rows)]


@torch.inference_mode()
def coarse_to_fine(weights: Weights, shift: float, steps: int, batch: int, seed: int, number: int) -> Tensor:
    """Clips (B, C, T, H, W) by vanilla's weights on a time pyramid that they were not trained on, as deployed code
    samples images: at the end of a stage the clean clip is predicted, its frames are repeated, and fresh noise is added
    at a time that `shift` raises. Frames have the positions at which they are shown."""
    pyramid, device = Pyramid("flow", 3), next(weights.model.parameters()).device
    model = DiT(replace(weights.model.config, stages=3)).to(device).eval()
    model.start_from(weights.model)
    counts, clips = split_steps(steps, 3), []
    for indices in torch.arange(number).split(batch):
        labels = sample.choose_labels(weights.classes, number)[indices].to(device)
        predict = sample.make_predict(model, labels, 1.0, use_bf16("auto", device))
        generators = [generator_for(seed, SAMPLING, index) for index in indices.tolist()]
        shape = (len(indices), model.config.channels, weights.frames, weights.size, weights.size)
        x, t = randn(pyramid.shape(shape, 2), generators, device), 1.0
        for k, count in zip((2, 1, 0), counts, strict=True):
            times = torch.linspace(t, pyramid.ends[k], count + 1, dtype=torch.float64).tolist()
            for now, then in zip(times, times[1:], strict=False):
                velocity = predict(x, torch.full((len(x),), now, device=device), k)
                x = x + (then - now) * velocity
            if k:
                clean = upsample(x - times[-1] * velocity, pyramid.factor, pyramid.shape(shape, k - 1)[2])
                t = shift * times[-1] / (1 + (shift - 1) * times[-1])
                x = (1 - t) * clean + t * randn(clean.shape, generators, device)
        clips.append(x.cpu())
    return torch.cat(clips)


def rival(args: argparse.Namespace) -> list:
    """The training-free rival: vanilla's own weights sampled from coarse to fine, beside vanilla and the time pyramid
    that was trained, over the cost of sampling."""
    rows, curves, metrics = [], {}, partial(digit_metrics, reference=args.reference)
    for seed, steps in product(training_seeds(args), (6, 9, 15, 30)):
        makes = {}
        for name, run in (("vanilla", "flow-1"), ("trained on the pyramid", "flow-3")):
            makes[name, run] = partial(clips_of, Cell(run + seed, steps), args)
        for shift in (1, 3, 6):
            name = f"vanilla's weights, coarse to fine, shift {shift}"
            makes[name, "flow-1"] = partial(coarse_to_fine, weights_of("flow-1" + seed, args), shift, steps, args.batch)
        for (name, run), make in makes.items():
            found = stored(f"{run + seed}, {name}, {steps} steps", run + seed, make, metrics, args)
            _, calls = cost(Cell("flow-1" if name == "vanilla" else "flow-3", steps), args)  # all others are pyramids
            scores = spread(found["judge_distance"]), spread(found["one_digit"])
            rows.append([name, SEEDS[seed], steps, f"{calls:.4g}", *scores])
            if not seed:
                curves.setdefault(name, []).append((calls, found["judge_distance"]))
    found = stored("draws, digits in turn", "real", partial(other_clips, args.reference), metrics, args)
    rows.append(["real", "", "", "", spread(found["judge_distance"]), spread(found["one_digit"])])
    labels = "Coarse to fine, training seed 1", "full-rate network calls", "judge's distance"
    draw_curves(curves, *labels, args.out / "rival.png", real=mean(found["judge_distance"]))
    return [(["sampled", "training seed", "steps", "full-rate calls", "judge's distance", "one digit"], rows)]


def draws(args: argparse.Namespace) -> list:
    """How much distance and path differ by the draw of clips alone: those of other real clips, of --number, half and a
    quarter of them, drawn anew for each of --seeds. With random digits; and with all digits in turn, as samples and the
    rows `real` of most tables have them. The same of samples of shipped weights, and of the difference between vanilla
    and the pyramid in time with the same seeds."""
    tables, curves, metrics = [], {}, partial(digit_metrics, reference=args.reference)

    def row(first: int | str, distances: list[float], path: str) -> list:
        shown = mean(distances), min(distances), max(distances)
        return [first, len(distances), *(f"{value:.3g}" for value in shown), path]

    names = ["draws", "judge's distance, mean", "lowest", "highest", "off track, px"]
    for name, in_turn in {"random digits": False, "digits in turn": True}.items():
        rows, curve = [], curves.setdefault(f"real clips, {name}", [])
        for number in (args.number, max(2, args.number // 2), max(2, args.number // 4)):
            options = argparse.Namespace(**vars(args) | {"number": number})
            make = partial(other_clips, args.reference, in_turn=in_turn)
            found = stored("draws" + f", {name}" * in_turn, "real", make, metrics, options)
            curve.append((number, found["judge_distance"]))
            rows.append(row(number, found["judge_distance"], spread(found["off_track"])))
        tables.append(([f"clips, {name}", *names], rows))
    rows, differences = [], []
    for steps in (9, 3):
        ours, vanilla = (measured(Cell(f"shipped-flow-{n}", steps), args) for n in (3, 1))
        for name, found in (("pyramid", ours), ("vanilla", vanilla)):
            rows.append(row(f"{name}, {steps} steps", found["judge_distance"], spread(found["off_track"])))
        less = [one - other for one, other in zip(vanilla["judge_distance"], ours["judge_distance"], strict=True)]
        differences.append(row(f"vanilla minus pyramid, {steps} steps", less, ""))
    tables.append((["sampled clips", *names], rows + differences))
    labels = "Draws of real clips", "clips", "judge's distance"
    draw_curves(curves, *labels, args.out / "draws.png", from_zero=True)
    return tables


QUESTIONS: tuple[Callable, ...] = (placing, positions, longer, fast, diversity, rival, draws)
