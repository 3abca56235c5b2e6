"""What the printed paper and its reviewers ask for beyond the paper's claims, measured on moving digits.

  python -m experiments.asked longer    clips of 32 frames by models that were trained on 16
  python -m experiments.asked alike     frames that are doubled, or stand still
  python -m experiments.asked rival     vanilla's own weights, sampled from coarse to fine without any training

Each trains the runs that it needs (experiments/runs.py) and writes a JSON file and a figure.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

import sample
from checkpoint import Weights, load_weights, make_pyramid
from cli import SAMPLING, Parser, choose_device, generator_for, keep_memory, use_bf16
from data import MovingDigits
from experiments.figures import draw_curves, pyplot
from experiments.metrics import (
    NO_MEMORY,
    REAL,
    add_command,
    add_scoring,
    digit_scores,
    frechet_distance,
    load_judge,
    real_clips,
    sample_clips,
    scores_of,
    spread,
)
from experiments.report import markdown, one_sentence, provenance, write_json
from experiments.runs import trained
from model import DiT
from tpdiff import randn, split_steps, upsample

SYSTEMS = {"vanilla": "flow-1", "time": "flow-3", "space-time": "flow-3-space-time"}
SMOKE = {"number": 6, "reference": 40, "seeds": [0, 1], "batch": 6}
SMOKE |= {"runs": Path("runs/smoke"), "out": Path("runs/smoke/results")}


def weights_of(run: str, args: argparse.Namespace) -> Weights:
    """A run's weights at its end."""
    return load_weights(trained(run, 100, args), choose_device())


@cache
def real_features(frames: int, count: int) -> Tensor:
    """The judge's, of real clips of this many frames."""
    return load_judge().features(real_clips(0, count, MovingDigits(frames, seed=REAL.seed)))


def scored(clips: Tensor, reference: int) -> dict[str, float]:
    """The judge's distance to real clips as long as these, and what it reads in them."""
    judge = load_judge()
    distance = frechet_distance(judge.features(clips), real_features(clips.shape[2], reference))
    return {"judge_distance": distance} | digit_scores(judge, clips)


def others(data: MovingDigits, reference: int, seed: int, number: int) -> Tensor:
    """Real clips that are not among the first `reference`."""
    return real_clips(reference + seed * number, number, data)


def longer(args: argparse.Namespace) -> list:
    """Clips of 32 frames by models trained on 16, beside clips of 16: the pyramids and vanilla, nine Euler steps."""
    rows, curves, metrics = [], {}, partial(scored, reference=args.reference)
    for system, seed, frames in product([*SYSTEMS, "real"], ("", "-seed-2"), (16, 32)):
        if system == "real":
            if seed:
                continue
            make = partial(others, MovingDigits(frames, seed=REAL.seed), args.reference)
        else:
            weights = replace(weights_of(SYSTEMS[system] + seed, args), frames=frames)
            make = partial(sample_clips, weights, weights.make_pyramid(), 9, "euler", args.batch)
        found = scores_of(make, metrics, args)
        names = ("judge_distance", "legible", "kept", "straight")
        rows.append([SYSTEMS.get(system, system) + seed, frames, *(spread(found[name]) for name in names)])
        print(rows[-1], flush=True)
        curves.setdefault(f"{system}, {seed.strip('-') or 'seed 1'}", []).append((frames, found["judge_distance"]))
    draw_curves(curves, "frames of a clip; trained on 16", "judge's distance", args.out / "longer.png")
    return [(["run", "frames", "judge's distance", "legible", "one digit throughout", "straight"], rows)]


def share_alike(clips: Tensor, limit: float) -> tuple[float, float]:
    """Shares of neighbouring frames whose mean squared difference is below `limit`: of frames 2 j and 2 j + 1, which
    the last renoising makes of one, and of frames 2 j + 1 and 2 j + 2."""
    alike = (clips.diff(dim=2).square().mean((1, 3, 4)) < limit).double()
    return alike[:, ::2].mean().item(), alike[:, 1::2].mean().item()


