"""What the code costs, beside what the machine can do and what people would use instead.

Any option of train.py may follow, as in `python -m experiments.speed step --width 256 --compile`: what is timed is that
run's own code on its own data. What is compared takes turns, so that a slow moment of the machine falls on all alike.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sample
import train
from checkpoint import make_pyramid
from cli import Parser, choose_device, generator_for, keep_memory, one_sentence, positive_int, use_bf16
from data import open_data
from experiments.peers import count_parameters, make_peers
from experiments.report import Table, add_command, json_to_write, processor, provenance, publish
from experiments.timing import alternate, in_milliseconds, synchronize
from tpdiff import align


class Run:
    """A training run without its loop: the model, its batches of every stage, and one batch to sample from."""

    def __init__(self, args: argparse.Namespace, captured: bool = True):
        if args.init:
            raise ValueError("--init changes no time: leave it out")
        self.args, self.device = args, choose_device()
        self.bf16 = use_bf16(args.precision, self.device)
        self.data = open_data(args)
        args.size = self.data.size
        if not isinstance(args.batch, int) or not isinstance(args.size, int):
            raise ValueError("speed is measured with one number for --batch and one for --size")
        self.state = train.make_state(train.make_model(self.data, args), args, self.device, None)
        self.model = train.fast_form(self.state.model, args, self.device) if captured else self.state.model
        self.pyramid = make_pyramid(args)
        self.x0 = torch.stack([self.data[number][0] for number in range(args.batch)]).to(self.device)
        endless = argparse.Namespace(**vars(args) | {"steps": 2**40})
        self.batches = [train.make_batches(self.data, endless, 0, 0, 1, self.device, k) for k in range(args.stages)]
        predict = sample.make_predict(self.state.ema, None, 1.0, self.bf16)
        self.predict = sample.replayed(predict) if self.device.type == "cuda" else predict  # as `generate` has it
        if args.compile:
            self.state.ema.compile_blocks()
            if not captured:
                self.state.model.compile_blocks()

    def at_stage(self, k: int) -> tuple[Tensor, Tensor]:
        """A batch at the rate of stage k, and a time for each of its clips."""
        return self.pyramid.down(self.x0, k), torch.full((self.args.batch,), 0.5, device=self.device)

    def training_step(self, k: int) -> None:
        train.optimize(self.state, self.model, self.pyramid, self.batches[k], k, self.args)

    @torch.inference_mode()
    def sampling_step(self, k: int) -> None:
        x, t = self.at_stage(k)
        x - 0.1 * self.predict(x, t, k)

    def tokens(self, k: int) -> int:
        shape = (self.args.batch, 1, self.args.frames, self.args.size, self.args.size)
        return math.prod(self.pyramid.shape(shape, k)) // self.args.patch**2

    def forward_flops(self, k: int) -> float:
        """Model FLOP of a forward pass, of its matrix products alone; forward plus backward counts three times."""
        x, t = self.at_stage(k)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter, torch.compiler.set_stance("force_eager"):  # what is compiled is not counted
            self.state.ema(x, t, k)
        return counter.get_total_flops()


def matrix_products(run: Run, k: int) -> tuple[Callable, float]:
    """(a function, its FLOP): the products of a block's linear layers at stage k, forward and backward, alone."""
    width, rows = run.args.width, run.tokens(k)
    random = partial(torch.randn, device=run.device, dtype=torch.bfloat16 if run.bf16 else torch.float32)
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    operands = [(random(rows, m), random(n, m), random(rows, n)) for m, n in shapes]

    def products():
        for x, weight, gradient in operands:
            F.linear(x, weight)
            gradient @ weight
            gradient.T @ x

    return products, sum(6 * rows * m * n for m, n in shapes)


