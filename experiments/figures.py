"""Figures: the losses of runs of train.py, the times of the stages, and a clip on its way through the stages."""

import argparse
import itertools
import json
import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import SHIPPED, load_weights, make_pyramid
from cli import SAMPLING, Parser, generator_for, one_sentence
from data import height_width
from experiments.report import add_command, file_to_write
from sample import make_predict, tile, to_images
from tpdiff import Pyramid, randn

COLOURS = {"vanilla": "C0", "time": "C1", "space": "C2", "space-time": "C3", "space and time": "C3", "real": "black"}
COLOURS |= {"trained on the pyramid": "C1", "real clips": "black"}  # the pyramid in time
PYRAMIDS = {"time": "pyramid in time", "space": "pyramid in space"}
PYRAMIDS |= dict.fromkeys(["space-time", "space and time"], "pyramid in space and time") | {"real": "real clips"}
OPTIONS = {"euler": "Euler", "ab2": "second order", "seed 1": "training seed 1", "seed 2": "training seed 2"}


def figure_class() -> type:
    """matplotlib's figure, which belongs to no window. Raises ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the figures need matplotlib: pip install matplotlib") from None
    return Figure


def subplots(rows: int, columns: int, size: tuple[float, float], **options):
    """A new figure of this size in inches, and its axes."""
    figure = figure_class()(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def save(figure, title: str, path: Path, **legend) -> None:
    """Writes a figure under its title, with a legend below it if that has options."""
    figure.suptitle(title, fontsize=10)
    if legend:
        figure.legend(loc="outside lower center", frameon=False, fontsize=7, **legend)
    figure.savefig(path, dpi=200)


def in_words(name: str) -> str:
    """A legend's name, its parts as whoever does not know our names of systems and options would call them."""
    first, *others = name.split(", ")
    return ", ".join([(PYRAMIDS | OPTIONS).get(first, first), *(OPTIONS.get(other, other) for other in others)])


def draw_curves(
    curves: dict[str, list], title: str, x_label: str, y_label: str, path: Path,
    centre: Callable = statistics.mean, real: float | None = None, from_zero: bool = False, goals: Sequence[float] = (),
) -> None:  # fmt: skip
    """Curves of (x, values): the values' centre, their mean over seeds or the median of quartiles, and their range as a
    band. What names have before their first comma has one colour, a system the same in all figures; what they have
    after it, if it is the same for all systems, has one dash. `real`: what real clips have, a line across; `goals`:
    more lines, what vanilla has at its ends. Both axes are logarithmic, or `from_zero`: y linear from 0 on."""
    groups = list(dict.fromkeys(name.split(", ")[0] for name in curves))
    kinds = list(dict.fromkeys(name.partition(", ")[2] for name in curves))
    table = min(len(groups), len(kinds)) > 1 and len(groups) * len(kinds) == len(curves)  # its legend: colours, dashes
    entries = [*groups, *kinds] if table else list(curves)
    columns = 2 if max(map(len, map(in_words, entries))) < 32 else 1
    height = 2.8 + 0.15 * math.ceil((len(entries) + 1) / columns)  # fits a column of a paper, with the legend below
    figure, axes = subplots(1, 1, (4.4, height))
    others = (f"C{number}" for number in itertools.count(4))
    colours = {name: COLOURS.get(name) or next(others) for name in groups}
    dashes = {name: itertools.cycle(("-", "--", ":")) for name in groups}
    dash_of = dict(zip(kinds, itertools.cycle(("-", "--", ":")), strict=False))
    for name, points in curves.items():
        group, _, kind = name.partition(", ")
        dash = dash_of[kind] if table else next(dashes[group])
        draw_curve(axes, points, centre, colours[group], dash, None if table else in_words(name))
    for group in groups if table else ():
        axes.plot([], [], color=colours[group], label=in_words(group))
    for kind in kinds if table else ():
        axes.plot([], [], color="grey", linestyle=dash_of[kind], label=in_words(kind))
    for label, goal in zip(("vanilla at its end, each seed", *[None] * len(goals)), goals, strict=False):
        axes.axhline(goal, color=COLOURS["vanilla"], linewidth=1, linestyle=(0, (1, 3)), label=label)
    if real is not None:
        axes.axhline(real, color="black", linewidth=1, linestyle="-.", label="real clips")
    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    scale_axes(axes, 8, from_zero)
    places = sorted({x for points in curves.values() for x, _ in points})
    if len(places) <= 4:  # room to name just these
        axes.set_xticks(places)
        axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0 if from_zero else None)
    save(figure, title, path, ncols=columns, handlelength=3)


