"""A run on disk: its checkpoints, its weights, its metrics, and how each is written and read.

A run's folder holds
  checkpoint.pt           the newest state, to resume from
  checkpoint-previous.pt  the one before it
  checkpoint-best.pt      the one with the lowest loss on the clips held out, or else in training on the way to it
  weights.pt              the weights' moving average (EMA) in bf16, to sample from
  metrics.jsonl           a row of losses every few steps
  held-out.txt            the clips that --held-out keeps out of training
  lock                    empty; held by the process that trains
  index.json              what the files of --data say of themselves, so that the next start is quick

Checkpoints and weights are written aside and then renamed, so that a crash while saving leaves the previous file
intact. They are read with weights_only: no code in them is run.
"""

import json
import math
import os
import shutil
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from cli import write_text_whole
from data import height_width
from model import DiT, DiTConfig
from tpdiff import Pyramid

FORMAT = 4  # of the weight files; raised when old ones can no longer be read
HEAD = ("config", "classes", "step", "mode", "stages", "frames", "size", "ema")
SHIPPED = Path(__file__).parent / "weights"
FACTORS = {"time": (2, 1, 1), "space": (1, 2, 2), "space-time": (2, 2, 2)}  # what --pyramid names
SETTINGS = ("mode", "stages", "pyramid", "shift", "ends", "frames", "size")  # of a run, that sampling must know
CLAIMED = []  # descriptors of the locks that this process holds
COUNTS = ("step", "seconds", "skipped", "skipped_in_a_row", "best")  # of a State, kept in a checkpoint


def make_pyramid(run, kind: type = Pyramid) -> Pyramid:
    """The pyramid of a `run`, which is arguments of train.py or Weights. In ddim mode the network says the velocity.
    That is past the paper, whose network predicts noise: trained from scratch on noise, no digit stayed
    legible. Raises ValueError, as Pyramid does."""
    options = {"factor": FACTORS[run.pyramid], "shift": run.shift, "ends": run.ends and run.ends[::-1]}
    return kind(run.mode, run.stages, prediction={"flow": None, "ddim": "velocity"}[run.mode], **options)


def as_typed(value) -> str:
    """A value of an option as it is typed: "8 4"; None and False are "left out"."""
    if value is None or value is False:
        return "left out"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def check_size(args: Namespace, latent: bool = False) -> None:
    """Raises ValueError if height and width, where they are known yet, do not divide into patches at every stage."""
    divisors = [args.patch * n ** (args.stages - 1) for n in FACTORS[args.pyramid][1:]]
    if any(length % divisor for length, divisor in zip(height_width(args.size or divisors), divisors, strict=True)):
        why = f"--patch {args.patch}, {args.stages} stages in {args.pyramid}"
        why += "; latents are (C, T, H, W), and by default --size is all of H and W" * latent
        raise ValueError(f"--size {as_typed(args.size)}: height and width must be multiples of {divisors[0]}: {why}")


def run_name(mode: str, stages: int, pyramid: str, data: str | None = None) -> str:
    """The name of a run's folder: flow-3, or flow-3-space-time, or of the clips of a folder flow-3-FOLDER."""
    parts = mode, str(stages), "" if pyramid == "time" else pyramid, Path(data).resolve().name if data else ""
    return "-".join(filter(None, parts))


@dataclass
class Weights:
    """What a weight file holds: the EMA model, and what the sampler must know of how it was trained."""

    model: DiT
    mode: str
    stages: int
    frames: int
    size: int | tuple[int, int]
    classes: tuple[str, ...]
    step: int
    latent_scale: float | None = None  # None: pictures
    pyramid: str = "time"
    shift: float = 1.0
    ends: list[float] | None = None  # as --ends has them: noisiest stage first
    label_dropout: float = 0.1
    digest: str = ""  # of the clips it was trained on; "" of digits, and in older files
    held_out: float = 0.0
    fps: float | None = None  # frames a second of what it was trained on, where its clips say it


def weights_of(state, dataset: Dataset, args: Namespace) -> Weights:
    """The EMA weights of a run's `state` (train.State), as sampling takes them."""
    about = {name: getattr(args, name) for name in (*SETTINGS, "label_dropout", "held_out")}
    about |= {"classes": tuple(dataset.classes), "step": state.step, "digest": dataset.digests[0], "fps": dataset.rate}
    return Weights(state.ema, latent_scale=args.latent_scale if dataset.latent else None, **about)


