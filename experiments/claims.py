"""The paper's claims, and what its reviewers ask, measured.

Each sub-command trains the runs it needs (runs.py), samples them and writes COMMAND.json and pictures into results/;
`work` takes what others have written.
`python -m experiments.report` then makes README.md of them.

Runs and clips are not made twice: a stopped run of train.py is continued, and the scores in results/cells.json stay as
long as the weights they are of. Times are measured anew, so leave the machine alone. --smoke: all at a tiny size.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch

import sample
import train
from checkpoint import FACTORS, Weights, make_pyramid
from cli import Parser, choose_device, generator_for, positive_int, use_bf16
from experiments.asked import QUESTIONS, draw_cells
from experiments.figures import draw_clips, draw_curves, figure_class
from experiments.metrics import add_scoring, real_clips
from experiments.report import publish, run_command, spread
from experiments.runs import (
    CLIP,
    FRONT,
    IN_TURN,
    RANDOM,
    RENOISING,
    SCORES,
    Cell,
    clips_of,
    cost,
    front_row,
    measured,
    scores_row,
    seconds_a_step,
    train_options,
    train_words,
    training_seeds,
)
from experiments.straight import straight
from experiments.timing import alternate, in_milliseconds, quartiles
from model import DiT, DiTConfig
from tpdiff import Pyramid, align, split_steps

SMOKE = {"number": 8, "reference": 50, "seeds": [0, 1], "batch": 8, "repeats": 1}
SMOKE |= {"runs": Path("runs/smoke"), "out": Path("runs/smoke/results")}
SYSTEMS = {"1": "vanilla", "3": "time", "3-space": "space", "3-space-time": "space and time"}  # by the name of a run


def latency(args: argparse.Namespace) -> list:
    """Table 1: how long thirty Euler steps of an untrained network take, for one clip and for several at once: vanilla,
    the pyramid in time, and in space and time."""
    rows, curves, device = [], {}, choose_device()
    kinds = {"vanilla": (1, "time"), "time": (3, "time"), "space and time": (3, "space-time")}
    for mode, batch in itertools.product(("flow", "ddim"), (1, 8) if args.smoke else (1, 2, 4, 8)):
        functions, calls = {}, {}
        for name, (stages, pyramid) in kinds.items():
            width, depth = (16, 1) if args.smoke else (96, 4)
            config = DiTConfig(width=width, depth=depth, stages=stages, factor=FACTORS[pyramid])
            model = DiT(config).to(device).eval()
            if use_bf16("auto", device):
                sample.with_products_in_bf16(model)
            weights = Weights(model, mode, stages, 16, 32, (), 0, pyramid=pyramid)
            p = make_pyramid(weights)
            calls[name] = sample.full_rate_steps(split_steps(30, stages), p, CLIP)
            functions[name] = partial(sample.generate, weights, p, None, batch)
        seconds = alternate(functions, args.repeats)
        full = statistics.median(seconds["vanilla"])
        for name, values in seconds.items():
            gains = [f"{ratio:.2f}" for ratio in (full / statistics.median(values), 30 / calls[name])]
            papers = {"flow": 1.71, "ddim": 1.49}[mode] if name == "time" else ""
            rows.append([mode, batch, name, in_milliseconds(values), *gains, papers])
            milliseconds = [value * 1e3 / batch for value in quartiles(values)]
            curves.setdefault(f"{name}, {mode}", []).append((batch, milliseconds))
    labels = "Sampling time of vanilla and two pyramids", "clips at once", "milliseconds a clip"
    draw_curves(curves, *labels, args.out / "latency.png", statistics.median)
    names = ["mode", "clips at once", "pyramid", "ms [quartiles]", "times as fast", "by network calls", "the paper's"]
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


def times_less(vanilla: list[float], goal: float, curve: list) -> str:
    """How many times less than each of `vanilla` a curve takes to come down to `goal`. It is more than that if the
    first point is there already."""
    if (reached := time_to(goal, curve)) is None:
        return "not reached"
    return "at least " * (reached == curve[0][0]) + spread([each / reached for each in vanilla], ".2f")


def training(args: argparse.Namespace) -> list:
    """Fig. 5: the judge's distance against training time, nine Euler steps: vanilla, and the pyramid in time, in space,
    and in both. And all scores at the end, with thirty steps and with nine."""
    systems = list(itertools.product(("flow", "ddim"), SYSTEMS))
    return against_time("training", "", systems, {30: "euler", 9: "euler"}, args)


def twice(args: argparse.Namespace, mode: str = "flow") -> list:
    """Fig. 5 with twice as many steps of training, flow: vanilla, and the pyramid in time, in space, and in both. And
    all scores at the end, with thirty Euler steps, nine, and six of `ab2`; of the last also with 5-3-1 of `ab2`."""
    ways = {30: "euler", 9: "euler", 6: "ab2"}
    *tables, ends = against_time("twice", "-twice", [(mode, name) for name in SYSTEMS], ways, args)
    cells = [Cell(f"{mode}-3-space-time-twice{seed}", (5, 3, 1), "ab2") for seed in training_seeds(args)]
    return [*tables, (FRONT, ends[1] + [front_row(cell, args) for cell in cells])]


def twice_ddim(args: argparse.Namespace) -> list:
    """As `twice`, with ddim."""
    return twice(args, "ddim")


def against_time(
    claim: str, length: str, systems: list[tuple[str, str]], ways: dict[int, str], args: argparse.Namespace
) -> list:
    """The tables and figures of a claim about training: runs of some modes and systems, vanilla first in each mode,
    and of one length; at their ends sampled in several `ways`, solvers by their steps."""
    percents, curve_rows, gains, ends, pictures = (25, 50, 75, 100), [], [], [], {}
    real, trial = statistics.mean(measured(IN_TURN, args)["judge_distance"]), 10 if args.smoke else 40
    for mode, group in itertools.groupby(systems, key=itemgetter(0)):
        names, curves, goals = [f"{mode}-{system}" for _, system in group], {}, []
        turns = [{name: seconds_a_step(train_words(name, args), trial) for name in names} for _ in range(args.repeats)]
        for (seed, shown), name in itertools.product(training_seeds(args).items(), names):
            run, title = f"{name}{length}{seed}", SYSTEMS[name.removeprefix(f"{mode}-")]
            steps, cells = train_options(run, args).steps, [Cell(run, 9, percent=each) for each in percents]
            seconds = [turn[name] * steps for turn in turns]
            distances = [measured(cell, args)["judge_distance"] for cell in cells]
            points = [(percent / 100, each) for percent, each in zip(percents, distances, strict=True)]
            whole = statistics.median(seconds)
            curves[f"{title}, {shown}"] = [(share * whole, each) for share, each in points]
            if name == names[0]:
                vanilla, goal = seconds, statistics.mean(distances[-1])
                goals.append(goal)
            ratios = [one / other for one, other in zip(vanilla, seconds, strict=True)]
            gains.append([run, times_less(ratios, goal, points)])
            curve_rows.append([run, f"{whole / steps * 1e3:.0f}", f"{whole:.0f}", *map(spread, distances)])
            ends += [front_row(Cell(run, calls, solver), args) for calls, solver in ways.items()]
            if not seed:
                pictures[f"{title}, {mode}"] = clips_of(cells[-1], args, args.seeds[0], 8)[:4]
        title = "Vanilla and pyramids" if not length else "Twice as many steps of training"
        labels = f"{title}, {mode}", "seconds of training", "judge's distance"
        draw_curves(curves, *labels, args.out / f"{claim}-{mode}.png", real=real, goals=goals)
    pictures["real"] = clips_of(RANDOM, args, args.seeds[0], 8)[:4]
    name = claim if not length else f"{claim}-{mode}"  # short runs of both modes are in one picture
    draw_clips(pictures, f"{title}: sampled and real clips", args.out / f"{name}-clips.png")
    header = ["run", "ms a step", "seconds", *(f"distance at {n}%" for n in percents)]
    return [(["run", "times as fast to vanilla's last distance"], gains), (header, curve_rows), (FRONT, ends)]


def work(args: argparse.Namespace) -> list:
    """Fig. 5 by the network's work in place of seconds, which depend on the machine. The distances are those in the
    files that `training`, `twice` and `twice-ddim` have made."""
    rows, curves, real = [], {}, statistics.mean(measured(IN_TURN, args)["judge_distance"])
    for claim in ("training", "twice", "twice-ddim"):
        if not (path := args.out / f"{claim}.json").exists():
            raise ValueError(f"{path} is missing: python -m experiments.claims {claim} makes it")
        for run, _, _, *found in json.loads(path.read_text())["tables"][1][1]:
            system, whole = run.split("-seed")[0].removesuffix("-twice"), train_options(run, args).steps
            whole, distances = whole * work_of_a_step(run, args), [float(each.split()[0]) for each in found]
            if system.endswith("-1"):
                vanilla, goal = whole, distances[-1]
            points = [(n / 4 * whole / vanilla, [each]) for n, each in enumerate(distances, start=1)]
            rows.append([run, f"{whole / vanilla:.2f}", times_less([1.0], goal, points)])
            if claim != "training":
                mode, name = system.split("-", 1)
                curve = curves.setdefault(f"{SYSTEMS[name]}, {mode}", [(x, []) for x, _ in points])
                for (_, values), each in zip(curve, distances, strict=True):
                    values.append(each)
    labels = "Twice as many steps, by the network's work", "training work, as a share of vanilla's", "judge's distance"
    draw_curves(curves, *labels, args.out / "work.png", real=real)
    return [(["run", "work of the run, of vanilla's", "times less work to vanilla's last distance"], rows)]


def work_of_a_step(run: str, args: argparse.Namespace) -> float:
    """Clips of an average training step; each counts by its share of the full clip's pixels."""
    options = train_options(run, args)
    clips = train.batch_sizes(options)[::-1]  # noisiest stage first; all are trained equally often
    return sample.full_rate_steps(clips, make_pyramid(options), CLIP) / options.stages