def draw_panels(panels: dict[str, dict[str, list]], title: str, x_label: str, y_label: str, path: Path) -> None:
    """The curves of each system, as in `draw_curves`, in a panel of their own: not to be compared between systems."""
    rows = -(-len(panels) // 2)
    figure, grid = subplots(rows, 2, (4.4, 0.6 + 1.7 * rows), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    names = max(panels.values(), key=len)
    dashes = dict(zip(names, itertools.cycle(("-", "--", ":")), strict=False))
    for axes, (system, curves) in zip(grid.flat, panels.items(), strict=False):
        for name, points in curves.items():
            draw_curve(axes, points, statistics.mean, COLOURS.get(system, "grey"), dashes[name], None)
        axes.set_title(in_words(system), fontsize=8)
        scale_axes(axes, 7)
        axes.set_xlabel(x_label, fontsize=6)
    for name, dash in dashes.items():
        grid[0, 0].plot([], [], dash, color="grey", label=name)
    figure.supylabel(y_label, fontsize=8)
    save(figure, title, path, ncols=len(names), handlelength=3)


def draw_curve(axes, points: list, centre: Callable, colour: str, dash: str, label: str | None) -> None:
    """The values' centre as a line, and their range as a band."""
    x, values = zip(*sorted(points), strict=True)
    axes.plot(x, [centre(v) for v in values], dash, color=colour, label=label, marker="o", markersize=4)
    axes.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2)


def scale_axes(axes, size: int, from_zero: bool = False) -> None:
    """Logarithmic axes, or y linear, a grid, and numbers of this size: 0.6 and 200 in place of powers of ten."""
    from matplotlib.ticker import LogLocator

    axes.set(xscale="log", yscale="linear" if from_zero else "log")
    for axis in (axes.xaxis,) if from_zero else (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(LogLocator(subs=(2, 3, 4, 6)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.tick_params(labelsize=size, which="both")
    axes.grid(alpha=0.3, which="both")


def draw_bars(
    bars: dict[str, list[float]], title: str, label: str, path: Path, real: float, dot: str = "one training seed"
) -> None:
    """A bar for each name, as long as the mean of its values, and if there are several a `dot` for each; its colour and
    `real` as in `draw_curves`."""
    figure, axes = subplots(1, 1, (4.4, max(2.4, 1 + 0.27 * len(bars))))
    colours = [COLOURS.get(name.partition(", ")[0], "grey") for name in bars]
    bars = {textwrap.fill(in_words(name), 36): values for name, values in bars.items()}
    axes.barh(list(bars), list(map(statistics.mean, bars.values())), color=colours, alpha=0.5)
    dots = [(value, name) for name, values in bars.items() for value in values if len(values) > 1]
    if dots:
        axes.plot(*zip(*dots, strict=True), "ko", markersize=4, label=dot)
    axes.axvline(real, color="black", linewidth=1, linestyle="-.", label="real clips")
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.set_xlabel(label, fontsize=8)
    save(figure, title, path, ncols=2)


def draw_clips(pictures: dict[str, Tensor], title: str, path: Path) -> None:
    """Clips (B, C, T, H, W) under their names, one below the other, every second frame to the right. Two names stand
    side by side."""
    rows = -(-len(pictures) // 2)
    images = {name: to_images(clips)[:, ::2] for name, clips in pictures.items()}
    count, shown, *frame = next(iter(images.values())).shape
    size = (4.4, (2.15 * count / shown + 0.22) * rows + 0.25)  # as wide as the curves
    figure, grid = subplots(rows, 2, size, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (name, frames) in zip(grid.flat, images.items(), strict=False):
        axes.imshow(tile(frames.reshape(-1, *frame), shown, scale=1))
        axes.set_title(in_words(name), fontsize=7, pad=2)
    save(figure, title, path)


def draw_losses(args: argparse.Namespace) -> None:
    """The losses of runs, stage by stage, over the seconds that they trained: in training, smoothed, and, where clips
    are held out, on those. Raises ValueError or OSError if there are none."""
    figure, axes = subplots(1, 1, (6, 3.8))
    for number, run in enumerate(args.runs):
        if not (run / "metrics.jsonl").exists():
            raise ValueError(f"{run} holds no metrics.jsonl: it is not the folder of a run")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        if not rows:
            raise ValueError(f"{run / 'metrics.jsonl'} holds no losses yet")
        for k in range(len(rows[0]["loss_by_stage"])):
            for name, style in (("loss_by_stage", "-"), ("held_out_by_stage", "o")):
                points = [(row["seconds"], row[name][k]) for row in rows if name in row and row[name][k] is not None]
                if points:
                    seconds, losses = zip(*points, strict=True)
                    losses = losses if style == "o" else smooth(losses)
                    label = f"{run.name}, stage {k}" + (", held out" if style == "o" else "")
                    axes.plot(seconds, losses, style, color=f"C{number}", alpha=1 / (k + 1), markersize=3, label=label)
    axes.set(xlabel="seconds of training", ylabel="loss", yscale="log", title="Loss by stage (0 is the full rate)")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(args.out, dpi=120)


def smooth(values: tuple[float, ...], decay: float = 0.8) -> list[float]:
    mean, found = values[0], []
    for value in values:
        mean = decay * mean + (1 - decay) * value
        found.append(mean)
    return found


def draw_windows(args: argparse.Namespace) -> None:
    """The times that each stage works on, from t = 1 to 0, its frame rate, and the jumps of renoising between them."""
    figure, rows = subplots(2, 1, (6, 3.8), sharex=True)
    for axes, mode in zip(rows, ("flow", "ddim"), strict=True):
        pyramid = Pyramid(mode)
        for stage in pyramid:
            height, name = len(pyramid) - stage.index, f"stage {stage.index}"
            rate = "full frame rate" if stage.index == 0 else f"1/{stage.stride[0]} of the frames"
            axes.barh(height, stage.t_start - stage.t_end, left=stage.t_end, height=0.5, color=f"C{stage.index}")
            axes.text(
                (stage.t_start + stage.t_end) / 2, height, f"{name}, {rate}", ha="center", va="center", fontsize=8
            )
            if stage.index > 0:
                following, arrow = pyramid[stage.index - 1], {"arrowstyle": "->", "color": "black"}
                axes.annotate("", (following.t_start, height + 0.7), (stage.t_end, height + 0.3), arrowprops=arrow)
        axes.set_title(f"{mode}: each later stage starts a little noisier than the one before ended", fontsize=10)
        axes.set(yticks=[], ylim=(0.4, len(pyramid) + 0.6))
    rows[1].set(xlim=(1, 0), xlabel="noise time t: sampling runs from 1, noise, to 0, data; arrows are renoising")
    figure.savefig(args.out, dpi=160)


def draw_stages(args: argparse.Namespace) -> None:
    """A clip of the shipped model on its way through the stages: each at its start, halfway and at its end. Frames
    stand at the time at which they are shown."""
    weights = load_weights(SHIPPED / "flow-3.pt")
    pyramid, shown = make_pyramid(weights), []

    def keep(x, t, k):
        shown.append((k, t[0].item(), x[0]))

    shape, steps = (1, weights.model.config.channels, weights.frames, *height_width(weights.size)), 10
    noise = randn(pyramid.shape(shape, len(pyramid) - 1), [generator_for(0, SAMPLING, 3)])
    predict = make_predict(weights.model, torch.tensor([3]), 2.0, bf16=False)
    keep(noise, torch.ones(1), len(pyramid) - 1)
    pyramid.sample(predict, shape, [steps] * len(pyramid), "ab2", [generator_for(0, SAMPLING, 3)], callback=keep)
    moments = [shown[k * (steps + 1) + step] for k in range(len(pyramid)) for step in (0, steps // 2, steps)]
    figure, grid = subplots(len(moments), weights.frames, (10, 6))
    for row, (k, t, clip) in zip(grid, moments, strict=True):
        row[0].set_ylabel(f"stage {k}\nt = {t:.2f}", rotation=0, ha="right", va="center", fontsize=9)
        for axes in row:
            axes.set(xticks=[], yticks=[], frame_on=False)
        for number, frame in enumerate(to_images(clip[None])[0]):
            row[number * pyramid[k].stride[0]].imshow(frame)
    figure.suptitle("A clip grows from 4 frames to 8 and 16 while its noise is removed")
    figure.savefig(args.out, dpi=100)


def make_parser() -> Parser:
    parser = Parser(prog="experiments.figures", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    adds = {"stages": add_command(commands, "stages", draw_stages)}
    adds["windows"] = add_command(commands, "windows", draw_windows)
    example = "example: python -m experiments.figures losses runs/flow-3 runs/flow-1"
    adds["losses"] = add_command(commands, "losses", draw_losses, epilog=example)
    adds["losses"]("runs", type=Path, nargs="+", help="folders of runs")
    for name, add in adds.items():
        add("--out", type=file_to_write, default=Path(f"{name}.png"), help="PNG to write")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    with one_sentence(parser, "not enough memory"):
        if not args.out.suffix:
            raise ValueError(f"--out {args.out} has no ending such as .png, which says what it shall be")
        args.function(args)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