def load_file(path: Path, *keys: str) -> dict:
    """A weight file's or checkpoint's contents, tensors on the CPU; no code in it is run. `keys`: what a checkpoint
    needs beyond the weights. Raises ValueError if it is missing, damaged, foreign or of another version."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Exception as error:
        text = str(error) or type(error).__name__  # of foreign files torch advises to run what is in them
        if "weights_only" in text:
            raise ValueError(f"{path} is not a checkpoint of train.py: it is of another kind") from None
        raise ValueError(f"{path} is not a whole checkpoint of train.py ({text.splitlines()[0]})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint, or not of this version of train.py (format {FORMAT})")
    if missing := sorted({*HEAD, *keys} - content.keys()):
        kind = "no whole checkpoint.pt" if keys else "damaged"
        raise ValueError(f"{path} lacks {', '.join(missing)}: it is {kind}")
    content = {"pyramid": "time", "shift": 1.0, "ends": None} | content  # older ones are of the paper's pyramid
    head = {name: content[name] for name in SETTINGS}
    with suppress(KeyError, TypeError, ValueError, IndexError, RuntimeError):
        make_pyramid(Namespace(**head))
        numbers = content["stages"], content["frames"], *height_width(content["size"])
        if all(type(number) is int and number > 0 for number in numbers):
            return content
    raise ValueError(f"{path} is damaged: {head}")


def load_checkpoint(path: Path) -> dict:
    """What --resume goes on from. Raises ValueError if it is missing, damaged or foreign."""
    try:
        stamp = path.stat().st_mtime_ns if path.exists() else 0
        return load_file(path, "args", "world", "model", "optimizers", *COUNTS) | {"stamp": stamp}
    except ValueError as error:
        previous = path.with_name("checkpoint-previous.pt")
        advice = f"; {previous} is the one before it, and can be copied there" if previous.exists() else ""
        raise ValueError(f"{error}{advice}") from None


def args_to_resume(parser: ArgumentParser, argv: list[str] | None, out: Path, free: set[str]) -> tuple[Namespace, dict]:
    """The run's arguments, those in `free` by `argv`, and its checkpoint. Raises ValueError if it changes another."""
    if not list(out.glob("checkpoint*.pt")):
        raise ValueError(f"{out / 'checkpoint.pt'} does not exist: give the run's folder with --out")
    checkpoint = load_checkpoint(out / "checkpoint.pt")
    if checkpoint["args"].get("time_shift", 1.0) != 1 and checkpoint["args"]["stages"] > 1:
        raise ValueError(f"{out} was trained with --time-shift, which is no longer supported: begin a new run")
    parser.set_defaults(**{"shift": checkpoint["args"].pop("time_shift", 1.0)} | checkpoint["args"])
    args = parser.parse_args(argv)
    args.precision = parser.get_default("precision") if args.precision == "auto" else args.precision
    for name in vars(args).keys() - free:
        was, now, flag = parser.get_default(name), getattr(args, name), "--" + name.replace("_", "-")
        moved = name == "data" and was and now  # whether it holds the same clips is seen when they are read
        if was != now and not moved:
            was, now = as_typed(was), as_typed(now)
            raise ValueError(f"{out} was trained with {flag} {was}; --resume cannot change it to {now}")
    if os.environ.get("RANK", "0") == "0":
        note = "; a larger --steps trains it on" if checkpoint["step"] >= args.steps else ""
        if (made_by := checkpoint.get("torch", torch.__version__)) != torch.__version__:
            note += f"; torch {made_by} saved it, {torch.__version__} goes on, so numbers may differ"
        print(f"resuming {out}, which has {checkpoint['step']} of {args.steps} steps{note}")
    return args, checkpoint


def make_folder(folder: Path, out: Path) -> None:
    """Makes the folder that --out needs, and writes a file into it that is gone at once. Raises ValueError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--out {out}: {folder} is no folder to write in ({error.strerror})") from None


def claim(out: Path, rank: int = 0, checkpoint: dict | None = None) -> None:
    """Makes a run's folder. In rank 0 it keeps other runs out of it until `release`, or until the process ends, however
    it ends. Raises ValueError if another is there, or wrote to it after the `checkpoint` was read (or none was there).
    Where the system or the file system has no such locks, none is kept out."""
    make_folder(out, out)
    if rank > 0:
        return
    with suppress(ImportError):
        import fcntl

        CLAIMED.append(os.open(out / "lock", os.O_RDWR | os.O_CREAT, 0o666))  # to close it would unlock
        try:
            fcntl.lockf(CLAIMED[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another process trains in {out}: wait for its end or choose another --out") from None
        except OSError:
            pass
    if checkpoint is None:
        check_new(out, None)
    elif (out / "checkpoint.pt").stat().st_mtime_ns != checkpoint["stamp"]:
        raise ValueError(f"{out} has gone on meanwhile: start --resume again")


def release() -> None:
    """Lets other processes into the folders of `claim`."""
    while CLAIMED:
        os.close(CLAIMED.pop())


def weight_file(path: Path) -> Path:
    """The file itself, or the weights in a run's folder."""
    return path / "weights.pt" if path.is_dir() else path


