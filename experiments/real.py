"""Four systems on real clips in equal training time: vanilla diffusion, and pyramids in time, in space and in both.

  python -m experiments.emoji                                         the clips
  python -m experiments.real train --seconds 7200                     the runs, each with as much time
  python -m experiments.real train --runs runs/settings/lr-4e-3 --options=' --lr 4e-3' --seconds 900   a choice
  python -m experiments.real settings                                 which choice does best
  python -m experiments.real pace                                     what a step takes, measured in turn
  python -m experiments.real scores                                   their held-out losses and distances
  python -m experiments.real distance                                 what the distance says of damaged real clips
  python -m experiments.real names                                    the same for how often clips are named rightly
  python -m experiments.real copies                                   whether samples repeat training clips

All systems have the same model, optimizer and data. A batch is larger at a smaller stage, up to eight times. The
pyramids in space train their smallest and cheapest stage twice as often as the others. Runs and their kept weights
stay, and a stopped run is continued. Scores stay in real-cells.json of --out, so a stopped command goes on: give each
folder of runs its own --out. `scores --paces` takes the file that `pace` makes. The distance uses an image network's
features.
"""

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import mean

import sample
import train
from checkpoint import SHIPPED, load_weights, make_pyramid
from cli import Parser, non_negative_int, positive_int, real_number, whole_number
from data import height_width
from experiments.claims import time_to
from experiments.figures import draw_clips, draw_curves, draw_panels, figure_class
from experiments.metrics import NAMED
from experiments.report import add_command, publish, run_command, spread
from experiments.runs import run_train, seconds_a_step
from experiments.trust import Scored, copies, distance, names, sampled
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
CHEAP = (5, 3, 1)  # most steps where they cost least: it does well on digits
PACE = ["seconds a step", "fewest", "most"]


def train_words(system: str, seed: int, args: argparse.Namespace) -> list[str]:
    """Options of train.py, all but those that depend on the time."""
    words = [*COMMON.split(), *SYSTEMS[system].split(), "--batch", *(str(args.clips * n) for n in BATCHES[system])]
    words += ["--seed", str(seed), "--data", str(args.data / "train")]
    return words + shlex.split(args.options)


