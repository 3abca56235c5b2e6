"""How good the samples are, and what the paper claims, measured. Each command prints a table and writes its numbers,
with the machine, the options and the date, to a file in results/.

  python evaluate.py judge      train the judge, a small network that knows moving digits: weights/judge.pt, shipped
  python evaluate.py quality    how good the samples of a run on moving digits are
  python evaluate.py renoise    the same weights sampled with the paper's renoising, with other noise, without (Fig. 6)
  python evaluate.py latency    the pyramid's sampling time beside vanilla's, and the predicted ratio (Table 1)
  python evaluate.py cost       that prediction for a model of any size
"""

import argparse
import datetime
import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import bench
import sample
from data import MovingDigits, draw_digit, save_strip
from model import DiT, DiTConfig
from tpdiff import Generators, Pyramid, randn, split_steps, upsample

JUDGE = sample.SHIPPED / "judge.pt"
JUDGE_SEED, REAL_SEED = 2**31, 2**31 + 1  # of the judge's training clips, and of the real clips of every measurement


class Judge(nn.Module):
    """Reads moving digits (B, 1, T, 32, 32): each frame on its own, then the frames together.

    All features lie in (-1, 1), so that what no digit looks like is far from real clips, and not infinitely far.
    """

    def __init__(self, features: int = 32):
        super().__init__()
        convolutions = [nn.Conv2d(1, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(32, 64, 3, 2, 1)]
        layers = [layer for convolution in convolutions for layer in (convolution, nn.SiLU())]
        self.see = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, features), nn.Tanh())
        conv1d = [nn.Conv1d(features, features, 3, padding=1) for _ in range(2)]
        self.watch = nn.Sequential(conv1d[0], nn.SiLU(), conv1d[1], nn.Tanh())
        self.label, self.place, self.velocity = nn.Linear(features, 10), nn.Linear(features, 2), nn.Linear(features, 2)

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """What it saw in each frame (B, T, D), and in the frames around it (B, T, D)."""
        seen = self.see(clips.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(clips), -1))
        return seen, self.watch(seen.transpose(1, 2)).transpose(1, 2)

    @torch.no_grad()
    def features(self, clips: Tensor) -> Tensor:
        """(B, 3 D) over time: mean of what was seen, root mean square of its second difference, mean of motion."""
        parts = []
        for batch in clips.split(100):
            seen, motion = self(batch)
            parts.append(
                torch.cat([seen.mean(1), seen.diff(n=2, dim=1).square().mean(1).sqrt(), motion.mean(1)], dim=1)
            )
        return torch.cat(parts).double()

    @torch.no_grad()
    def read(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """The digit in each frame (B, T), and its corner's position (B, T, 2) in pixels."""
        seen = torch.cat([self(batch)[0] for batch in clips.split(100)])
        return self.label(seen).argmax(-1), self.place(seen) * 16 + 11


def judge_loss(judge: Judge, clips: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    """How wrong the judge is about digit, place and velocity in every frame."""
    seen, motion = judge(clips)
    velocity = torch.stack(torch.gradient(positions, dim=1)).squeeze(0)
    wrong_digit = F.cross_entropy(judge.label(seen).flatten(0, 1), labels.repeat_interleave(clips.shape[2]))
    wrong_place = F.mse_loss(judge.place(seen) * 16 + 11, positions)
    return wrong_digit + wrong_place / 64 + F.mse_loss(judge.velocity(motion), velocity)


def train_judge(steps: int, batch: int = 32) -> Judge:
    torch.manual_seed(0)
    judge, data = Judge(), MovingDigits(seed=JUDGE_SEED)
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3)
    for step in tqdm(range(steps), desc="training the judge", unit="step"):
        numbers = range(step * batch, (step + 1) * batch)
        tracks = [data.tracks(number)[0] for number in numbers]
        positions = torch.tensor(np.stack([np.stack([y, x], axis=-1) for _, y, x in tracks]), dtype=torch.float32)
        labels = torch.tensor([label for label, _, _ in tracks])
        loss = judge_loss(judge, torch.stack([data[number][0] for number in numbers]), labels, positions)
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge.eval()


def load_judge() -> Judge:
    judge = Judge()
    judge.load_state_dict(torch.load(JUDGE, weights_only=True))
    return judge.eval()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Of the Gaussians with the means and covariances of the features a (N, D) and b (M, D): Frechet (1957)."""
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def digit_scores(judge: Judge, clips: Tensor) -> dict[str, float]:
    """Shares of moving-digit clips (B, 1, T, 32, 32), which are about 1 on real ones.

    legible   frames that the digit read in them, drawn where it was read, explains to 3/4 of their brightness squared.
    kept      clips whose frames are all legible and all the same digit.
    straight  kept clips whose digit stays within a pixel of a constant velocity with bounces.
    """
    labels, positions = judge.read(clips)
    glyphs, size = MovingDigits().glyphs, clips.shape[-1]
    legible, kept, straight = [], [], []
    for clip, digits, places in zip(
        clips[:, 0].double().numpy(), labels.tolist(), positions.double().numpy(), strict=True
    ):
        frames = (clip + 1) / 2
        drawn = np.stack([draw_digit(glyphs[d], *p[:, None], size)[0] for d, p in zip(digits, places, strict=True)])
        fine = ((frames - drawn) ** 2).sum((1, 2)) < 0.25 * (drawn**2).sum((1, 2))
        legible.append(fine.mean())
        kept.append(fine.all() and len(set(digits)) == 1)
        rooms = np.array(glyphs[digits[0]].shape)
        straight.append(kept[-1] and all(bounces(places[:, axis], size - rooms[axis]) for axis in (0, 1)))
    return {"legible": float(np.mean(legible)), "kept": float(np.mean(kept)), "straight": float(np.mean(straight))}


def bounces(positions: np.ndarray, room: float, tolerance: float = 1.0) -> bool:
    """Whether positions (T,) stay within `tolerance` of a point of constant velocity that bounces off 0 and `room`."""
    time = np.arange(len(positions))
    velocities, starts = np.arange(-2.2, 2.2, 0.05), np.arange(0, room + 0.25, 0.25)
    unfolded = starts[:, None, None] + velocities[:, None] * time
    path = room - np.abs(unfolded % (2 * room) - room)
    return bool((np.abs(path - positions).max(-1) < tolerance).any())


def flicker(clips: Tensor) -> float:
    """Mean squared second difference in time of clips (B, C, T, H, W)."""
    return clips.double().diff(n=2, dim=2).square().mean().item()


def real_clips(first: int, count: int) -> Tensor:
    """Moving digits that no run was trained on."""
    data = MovingDigits(seed=REAL_SEED)
    return torch.stack([data[number][0] for number in range(first, first + count)])


def quality_of(judge: Judge, clips: Tensor, reference: Tensor) -> dict[str, float]:
    """All metrics of moving-digit clips. `reference`: the judge's features of real ones."""
    distance = frechet_distance(judge.features(clips), reference)
    return {"judge_distance": distance, **digit_scores(judge, clips), "flicker": flicker(clips)}


def measure(args: argparse.Namespace, settings: dict[str, Callable[[int, int], Tensor]]) -> dict:
    """The metrics of each setting (a sampling seed and a number -> clips) for every seed, and of real clips."""
    if min(args.number, args.reference) < 2:
        raise ValueError("--number and --reference must be at least 2: one clip has no covariance")
    judge = load_judge()
    reference = judge.features(real_clips(0, args.reference))
    settings |= {"real clips": lambda seed, number: real_clips(args.reference + seed * number, number)}
    found = {}
    for name, make in settings.items():
        rows = [quality_of(judge, make(seed, args.number), reference) for seed in args.seeds]
        found[name] = {metric: [row[metric] for row in rows] for metric in rows[0]}
    metrics = list(rows[0])
    cells = [[name, *(spread(values[metric]) for metric in metrics)] for name, values in found.items()]
    bench.table(", ".join(["", *metrics]), cells)
    return found


def spread(values: list[float]) -> str:
    """The mean, and the smallest and largest over the seeds."""
    return f"{statistics.mean(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def generate(weights: sample.Weights, pyramid: Pyramid, args: argparse.Namespace, seed: int, number: int) -> Tensor:
    """`number` clips of all classes in turn, in batches; clip i's noise depends on the seed and i alone."""
    clips, labels = [], sample.choose_labels(weights.classes, number)
    for first in tqdm(range(0, number, args.batch), desc=f"seed {seed}", unit="batch"):
        count = min(args.batch, number - first)
        part = labels if labels is None else labels[first : first + count]
        options = args.steps, args.solver, args.guidance, seed, args.precision
        clips.append(sample.generate(weights, pyramid, part, count, *options, first=first).cpu())
    return torch.cat(clips)


def quality(args: argparse.Namespace) -> dict:
    weights = load_run(args)
    pyramid = Pyramid(weights.mode, weights.stages)
    return measure(args, {f"{weights.mode}, {weights.stages} stages": partial(generate, weights, pyramid, args)})


class WithoutNoise(Pyramid):
    """Renoising that scales as Eq. 15 does, and adds nothing: the frames of a pair start with the same noise."""

    def renoise(self, x_end: Tensor, k: int, generator: Generators = None) -> Tensor:
        return self[k - 1].gamma_start / self[k].gamma_end * upsample(x_end)


class PlainNoise(WithoutNoise):
    """As much noise as in Eq. 15, independent in the two frames of a pair: its g is 0 where the paper has -1."""

    def renoise(self, x_end: Tensor, k: int, generator: Generators = None) -> Tensor:
        scaled = super().renoise(x_end, k)
        return scaled + self[k - 1].sigma_start / math.sqrt(2) * randn(
            scaled.shape, generator, x_end.device, x_end.dtype
        )


def renoise(args: argparse.Namespace) -> dict:
    """Fig. 6: the same weights and first noise, three ways from one stage to the next."""
    weights = load_run(args)
    kinds = {"the paper's": Pyramid, "plain noise": PlainNoise, "no noise": WithoutNoise}
    ways = {name: partial(generate, weights, kind(weights.mode, weights.stages), args) for name, kind in kinds.items()}
    found = measure(args, ways)
    save_strip(torch.cat([make(args.seeds[0], 3) for make in ways.values()]), args.out / f"renoise-{weights.mode}.png")
    return found


def network_cost(frames: int, tokens: int, width: int, depth: int, attention: str) -> float:
    """Multiplications of one network call on one clip: the linear layers, and attention, whose cost for a token grows
    with the number of tokens that it sees. `attention`: "factorized" (space, then time), or "full" over all tokens."""
    linear = {"factorized": 16, "full": 12}[attention] * width**2
    seen = {"factorized": tokens + frames, "full": tokens * frames}[attention]
    return depth * frames * tokens * (linear + 2 * width * seen)


def predicted_speedup(counts: list[int], frames: int, *size) -> float:
    """Vanilla's cost over the pyramid's, for as many steps; `counts` by stage, noisiest first."""
    rates = [2**k for k in reversed(range(len(counts)))]
    pyramid = sum(count * network_cost(frames // rate, *size) for count, rate in zip(counts, rates, strict=True))
    return sum(counts) * network_cost(frames, *size) / pyramid


def cost(args: argparse.Namespace) -> dict:
    """The prediction alone, for every number of stages up to --stages that the frames divide by."""
    size, rows = (args.tokens, args.width, args.depth, args.attention), []
    for stages in range(1, args.stages + 1):
        if args.frames % 2 ** (stages - 1) == 0 and args.steps >= stages:
            counts = split_steps(args.steps, stages)
            rows.append([stages, "-".join(map(str, counts)), predicted_speedup(counts, args.frames, *size)])
    bench.table("stages, steps (noisiest first), times as fast as one stage", [[k, c, f"{x:.3g}"] for k, c, x in rows])
    return {str(stages): speedup for stages, _, speedup in rows}


def latency(args: argparse.Namespace) -> dict:
    """Table 1: sampling a clip at batch 1 and a batch, the pyramid beside vanilla with the same network and steps."""
    device, found, rows = sample.choose_device(), {}, []
    counts, tokens = split_steps(args.steps, args.stages), (args.size // args.patch) ** 2
    predicted = predicted_speedup(counts, args.frames, tokens, args.width, args.depth, "factorized")
    for mode in ("flow", "ddim"):
        functions = {}
        for batch in (1, args.batch):
            for stages in (1, args.stages):
                model = DiT(DiTConfig(1, args.patch, args.width, args.depth, args.heads, stages)).to(device).eval()
                whole = sample.Weights(model, mode, stages, args.frames, args.size, (), 0)
                functions[batch, stages] = partial(
                    sample.generate, whole, Pyramid(mode, stages), None, batch, args.steps, precision=args.precision
                )
        seconds = bench.alternate(functions, args.repeats)
        for batch in (1, args.batch):
            one, many = (seconds[batch, stages] for stages in (1, args.stages))
            speedup = statistics.median(one) / statistics.median(many)
            found[f"{mode}, batch {batch}"] = {
                "vanilla": one,
                "pyramid": many,
                "speedup": speedup,
                "predicted": predicted,
            }
            times = bench.in_milliseconds(one), bench.in_milliseconds(many)
            rows.append([mode, batch, *times, f"{speedup:.2f}", f"{predicted:.2f}", f"{speedup / predicted - 1:+.0%}"])
    bench.table("mode, batch, vanilla (ms), pyramid (ms), times as fast, predicted, off by", rows)
    return found


def make_judge(args: argparse.Namespace) -> dict:
    """Trains the judge and writes it over the shipped one."""
    trained = train_judge(args.judge_steps)
    torch.save(trained.state_dict(), JUDGE)
    clips, features = real_clips(0, 2000), trained.features(real_clips(2000, 2000))
    found = quality_of(trained, clips, features)
    print(f"wrote {JUDGE}; real clips score {found}")
    return found


def load_run(args: argparse.Namespace) -> sample.Weights:
    path = sample.weight_file(args.checkpoint or sample.find_weights(args.mode, args.stages))
    weights = sample.load_weights(path, sample.choose_device())
    if (weights.model.config.channels, weights.size) != (1, 32) or weights.classes != MovingDigits.classes:
        raise ValueError(f"{path} was not trained on moving digits of 32x32, which is all that the judge knows")
    return weights


COMMANDS = {"judge": make_judge, "quality": quality, "renoise": renoise, "latency": latency, "cost": cost}


def make_parser() -> sample.Parser:
    parser = sample.Parser(prog="evaluate.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("--checkpoint", type=Path, help="weights.pt of a run, or its folder [newest match in runs/, else shipped]")
    add("--mode", choices=["flow", "ddim"], default="flow")
    add("--stages", type=sample.positive_int, default=3)
    add("--steps", type=sample.positive_int, default=30, help="solver steps in all")
    add("--solver", choices=["euler", "ab2"], default="euler")
    add("--guidance", type=sample.real_number(-100, 100), default=1.0)
    add("--number", type=sample.positive_int, default=1000, help="clips of a number")
    add("--reference", type=sample.positive_int, default=4000, help="real clips that they are compared with")
    add("--seeds", type=sample.non_negative_int, nargs="+", default=[0, 1, 2], help="sampling seeds")
    add("--batch", type=sample.positive_int, default=50)
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    add("--repeats", type=sample.positive_int, default=7, help="timings of each kind")
    add("--judge-steps", type=sample.positive_int, default=1500)
    add("--frames", type=sample.positive_int, default=16, help="of latency and cost, as are the next ones")
    add("--size", type=sample.positive_int, default=32)
    add("--patch", type=sample.positive_int, default=4)
    add("--tokens", type=sample.positive_int, default=64, help="tokens a frame, of cost")
    add("--width", type=sample.positive_int, default=96)
    add("--depth", type=sample.positive_int, default=4)
    add("--heads", type=sample.positive_int, default=4)
    add(
        "--attention",
        choices=["factorized", "full"],
        default="factorized",
        help="of cost: space then time, or all tokens",
    )
    add("--out", type=Path, default=Path("results"))
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        found = COMMANDS[args.command](args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    options = {
        name: value if isinstance(value, int | float | list) else str(value) for name, value in vars(args).items()
    }
    head = {"date": str(datetime.date.today()), "machine": bench.processor(), "torch": torch.__version__}
    name = f"{args.command}-{args.mode}-{args.stages}.json"
    (args.out / name).write_text(json.dumps(head | {"options": options, "found": found}, indent=1) + "\n")
    print(f"wrote {args.out / name}")


if __name__ == "__main__":
    sample.keep_memory()
    main()