def load_weights(path: Path, device: torch.device | str = "cpu") -> Weights:
    """The EMA weights of a file that train.py wrote: `weights.pt`, or a whole `checkpoint.pt`. Raises ValueError."""
    content = load_file(path)
    try:
        model = DiT(DiTConfig(**content["config"]))
        if model.config.factor != FACTORS[content["pyramid"]]:
            raise ValueError(f"its factor is not that of the pyramid in {content['pyramid']}")
        model.load_state_dict({name: value.float() for name, value in content["ema"].items()})
        if len(content["classes"]) != model.config.classes or model.config.stages != content["stages"]:
            raise ValueError("its labels or stages are not those of its model")
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path} does not fit this version of the model ({str(error).splitlines()[0]})") from None
    if not all(value.isfinite().all() for value in model.parameters()):
        raise ValueError(f"{path} holds weights that are NaN or infinite")
    # older checkpoints have some of it in their arguments alone, but --fps there is not that of a window
    more = content.get("args", {}) | {"fps": None} | content
    about = {field.name: more[field.name] for field in fields(Weights) if field.name in more}
    return Weights(**about | {"model": model.to(device).eval(), "classes": tuple(content["classes"])})


def find_weights(mode: str, stages: int, pyramid: str = "time") -> Path:
    """The newest run under runs/ that matches, else the shipped weights. Raises ValueError if there are neither."""
    others = []
    for path in sorted(Path("runs").glob("*/weights.pt"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            content = load_file(path)
            if (content["mode"], content["stages"], content["pyramid"]) == (mode, stages, pyramid):
                return path
            others.append(path.parent)
        except ValueError as error:
            print(f"passed over: {error}", file=sys.stderr)
    shipped = SHIPPED / f"{run_name(mode, stages, pyramid)}.pt"
    if not shipped.exists():
        flags = f"--mode {mode} --stages {stages} --pyramid {pyramid}"
        raise ValueError(f"no weights for {flags}: none in runs/, no {shipped.name}; to train: python train.py {flags}")
    if others:
        print(f"note: no run in runs/ has this mode, stages and pyramid; the newest is {others[0]}", file=sys.stderr)
    return shipped


def start_from_file(model: DiT, dataset: Dataset, args: Namespace) -> None:
    """Gives the model the weights of --init. Raises ValueError if it was trained for something else."""
    trained = f"--init {args.init} was trained"
    weights = load_weights(weight_file(Path(args.init)))
    if weights.mode != args.mode:
        raise ValueError(f"{trained} with --mode {weights.mode}, not {args.mode}")
    if bool(weights.classes) != bool(dataset.classes):
        raise ValueError(f"{trained} {'with' if weights.classes else 'without'} labels, unlike this run: see --labels")
    if dataset.classes:  # by name, and a name that is new starts as the null label
        old, embedding = weights.classes, weights.model.embed_label
        rows = [old.index(name) if name in old else len(old) for name in dataset.classes] + [len(old)]
        embedding.weight = torch.nn.Parameter(embedding.weight[rows])
        weights.model.config = replace(weights.model.config, classes=len(dataset.classes))
    if weights.latent_scale not in (None, args.latent_scale):
        raise ValueError(f"{trained} with --latent-scale {weights.latent_scale}")
    if args.mode == "flow":  # whose target is x_start - x_end, larger the longer a stage is
        new, old = (mean(stage.t_start - stage.t_end for stage in make_pyramid(run)) for run in (args, weights))
        for weight in weights.model.unembed.parameters():
            weight.data *= new / old
    try:
        model.start_from(weights.model)
    except ValueError as error:
        raise ValueError(f"--init {args.init}: {error}") from None


def write_whole(content: dict, path: Path, also: str | None = None) -> None:
    """torch.save that leaves a whole file or the old one: written aside, then renamed. Before that it gets its second
    name, `also`. Raises OSError."""
    aside = path.with_name(path.name + ".tmp")
    aside.unlink(missing_ok=True)  # what a kill left may have a second name, whose file must not be written into
    try:
        with open(aside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        aside.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({str(error).splitlines()[0]}); what was there is kept") from None
    try:
        if also:
            keep_as(aside, also)
    except OSError:  # for a copy there was no room
        os.replace(aside, path)
        raise
    os.replace(aside, path)


def keep_as(path: Path, name: str) -> None:
    """A second name, in the same folder, for a file that later will be replaced."""
    aside = path.with_name(name + ".tmp")
    aside.unlink(missing_ok=True)
    try:
        os.link(path, aside)
    except OSError:  # a file system without hard links
        try:
            shutil.copyfile(path, aside)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
    os.replace(aside, path.with_name(name))
    aside.unlink(missing_ok=True)  # it stays if both names were of one file already


def save(
    state, dataset: Dataset, args: Namespace, world: int, due: bool = False, held_out: list[float] | None = None
) -> None:
    """Writes a run's `state` (train.State): weights.pt (the EMA in bf16) to sample from and to ship, then checkpoint.pt
    to resume from. The one before it stays as checkpoint-previous.pt. Of those made on schedule (`due`) the one with
    the lowest loss stays as checkpoint-best.pt: the mean of the stages' `held_out`, or else of their training losses
    since the last that was due. Raises OSError."""
    newest, best, since = args.out / "checkpoint.pt", state.best, state.since_judged
    if due and (held_out or since[1].all() and not args.held_out):
        best = min(mean(held_out) if held_out else (since[0] / since[1]).mean().item(), best)
        since = torch.zeros_like(since)
    about = {name: value for name, value in vars(weights_of(state, dataset, args)).items() if name != "model"}
    head = {"format": FORMAT, "config": asdict(state.model.config)} | about
    ema = state.ema.state_dict()
    whole = head | {"ema": ema, "model": state.model.state_dict(), "world": world}
    whole |= {name: getattr(state, name) for name in COUNTS} | {"best": best, "torch": str(torch.__version__)}
    whole |= {"losses": torch.stack([state.losses, since])}
    whole |= {"optimizers": [optimizer.state_dict() for optimizer in state.optimizers]}
    whole |= {"args": {name: value for name, value in vars(args).items() if name not in ("out", "resume")}}
    write_whole(head | {"ema": {name: value.bfloat16() for name, value in ema.items()}}, args.out / "weights.pt")
    if args.keep_interval and state.step % args.keep_interval == 0:
        keep_as(args.out / "weights.pt", f"weights-{state.step}.pt")
    if newest.exists():
        keep_as(newest, "checkpoint-previous.pt")
    # Last, so that --resume makes anew whatever a kill before this kept from being written.
    write_whole(whole, newest, "checkpoint-best.pt" if best < state.best else None)
    state.best, state.since_judged = best, since  # only now: what failed is tried again


def check_new(out: Path, data: str | None) -> None:
    """Raises ValueError if the folder holds the clips to train on, or weights or checkpoints of a run, also of one of
    examples/finetune.py."""
    if data and Path(data).resolve() == out.resolve():
        raise ValueError(f"--out {out} is --data: the run's own files would be trained on; choose another --out")
    if data and not Path(data).is_dir():
        raise ValueError(f"{data} is not a folder: --data wants one with clips in it")
    patterns = "checkpoint*.pt", "weights*.pt", "lora.safetensors", "network"
    if held := sorted(path for pattern in patterns for path in out.glob(pattern)):
        raise ValueError(f"{held[0]} is there already: {how_to_go_on(out)}")


def how_to_go_on(out: Path) -> str:
    """What to do about a run that has ended, or could not go on."""
    saved = (out / "checkpoint.pt").exists()
    return f"continue with --resume --out {out}" if saved else "start a new run with another --out"


def start_metrics(path: Path, step: int) -> None:
    """Makes metrics.jsonl, or drops its rows past `step`, and a half-written one: those steps will be run again."""
    rows, kept = path.read_text().splitlines() if step and path.exists() else [], []
    for row in rows:
        with suppress(ValueError):
            kept += [row] if json.loads(row)["step"] <= step else []
    write_text_whole(path, "".join(row + "\n" for row in kept))  # a full disk costs no rows


def write_metrics(
    path: Path, state, lr: float, rate: float, first: bool, held_out: list[float] | None = None
) -> float | None:
    """Appends a row of the losses of `state` (train.State) and returns its loss: the means since the last row, over the
    ranks, in all and by stage; and, if they were measured, those by stage on the clips held out."""
    if dist.is_initialized():
        dist.all_reduce(state.losses)
    sums, counts = state.losses.tolist()
    state.since_judged += state.losses
    state.losses.zero_()
    loss = sum(sums) / sum(counts) if sum(counts) else None
    by_stage = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
    row = {"step": state.step, "loss": loss, "loss_by_stage": by_stage, "lr": lr}
    row |= {"clips_per_second": round(rate, 2), "seconds": round(state.seconds, 4), "skipped": state.skipped}
    norm = math.inf if state.norm is None else state.norm.item()
    row |= {"gradient_norm": round(norm, 6) if math.isfinite(norm) else None}  # of the last step, before clipping
    row |= {"held_out_by_stage": held_out} if held_out else {}
    if first:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
    return loss
