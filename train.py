"""Train a video diffusion model with or without the temporal pyramid: Algorithm 2 of TPDiff (arXiv 2503.09566).

  python train.py --mode flow                              one process
  torchrun --nproc_per_node=8 train.py --mode flow         one process a GPU

Every random draw belongs to a step (its stage) or a sample number (its clip, noise, time and label dropout), not to a
process. So a resumed run is the same run, and n processes draw as one with n times the clips, but align their own.
"""

import copy
import math
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from bisect import bisect
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

import checkpoint as disk
import cli
from checkpoint import FACTORS, make_pyramid, run_name
from cli import generator_for, non_negative_int, positive_int, real_number, use_bf16
from data import DATA_ONLY, DataError, height_width, list_held_out, open_data
from model import Captured, DiT, DiTConfig, make_optimizers, update_ema
from sample import save_preview
from tpdiff import Generators, Pyramid, align, draw_nearest, randn

# --resume takes all other arguments from the checkpoint and refuses to change them; the clips of --data may have moved.
FREE = "steps workers device accumulate compile gradient-checkpointing sample-number log-interval sample-interval "
FREE += "save-interval keep-interval"
HELD_OUT, MOST_SKIPPED = 64, 10  # clips that a loss is measured on; steps in a row without a gradient
NO_MEMORY = "not enough memory: a smaller --batch, --width, --size or --frames needs less, or --gradient-checkpointing"


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="train.py", description=__doc__.split("\n")[0])
    add = parser.add_argument_group("method").add_argument
    add("--mode", choices=["flow", "ddim"], default="flow", help="form of diffusion: flow matching or DDIM")
    add("--stages", type=positive_int, default=3, help="pyramid stages, each at half the frame rate; 1 is vanilla")
    add("--stage-odds", type=positive_int, nargs="+", help="how often each is trained, noisiest first [equally often]")
    add("--pyramid", choices=FACTORS, default="time", help="what a stage halves: frame rate, height and width, or all")
    add("--shift", type=real_number(0.01, 100), default=1.0, help="above 1: noisier times in training and sampling")
    ends = "times at which the stages end, noisiest first and the last 0, as in --ends 0.5 0.25 0 [equally spaced]"
    add("--ends", type=real_number(0, 1), nargs="+", help=ends)
    pairing = "how noise is paired with data: permuted within a batch, the nearest of --candidates, or neither"
    add("--align", choices=["assignment", "nearest", "none"], default="assignment", help=pairing)
    add("--candidates", type=positive_int, default=8, help="noises a clip for --align nearest")
    add = parser.add_argument_group("data").add_argument
    add("--data", help="folder of animations, numbered stills, videos or latents [moving digits, made on the fly]")
    add("--labels", choices=["folder"], help="folder: the names of --data's sub-folders are the classes [no labels]")
    add("--fps", type=real_number(0.01, 1000), help="frames a second at which --data is read [each at its own]")
    add("--from-start", action="store_true", help="take each clip's first frames, as latents of causal VAEs need")
    add("--held-out", type=real_number(0, 0.5), default=0.0, help="share not trained on; 64 windows of it give a loss")
    add("--frame-stride", type=positive_int, default=1, help="2 takes every second frame of --data, and so on")
    add("--flip", action="store_true", help="mirror each window of --data with chance 1/2")
    add("--grayscale", action="store_true", help="one channel from --data instead of three")
    add("--latent-scale", type=real_number(1e-6, 1e6), default=1.0, help="of all channels; to bring latents to size 1")
    add("--digits", type=positive_int, default=1, help="moving digits in a clip")
    add("--frames", type=positive_int, default=16, help="frames a clip, any number")
    size = "height and width, or one number for both; multiples of the patch and of what --pyramid halves [32; of "
    add("--size", type=positive_int, nargs="+", action=cli.OneOrMore, help=size + "latents all they have]")
    add("--workers", type=non_negative_int, help="processes that prepare clips [4 with a GPU; else 1, 0 for digits]")
    add = parser.add_argument_group("model").add_argument
    add("--patch", type=positive_int, default=4, help="patch size in pixels")
    add("--init", metavar="CHECKPOINT", help="weights to start from: of an image model, or of another video model")
    add("--width", type=positive_int, default=96, help="channels of a token")
    add("--depth", type=positive_int, default=4, help="blocks")
    add("--heads", type=positive_int, default=4, help="attention heads")
    add("--convolution", action="store_true", help="a 3x3 convolution in each MLP, so that patches see neighbours")
    add = parser.add_argument_group("optimization").add_argument
    add("--steps", type=positive_int, default=3000, help="optimizer steps; a change on --resume moves --lr's curve")
    batch = "clips a process in one forward pass: one number, or one for each stage, noisiest first"
    add("--batch", type=positive_int, nargs="+", action=cli.OneOrMore, default=4, help=batch)
    add("--accumulate", type=positive_int, default=1, help="micro-batches a step; CUDA graphs need 1 and no torchrun")
    add("--optimizer", choices=["muon", "adamw"], default="muon", help="for the blocks' matrices; AdamW for the rest")
    add("--lr", type=real_number(0, 10), default=2e-3, help="peak learning rate")
    add("--warmup", type=non_negative_int, default=100, help="steps of linear warm-up, on top of half a cosine to 0")
    add("--weight-decay", type=real_number(0, 10), default=0.01, help="decoupled weight decay")
    add("--ema", type=real_number(0, 1), default=0.995, help="decay of the weights' moving average")
    add("--clip", type=real_number(0, 1e9), default=1.0, help="largest norm of the gradient; 0 does not clip")
    add("--label-dropout", type=real_number(0, 1), default=0.1, help="share of labels dropped, for guidance")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 where the hardware has it")
    cli.add_device(add)
    add("--compile", action=BooleanOptionalAction, default=False, help="torch.compile: slow to start, faster after")
    add("--gradient-checkpointing", action=BooleanOptionalAction, default=False, help="takes less memory, more time")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=non_negative_int, default=0, help="of everything random")
    add("--out", type=Path, help="folder of the run [runs/MODE-STAGES, -PYRAMID if not time, -NAME of --data]")
    add("--resume", action="store_true", help=f"continue the run in --out; may change: {FREE}")
    add("--log-interval", type=positive_int, default=50, help="steps between rows of metrics.jsonl")
    add("--sample-interval", type=positive_int, default=800, help="steps between sample GIFs")
    add("--sample-number", type=non_negative_int, default=10, help="clips of a sample GIF; 0: none are made")
    add("--save-interval", type=positive_int, default=400, help="steps between checkpoints")
    add("--keep-interval", type=non_negative_int, default=0, help="steps between weights-STEP.pt that stay; 0: none")
    return parser