def alike(args: argparse.Namespace) -> list:
    """The share of neighbouring frames that are alike: doubled at a transition, or frozen. Alike means that they differ
    by less than a tenth of what is usual, the median, in real clips (mean square)."""
    real = real_clips(0, args.reference)
    limit = real.diff(dim=2).square().mean((1, 3, 4)).median().item() / 10
    rows, curves = [["real", "", "", *(f"{share:.2%}" for share in share_alike(real, limit))]], {}
    for system, solver, seed, steps in product(SYSTEMS, ("euler", "ab2"), ("", "-seed-2"), (3, 9, 30)):
        weights = weights_of(SYSTEMS[system] + seed, args)
        make = partial(sample_clips, weights, weights.make_pyramid(), steps, solver, args.batch)
        within, between = zip(*(share_alike(make(each, args.number), limit) for each in args.seeds), strict=True)
        run = SYSTEMS[system] + seed
        rows.append([run, steps, solver, f"{mean(within):.2%}", f"{mean(between):.2%}"])
        print(rows[-1], flush=True)
        if not seed:
            points = (steps, [max(100 * share, 0.01) for share in within])
            curves.setdefault(f"{system}, {solver}", []).append(points)
    draw_curves(curves, "solver steps", "% of frames like their pair's other", args.out / "alike.png")
    return [(["run", "steps", "solver", "alike, frames of a pair", "alike, frames of two pairs"], rows)]


@torch.inference_mode()
def coarse_to_fine(weights: Weights, shift: float, steps: int, batch: int, seed: int, number: int) -> Tensor:
    """Clips (B, C, T, H, W) by vanilla's weights on a time pyramid that they were not trained on, as deployed code
    samples images: at the end of a stage the clean clip is predicted, its frames are repeated, and fresh noise is added
    at a time that `shift` raises. Frames have the positions at which they are shown."""
    pyramid, device = make_pyramid("flow", 3), next(weights.model.parameters()).device
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
    rows, curves, metrics = [], {}, partial(scored, reference=args.reference)
    shape, pyramid = (1, 1, 16, 32, 32), make_pyramid("flow", 3)
    for seed, steps in product(("", "-seed-2"), (6, 9, 15, 30)):
        vanilla, ours = (weights_of(run + seed, args) for run in ("flow-1", "flow-3"))
        makes: dict[str, Callable] = {
            f"vanilla's weights, coarse to fine, shift {shift}": partial(
                coarse_to_fine, vanilla, shift, steps, args.batch
            )
            for shift in (1, 3, 6)
        }
        for name, weights in (("vanilla", vanilla), ("trained on the pyramid", ours)):
            makes[name] = partial(sample_clips, weights, weights.make_pyramid(), steps, "euler", args.batch)
        for name, make in makes.items():
            found = scores_of(make, metrics, args)
            cost = steps if name == "vanilla" else sample.full_rate_steps(split_steps(steps, 3), pyramid, shape)
            scores = spread(found["judge_distance"]), spread(found["kept"])
            rows.append([name, seed.strip("-") or "seed-1", steps, f"{cost:.4g}", *scores])
            print(rows[-1], flush=True)
            if not seed:
                curves.setdefault(name, []).append((cost, found["judge_distance"]))
    draw_curves(curves, "full-rate network calls", "judge's distance", args.out / "rival.png")
    return [
        (["sampled", "training seed", "steps", "full-rate calls", "judge's distance", "one digit throughout"], rows)
    ]


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and those of its sub-commands by name."""
    parser = Parser(prog="experiments.asked", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function in (("longer", longer), ("alike", alike), ("rival", rival)):
        add = add_command(commands, name, function)
        add_scoring(add)
        add("--runs", type=Path, default=Path("runs/evaluate"), help="where the runs are that it trains")
        add("--out", type=Path, default=Path(__file__).parent / "results", help="where its numbers and figure go")
        add("--smoke", action="store_true", help="few clips of tiny runs; in runs/smoke, and results in there")
    return parser, commands.choices


def main(argv: list[str] | None = None) -> None:
    (parser, commands), words = make_parser(), sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    if args.smoke:
        commands[args.command].set_defaults(**SMOKE)
        args = parser.parse_args(words)
    made_by = provenance("experiments.asked", words) | {"number": args.number, "seeds": args.seeds}
    with one_sentence(parser, NO_MEMORY):
        pyplot()  # says what to install, if anything
        args.out.mkdir(parents=True, exist_ok=True)
        tables = args.function(args)
        print("\n".join(markdown(*table) for table in tables))
        write_json(args.out / f"{args.command}.json", made_by | {"tables": tables})


if __name__ == "__main__":
    keep_memory()
    main()
