"""Sample clips from trained weights: `python sample.py --stages 3` writes a GIF and a PNG strip and says where."""

import argparse
import itertools
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import cli
from checkpoint import FACTORS, Weights, find_weights, load_weights, make_folder, make_pyramid, weight_file
from cli import generator_for, non_negative_int, positive_int, real_number, use_bf16
from data import height_width
from tpdiff import Pyramid, split_steps
from video import SUFFIXES, import_av

MOST_PIXELS = 2**24  # of a preview
MOST_FPS = 50.0  # that a GIF is shown at everywhere
MOST_SIDE = {".gif": 65535, ".mp4": 16384}  # pixels
CODE_POINT = re.compile("1f[0-9a-f]{3}")  # the labels of weights/emoji.pt
PICTURES, LATENTS = (".gif", ".png", ".mp4"), (".npy",)  # suffixes of what is written
COLUMNS = 5  # of clips in a picture
FPS = 12  # of what was trained on clips that do not say theirs, as digits
FEW = 500  # training steps: before, samples may still look like noise, as those of digits do


class Stopped(Exception):
    """A signal ended a preview."""


def make_predict(model: torch.nn.Module, labels: Tensor | None, guidance: float, bf16: bool) -> Callable:
    """The sampler's `predict(x, t, k)`: the model, with classifier-free guidance unless it is 1 (arXiv 2207.12598)."""

    def predict(x: Tensor, t: Tensor, k: int) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            if labels is None or guidance == 1:
                return model(x, t, k, labels)
            both = torch.cat([labels, torch.full_like(labels, model.null_label)])
            conditional, unconditional = model(torch.cat([x, x]), torch.cat([t, t]), k, both).chunk(2)
            return unconditional + guidance * (conditional - unconditional)

    return predict


def replayed(predict: Callable) -> Callable:
    """`predict` for a GPU, for one call of `Pyramid.sample`. Of each stage and shape the first two calls are made as
    usual, the third is recorded as a CUDA graph, and from then on the graph is replayed. A small model's kernels are
    over before Python has launched the next; for a large one the recording costs less than a call."""
    graphs, calls, pool = {}, Counter(), torch.cuda.graph_pool_handle()  # graphs that take turns share their memory

    def call(x: Tensor, t: Tensor, k: int) -> Tensor:
        key = k, x.shape
        calls[key] += 1
        with torch.no_grad(), torch.cuda.device(x.device):
            if calls[key] < 3:
                return predict(x, t, k)
            if key not in graphs:
                graph, inputs, own = torch.cuda.CUDAGraph(), (x.clone(), t.clone()), torch.cuda.current_stream()
                # thread_local: a loader's thread may pin memory. The streams: this one also after a failure
                with torch.cuda.stream(own), torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
                    output = predict(*inputs, k)
                graphs[key] = graph, inputs, output
            graph, inputs, output = graphs[key]
            for kept, given in zip(inputs, (x, t), strict=True):
                kept.copy_(given)
            graph.replay()
            return output.clone()

    return call