def parse_args(argv: list[str] | None) -> tuple[Namespace, dict | None]:
    """The arguments, and on --resume the checkpoint, whose arguments are then the defaults. Raises ValueError."""
    parser = make_parser()
    args, checkpoint = parser.parse_args(argv), None
    out = args.out or Path("runs") / run_name(args.mode, args.stages, args.pyramid, args.data)
    if args.resume:
        args, checkpoint = disk.args_to_resume(parser, argv, out, {*FREE.replace("-", "_").split(), "out", "resume"})
    else:
        disk.check_new(out, args.data)
    idle = {"digits": "with --data"} if args.data else dict.fromkeys(DATA_ONLY, "without --data")
    idle |= {} if args.align == "nearest" else {"candidates": f"with --align {args.align}"}
    idle |= {} if args.resume or args.labels or not args.data else {"label_dropout": "without --labels"}
    idle |= {} if args.resume or args.stages > 1 else dict.fromkeys(["pyramid", "stage_odds"], "with --stages 1")
    idle |= {} if args.resume or args.frames > 1 else {"frame_stride": "with --frames 1"}
    cli.refuse_idle(parser, args, idle)
    args.out, stages, given = out, args.stages, disk.as_typed(args.batch)
    if len(batch_sizes(args)) != stages:
        raise ValueError(f"--batch needs one number, or one for each of --stages {stages}, not {given}")
    if args.stage_odds and (len(args.stage_odds) != stages or max(args.stage_odds) > 1000):
        raise ValueError(f"--stage-odds needs a number up to 1000 for each of --stages {stages}, noisiest first")
    if args.ends and (len(args.ends) != stages or args.ends[-1] != 0 or args.ends != sorted({*args.ends} - {1})[::-1]):
        raise ValueError(f"--ends needs a time below 1 for each of --stages {stages}, falling to 0")
    if args.pyramid == "time" and 1 < stages and args.frames <= 2 ** (stages - 2) and not args.resume:
        raise ValueError(f"--stages {stages} is too many for --frames {args.frames}: take fewer, or --pyramid space")
    args.size = args.size if args.size or args.data else 32
    disk.check_size(args)
    make_pyramid(args)  # refuses stages that the schedule has no noise for
    return args, checkpoint