def bench_step(args: argparse.Namespace, repeats: int) -> Iterator[Table]:
    """The whole training step (clips, noise and alignment, unless processes of the loader draw them; forward, backward,
    clip, optimizer, EMA) and a sampling step."""
    start, stages = time.perf_counter(), range(args.stages)
    run = Run(args)
    for k in stages:
        run.training_step(k)
        run.sampling_step(k)  # a GPU's third one is recorded; so that none which is timed will be
    synchronize()
    print(f"to warm up, with a training step of every stage: {time.perf_counter() - start:.1f} s")
    products, flops = zip(*(matrix_products(run, k) for k in stages), strict=True)
    functions = {("products", k): products[k] for k in stages}
    functions |= {("training", k): lambda k=k: run.training_step(k) for k in stages}
    functions |= {("sampling", k): lambda k=k: run.sampling_step(k) for k in stages}
    seconds = alternate(functions, repeats)
    for what, passes in (("training", 3), ("sampling", 1)):
        rows, full = [], median(seconds[what, 0])
        for name, ks in [*((k, [k]) for k in stages), ("all, equally often", stages)]:
            whole = sum(median(seconds[what, k]) for k in ks)
            model = passes * sum(run.forward_flops(k) for k in ks)
            # The mean over the stages weighs each by its model FLOP: the time the products alone would have taken.
            ideal = passes * sum(run.forward_flops(k) * median(seconds["products", k]) / flops[k] for k in ks)
            spread = in_milliseconds(seconds[what, name]) if name in stages else f"{whole / len(ks) * 1e3:.1f}"
            rates = args.batch * len(ks) / whole, sum(run.tokens(k) for k in ks) / whole
            row = [name, spread, f"{whole / len(ks) / full:.2f}", f"{rates[0]:.1f}", f"{rates[1]:.0f}"]
            rows.append([*row, f"{model / whole / 1e9:.0f}", f"{model / ideal / 1e9:.0f}", f"{ideal / whole:.0%}"])
        unit = "GFLOP/s of the model, of its products alone, share"
        header = f"{what} step at stage, ms [quartiles], of stage 0, clips/s, tokens/s, {unit}"
        yield header.split(", "), rows


def bench_peers(args: argparse.Namespace, repeats: int) -> Iterator[Table]:
    """Forward plus backward at the full rate, and ours averaged over the stages: what the pyramid adds."""
    run, rows = Run(args, captured=False), []
    ours = run.state.model
    peers = make_peers(ours.config, count_parameters(ours), args)

    def forward_backward(model: nn.Module, call: Callable, k: int = 0) -> None:
        x, t = run.at_stage(k)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            call(x, t).square().mean().backward()
        model.zero_grad()

    for model, _ in peers.values():
        model.to(run.device).train()
        if args.compile:
            model.compile(dynamic=False)
    calls = {f"ours, stage {k}": (ours, partial(ours, stage=k), k) for k in range(args.stages)} | peers
    seconds = alternate({name: partial(forward_backward, *call) for name, call in calls.items()}, repeats)
    times = {name: (median(values), in_milliseconds(values)) for name, values in seconds.items()}
    best = min(times[name][0] for name in peers)
    average = mean(one for name, (one, _) in times.items() if name not in peers)
    times["ours, mean of stages"] = average, f"{average * 1e3:.1f}"
    for name, (one, shown) in times.items():
        million = count_parameters(peers[name][0] if name in peers else ours) / 1e6
        rows.append([name, f"{million:.2f}", shown, f"{args.batch / one:.1f}", f"{best / one:.2f}"])
    yield ["model", "M parameters", "ms forward + backward [quartiles]", "clips/s", "times the best peer"], rows


