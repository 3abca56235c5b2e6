"""What attention costs by the number of tokens, and training by the size of its clips.

  python -m experiments.sizes attention
  python -m experiments.sizes training --limit 16

A row of `training` is a process of its own: two training steps at each stage, of which the second is timed, or one that
takes longer than ten seconds; clips of one at a time. Its peak is what the process held at most, over what it held
before them. What would need more than --limit GiB is left out.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median

import torch

import model
import train
from cli import Parser, keep_memory, one_sentence, positive_int, real_number
from experiments.report import Table, add_command, json_to_write, provenance, publish
from experiments.speed import Run
from experiments.timing import alternate, synchronize

SYSTEMS = {"vanilla": ["--stages", "1"], "time": [], "space-time": ["--pyramid", "space-time"]}


def attention(args: argparse.Namespace) -> Iterator[Table]:
    """Time of attention by the tokens of a sequence. Forward plus backward of 4,096 tokens, 4 heads of 24: written
    out, by torch's fused kernel, and by that in fp32 whatever the clips are in."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        rows = []
        for tokens in (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)[: 2 if args.smoke else None]:
            shape = max(1, 4096 // tokens), 1, tokens, 4, 24
            q, k, v, gradient = (torch.randn(shape, dtype=dtype, device=device).transpose(2, 3) for _ in range(4))
            inputs = [part.requires_grad_() for part in (q, k, v)]

            def both(function, inputs=inputs, gradient=gradient):
                function(*inputs).backward(gradient)

            def in_fp32(q, k, v):
                return model.fused_attention(q.float(), k.float(), v.float()).to(v.dtype)

            ways = [model.written_attention, model.fused_attention]
            if dtype != torch.float32:
                ways.append(in_fp32)
            times = alternate({way: partial(both, way) for way in ways}, args.repeats).values()
            rows.append([tokens, *(f"{median(seconds) * 1e3:.1f}" for seconds in times)])
        header = ["tokens", f"written out, {dtype} (ms)".replace("torch.", ""), "fused", "fused in fp32"]
        yield header[: len(rows[0])], rows


def training(args: argparse.Namespace) -> Iterator[Table]:
    """Peak memory and clips/s by size and frames, vanilla and pyramids, with and without gradient checkpointing."""
    rows = []
    for size, frames in product((16,) if args.smoke else (32, 64, 128, 256), (16,) if args.smoke else (16, 64)):
        for name, system in SYSTEMS.items():
            row = [f"{size}x{size}", frames, name]
            for flags in ([], ["--gradient-checkpointing"]):
                options = [*system, *flags, *args.options, "--batch", "1", "--size", str(size), "--frames", str(frames)]
                found = measured_apart(options, args.limit)
                row += ["over", ""] if found is None else [f"{found[0]:.2f}", f"{1 / found[1]:.3g}"]
            rows.append(row)
            print(row, flush=True)
    plain, checkpointed = ("GiB", "clips/s"), ("GiB, checkpointed", "clips/s, checkpointed")
    yield ["size", "frames", "pyramid", *plain, *checkpointed], rows


def measured_apart(options: list[str], limit: float) -> tuple[float, float] | None:
    """(GiB at most, seconds of a step, the mean of the stages) of training in a process of its own, whose memory is
    bounded to `limit` GiB; None if that is too little."""
    words = [sys.executable, "-m", "experiments.sizes", "one", "--limit", str(limit), *options]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode and train.NO_MEMORY not in done.stderr:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr}")
    return None if done.returncode else tuple(map(float, done.stdout.split()[-2:]))


def one(args: argparse.Namespace) -> None:
    """Prints what `measured_apart` asks for, of this process."""
    if not torch.cuda.is_available():
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (int((args.limit + 2) * 2**30),) * 2)  # 2: before any step
    run = Run(train.parse_args(["--out", tempfile.gettempdir() + "/nothing", *args.options])[0], captured=False)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # from now on the most counts that is held from now on
    before, times = peak_bytes(), []
    for k in reversed(range(run.args.stages)):
        for _ in range(2):
            synchronize()
            start = time.perf_counter()
            run.training_step(k)
            synchronize()
            took = time.perf_counter() - start
            if took > 10:
                break
        times.append(took)
    print((peak_bytes() - before) / 2**30, mean(times))


def peak_bytes() -> int:
    """The most memory this process has held: of the GPU, else of the machine (Linux; getrusage counts a parent's)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def make_parser() -> Parser:
    parser = Parser(prog="experiments.sizes", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    for function in (attention, training):
        add = add_command(commands, function.__name__, function)
        add("--repeats", type=positive_int, default=9, help="times that each way is timed")
        add("--limit", type=real_number(1, 10_000), default=16, help="GiB that a process may hold")
        add("--smoke", action="store_true", help="a tiny size, to see that it runs")
        add("--json", type=json_to_write, help="file to write the tables to as well")
    commands.add_parser("one").add_argument("--limit", type=float)  # without a help it is not listed
    return parser


def main(argv: list[str] | None = None) -> None:
    parser, words = make_parser(), sys.argv[1:] if argv is None else argv
    args, args.options = parser.parse_known_args(words)
    keep_memory()
    with one_sentence(parser, train.NO_MEMORY):
        if args.what == "one":
            return one(args)
        shown = [word for word in words if word != "--json" and word != str(args.json)]
        made_by = provenance("experiments.sizes", shown)
        publish(list(args.function(args)), made_by, args.json)


if __name__ == "__main__":
    main()