def alignment(args: argparse.Namespace) -> list:
    """Table 3: training with alignment, with the nearest of eight noises, and without, nine Euler steps. And how much
    of the target's variance alignment removes."""
    names = {"by assignment": "flow-3", "nearest of eight noises": "flow-3-nearest", "at random": "flow-3-none"}
    cells = {name: [Cell(run + seed, 9) for seed in training_seeds(args)] for name, run in names.items()}
    rows = [[cell.run, *scores_row(cell, args)] for of_seed in zip(*cells.values(), strict=True) for cell in of_seed]
    rows.append(["real", *scores_row(IN_TURN, args)])
    metric = "judge_distance", "judge's distance, both training seeds"
    draw_cells(cells, "How noises are paired with clips", metric, "alignment-clips", args)
    figure, batches = {}, (4, 16) if args.smoke else (4, 16, 64, 256)
    for mode, k in itertools.product(("flow", "ddim"), range(3)):
        removed = [[100 * variance_removed(mode, k, batch, seed) for seed in (0, 1, 2)] for batch in batches]
        figure[f"{mode}, stage {k}"] = list(zip(batches, removed, strict=True))
    labels = "What alignment removes", "clips in a batch", "% of the target's variance"
    draw_curves(figure, *labels, args.out / "alignment.png")
    shares = [[name, *(spread(values) for _, values in points)] for name, points in figure.items()]
    header = ["% of variance removed by", *(f"batch of {batch}" for batch in batches)]
    return [(["run", *SCORES], rows), (header, shares)]