def split_step(args: argparse.Namespace, repeats: int) -> Table:
    """The parts of a training step, each timed by itself at every stage; the share is of their sum. What the loader
    does belongs to the step on a CPU; for a GPU processes of its own do it meanwhile."""
    run, sums, losses = Run(args), {}, []
    pyramid, generators = run.pyramid, [torch.Generator() for _ in range(args.batch)]

    def interpolate(x_start, x_end, u, _, k):  # what Algorithm 2 adds to a step, beside what the loader does
        pyramid.interpolate(x_start, x_end, k, u)

    beside = ("of ", "loader") if run.device.type == "cuda" else ("of ",)
    for k in range(args.stages):
        x0 = run.x0.cpu()
        x0_stage, batch = pyramid.down(x0, k), (*next(run.batches[k]), k)
        parts = {"loader: clips": lambda: [run.data[number] for number in range(args.batch)]}
        parts |= {"loader: noise": partial(train.draw_noise, x0_stage, generators, args)}
        if args.align == "assignment":
            parts |= {"of noise: alignment": partial(align, x0_stage, torch.randn_like(x0_stage))}
        parts |= {"loader: end points": partial(pyramid.endpoints, x0, torch.randn_like(x0_stage), k)}
        parts |= {"of forward: interpolation": partial(interpolate, *batch)}
        parts |= {"forward": lambda batch=batch: losses.append(train.training_loss(run.model, pyramid, *batch, args))}
        parts |= {"backward": lambda: losses.pop().backward()}
        parts["clip"] = lambda: nn.utils.clip_grad_norm_(run.state.model.parameters(), args.clip or math.inf)
        parts |= {type(optimizer).__name__: optimizer.step for optimizer in run.state.optimizers}
        ema = partial(train.update_ema, run.state.ema, run.state.model, args.ema, run.state.step)
        parts |= {"EMA": ema, "zero_grad": run.state.model.zero_grad}
        for name, values in alternate(parts, repeats).items():
            sums.setdefault(name, []).append(median(values))
    total = sum(sum(values) for name, values in sums.items() if not name.startswith(beside))
    rows = []
    for name, values in sums.items():
        rows.append([name, *(f"{value * 1e3:.2f}" for value in values), f"{sum(values) / total:.1%}"])
    return ["part of a training step (ms)", *(f"stage {k}" for k in range(args.stages)), "share of all stages"], rows


