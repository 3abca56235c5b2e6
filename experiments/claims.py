"""The paper's claims, measured.

Each claim trains the runs it needs (RUNS), samples them and writes CLAIM.json and pictures, CLAIM*.png, into results/.
`python -m experiments.report` then makes README.md of them.

Runs and clips are not made twice: a stopped run of train.py is continued, and the scores in results/cells.json stay as
long as the weights they are of. Times are measured anew, so leave the machine alone. --smoke: all at a tiny size.
"""

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import sample
from checkpoint import Weights, make_pyramid
from cli import Parser, choose_device, generator_for, keep_memory, positive_int, real_number, use_bf16
from experiments.figures import draw_clips, draw_curves, pyplot
from experiments.metrics import NO_MEMORY, add_scoring, real_clips, spread
from experiments.report import markdown, one_sentence, provenance, write_json
from experiments.runs import (
    FRONT,
    RENOISING,
    SCORES,
    Cell,
    clips_of,
    front_row,
    full_rate_calls,
    measured,
    scores_row,
    train_options,
)
from experiments.speed import Run
from experiments.timing import alternate, in_milliseconds, quartiles
from model import DiT, DiTConfig
from tpdiff import align, split_steps

SMOKE = {"number": 8, "reference": 50, "seeds": [0, 1], "batch": 8, "repeats": 1}
SMOKE |= {"width": 16, "depth": 1, "runs": Path("runs/smoke"), "out": Path("runs/smoke/results")}


def network_cost(frames: float, tokens: int, width: int, depth: int, attention: str) -> float:
    """Multiplications of a network call on a clip: the linear layers, and attention to the tokens that each sees."""
    linear = {"factorized": 16, "full": 12}[attention] * width**2
    seen = {"factorized": tokens + frames, "full": tokens * frames}[attention]
    return depth * frames * tokens * (linear + 2 * width * seen)


def predicted_speedup(counts: list[int], frames: int, *size, fixed: float = 0.0) -> float:
    """Vanilla's time over the pyramid's, for as many steps; `counts` by stage, noisiest first. `fixed`: what a call
    takes whatever its frames, as a share of one at the full rate; the rest goes with the multiplications."""
    full = network_cost(frames, *size)
    calls = [fixed + (1 - fixed) * network_cost(math.ceil(frames / 2**k), *size) / full for k in range(len(counts))]
    return sum(counts) / sum(count * call for count, call in zip(reversed(counts), calls, strict=True))


def fixed_share(full: float, quarter: float, frames: int, *size) -> float:
    """`fixed` of the above, from the times of vanilla at all frames and at a quarter of them."""
    ratio = network_cost(frames / 4, *size) / network_cost(frames, *size)
    return min(1.0, max(0.0, (quarter / full - ratio) / (1 - ratio)))


def cost(args: argparse.Namespace) -> None:
    """How many times as fast as vanilla the pyramid should sample, for a model of any size: with every number of stages
    up to --stages, or with the steps given stage by stage."""
    predict, size = partial(predicted_speedup, fixed=args.fixed), (args.tokens, args.width, args.depth, args.attention)
    splits = [args.steps]
    if len(args.steps) == 1:
        splits = [split_steps(args.steps[0], count) for count in range(1, min(args.stages, *args.steps) + 1)]
    rows = [["-".join(map(str, counts)), f"{predict(counts, args.frames, *size):.3g}"] for counts in splits]
    print(markdown(["steps (noisiest first)", "times as fast as one stage"], rows))


def sampling_times(settings: dict, args: argparse.Namespace) -> dict:
    """Sorted seconds of 30 Euler steps, network untrained. `settings`: a name -> (mode, stages, frames, batch)."""
    functions = {}
    for name, (mode, stages, frames, batch) in settings.items():
        config = DiTConfig(width=args.width, depth=args.depth, stages=stages)
        model = DiT(config).to(choose_device()).eval()
        if use_bf16("auto", choose_device()):
            sample.with_products_in_bf16(model)
        weights = Weights(model, mode, stages, frames, 4 * math.isqrt(args.tokens), (), 0)
        functions[name] = partial(sample.generate, weights, weights.make_pyramid(), None, batch)
    return alternate(functions, args.repeats)


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
        times = map(in_milliseconds, seconds.values())
        rows.append([mode, batch, *times, f"{batch / pyramid:.2f}", *ratios, papers])
        shown = {"vanilla": quartiles(seconds["vanilla"]), "3 stages": quartiles(seconds["pyramid"])}
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
            calls = sample.full_rate_steps(counts, make_pyramid("flow", stages), (1, 1, frames, 1, 1))
            row = [frames, stages, f"{calls:.4g}", in_milliseconds(seconds[stages])]
            rows.append([*row, f"{ratio:.2f}", f"{fixed:.0%}", f"{expected:.2f}", f"{ratio / expected - 1:+.0%}"])
        for name, stages in (("vanilla", 1), ("3 stages", 3), ("as many as fit", most)):
            values = [value * 1e3 for value in quartiles(seconds[stages])]
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
        step = Run(options).training_step
        steps |= {(options.mode, options.stages, k): partial(step, k) for k in range(options.stages)}
    seconds = alternate(steps, args.repeats)
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
    pyramid, aligned, plain = make_pyramid(mode, 3), [], []
    for x0 in real_clips(seed * clips, clips).split(batch):
        x0_stage, u = pyramid.down(x0, k), torch.full((len(x0),), 0.5)
        noise = torch.randn(x0_stage.shape, generator=generator_for(seed, k, len(plain)))
        for targets, paired in ((aligned, align(x0_stage, noise)), (plain, noise)):
            targets.append(pyramid.interpolate(*pyramid.endpoints(x0, paired, k), k, u)[1])
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


