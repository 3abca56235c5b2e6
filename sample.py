"""Sample clips from trained weights: `python sample.py --stages 3` writes a GIF and a PNG strip and says where."""

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from data import save_gif, save_latents, save_strip
from model import DiT, DiTConfig
from tpdiff import Pyramid, per_clip, split_steps

FORMAT = 4  # of the weight files; raised when old ones can no longer be read
SAMPLING, TRAINING, STAGE = range(3)  # what a generator is for; its second number
SUFFIXES = (".gif", ".png", ".npy")  # of what is written; the last for latents
SHIPPED = Path(__file__).parent / "weights"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        bare = action.default is None or action.default is False
        return action.help if bare else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as one sentence on stderr and exit code 2, and a help that shows the defaults."""

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def whole_number(low: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `low` that fits in 63 bits."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {low} and below 2^63, not {text!r}")
        return int(text)

    return parse


positive_int, non_negative_int = whole_number(1), whole_number(0)


def real_number(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number in [low, high]."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number in [{low:g}, {high:g}], not {text!r}")
        return value

    return parse


def generator_for(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on the numbers alone. Hashed, as torch keeps only 32 bits of a CPU seed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def choose_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def keep_memory() -> None:
    """Makes glibc keep the memory of freed tensors for the next ones: to ask the kernel for every large tensor anew,
    and have it cleared page by page, took a fifth of a training step on CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no memory beside the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back its end


def is_out_of_memory(error: Exception) -> bool:
    """On a GPU or a CPU, whose allocator raises a RuntimeError like many others."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def use_bf16(precision: str, device: torch.device) -> bool:
    """ "auto": bfloat16 on a GPU that has it, and on a CPU whose matrix units do (elsewhere it is slower than fp32)."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    units = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private in torch 2.9 to 2.14, hence the care
    return any(getattr(torch.cpu, unit, bool)() for unit in units)


@dataclass
class Weights:
    """What a weight file holds: the EMA model, and what the sampler must know of how it was trained."""

    model: DiT
    mode: str
    stages: int
    frames: int
    size: int
    classes: tuple[str, ...]
    step: int
    latent_scale: float | None = None  # None: pictures


HEAD = ("config", "classes", "step", "mode", "stages", "frames", "size", "ema")


def load_file(path: Path, *keys: str) -> dict:
    """A weight file's or checkpoint's contents, tensors on the CPU; no code in it is run. `keys`: what a checkpoint
    needs beyond the weights. Raises ValueError if it is missing, damaged, foreign or of another version."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a whole checkpoint of train.py ({reason})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this version of train.py (format {FORMAT})")
    missing = sorted({*HEAD, *keys} - content.keys())
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: train.py did not write it for this")
    numbers = {name: content[name] for name in ("stages", "frames", "size")}
    if content["mode"] not in ("flow", "ddim") or not all(type(n) is int and n > 0 for n in numbers.values()):
        raise ValueError(f"{path} is damaged: mode {content['mode']!r}, {numbers}")
    return content


def weight_file(path: Path) -> Path:
    """The file itself, or the weights in a run's folder."""
    return path / "weights.pt" if path.is_dir() else path


def load_weights(path: Path, device: torch.device | str = "cpu") -> Weights:
    """The EMA weights of a file that train.py wrote: `weights.pt`, or a whole `checkpoint.pt`. Raises ValueError."""
    content = load_file(path)
    try:
        model = DiT(DiTConfig(**content["config"]))
        model.load_state_dict({name: value.float() for name, value in content["ema"].items()})
        if len(content["classes"]) != model.config.classes or model.config.stages != content["stages"]:
            raise ValueError("its labels or stages are not those of its model")
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} does not fit this version of the model ({reason})") from None
    if not all(value.isfinite().all() for value in model.parameters()):
        raise ValueError(f"{path} holds weights that are NaN or infinite")
    names = ("mode", "stages", "frames", "size", "step")
    head = {name: content[name] for name in names} | {"latent_scale": content.get("latent_scale")}
    return Weights(model.to(device).eval(), classes=tuple(content["classes"]), **head)


