"""What the commands share: the parser and its one-sentence errors, argument types, seeds, device, precision, memory."""

import argparse
import ctypes
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist

SAMPLING, TRAINING, STAGE = range(3)  # what a generator is for; its second number
MAY_BE_EMPTY = ("--prompt", "--negative-prompt", "--options")
BRACKETS = "Below, [brackets] hold the default."  # of a help


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        bare = action.default is None or action.default is False or action.default == "" or "[" in action.help
        if isinstance(action.default, list) and not bare:
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return action.help if bare else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with its errors as one sentence on stderr and exit code 2, and a help that shows
    the defaults, explains brackets, and ends with an example: `epilog`, or the bare command, or its first sub-command.
    """

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's. An option of an empty value, as an unset variable of a shell leaves it, is an error."""
        words = sys.argv[1:] if args is None else [*args]
        empty = [name for name, value in pairwise(words) if value == ""]
        empty += [name for name, equals, value in (word.partition("=") for word in words) if equals and not value]
        for name in empty:
            if name.startswith("--") and name not in MAY_BE_EMPTY:
                self.error(f"the value of {name} is empty")
        return super().parse_known_args(words, namespace)

    def format_help(self) -> str:
        first = [next(iter(action.choices)) for action in self._actions if action.nargs == argparse.PARSER]
        about = self.description or ""
        if any("[" in (action.help or "") for action in self._actions) and BRACKETS not in about:
            self.description = f"{about}\n{BRACKETS}"
        python = "python " if ".py" in self.prog else "python -m "
        self.epilog = self.epilog or f"example: {python}{' '.join([self.prog, *first])}"
        return super().format_help().replace("usage: ", f"usage: {python}", 1)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized"):
            commands = next((action.choices for action in self._actions if action.nargs == argparse.PARSER), {})
            options = {option for parser in (self, *commands.values()) for option in parser._option_string_actions}
            wrong = message.split(": ", 1)[1].partition(" ")[0].partition("=")[0]
            near = get_close_matches(wrong, options, n=1, cutoff=0.65)
            message += f"; did you mean {near[0]}?" if near else f"; {'COMMAND ' * bool(commands)}--help lists all"
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
        with suppress(ValueError):
            if low <= float(text) <= high:
                return float(text)
        raise argparse.ArgumentTypeError(f"must be a number in [{low:g}, {high:g}], not {text!r}")

    return parse


def refuse_idle(parser: Parser, args: argparse.Namespace, idle: dict[str, str]) -> None:
    """Raises ValueError for an option that was given and would do nothing. `idle` says where each has no meaning."""
    for name, where in idle.items():
        if getattr(args, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} has no meaning {where}")


class OneOrMore(argparse.Action):
    """For nargs="+": one value is kept as it is, several as a tuple."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values[0] if len(values) == 1 else tuple(values))


def generator_for(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on the numbers alone. Hashed, as torch keeps only 32 bits of a CPU seed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def add_device(add: Callable) -> None:
    """Gives a parser the option --device."""
    device = "auto: an NVIDIA or AMD GPU (cuda) if there is one, else the CPU; Apple's mps was never tried"
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help=device)


def choose_device(name: str = "auto") -> torch.device:
    """The device that --device names, of several GPUs the current one. Raises ValueError if there is none such."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(name, True):
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no such device")
    return torch.device(("cuda" if there["cuda"] else "cpu") if name == "auto" else name)


def start_processes(name: str = "auto") -> tuple[int, int, torch.device]:
    """(rank, number of processes, device), joined through torchrun's environment if it is there."""
    device = choose_device(name)
    if device.type == "cuda":
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"process {local} of this machine finds {gpus} GPU(s): start no more processes than GPUs")
        torch.cuda.set_device(local)
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "mps":
            raise ValueError("--device mps works alone: start train.py without torchrun")
        long = timedelta(hours=2)  # the others wait while the first measures, saves and samples
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=long)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return rank, world, device