def pyramids(args: argparse.Namespace) -> list:
    """Four systems in about equal training time: vanilla, and the pyramid in time, in space, and in both. Thirty Euler
    steps and nine."""
    runs = [f"{mode}-{system}{seed}" for mode in ("flow", "ddim") for system in SYSTEMS for seed in ("", "-seed-2")]
    cells = {run: [Cell(run, steps) for steps in (30, 9)] for run in runs}
    pictures = {run: clips_of(cells[run][1], args, args.seeds[0], 8)[:4] for run in runs if "seed" not in run}
    draw_clips(pictures, len(SYSTEMS), args.out / "pyramids.png")
    return [(FRONT, [front_row(cell, args) for each in cells.values() for cell in each])]


SYSTEMS = ("1", "3", "3-space", "3-space-time")
CLAIMS = {f.__name__: f for f in (latency, training, alignment, renoising, early, sampling, stages, growth, pyramids)}
SCORED = (training, alignment, renoising, early, sampling, stages, pyramids)  # the others time untrained networks


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and those of its sub-commands by name."""
    parser = Parser(prog="experiments.claims", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    every = {name: commands.add_parser(name, **described(function)) for name, function in CLAIMS.items()}
    every["all"] = commands.add_parser("all", help="every claim", description="Every claim, one after the other.")
    for name, command in every.items():
        add, whole = command.add_argument, name == "all"
        if whole or CLAIMS[name] in SCORED:
            add_scoring(add)
            add("--compile", action="store_true", help="torch.compile what is sampled to be judged")
            add("--runs", type=Path, default=Path("runs/evaluate"), help="where the runs are that it trains")
        if whole or name in ("latency", "growth", "training"):
            add("--repeats", type=positive_int, default=9, help="timings of each kind")
        if whole or name in ("latency", "growth"):
            add_size(add)
        add("--out", type=Path, default=Path("experiments/results"), help="where its numbers and figures go")
        add("--smoke", action="store_true", help="few clips of tiny runs; in runs/smoke, and results in there")
    every["cost"] = commands.add_parser("cost", **described(cost))
    add = every["cost"].add_argument
    add("--steps", type=positive_int, nargs="+", default=[30], help="solver steps: a total, or one count per stage")
    add("--stages", type=positive_int, default=3, help="the most, if --steps is a total")
    add("--frames", type=positive_int, default=16, help="of a clip")
    add_size(add)
    fixed = "what a call takes whatever its frames, as a share of a full-rate one; `latency` measures it"
    add("--fixed", type=real_number(0, 1), default=0.0, help=fixed)
    attention = "factorized (space, then time), or full (over all tokens)"
    add("--attention", choices=["factorized", "full"], default="factorized", help=attention)
    return parser, every


def described(function: Callable) -> dict[str, str]:
    """What a sub-command measures, for the list of them and for its own help."""
    purpose = " ".join(function.__doc__.split())
    return {"help": purpose.replace("%", "%%"), "description": purpose}


def add_size(add: Callable) -> None:
    """The options of a network's size."""
    add("--tokens", type=positive_int, default=64, help="a frame")
    add("--width", type=positive_int, default=96, help="channels of a token")
    add("--depth", type=positive_int, default=4, help="blocks")


def claim(name: str, args: argparse.Namespace) -> None:
    """Measures a claim, prints its tables and writes them with what they were made by."""
    tables = CLAIMS[name](args)
    for header, rows in tables:
        print(markdown(header, rows))
    write_json(args.out / f"{name}.json", args.made_by | {"tables": tables})
    print(f"wrote {args.out / name}.json\n", flush=True)


def main(argv: list[str] | None = None) -> None:
    (parser, commands), words = make_parser(), sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    with one_sentence(parser, NO_MEMORY):
        if args.command == "cost":
            return cost(args)
        if args.smoke:
            commands[args.command].set_defaults(**{name: SMOKE[name] for name in SMOKE.keys() & vars(args).keys()})
            args = parser.parse_args(words)
        args.made_by = provenance("experiments.claims", words)
        args.made_by |= {name: getattr(args, name) for name in ("number", "seeds") if name in args}
        pyplot()
        args.out.mkdir(parents=True, exist_ok=True)
        for name in CLAIMS if args.command == "all" else [args.command]:
            claim(name, args)


if __name__ == "__main__":
    keep_memory()
    main()