def with_products_in_bf16(model: torch.nn.Module) -> torch.nn.Module:
    """The model, its matrices in bfloat16 for good: autocast would convert them at every call, for the same clips."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.bfloat16()
    return model


def full_rate_steps(counts: list[int], pyramid: Pyramid, shape: Sequence[int]) -> float:
    """Cost of a clip of `shape` (B, C, T, H, W) in network calls at the full rate: a call at stage k weighs as many
    tokens as `p.shape` says it has. `counts` are noisiest first."""
    size = [math.prod(pyramid.shape(shape, k)) for k in range(len(pyramid))]
    return sum(count * part / size[0] for count, part in zip(counts, reversed(size), strict=True))


def said_cost(counts: list[int], pyramid: Pyramid, shape: Sequence[int], args: argparse.Namespace) -> str:
    """A line of the solver steps and what a clip costs; of args `solver` and `guidance`."""
    steps = "-".join(map(str, counts)) + " (noisiest stage first)" * (len(counts) > 1)
    calls, guided = full_rate_steps(counts, pyramid, shape), args.guidance != 1
    cost = f"{2 * calls if guided else calls:.4g} network calls on the full clip"
    more = " (twice as many as without guidance)" if guided else ""
    return f"steps {steps} with {args.solver}: a clip costs as much as {cost}{more}"


def check_guidance(weights: Weights, guidance: float) -> None:
    """Raises ValueError for guidance other than 1 of a model that was not trained both with labels and without."""
    if guidance != 1 and not (weights.classes and 0 < weights.label_dropout < 1):
        never = "without" if weights.classes and not weights.label_dropout else "with"
        raise ValueError(f"guidance needs a model trained with labels and without: it was never trained {never} labels")


def generate(
    weights: Weights, pyramid: Pyramid, labels: Tensor | None, number: int,
    steps: int | list[int] = 30, solver: str = "euler", guidance: float = 1.0,
    seed: int = 0, precision: str = "auto", progress: bool = False, first: int = 0, callback: Callable | None = None,
) -> Tensor:  # fmt: skip
    """`number` clips (B, C, T, H, W) from number `first` on. Clip i's noise depends on `seed` and i alone. The callback
    is that of `Pyramid.sample`."""
    check_guidance(weights, guidance)
    device = next(weights.model.parameters()).device
    shape = (number, weights.model.config.channels, weights.frames, *height_width(weights.size))
    generators = [generator_for(seed, cli.SAMPLING, index) for index in range(first, first + number)]
    labels = None if labels is None or weights.label_dropout == 1 else labels.to(device)  # or never trained with them
    predict = make_predict(weights.model, labels, guidance, use_bf16(precision, device))
    predict = replayed(predict) if device.type == "cuda" else predict
    return pyramid.sample(predict, shape, steps, solver, generators, device, progress=progress, callback=callback)


def frame_rate(weights: Weights, suffix: str = ".gif") -> float:
    """Frames a second unless --fps says it: the training clips', 1 at least, and of a GIF MOST_FPS at most."""
    return min(max(1.0, weights.fps or FPS), MOST_FPS if suffix == ".gif" else math.inf)


def enlarged(weights: Weights) -> int:
    """How many pixels of a picture's width and height a clip's pixel becomes."""
    return 3 if height_width(weights.size)[1] <= 64 else 1