def split_sampling(args: argparse.Namespace, repeats: int) -> Table:
    """The sampler with a network that costs nothing, against the network: solver and renoising as a share."""
    run, steps, rows = Run(args), 10 * args.stages, []
    generators = [generator_for(0, index) for index in range(args.batch)]
    predicts = {"free": lambda x, t, k: x, "whole": run.predict}
    draw = torch.inference_mode()(run.pyramid.sample)
    for solver in ("euler", "ab2"):
        options = tuple(run.x0.shape), steps, solver, generators, run.device
        functions = {name: partial(draw, predict, *options) for name, predict in predicts.items()}
        free, whole = (median(seconds) for seconds in alternate(functions, max(3, repeats // 5)).values())
        rows.append([solver, f"{free / steps * 1e3:.2f}", f"{whole / steps * 1e3:.2f}", f"{free / whole:.1%}"])
    return ["sampling step with", "ms of solver and renoising", "ms in all", "share"], rows


def wait_for_data(args: argparse.Namespace, steps: int = 100) -> Table:
    """How long the training loop waits for its next batch, or itself draws it, over `steps` steps."""
    run = Run(args)
    args.steps = steps + 5  # five to warm up
    batches = train.make_batches(run.data, args, 0, 0, 1, run.device)
    asked, got = [], []
    for step in range(args.steps):
        asked.append(time.perf_counter())
        batch = next(batches)
        got.append(time.perf_counter())
        k = train.draw_stage(step, args)
        train.optimize(run.state, run.model, run.pyramid, iter([batch]), k, args)
    synchronize()
    whole, waited = time.perf_counter() - asked[5], sum(got[5:]) - sum(asked[5:])
    row = [args.batch, f"{waited / steps * 1e3:.2f}", f"{whole / steps * 1e3:.1f}", f"{waited / whole:.2%}"]
    return ["clips a step", "ms that the loop waits for them, or draws them", "ms in all", "share"], [row]


def compare_alignment(get_map: Callable, repeats: int) -> Table:
    """`align` against torchcfm's exact plan, which minimizes the sum of squared distances, not of distances: for clips
    of so many elements nearly the same."""
    rows = []
    for batch in (16, 64, 256, 1024):
        generator = torch.Generator().manual_seed(batch)
        x, noise = torch.randn(2, batch, 1, 16, 32, 32, generator=generator)
        pairs = torch.as_tensor(get_map(noise, x)).argmax(dim=0)  # of every clip, its noise
        assert len(set(pairs.tolist())) == batch
        functions = {"ours": partial(align, x, noise), "torchcfm": partial(get_map, noise, x)}
        ours, theirs = alternate(functions, max(3, repeats // 5)).values()
        paired = align(x, noise), noise[pairs]
        costs = [f"{(x - noise).double().square().sum().item():.9g}" for noise in paired]
        faster = f"{median(theirs) / median(ours):.1f}"
        rows.append([batch, in_milliseconds(ours), in_milliseconds(theirs), *costs, faster])
    header = "clips of 16x32x32, align (ms), torchcfm (ms), distance, torchcfm's, times as fast"
    return header.split(", "), rows


def bench_parts(args: argparse.Namespace, repeats: int) -> Iterator[Table]:
    """How a step's time splits, what the pyramid adds to it, and alignment beside torchcfm's. Raises ValueError without
    torchcfm."""
    try:
        from torchcfm.optimal_transport import OTPlanSampler
    except ImportError:
        raise ValueError("align is compared with torchcfm's: pip install torchcfm") from None
    yield split_step(args, repeats)
    yield split_sampling(args, repeats)
    yield wait_for_data(args)
    yield compare_alignment(OTPlanSampler(method="exact").get_map, repeats)


def bench_processes(args: argparse.Namespace, repeats: int, interval: int = 30) -> Iterator[Table]:
    """The same global batch by one process on two threads, by two on one thread each, and by two that train apart:
    what these are faster than the joined two is what sharing the gradients costs."""
    Run(args)  # what train.py would refuse is refused here
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    settings = {"1": (1, [[*launch, "--nproc_per_node=1"]]), "2, joined": (2, [[*launch, "--nproc_per_node=2"]])}
    settings["2, apart"] = 2, [[sys.executable]] * 2
    rates = {name: [] for name in settings}
    for _ in range(max(3, repeats // 10)):
        for name, (world, commands) in settings.items():
            words = [train.__file__, *args.options, "--batch", str(args.batch // world), "--steps", str(3 * interval)]
            words += ["--log-interval", str(interval), "--sample-interval", "1000000"]
            rates[name].append(trained_rate([[*command, *words] for command in commands], 2 // world))
    rows = []
    for name, (world, _) in settings.items():
        middle, ends = median(rates[name]), f"[{min(rates[name]):.1f}, {max(rates[name]):.1f}]"
        rate = f"{middle:.1f} {ends}", f"{middle / median(rates['1']):.2f}"
        rows.append([name, 2 // world, args.batch // world, *rate])
    yield ["processes", "threads each", "batch each", "clips/s [least to most]", "of one process"], rows


def trained_rate(commands: list[list[str]], threads: int) -> float:
    """Clips/s between the first and the second logging of runs of train.py that run side by side, together."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        options = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        outs = [Path(folder, str(number)) for number in range(len(commands))]
        children = [subprocess.Popen([*c, "--out", out], **options) for c, out in zip(commands, outs, strict=True)]
        errors = [child.communicate()[1].decode() for child in children]
        for child, error in zip(children, errors, strict=True):
            if child.returncode:
                raise ValueError(f"train.py failed: {error.strip().splitlines()[-1]}")
        metrics = [(out / "metrics.jsonl").read_text().splitlines() for out in outs]
        return sum(json.loads(rows[1])["clips_per_second"] for rows in metrics)


def make_parser() -> Parser:
    parser = Parser(prog="experiments.speed", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    measures = {"step": bench_step, "peers": bench_peers, "parts": bench_parts, "processes": bench_processes}
    for name, function in measures.items():
        add = add_command(commands, name, function)
        add("--repeats", type=positive_int, default=25, help="times that each thing is timed")
        add("--json", type=json_to_write, help="file to write the tables to as well")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser, words = make_parser(), sys.argv[1:] if argv is None else argv
    ours, options = parser.parse_known_args(words)
    keep_memory()
    with one_sentence(parser, train.NO_MEMORY):
        args = train.parse_args(["--out", tempfile.gettempdir() + "/nothing", *options])[0]
        args.options = options
        precision = "bf16" if use_bf16(args.precision, choose_device()) else "fp32"
        words = [ours.what, "--repeats", str(ours.repeats), *options]
        made_by = provenance("experiments.speed", words) | {"precision": precision, "batch": args.batch}
        print(f"torch {torch.__version__} on {processor()}: {made_by['command']}\n{precision}, batch {args.batch}")
        publish(list(ours.function(args, ours.repeats)), made_by, ours.json)


if __name__ == "__main__":
    main()