def variance_removed(mode: str, k: int, batch: int, seed: int, clips: int = 1024) -> float:
    """Share that alignment in a batch removes of the variance, per pixel over clips and noises, of what the network
    is trained to say, halfway through a stage. Clips and noises are drawn by the seed."""
    pyramid, aligned, plain = Pyramid(mode, 3, prediction={"ddim": "velocity"}.get(mode)), [], []
    for x0 in real_clips(seed * clips, clips).split(batch):
        x0_stage, u = pyramid.down(x0, k), torch.full((len(x0),), 0.5)
        noise = torch.randn(x0_stage.shape, generator=generator_for(seed, k, len(plain)))
        for targets, paired in ((aligned, align(x0_stage, noise)), (plain, noise)):
            targets.append(pyramid.interpolate(*pyramid.endpoints(x0, paired, k), k, u)[1])
    left, whole = (torch.cat(targets).var(0).mean().item() for targets in (aligned, plain))
    return 1 - left / whole


def renoising(args: argparse.Namespace) -> list:
    """Fig. 6: the same weights and first noise, nine Euler steps, four ways from one stage to the next. Of short runs,
    and of the shipped weights, which had four times as many steps."""
    runs = ("flow-3", "ddim-3", "shipped-flow-3", "shipped-ddim-3")
    cells = {f"{run}, {way}": Cell(run, 9, renoising=way) for run in runs for way in RENOISING}
    rows = [[name, *scores_row(cell, args)] for name, cell in (cells | {"real": IN_TURN}).items()]
    bars, metric = {}, ("one_digit", "share of clips that show one digit")
    for cell in cells.values():
        length = "long" if cell.run.startswith("shipped") else "short"
        bars[f"{cell.run.removeprefix('shipped-')[:4]}, {length} training, {cell.renoising}"] = [cell]
    draw_cells(bars, "Four ways of renoising", metric, "renoising-digits", args)
    pictures = {name: clips_of(cell, args, args.seeds[0], 8)[:3] for name, (cell,) in bars.items()}
    pictures["real"] = clips_of(RANDOM, args, args.seeds[0], 8)[:3]
    draw_clips(pictures, "Four ways of renoising, and real clips", args.out / "renoising.png")
    return [(["run, renoising", *SCORES], rows)]