def batch_sizes(args: Namespace) -> tuple[int, ...]:
    """Clips of a micro-batch by stage, from k = 0 on."""
    return (args.batch,) * args.stages if isinstance(args.batch, int) else args.batch[::-1]


class TrainingBatches(Dataset):
    """What a micro-batch of this rank takes in: clips, and all that is random about them. It is drawn here, on the CPU
    and with --workers beside the training, so that a GPU need not wait for it."""

    def __init__(self, dataset: Dataset, args: Namespace, rank: int, world: int, stage: int | None = None):
        self.dataset, self.args, self.rank, self.world, self.stage = dataset, args, rank, world, stage
        self.pyramid, self.ends = make_pyramid(args), [0]

    def stage_of(self, micro: int) -> int:
        return draw_stage(micro // self.args.accumulate, self.args) if self.stage is None else self.stage

    def numbers(self, micro: int) -> range:
        """The sample numbers of a micro-batch: ranks take turns, and no number is left out."""
        sizes = batch_sizes(self.args)
        if len(set(sizes)) == 1:
            return range(first := (micro * self.world + self.rank) * sizes[0], first + sizes[0])
        while len(self.ends) <= micro + 1:  # how many samples all ranks have had after each micro-batch
            self.ends.append(self.ends[-1] + self.world * sizes[self.stage_of(len(self.ends) - 1)])
        size = sizes[self.stage_of(micro)]
        return range(first := self.ends[micro] + self.rank * size, first + size)

    def __getitem__(self, micro: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What `draw` returns, of this micro-batch."""
        numbers, k = self.numbers(micro), self.stage_of(micro)
        clips, labels = zip(*(self.dataset[number] for number in numbers), strict=True)
        classes = len(self.dataset.classes)
        drawn = draw(torch.stack(clips), torch.tensor(labels), classes, self.pyramid, k, numbers, self.args)
        share = get_worker_info() is not None  # if /dev/shm is full, it is here that the main process hears of it
        return tuple(each.share_memory_() if share and each is not None else each for each in drawn)


def make_batches(
    dataset: Dataset, args: Namespace, start: int, rank: int, world: int, device: torch.device, stage: int | None = None
) -> Iterator:
    """This rank's micro-batches from step `start` on, of the steps' own stages or all of one, on `device` but for u."""
    gpu = device.type == "cuda"
    usual = 4 if gpu else int(bool(args.data))  # to draw digits a CPU needs less time than a worker costs
    batches = TrainingBatches(dataset, args, rank, world, stage)
    micros = range(start * args.accumulate, args.steps * args.accumulate)
    options = {"num_workers": usual if args.workers is None else args.workers, "pin_memory": gpu}
    for x_start, x_end, u, y in DataLoader(batches, None, sampler=micros, worker_init_fn=cli.leave_group, **options):
        x_start, x_end = (each.to(device, non_blocking=True) for each in (x_start, x_end))
        yield x_start, x_end, u, y if y is None else y.to(device, non_blocking=True)


def draw_stage(step: int, args: Namespace) -> int:
    """The stage of a step, as often as --stage-odds says. It depends on the step alone, so that no rank waits for a
    longer stage. The paper does not say how often; equally often is the default."""
    odds = args.stage_odds or [1] * args.stages
    drawn = torch.randint(sum(odds), (), generator=generator_for(args.seed, cli.STAGE, step)).item()
    return bisect(list(accumulate(reversed(odds))), drawn)


def draw_noise(x0_stage: Tensor, generators: Generators, args: Namespace) -> Tensor:
    """Noise for clips at a stage's rate, paired with them as --align says."""
    if args.align == "nearest":
        return draw_nearest(x0_stage, args.candidates, generators)
    noise = randn(x0_stage.shape, generators, x0_stage.device, x0_stage.dtype)
    return align(x0_stage, noise) if args.align == "assignment" else noise  # Algorithm 1


def draw(x0: Tensor, labels: Tensor, classes: int, pyramid: Pyramid, k: int, numbers: range, args: Namespace) -> tuple:
    """The end points of clips `x0` (B, C, T, H, W) at stage k, places u (B,) between them, and labels (B,): `classes`
    where one is dropped, None where the data has none (-1). Sample n's draws come from a generator of its own."""
    generators = [generator_for(args.seed, cli.TRAINING, number) for number in numbers]
    u, dropout = torch.stack([torch.rand(2, generator=generator) for generator in generators]).unbind(1)
    noise = draw_noise(pyramid.down(x0, k), generators, args)
    y = labels.where(dropout >= args.label_dropout, classes) if classes else None
    return *pyramid.endpoints(x0, noise, k), u, y  # Eq. 7-8


def training_loss(
    model: torch.nn.Module, pyramid: Pyramid, x_start: Tensor, x_end: Tensor, u: Tensor, y: Tensor | None, k: int, args
) -> Tensor:
    """The rest of Algorithm 2 for one batch at stage k: a point between its end points, the squared error of what the
    network says there. `u` on the CPU."""
    x_t, target, t = pyramid.interpolate(x_start, x_end, k, u)  # Eq. 10-13
    with torch.autocast(x_t.device.type, torch.bfloat16, enabled=use_bf16(args.precision, x_t.device)):
        output = model(x_t, t, k, y)
    return (output - target).square().mean()


def fast_form(model: DiT, args: Namespace, device: torch.device) -> torch.nn.Module:
    """What the training loop calls: the model compiled if --compile says so; joined with those of other processes, or
    captured if it is alone on a GPU and each of its steps has one backward pass."""
    if args.compile:
        model.compile_blocks()
    if dist.is_initialized():
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    if device.type != "cuda" or args.accumulate > 1:
        return model
    pyramid, inputs = make_pyramid(args), []
    for k, batch in enumerate(batch_sizes(args)):
        shape = pyramid.shape((batch, model.config.channels, args.frames, *height_width(args.size)), k)
        labels = (torch.zeros(batch, dtype=torch.long, device=device),) if model.config.classes else ()
        inputs.append((torch.zeros(shape, device=device), torch.full((batch,), 0.5, device=device), *labels))
    return Captured(model, inputs, use_bf16(args.precision, device))


def learning_rate(step: int, args: Namespace) -> float:
    """Half a cosine from args.lr down to 0, times a linear warm-up."""
    return args.lr * min(1.0, (step + 1) / (args.warmup + 1)) * (1 + math.cos(math.pi * step / args.steps)) / 2


@dataclass
class State:
    """What a run is made of, at the start of `step`."""

    model: torch.nn.Module
    ema: torch.nn.Module | None  # None: no moving average is kept
    optimizers: list[torch.optim.Optimizer]
    losses: Tensor  # (2, K): sum and number of the losses of each stage since the last row of metrics.jsonl
    since_judged: Tensor  # (2, K): the same, for the next checkpoint's loss
    step: int = 0
    seconds: float = 0.0  # spent in training steps, over all resumptions
    skipped: int = 0  # steps whose gradient was not finite
    skipped_in_a_row: int = 0
    best: float = math.inf  # lowest loss of a checkpoint, the mean of the stages' means on the way to it
    norm: Tensor | None = None  # of the last gradient, before it was clipped
    moving: bool = False  # an optimizer step is half done: what is there belongs to no step


def make_model(dataset: Dataset, args: Namespace) -> DiT:
    """A new model; of clips of one frame an image model."""
    torch.manual_seed(args.seed)
    shape = dataset.channels, args.patch, args.width, args.depth, args.heads, args.stages, len(dataset.classes)
    return DiT(DiTConfig(*shape, FACTORS[args.pyramid], args.frames > 1, args.convolution))


def make_state(model: DiT, args: Namespace, device: torch.device, checkpoint: dict | None) -> State:
    model = model.to(device)
    model.gradient_checkpointing = args.gradient_checkpointing
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    losses = (checkpoint or {}).get("losses", torch.zeros(2, 2, args.stages))  # older checkpoints have none
    dtype = torch.bfloat16 if use_bf16(args.precision, device) else torch.float32
    optimizers, counts = make_optimizers(model, args.optimizer, args.lr, args.weight_decay, dtype), {}
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        for optimizer, own in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        counts = {name: checkpoint[name] for name in disk.COUNTS}
    return State(model, ema, optimizers, *losses.to(device), **counts)


@torch.no_grad()
def held_out_loss(model: DiT, pyramid: Pyramid, clips: Dataset | None, args, stop=None) -> list[float] | None:
    """The EMA model's loss at each stage, k = 0 first, on clips that training never sees, with the same noise and times
    at every call. Checkpoints can be compared by it, also those of runs that differ in --seed or --steps alone. None if
    there are no such clips, `stop` has a signal, or something fails, which is printed: the run goes on."""
    losses, fixed = [], {"seed": 0, "label_dropout": float(args.label_dropout == 1), "workers": 0, "accumulate": 1}
    try:
        for k, size in enumerate(batch_sizes(args) if clips else ()):
            options = Namespace(**vars(args) | fixed | {"steps": math.ceil(HELD_OUT / size)})
            batches = make_batches(clips, options, 0, 0, 1, model.unembed.weight.device, k)
            losses.append(0.0)
            for batch in batches:
                if stop and stop.signal:
                    return None
                losses[k] += training_loss(model, pyramid, *batch, k, args).item() / options.steps
    except Exception as error:
        tqdm.write(f"no held-out loss this time ({cli.reason(error)})", file=sys.stderr)
        return None
    return losses or None


def optimize(state: State, model, pyramid: Pyramid, batches: Iterator, k: int, args: Namespace) -> None:
    """One optimizer step at stage k, its losses added to the state's. Raises what `end_step` does."""
    losses = torch.zeros((), device=state.losses.device)
    for micro in range(args.accumulate):
        x_start, x_end, u, y = next(batches)
        with nullcontext() if micro == args.accumulate - 1 or model is state.model else model.no_sync():
            loss = training_loss(model, pyramid, x_start, x_end, u, y, k, args)
            (loss / args.accumulate).backward()
        losses += loss.detach()
    end_step(state, losses, k, learning_rate(state.step, args), args)


def end_step(state: State, losses: Tensor, k: int, lr: float, args: Namespace) -> None:
    """Moves the weights by the gradient that is there, or leaves them as they are if it is NaN or infinite. Raises
    SystemExit after MOST_SKIPPED such steps in a row. `losses` is the sum of those of the micro-batches."""
    state.norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), args.clip or math.inf)
    state.moving = True
    if state.norm.isfinite():  # the same on all ranks, as the gradient is
        state.losses[0, k] += losses
        state.losses[1, k] += args.accumulate
        state.skipped_in_a_row = 0
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        if state.ema is not None:
            update_ema(state.ema, state.model, args.ema, state.step)
    else:
        state.skipped += 1
        state.skipped_in_a_row += 1
    state.model.zero_grad()
    state.step, state.moving = state.step + 1, False
    if state.skipped_in_a_row == MOST_SKIPPED:
        last = next((f"the last checkpoint is {path}" for path in args.out.glob("checkpoint.pt")), "nothing saved yet")
        when = f"{MOST_SKIPPED} steps in a row, last at step {state.step}, stage {k}"
        raise SystemExit(f"the gradient was NaN or infinite {when}: try a lower --lr in a new run; {last}")