def save_preview(weights: Weights, args: argparse.Namespace, batch: int, stop: cli.StopRequest | None = None) -> None:
    """Writes step-N of a run: --sample-number clips by the EMA weights, 30 Euler steps, as a GIF, or .npy of latents.
    The noises are always the same, so that progress shows. `batch` clips at a time, as training takes, and of large
    clips fewer: 16 million pixels at most. What goes wrong is said on stderr, and does not end the run. A signal
    that `stop` has heard ends the sampling."""
    height, width = height_width(weights.size)
    number = max(1, min(args.sample_number, MOST_PIXELS // (weights.frames * height * width)))
    pyramid, labels, clips = make_pyramid(weights), choose_labels(weights.classes, number), []
    suffix = ".gif" if weights.latent_scale is None else ".npy"

    def give_up(*_) -> None:
        if stop and stop.signal and weights.step < args.steps:  # the last one cannot be made later
            raise Stopped

    try:
        for first in tqdm(range(0, number, batch), desc=f"sampling {number} clips", unit="batch", leave=False):
            part = labels if labels is None else labels[first : first + batch]
            give_up()
            options = {"precision": args.precision, "first": first, "callback": give_up}
            clips.append(generate(weights, pyramid, part, min(batch, number - first), **options).cpu())
        with cli.written_whole(args.out / f"step-{weights.step:07d}{suffix}") as aside:
            if weights.latent_scale is None:
                save_gif(torch.cat(clips), aside, min(COLUMNS, number), enlarged(weights), frame_rate(weights))
            else:
                save_latents(torch.cat(clips), aside, weights.latent_scale)
    except Stopped:
        return
    except Exception as error:
        tqdm.write(f"step {weights.step}: no sample clips ({cli.reason(error)}); the run goes on", file=sys.stderr)


def choose_labels(classes: tuple[str, ...], number: int, names: list[str] | None = None) -> Tensor | None:
    """(B,) labels: the `names` in turn, or every class; None for a model without classes. A name may also be an emoji
    whose first code point is a class, as it is for weights/emoji.pt. Raises ValueError."""
    names = names or classes
    words = {name for name in names if name in classes or name.isascii() or name.isalpha()}
    found = {name: name if name in words else f"{ord(name[0]):x}" for name in names}
    for name, label in found.items():
        if label not in classes:
            few = ", ".join(classes[:10]) + ", ...; --list-labels prints all" * (len(classes) > 10)
            known = f"its labels are {few}" if classes else "it was trained without labels"
            raise ValueError(f"--label {name} is unknown to the model: {known}")
    chosen = torch.tensor([classes.index(found[name]) for name in names])
    return chosen[torch.arange(number) % len(chosen)] if classes else None


def check_pictures(weights: Weights, number: int, fps: float | None, suffix: str) -> None:
    """Raises ValueError for what a file of this kind cannot hold."""
    sizes, grid = height_width(weights.size), (-(-number // COLUMNS), min(COLUMNS, number))
    height, width = (enlarged(weights) * (count * (size + 2) + 2) for count, size in zip(grid, sizes, strict=True))
    if max(height, width) > MOST_SIDE.get(suffix, math.inf):
        most = f"a {suffix} file has at most {MOST_SIDE[suffix]} a side: sample fewer"
        raise ValueError(f"--number {number} makes a picture of {width}x{height} pixels, and {most}")
    if fps and suffix not in MOST_SIDE:
        raise ValueError(f"--fps has no meaning for {suffix} files")
    if fps and suffix == ".gif" and fps > MOST_FPS:
        raise ValueError(f"--fps {fps:g}: a GIF has at most {MOST_FPS:g} frames a second, an .mp4 more")


def to_images(clips: Tensor) -> np.ndarray:
    """(B, C, T, H, W) with pixels in [-1, 1] -> (B, T, H, W, 3) uint8. Raises ValueError if C is not 1 or 3."""
    if clips.shape[1] not in (1, 3):
        raise ValueError(f"clips of {clips.shape[1]} channels are not pictures: 1 or 3 can be shown")
    pixels = ((clips.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1).expand(-1, -1, -1, -1, 3).numpy()


def tile(images: np.ndarray, columns: int, scale: int) -> Image.Image:
    """(N, H, W, 3) -> one picture, row by row, enlarged, with grey gaps unless there is one image alone."""
    missing, gap = -len(images) % columns, 2 if len(images) > 1 else 0
    cells = np.pad(images, [(0, missing), (gap, 0), (gap, 0), (0, 0)], constant_values=128)
    rows = cells.reshape(-1, columns, *cells.shape[1:]).swapaxes(1, 2)
    picture = np.pad(rows.reshape(-1, columns * cells.shape[2], 3), [(0, gap), (0, gap), (0, 0)], constant_values=128)
    return ImageOps.scale(Image.fromarray(picture), scale, Image.Resampling.NEAREST)


def grid_frames(clips: Tensor, columns: int | None, scale: int) -> list[Image.Image]:
    """Clips (B, C, T, H, W) as the frames of one picture, a grid of `columns` (default: about square)."""
    images = to_images(clips)
    return [tile(frame, columns or int(np.ceil(len(images) ** 0.5)), scale) for frame in images.swapaxes(0, 1)]


def save_gif(clips: Tensor, path: str | Path, columns: int | None = None, scale: int = 3, fps: float = 12) -> None:
    """A grid of clips (B, C, T, H, W) as one looping animated GIF. Its frames last whole hundredths of a second, so
    that they are as long as asked for on the average. Of equal frames in a row Pillow writes one that lasts longer."""
    frames = grid_frames(clips, columns, scale)
    durations = [10 * (round(100 * (number + 1) / fps) - round(100 * number / fps)) for number in range(len(frames))]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def save_video(clips: Tensor, path: Path, columns: int | None = None, scale: int = 3, fps: float = 12) -> None:
    """The same as MP4, with PyAV: H.264 in 4:2:0, which plays everywhere. Raises DataError without PyAV."""
    av, frames = import_av(path), grid_frames(clips, columns, scale)
    with av.open(f"file:{path}", "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "16"})
        stream.width, stream.height = (size + size % 2 for size in frames[0].size)  # 4:2:0 wants even numbers
        stream.pix_fmt, stream.colorspace, stream.color_range = "yuv420p", 6, 1  # BT.601, or players guess by the size
        for frame in frames:
            even = ImageOps.expand(frame, (0, 0, frame.width % 2, frame.height % 2), frame.getpixel((0, 0)))
            container.mux(stream.encode(av.VideoFrame.from_image(even)))
        container.mux(stream.encode(None))


def save_strip(clips: Tensor, path: str | Path, scale: int = 2) -> None:
    """Clips (B, C, T, H, W) as one PNG for papers: a clip a row, time to the right."""
    images = to_images(clips)
    tile(images.reshape(-1, *images.shape[2:]), images.shape[1], scale).save(path, format="PNG")


def save_latents(clips: Tensor, path: str | Path, latent_scale: float) -> None:
    """Clips (B, C, T, H, W) as one .npy file, float32, at the scale that their VAE gave and takes."""
    with open(path, "wb") as file:  # or numpy adds .npy to other endings
        np.save(file, (clips.detach().float().cpu() / latent_scale).numpy())


def free_name(stem: Path) -> Path:
    """`stem` with the first number at which there is no such file."""
    names = (Path(f"{stem}-{number:03d}") for number in itertools.count())
    return next(name for name in names if not any(Path(f"{name}{suffix}").exists() for suffix in PICTURES + LATENTS))


def make_parser() -> cli.Parser:
    about = {"description": "Sample clips from trained weights, as a GIF and a PNG strip."}
    parser = cli.Parser(prog="sample.py", **about, epilog="example: python sample.py --stages 3 --label 7 --guidance 2")
    add = parser.add_argument
    add("--mode", choices=["flow", "ddim"], help="form of diffusion [the checkpoint's, else flow]")
    add("--stages", type=positive_int, help="stages; 1 is vanilla, plain diffusion [the checkpoint's, else 3]")
    add("--pyramid", choices=FACTORS, help="what a stage halves [the checkpoint's, else time]")
    checkpoint = "a run's folder, or its weights.pt or checkpoint.pt [newest match in runs/, else shipped]"
    add("--checkpoint", type=Path, help=checkpoint)
    add("--number", type=positive_int, help="clips to sample [10, or a clip of each --label if these are more]")
    steps = "solver steps: a total, or one count per stage, noisiest first"
    add("--steps", type=positive_int, nargs="+", action=cli.OneOrMore, default=30, help=steps)
    add("--solver", choices=["euler", "ab2"], default="euler", help="ab2: as many network calls, second order")
    add("--label", nargs="+", help="classes to sample, in turn; an emoji stands for its first code point [every class]")
    add("--list-labels", action="store_true", help="print the classes of the model, and stop")
    guidance = "above 1 labels show more strongly (classifier-free guidance); other than 1 doubles the cost"
    add("--guidance", type=real_number(-100, 100), default=1.0, help=guidance)
    add("--seed", type=non_negative_int, default=0, help="of the noise; clip i has the same noise whatever --number is")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where the hardware has it")
    cli.add_device(add)
    add("--compile", action="store_true", help="torch.compile the model: slow to start, faster after")
    add("--fps", type=real_number(1, 1000), help=f"frames a second of the GIF or MP4 [the training clips', else {FPS}]")
    out = "file: .gif, .png (frames in a row), .mp4 (needs PyAV) or, of latents, .npy; without a suffix .gif and .png"
    add("--out", type=Path, help=f"{out}; an existing folder: RUN-NNN in it [samples]")
    return parser


def run(args: argparse.Namespace) -> None:
    device = cli.choose_device(args.device)
    path = weight_file(args.checkpoint or find_weights(args.mode or "flow", args.stages or 3, args.pyramid or "time"))
    weights = load_weights(path, device)
    for flag in ("mode", "stages", "pyramid"):
        asked, trained = getattr(args, flag), getattr(weights, flag)
        if asked not in (None, trained):
            raise ValueError(f"{path} was trained with --{flag} {trained}, not --{flag} {asked}")
    if use_bf16(args.precision, device):
        with_products_in_bf16(weights.model)
    if args.compile:
        weights.model.compile_blocks()
    if args.list_labels:
        shown = [f"{name}  {chr(int(name, 16))}" if CODE_POINT.fullmatch(name) else name for name in weights.classes]
        return print(*shown or [f"{path} was trained without labels"], sep="\n")
    asked = len(args.label or ())
    number = args.number or max(10, asked)
    if asked > number:
        raise ValueError(f"--label names {asked} classes, and --number {number} makes fewer clips")
    try:
        labels = choose_labels(weights.classes, number, args.label)
    except ValueError as error:
        raise ValueError(f"{error} ({path})") from None
    if args.label and weights.label_dropout == 1:
        raise ValueError(f"{path} was never trained with labels (--label-dropout 1): leave out --label")
    if args.label:
        print("labels:", *(weights.classes[label] for label in labels[:asked]))
    check_guidance(weights, args.guidance)
    pyramid = make_pyramid(weights)
    counts = split_steps(args.steps, weights.stages, pyramid.lengths)
    of_a_run, pictures = path.stem.startswith(("weights", "checkpoint")), weights.latent_scale is None
    out, name = args.out or Path("samples"), path.resolve().parent.name if of_a_run else path.stem
    out = free_name(out / name) if out.is_dir() or not args.out else out
    kinds = PICTURES if pictures else LATENTS
    suffix = out.suffix.lower()
    files = [out] if suffix in SUFFIXES else [Path(f"{out}{kind}") for kind in kinds[:2]]
    if files[0].suffix.lower() not in kinds:
        advice = f"pictures: {', '.join(kinds)}" if pictures else "latents, which are no pictures: .npy, to decode them"
        raise ValueError(f"--out {out}: {path} makes {advice}")
    if suffix == ".mp4":
        import_av(out)  # says what to install
    kind = files[0].suffix.lower()
    check_pictures(weights, number, args.fps, kind)
    if there := [file for file in files if file.exists()]:
        raise ValueError(f"{there[0]} exists already: choose another --out")
    make_folder(out.parent, out)  # what cannot be written shall not be found out after sampling
    stages = f"{cli.count(weights.stages, 'stage')} in {weights.pyramid}" if weights.stages > 1 else "1 stage"
    print(f"weights: {path} ({weights.mode}, {stages}, step {weights.step})")
    if weights.step < FEW:
        print("note: after so few training steps samples may still look like noise")
    start = time.perf_counter()
    options = counts, args.solver, args.guidance, args.seed, args.precision
    clips = generate(weights, pyramid, labels, number, *options, progress=True).cpu()
    said = f"{cli.count(number, 'clip')} of {cli.count(weights.frames, 'frame')}"
    print(f"{said}, {(time.perf_counter() - start) / number:.2f} s a clip")
    print(said_cost(counts, pyramid, clips.shape, args))
    fps = args.fps or frame_rate(weights, kind)
    for file in files:
        with cli.written_whole(file) as aside:
            if file.suffix.lower() == ".npy":
                save_latents(clips, aside, weights.latent_scale)
            elif file.suffix.lower() == ".png":
                save_strip(clips, aside)
            else:
                save = save_video if suffix == ".mp4" else save_gif
                save(clips, aside, min(COLUMNS, number), enlarged(weights), fps)
    rate = f", {fps:g} frames a second" * (kind in MOST_SIDE)
    print(f"wrote {' and '.join(map(str, files))}{rate}")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    cli.keep_memory()
    with cli.one_sentence(parser, "not enough memory for so many clips at once: sample fewer with --number"):
        run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
