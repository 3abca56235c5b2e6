"""Figures: curves with their spread, clips side by side, and the losses of runs of train.py:

python -m experiments.figures runs/flow-3 runs/flow-1 --out losses.png
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from cli import Parser
from data import tile, to_images
from experiments.report import file_to_write, one_sentence


def pyplot():
    """matplotlib's pyplot, which opens no window. Raises ValueError without matplotlib."""
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


def draw_losses(runs: list[Path], path: Path) -> None:
    """The losses of runs, stage by stage, over the seconds that they trained: in training, smoothed, and, where clips
    are held out, on those. Raises ValueError or OSError if there are none."""
    figure, axes = pyplot().subplots(figsize=(7, 4), layout="constrained")
    for number, run in enumerate(runs):
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
    figure.savefig(path, dpi=120)


def smooth(values: tuple[float, ...], decay: float = 0.8) -> list[float]:
    """A running mean."""
    mean, found = values[0], []
    for value in values:
        mean = decay * mean + (1 - decay) * value
        found.append(mean)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="experiments.figures", description="Draw the losses of runs of train.py.")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--out", type=file_to_write, default=Path("losses.png"), help="PNG to write")
    args = parser.parse_args(argv)
    with one_sentence(parser, "not enough memory"):
        draw_losses(args.runs, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