def set_up(args: Namespace, checkpoint: dict | None) -> tuple:
    """What `train` needs after `args`. Raises ValueError or OSError on bad input."""
    rank, world, device = cli.start_processes(args.device)
    if checkpoint and (micros := checkpoint["world"] * checkpoint["args"]["accumulate"]) != world * args.accumulate:
        raise ValueError(f"{args.out} must keep processes x --accumulate = {micros}, not {world} x {args.accumulate}")
    cli.in_turn(rank, lambda: disk.claim(args.out, rank, checkpoint))
    dataset = cli.in_turn(rank, lambda: open_data(args, args.out / "index.json"))
    args.size = dataset.size
    disk.check_size(args, dataset.latent)
    if checkpoint and checkpoint["digest"] not in dataset.digests:
        advice = f"a new run with --init {args.out} and another --out can"
        raise ValueError(f"{args.data} holds other clips than when {args.out} began: --resume cannot go on, {advice}")
    args.precision = "bf16" if use_bf16(args.precision, device) else "fp32"  # a resumed run keeps it
    model = make_model(dataset, args)
    if args.init and not checkpoint:
        disk.start_from_file(model, dataset, args)
    state = make_state(model, args, device, checkpoint)
    if rank == 0:
        disk.start_metrics(args.out / "metrics.jsonl", state.step)
        list_held_out(dataset, args.out / "held-out.txt")
        print(dataset.summary)
        size = sum(parameter.numel() for parameter in state.model.parameters()) / 1e6
        kind = f"{args.precision} on {world} x {device.type}"
        print(f"{args.mode}, {cli.count(args.stages, 'stage')}, {size:.2f} M parameters, {kind}")
        if args.warmup >= args.steps:
            print(f"note: --warmup {args.warmup} is not over after --steps {args.steps}: --lr is never reached")
        if args.align == "assignment" and 1 in batch_sizes(args):
            print("note: one clip has no other to exchange noises with; --align nearest draws several and takes one")
    return dataset, state, rank, world, device