def train_systems(args: argparse.Namespace) -> None:
    """Train every system of --systems with every seed of --training-seeds for --seconds, or for --steps. All seeds of a
    system have as many steps as its first. What a run took is said where it is 5% off --seconds."""
    parse = train.make_parser().parse_args
    if args.steps and args.steps % len(SHARES):
        raise ValueError(f"--steps {args.steps} is no multiple of {len(SHARES)}")
    for seed, system in itertools.product(args.training_seeds, args.systems):
        folder, words = args.runs / f"{system}-seed-{seed}", train_words(system, seed, args)
        begun = {run: old for run, old in begun_runs(args.runs).items() if run.name.startswith(f"{system}-seed-")}
        for run, old in begun.items():
            same = parse(old) == parse([*train_words(*system_and_seed(run), args), *old[-4:]])  # all but the steps
            if not same or args.steps not in (None, parse(old).steps):
                raise ValueError(f"{run} was begun with other options: move it away")
        if folder in begun:
            words = begun[folder]
        else:
            if begun:
                steps = parse(next(iter(begun.values()))).steps
            else:
                planned = args.steps or args.seconds / seconds_a_step(train_words(system, 0, args), args.trial)
                steps = max(1, int(planned) // len(SHARES)) * len(SHARES)
            words += ["--steps", str(steps), "--keep-interval", str(steps // len(SHARES))]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "options.txt").write_text(shlex.join(words) + "\n")
        if not (folder / f"weights-{parse(words).steps}.pt").exists():
            run_train(words, folder)
        took = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
        if args.steps is None and abs(took / args.seconds - 1) > 0.05:
            print(f"{folder.name} trained for {took:.0f} s, not {args.seconds:.0f}", file=sys.stderr)


def pace(args: argparse.Namespace) -> None:
    """What a step of each system takes, with the options of its runs. Systems are measured in turn, so that what else
    the machine does slows all of them. Raises ValueError if there are no runs, or two of a system have other
    options."""
    options = {}
    for folder, words in begun_runs(args.runs).items():
        system, _ = system_and_seed(folder)
        if options.setdefault(system, timed(words)) != timed(words):
            raise ValueError(f"{folder} and another run of {system} have other options: move one of them away")
    if not options:
        raise ValueError(f"{args.runs} holds no runs: python -m experiments.real train makes them")
    found = {system: [] for system in options}
    for _, system in itertools.product(range(args.repeats), options):
        found[system].append(seconds_a_step(shlex.split(options[system]), args.trial))
    rows = [[system, *(f"{each(values):.4g}" for each in (mean, min, max))] for system, values in found.items()]
    publish([(["system", *PACE], rows)], args.made_by | {"options": options}, args.out / "real-pace.json")


def paces_of(path: Path, runs: Path, finished: Iterable[Path]) -> dict[str, float]:
    """Seconds a step by system, from a file that `pace` made. Raises ValueError if it is another, or was made for other
    options than those of the `finished` ones among `runs`."""
    paces, options, begun = {}, {}, begun_runs(runs)
    with suppress(ValueError, TypeError, KeyError, IndexError):
        content = json.loads(path.read_text())
        ((header, rows),) = content["tables"]
        if header[1:] == PACE:
            paces, options = {row[0]: float(row[1]) for row in rows}, dict(content["options"])
    for folder in finished:
        system, _ = system_and_seed(folder)
        if system not in paces or options.get(system) != timed(begun[folder]):
            command = "python -m experiments.real pace"
            raise ValueError(f"--paces {path} has no pace of {folder.name} with its options: make it with {command}")
    return paces


def timed(words: list[str]) -> str:
    """The options of a run that its pace depends on: all but --seed, and --steps and --keep-interval, the last ones."""
    at = words.index("--seed")
    return shlex.join([*words[:at], *words[at + 2 : -4]])


def system_and_seed(folder: Path) -> tuple[str, int]:
    """What the folder of a run has in its name. Raises ValueError if it has another."""
    system, _, seed = folder.name.rpartition("-seed-")
    if not seed.isdecimal():
        raise ValueError(f"{folder} is not named SYSTEM-seed-NUMBER: move it away")
    return system, int(seed)


def begun_runs(folder: Path, below: str = "") -> dict[Path, list[str]]:
    """The folders of runs, and their options as words; `below` is "*/" if they are one level down."""
    return {note.parent: shlex.split(note.read_text()) for note in sorted(folder.glob(f"{below}*-seed-*/options.txt"))}


def options_of(runs: Iterable[Path], folder: Path) -> dict[str, str]:
    """The options of the `runs` in a folder, by name."""
    return {str(run.relative_to(folder)): (run / "options.txt").read_text().strip() for run in runs}


def finished_runs(folder: Path, below: str = "") -> dict[Path, argparse.Namespace]:
    """The folders of runs that are done, and their options. Raises ValueError if there are none or clips differ."""
    runs = {}
    for run, words in begun_runs(folder, below).items():
        system_and_seed(run)  # refuses other names
        options = train.make_parser().parse_args(words)
        if all((run / f"weights-{options.steps * share // 100}.pt").exists() for share in SHARES):
            runs[run] = options
        else:
            print(f"{run} is passed over: it is not done", file=sys.stderr)
    if not runs:
        where = folder / "CHOICE" if below else folder
        raise ValueError(f"{where} holds no finished runs: python -m experiments.real train --runs {where} makes them")
    if len({(options.frames, options.size) for options in runs.values()}) > 1:
        raise ValueError(f"the runs in {folder} make clips of different frames or sizes")
    return runs


def scores(args: argparse.Namespace) -> None:
    """Distance of every run to held-out clips over its training time, how many clips are named rightly, and its
    held-out loss; and the distance over the cost of sampling its last weights. Stages of different systems have
    different targets, so compare a loss within a system only. The pictures are of each system's first run, 30 Euler
    steps."""
    figure_class()  # says what to install, if anything
    runs = finished_runs(args.runs)
    check_splits(args.splits, runs)
    args.splits = [CHEAP] if args.splits is None else args.splits
    paces = paces_of(args.paces, args.runs, runs) if args.paces else {}
    scored = Scored("held-out", runs, args)
    rows, front, trained, pictures = [], {}, {}, {}
    for folder, options in runs.items():
        system, points = system_and_seed(folder)[0], []
        seconds = {row["step"]: row["seconds"] for row in map(json.loads, (folder / "metrics.jsonl").open())}
        trained.setdefault(system, []).append(points)
        for share in SHARES:
            step = options.steps * share // 100
            file = folder / f"weights-{step}.pt"
            weights = load_weights(file, scored.device)
            found = scored.after_training(file, weights, options)
            points.append((step * paces[system] if paces else seconds[step], found))
            second, far, losses = points[-1][0], found["distance"], ", ".join(f"{x:.4f}" for x in found["losses"])
            rows.append([folder.name, step, f"{second:.0f}", f"{far:.0f}", *found["named"], losses])
        pyramid = make_pyramid(weights)
        if system not in pictures:
            pictures[system] = sampled(weights, scored.labels[:8], args, 30).cpu()
        totals = args.steps, *args.sampling_steps
        even, *splits = (tuple(split_steps(total, weights.stages, pyramid.lengths)) for total in totals)
        args.splits = [split for split in args.splits if split not in splits]  # those are no others
        splits += [split for split in args.splits if len(split) == weights.stages]
        known = {("euler", even): points[-1][1]["distance"]}
        clip = 1, weights.model.config.channels, options.frames, *height_width(options.size)
        calls = {split: sample.full_rate_steps(split, pyramid, clip) for split in splits}
        for solver, split in itertools.product(("euler", "ab2"), sorted(calls, key=calls.get)):
            if (solver, split) not in known:
                known[solver, split] = scored.after_sampling(file, weights, split, solver)
            way = system, "-".join(map(str, split)), solver, calls[split]
            front.setdefault(way, []).append(known[solver, split])
    floor = scored.floor()
    rows.append(["real training clips", "", "", f"{floor:.0f}", "", "", ""])
    args.made_by["options"] = options_of(runs, args.runs)
    publish_scores(rows, trained, front, floor, args)
    pictures["real"] = scored.train_clips[:8].cpu()
    draw_clips(pictures, "Real clips: samples of each system, the same labels", args.out / "real-clips.png")


def check_splits(splits: list[tuple[int, ...]] | None, runs: dict[Path, argparse.Namespace]) -> None:
    """Raises ValueError if one is for a number of stages that no run has."""
    for split in splits or ():
        if len(split) not in {options.stages for options in runs.values()}:
            raise ValueError(f"--splits {'-'.join(map(str, split))} is for {len(split)} stages, which no run has")


def settings(args: argparse.Namespace) -> None:
    """Distance of runs with other options to clips that are there to choose options by, the split *settings*. --runs
    holds a folder for each choice, with runs of the systems in it. Give all systems equally many choices. The split has
    other clips, and fewer, so compare these distances with no others. Their last weights are measured, sampled with
    both solvers in the ways of --splits for their number of stages, or, if there are none, with --steps of Euler."""
    runs, rows = finished_runs(args.runs, "*/"), []
    check_splits(args.splits, runs)
    scored = Scored("settings", runs, args)
    for folder, options in runs.items():
        file = folder / f"weights-{options.steps}.pt"
        weights = load_weights(file, scored.device)
        even = tuple(split_steps(args.steps, weights.stages, make_pyramid(weights).lengths))
        splits = [split for split in args.splits if len(split) == weights.stages]
        ways = itertools.product(splits, ("euler", "ab2")) if splits else [(even, "euler")]
        seconds = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
        for split, solver in ways:
            row = [folder.name, folder.parent.name, options.steps, f"{seconds:.0f}", "-".join(map(str, split)), solver]
            rows.append([*row, f"{scored.after_sampling(file, weights, split, solver):.0f}"])
    rows.sort(key=itemgetter(0, 1))
    rows.append(["real training clips", *[""] * 5, f"{scored.floor():.0f}"])
    header = ["run", "choice", "steps", "seconds", "sampling steps", "solver", "distance"]
    made_by = args.made_by | {"options": options_of(runs, args.runs)}
    publish([(header, rows)], made_by, args.out / "real-settings.json")


def publish_scores(rows: list, trained: dict[str, list], front: dict[tuple, list], floor: float, args) -> None:
    """The tables and curves of `scores`. `trained` has for each system the seconds and scores of its runs, `front` for
    each way to sample, (system, steps, solver, calls), the distance of each run, and `floor` is that of real clips."""
    curves = {system: over_seeds(runs, itemgetter("distance")) for system, runs in trained.items()}
    losses, costs, ways = {}, {}, []
    for system, runs in trained.items():
        stages = range(len(runs[0][0][1]["losses"]))
        losses[system] = {f"stage {k}": over_seeds(runs, lambda found, k=k: found["losses"][k]) for k in stages}
    for (system, counts, solver, calls), distances in front.items():
        ways.append([system, counts, solver, f"{calls:.3g}", spread(distances, ".0f")])
        if tuple(map(int, counts.split("-"))) not in args.splits:  # a line joins like with like
            costs.setdefault(f"{system}, {solver}", []).append((calls, distances))
    tables = [(["run", "steps", "seconds", "distance", *NAMED, "held-out loss by stage, 0 first"], rows)]
    tables += [(["system", "steps", "solver", "full-rate calls", "distance"], ways), gains(curves)]
    publish(tables, args.made_by, args.out / "real.json")
    time = f"seconds of training{', at the measured pace' if args.paces else ''}"
    far, draw = "distance to held-out clips", partial(draw_curves, real=floor)
    draw(curves, "Real clips: quality against training", time, far, args.out / "real-training.png")
    draw(costs, "Real clips: quality against cost", "full-rate network calls", far, args.out / "real-sampling.png")
    draw_panels(losses, "Real clips: loss of each stage", time, "held-out loss", args.out / "real-losses.png")


def over_seeds(runs: list[list], value: Callable[[dict], float]) -> list[tuple[float, list[float]]]:
    """Runs of one system, each a list of seconds and scores, as one curve: mean seconds, and a value of every run."""
    together = zip(*runs, strict=True)
    return [(mean(second for second, _ in points), [value(found) for _, found in points]) for points in together]


def gains(curves: dict[str, list]) -> tuple[list, list]:
    """Each pyramid beside vanilla, the means over the seeds: the distance after all the time, and how much of it the
    pyramid needs to reach vanilla's. Nothing without vanilla."""
    header = ["system", "seconds", "distance at the end", "of vanilla's"]
    header += ["share of vanilla's time to reach its last distance"]
    if "vanilla" not in curves:
        return header, []
    (time, values), rows = curves["vanilla"][-1], []
    for system, curve in curves.items():
        reached = time_to(mean(values), curve)
        at_most = "at most " if reached == curve[0][0] else ""
        share = "not reached" if reached is None else f"{at_most}{reached / time:.2f}"
        end, far = curve[-1]
        rows.append([system, f"{end:.0f}", spread(far, ".0f"), f"{mean(far) / mean(values):.2f}", share])
    return header, rows


def split(text: str) -> tuple[int, ...]:
    return tuple(positive_int(number) for number in text.split("-"))


def make_parser() -> Parser:
    parser = Parser(prog="experiments.real", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    functions = {"train": train_systems, "settings": settings, "pace": pace, "scores": scores}
    functions |= {"distance": distance, "names": names, "copies": copies}
    adds = (add_command(commands, *each) for each in functions.items())
    train_, settings_, pace_, scores_, distance_, names_, copies_ = adds
    train_("--seconds", type=real_number(1, 10**7), default=7200.0, help="training time of a run")
    trial = "a third of the steps of a trial run, which tells what a step takes"
    train_("--steps", type=positive_int, help="steps of a run, a multiple of 4, in place of --seconds and --trial")
    train_("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), help="which of the four")
    train_("--training-seeds", type=positive_int, nargs="+", default=[1, 2], help="seeds of the runs")
    train_("--clips", type=positive_int, default=16, help="clips of a step at stage 0, where they have all frames")
    train_("--options", default="", help="further options of train.py for all runs: --options='--workers 4' [none]")
    pace_("--repeats", type=positive_int, default=3, help="how often each is measured")
    for add in (train_, pace_):
        add("--trial", type=positive_int, default=50, help=trial)
    scores_("--paces", type=Path, help="real-pace.json: seconds are at this pace, not those that the runs took")
    for add in (settings_, pace_, scores_, distance_, names_, copies_):
        add("--out", type=Path, default=Path("experiments/results"), help="folder of the tables and pictures")
    for add in (settings_, scores_, distance_, names_, copies_):
        add("--number", type=whole_number(2), default=192, help="clips of each kind that are sampled, or damaged")
        add("--batch", type=positive_int, default=8, help="clips sampled at once; a GPU wants more")
        add("--seed", type=non_negative_int, default=0, help="of the noise that clips are sampled from")
    scores_("--sampling-steps", type=positive_int, nargs="+", default=[3, 6, 9, 15, 30], help="totals to compare")
    splits = "solver steps of each stage, noisiest first, as 5-3-1, for runs of so many stages"
    scores_("--splits", type=split, nargs="*", help=f"{splits}, beside the totals [5-3-1]")
    settings_("--splits", type=split, nargs="*", default=[], help=f"{splits}; each with both solvers [--steps, Euler]")
    for add in (settings_, scores_):
        add("--reference", type=whole_number(2), default=400, help="clips to compare with, at most four windows a clip")
    distance_("--checkpoint", type=Path, nargs="*", default=[], help="weights whose samples are compared too")
    for add in (settings_, scores_, distance_, copies_):
        add("--steps", type=positive_int, default=30, help="solver steps, where they are not compared")
    for add in (names_, copies_):
        add("--checkpoint", type=Path, default=SHIPPED / "emoji.pt", help="whose samples these are [weights/emoji.pt]")
    for add in (distance_, copies_):
        add("--solver", choices=["euler", "ab2"], default="euler", help="as in sample.py")
    for add in (train_, settings_, scores_, distance_, names_, copies_):
        add("--data", type=Path, default=Path("data/emoji64"), help="folder that experiments.emoji made")
    for add in (train_, pace_, scores_):
        add("--runs", type=Path, default=Path("runs/real"), help="folder of the runs")
    settings_("--runs", type=Path, default=Path("runs/settings"), help="folder of such folders, one for each choice")
    return parser


def main(argv: list[str] | None = None) -> None:
    run_command(make_parser(), argv)


if __name__ == "__main__":
    main()