def early(args: argparse.Namespace) -> list:
    """Fig. 8: clips at 10, 25 and 50% of training, the time pyramid beside vanilla; at 25 and 50% how many frames are
    legible, and how much clips flicker. Nine Euler steps."""
    modes, systems, pictures, rows = ("flow", "ddim"), ("3", "1"), {}, []
    runs = [f"{mode}-{n}{seed}" for mode in modes for seed in training_seeds(args) for n in systems]
    for percent, mode, n in itertools.product((10, 25, 50), modes, systems):
        clips = clips_of(Cell(f"{mode}-{n}", 9, percent=percent), args, args.seeds[0], 8)
        pictures[f"{SYSTEMS[n]}, {mode}, {percent}%"] = clips[5:8]
    pictures["real"] = clips_of(RANDOM, args, args.seeds[0], 8)[5:8]
    draw_clips(pictures, "After 10, 25 and 50% of training, and real clips", args.out / "early.png")
    real = statistics.mean(measured(RANDOM, args)["flicker"])
    for run in runs:
        found = [measured(Cell(run, 9, percent=percent), args) for percent in (25, 50)]
        flickers = [spread([value / real for value in each["flicker"]]) for each in found]
        rows.append([run, *(spread(each["legible"]) for each in found), *flickers])
    halfway = {
        f"{SYSTEMS[n]}, {mode}": [Cell(f"{mode}-{n}{seed}", 9, percent=50) for seed in training_seeds(args)]
        for mode, n in itertools.product(modes, systems)
    }
    metric = "legible", "share of frames in which a digit can be read"
    draw_cells(halfway, "After half of the training", metric, "early-legible", args)
    names = ("legible", "flicker, of real")
    return [(["run", *(f"{name} at {percent}%" for name in names for percent in (25, 50))], rows)]


def sampling(args: argparse.Namespace) -> list:
    """Quality against cost: solver and steps, of the shipped weights of flow. And how nine steps are shared out over
    the stages."""
    counts, cells, curves = (30, 3) if args.smoke else (30, 9, 6, 3), {}, {}
    for system, solver in itertools.product(("1", "3", "3-space-time"), ("euler", "ab2")):
        name, each = f"{SYSTEMS[system]}, {solver}", [Cell(f"shipped-flow-{system}", n, solver) for n in counts]
        curves[name] = [(cost(cell, args)[1], measured(cell, args)["judge_distance"]) for cell in each]
        cells[name] = each
    labels = "Quality against cost, flow", "full-rate network calls", "judge's distance"
    real = statistics.mean(measured(IN_TURN, args)["judge_distance"])
    draw_curves(curves, *labels, args.out / "sampling.png", real=real)
    splits = itertools.product(("3", "3-space-time"), ("euler", "ab2"), (9, (5, 3, 1), (1, 3, 5)))
    shared_out = (Cell(f"shipped-flow-{system}", split, solver) for system, solver, split in splits)
    tables = itertools.chain.from_iterable(cells.values()), shared_out
    return [(FRONT, [front_row(cell, args) for cell in each]) for each in tables]


CLAIMS = {
    f.__name__.replace("_", "-"): f
    for f in (latency, training, twice, twice_ddim, work, sampling, alignment, renoising, early, *QUESTIONS, straight)
}


def measure(args: argparse.Namespace) -> None:
    """One claim or all."""
    figure_class()  # says what to install, if anything
    made_by = args.made_by | {name: getattr(args, name) for name in ("number", "seeds") if name in args}
    for name in CLAIMS if args.command == "all" else [args.command]:
        publish(CLAIMS[name](args), made_by, args.out / f"{name}.json")


def make_parser(smoke: bool = False) -> Parser:
    """With `smoke` the defaults are those of --smoke."""
    parser = Parser(prog="experiments.claims", description=__doc__)
    parser.set_defaults(function=measure)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    purposes = {name: " ".join(function.__doc__.split()) for name, function in CLAIMS.items()}
    for name, purpose in (purposes | {"all": "Every one of them, one after the other."}).items():
        command, whole = commands.add_parser(name, help=purpose.replace("%", "%%"), description=purpose), name == "all"
        add = command.add_argument
        if name != "latency":
            add_scoring(add)
            add("--runs", type=Path, default=Path("runs/evaluate"), help="where the runs are that it trains")
        if whole or name in ("latency", "training", "twice", "twice-ddim"):
            add("--repeats", type=positive_int, default=9, help="timings of each kind")
        add("--out", type=Path, default=Path("experiments/results"), help="where its numbers and figures go")
        add("--smoke", action="store_true", help="few clips of tiny runs; in runs/smoke, and results in there")
        if smoke:
            command.set_defaults(**SMOKE)
    return parser


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    run_command(make_parser(smoke="--smoke" in words), words)


if __name__ == "__main__":
    main()