def train(args: Namespace, dataset: Dataset, state: State, rank: int, world: int, device: torch.device) -> int:
    """The whole run. Returns 0, or 128 + the number of the signal that stopped it."""
    stop, pyramid, first = cli.StopRequest(), make_pyramid(args), rank == 0
    model = fast_form(state.model, args, device)
    batches = make_batches(dataset, args, state.step, rank, world, device)
    mark, clips, saved, end = time.perf_counter(), 0, state.step, state.step >= args.steps
    with tqdm(total=args.steps, initial=state.step, desc="training", unit="step", disable=not first) as bar:
        while not end:
            k, lr = draw_stage(state.step, args), learning_rate(state.step, args)
            try:
                optimize(state, model, pyramid, batches, k, args)
                bar.update()
                clips += batch_sizes(args)[k] * args.accumulate * world
                end = stop.agreed() or state.step == args.steps
                due = any(n and state.step % n == 0 for n in (args.save_interval, args.keep_interval, args.steps))
                save_due, sample_due = end or due, any(state.step % n == 0 for n in (args.sample_interval, args.steps))
                if save_due or sample_due or state.step % args.log_interval == 0:
                    torch.get_device_module(device).synchronize()  # a CPU's does nothing
                    now = time.perf_counter()
                    state.seconds, rate, mark = state.seconds + now - mark, clips / (now - mark), now
                    judged = held_out_loss(state.ema, pyramid, save_due and first and dataset.judged_on, args, stop)
                    loss = disk.write_metrics(args.out / "metrics.jsonl", state, lr, rate, first, judged)
                    bar.set_postfix(loss="none" if loss is None else loss, lr=lr, clips_per_s=f"{rate:.1f}")
                    if save_due and first:
                        disk.save(state, dataset, args, world, due, judged)
                        saved = state.step
                    if sample_due and first and args.sample_number:
                        save_preview(disk.weights_of(state, dataset, args), args, batch_sizes(args)[0], stop)
                    mark, clips = time.perf_counter(), 0
            except Exception:  # clips or a process are lost, or memory is short: save the finished steps
                bar.close()  # or what is said now stands in its line
                if first and state.step > saved and not state.moving:
                    state.seconds += time.perf_counter() - mark
                    disk.save(state, dataset, args, world)
                    print(f"step {state.step}: saved, as then something failed", file=sys.stderr)
                raise
    del model  # or DDP holds the process group last and joins gloo's threads while it keeps the lock they wait for
    if dist.is_initialized():
        dist.barrier()  # all leave together, also while the first still saves
        dist.destroy_process_group()
    if first:
        done, stopped = "done; python sample.py --checkpoint", "stopped and saved; continue with --resume --out"
        print(f"step {state.step}: {stopped if state.step < args.steps else done} {args.out}")
    return 128 + stop.signal if state.step < args.steps else 0


def main(argv: list[str] | None = None) -> None:
    cli.keep_memory()
    parser, ready = make_parser(), None
    try:
        with cli.one_sentence(parser, NO_MEMORY):
            args, checkpoint = parse_args(argv)
            ready = set_up(args, checkpoint)
        raise SystemExit(train(args, *ready))
    except DataError as error:  # from a loader's process it comes with that one's traceback in front
        parser.error(str(error).strip().splitlines()[-1].removeprefix("video.DataError: "))
    except OSError as error:
        parser.error(f"{error}; once that is mended, {disk.how_to_go_on(args.out)}")
    except (RuntimeError, MemoryError) as error:
        if cli.is_out_of_memory(error):
            parser.error(NO_MEMORY)
        if not (said := cli.lost_process(error) or cli.failed_compiler(error)):
            raise
        raise SystemExit(f"train.py: {said}; {disk.how_to_go_on(args.out)}") from None
    finally:
        disk.release()
        if dist.is_initialized() and ready is None:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