def find_weights(mode: str, stages: int) -> Path:
    """The newest run under runs/ that matches, else the shipped weights. Raises ValueError if there are neither."""
    runs = sorted(Path("runs").glob("*/weights.pt"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in runs:
        try:
            content = load_file(path)
        except ValueError as error:
            print(f"passed over: {error}", file=sys.stderr)
            continue
        if (content["mode"], content["stages"]) == (mode, stages):
            return path
    shipped = SHIPPED / f"{mode}-{stages}.pt"
    if not shipped.exists():
        raise ValueError(
            f"no weights for --mode {mode} --stages {stages}: none in runs/ and none shipped; "
            f"train them with: python train.py --mode {mode} --stages {stages}"
        )
    return shipped


def output_coefficients(pyramid: Pyramid, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b), one per clip, such that the pyramid's target is a x_t + b output, for the output of the network.

    flow: (0, 1), the network says v_k. ddim: (sigma, gamma), it says the velocity (eps_k - sigma x_t) / gamma of
    arXiv 2202.00512: training on it is training on eps_k with the squared error weighted by 1 / gamma^2. Past the
    paper, which finetunes a model that predicts noise: trained from scratch on eps_k itself, no digit stayed legible.
    """
    gamma, sigma = pyramid.gamma_sigma(t) if pyramid.mode == "ddim" else (torch.ones(len(t)), torch.zeros(len(t)))
    return per_clip(sigma, x_t), per_clip(gamma, x_t)


def make_predict(
    model: torch.nn.Module, pyramid: Pyramid, labels: Tensor | None, guidance: float, bf16: bool
) -> Callable:
    """The sampler's `predict(x, t, k)`: the model, with classifier-free guidance unless it is 1 (arXiv 2207.12598)."""

    def predict(x: Tensor, t: Tensor, k: int) -> Tensor:
        a, b = output_coefficients(pyramid, x, t)  # before the model: reading t waits for a GPU
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            if labels is None or guidance == 1:
                output = model(x, t, k, labels)
            else:
                both = torch.cat([labels, torch.full_like(labels, model.null_label)])
                conditional, unconditional = model(torch.cat([x, x]), torch.cat([t, t]), k, both).chunk(2)
                output = unconditional + guidance * (conditional - unconditional)
        return a * x + b * output

    return predict


def full_rate_steps(counts: list[int], calls: int = 1) -> float:
    """Cost of a clip in network calls at the full frame rate: stage k's calls weigh 1 / 2^k. Noisiest first."""
    return calls * sum(count / 2**k for k, count in zip(reversed(range(len(counts))), counts, strict=True))


def generate(
    weights: Weights,
    pyramid: Pyramid,
    labels: Tensor | None,
    number: int,
    steps: int | list[int] = 30,
    solver: str = "euler",
    guidance: float = 1.0,
    seed: int = 0,
    precision: str = "auto",
    progress: bool = False,
    first: int = 0,
) -> Tensor:
    """`number` clips (B, C, T, H, W) from number `first` on. Clip i's noise depends on `seed` and i alone."""
    device = next(weights.model.parameters()).device
    shape = (number, weights.model.config.channels, weights.frames, weights.size, weights.size)
    generators = [generator_for(seed, SAMPLING, index) for index in range(first, first + number)]
    labels = labels if labels is None else labels.to(device)
    predict = make_predict(weights.model, pyramid, labels, guidance, use_bf16(precision, device))
    return pyramid.sample(predict, shape, steps, solver, generators, device, progress=progress)


def choose_labels(classes: tuple[str, ...], number: int, names: list[str] | None = None) -> Tensor | None:
    """(B,) labels: the `names` in turn, or every class; None for a model without classes. Raises ValueError."""
    for name in names or ():
        if name not in classes:
            known = f"its labels are {', '.join(classes)}" if classes else "it was trained without labels"
            raise ValueError(f"--label {name} is unknown to the model: {known}")
    chosen = torch.tensor([classes.index(name) for name in names or classes])
    return chosen[torch.arange(number) % len(chosen)] if classes else None


def free_name(stem: Path) -> Path:
    """`stem` with the first number at which there is no such file."""
    for index in range(1_000_000):
        candidate = stem.with_name(f"{stem.name}-{index:03d}")
        if not any(candidate.with_suffix(suffix).exists() for suffix in SUFFIXES):
            return candidate
    raise ValueError(f"{stem.parent} is full")


def make_parser() -> Parser:
    parser = Parser(prog="sample.py", description="Sample clips from trained weights, as a GIF and a PNG strip.")
    add = parser.add_argument
    add("--mode", choices=["flow", "ddim"], help="form of diffusion [the checkpoint's, else flow]")
    add("--stages", type=positive_int, help="stages; 1 is vanilla [the checkpoint's, else 3]")
    add("--checkpoint", type=Path, help="weights.pt or checkpoint.pt of a run [newest match in runs/, else shipped]")
    add("--number", type=positive_int, default=10, help="clips to sample")
    steps = "solver steps: a total, or one count per stage, noisiest first"
    add("--steps", type=positive_int, nargs="+", default=[30], help=steps)
    add("--solver", choices=["euler", "ab2"], default="euler", help="ab2: as many network calls, second order")
    add("--label", nargs="+", help="classes to sample, in turn [every class]")
    guidance = "classifier-free guidance scale; other than 1 doubles the cost"
    add("--guidance", type=real_number(-100, 100), default=1.0, help=guidance)
    add("--seed", type=non_negative_int, default=0, help="clip i's noise depends on the seed and i alone")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where the hardware has it")
    add("--out", type=Path, help="file name; .gif and .png are added [samples/MODE-STAGES-NNN]")
    return parser


def run(args: argparse.Namespace) -> None:
    device = choose_device()
    path = weight_file(args.checkpoint or find_weights(args.mode or "flow", args.stages or 3))
    weights = load_weights(path, device)
    for flag, asked, trained in (("mode", args.mode, weights.mode), ("stages", args.stages, weights.stages)):
        if asked not in (None, trained):
            raise ValueError(f"{path} was trained with --{flag} {trained}, not --{flag} {asked}")
    labels = choose_labels(weights.classes, args.number, args.label)
    if labels is None and args.guidance != 1:
        raise ValueError("--guidance needs a model trained with labels, and this one has none")
    steps = args.steps[0] if len(args.steps) == 1 else args.steps
    counts = split_steps(steps, weights.stages)
    out = args.out.with_suffix("") if args.out and args.out.suffix in SUFFIXES else args.out
    out = out or free_name(Path("samples") / f"{weights.mode}-{weights.stages}")
    gif, strip, latents = (out.with_name(out.name + suffix) for suffix in SUFFIXES)
    files = [gif, strip] if weights.latent_scale is None else [latents]
    for file in files:
        if file.exists():
            raise ValueError(f"--out {out}: {file} exists already; choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)

    print(f"weights: {path} ({weights.mode}, {weights.stages} stages, step {weights.step})")
    start, pyramid = time.perf_counter(), Pyramid(weights.mode, weights.stages)
    options = steps, args.solver, args.guidance, args.seed, args.precision
    clips = generate(weights, pyramid, labels, args.number, *options, progress=True).cpu()
    seconds = (time.perf_counter() - start) / args.number
    if weights.latent_scale is None:
        save_gif(clips, gif, columns=min(5, args.number))
        save_strip(clips, strip)
    else:
        save_latents(clips, latents, weights.latent_scale)
    cost = full_rate_steps(counts, calls=1 if args.guidance == 1 else 2)
    print(f"{args.number} clips of {weights.frames} frames, {seconds:.2f} s a clip")
    print(f"steps {counts} (noisiest first) with {args.solver}: {cost:.4g} full-rate network calls a clip")
    print(f"wrote {' and '.join(map(str, files))}")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    keep_memory()
    try:
        run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        parser.error("not enough memory for so many clips at once: sample fewer with --number")


if __name__ == "__main__":
    main()