def in_turn(rank: int, make: Callable, group: dist.ProcessGroup | None = None):
    """What `make` returns, called by rank 0 first: others need what it writes. If one fails, all raise ValueError.
    `group`: the one to wait in, if the usual one waits too briefly or is of GPUs alone."""
    result, problem = None, ""
    if rank > 0:
        dist.barrier(group)
    try:
        result = make()
    except (ValueError, OSError) as error:
        problem = str(error)
    if rank == 0 and dist.is_initialized():
        dist.barrier(group)
    failed = torch.tensor(float(bool(problem)))
    if dist.is_initialized():
        dist.all_reduce(failed, group=group)
    if failed:
        raise ValueError(problem or "another process of the run could not go on")
    return result


def leave_group(_worker: int) -> None:
    """For a process that prepares clips. Ctrl-C signals the whole group, a scheduler each process of a job, and the
    main one still needs its workers to finish a step and save."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


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


def lost_process(error: Exception) -> str:
    """What to say if the error is that another process is gone, or cannot pass on its clips; else ""."""
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return f"another process of the run has ended ({reason(error)})"
    if "shared memory(shm)" in str(error) or "Bus error" in str(error):
        return "too little shared memory for --workers: --workers 0 needs none, a container gets it by --shm-size"
    if "DataLoader worker (pid" in str(error):
        return f"a process that prepares clips has ended, perhaps for lack of memory; fewer --workers? {reason(error)}"
    return ""


def failed_compiler(error: Exception) -> str:
    """What to say if the error is the compiler's; else ""."""
    of_compiler = type(error).__module__.startswith(("torch._inductor", "torch._dynamo"))
    return f"--compile failed ({reason(error)}): leave it out (with --resume: --no-compile)" if of_compiler else ""


def count(number: int, thing: str) -> str:
    """ "1 clip", "2 clips"."""
    return f"{number} {thing}{'s' * (number != 1)}"


def few(names: Sequence[str | Path]) -> str:
    """The first three names, as they can be printed."""
    shown = (os.fsencode(name).decode(errors="replace") for name in names[:3])
    return ", ".join(shown) + ", ..." * (len(names) > 3)


def reason(error: Exception) -> str:
    """What went wrong, in a line."""
    return "not enough memory" if is_out_of_memory(error) else (str(error) or repr(error)).splitlines()[0]


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to. It replaces `path` if all goes well, else it is removed. The folder of `path` is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="unfinished-", dir=path.parent) as folder:
        aside = Path(folder, path.name)
        yield aside
        aside.replace(path)


def write_text_whole(path: Path, text: str) -> None:
    """Writes a file of text; if that fails, what was there stays."""
    with written_whole(path) as aside:
        aside.write_text(text)


@contextmanager
def one_sentence(parser: Parser, no_memory: str) -> Iterator[None]:
    """Bad input and a lack of memory end the command with one sentence on stderr and exit code 2; Ctrl-C with 130.
    What a terminal or file of another encoding than UTF-8 cannot show is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped\n")
    except (ValueError, OSError) as error:
        parser.error(reason(error))
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            parser.error(no_memory)
        if said := failed_compiler(error):
            parser.error(said)
        if said := lost_process(error):
            parser.exit(1, f"{parser.prog}: {said}; continue with --resume, if there is a checkpoint\n")
        raise


def use_bf16(precision: str, device: torch.device) -> bool:
    """ "auto": bfloat16 on a GPU that has it, and on a CPU whose matrix units do (elsewhere it is slower than fp32)."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    units = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private in torch 2.9 to 2.14, hence the care
    return any(getattr(torch.cpu, unit, bool)() for unit in units)


class StopRequest:
    """Set by Ctrl-C or SIGTERM; the loop then saves and stops, all ranks at the same step."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame) -> None:
        self.signal = number
        # A second Ctrl-C kills, but not with torchrun, which repeats it. A second SIGTERM may be the first, passed on.
        if number == signal.SIGINT and not dist.is_initialized():
            signal.signal(number, signal.SIG_DFL)
            with suppress(OSError):  # the terminal may be closed; print() may be what is interrupted here
                os.write(2, b"\nsaving, then stopping; a second Ctrl-C ends at once\n")

    def agreed(self) -> int:
        if dist.is_initialized():
            flag = torch.tensor(self.signal)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self.signal = int(flag)
        return self.signal
