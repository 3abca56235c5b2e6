"""Finetune someone else's video model on the pyramid: Wan, CogVideoX, AnimateDiff (families.py has a row for each).

  accelerate launch -m examples.finetune --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --data clips --out runs/wan
  python -m examples.finetune ...                                        one process
  torchrun --nproc_per_node=2 -m examples.finetune ...                   several processes, on CPUs too

First the model's own VAE and text encoder turn the clips of --data and their captions (clip.txt beside clip.mp4) into
files under --out, once. Then its network is trained alone, by Algorithm 2 of the paper. --stages 1 is the model's own
diffusion, by the same code. A batch of one cannot exchange noises; it takes the nearest of 8. There are no previews and
no losses of held-out clips. How much memory real models need was not measured. A run's folder holds
  cache/             the clips' latents and prompts      run.json        how it was trained
  lora.safetensors   or network/, for generate.py        metrics.jsonl   losses every few steps
  checkpoint.pt      to resume from

Every draw belongs to a step or to a sample number, as in train.py, so a resumed run is the same run.
"""

import hashlib
import json
import os
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from tqdm import tqdm

import checkpoint as disk
import cli
from data import DataError, FolderClips, height_width
from examples import generate as models
from examples.families import Family, check_packages, library
from tpdiff import Pyramid
from train import State, draw_noise, draw_stage, end_step

ORDER = 3  # what a generator is for, beside cli.SAMPLING and so on
UNSAVED = ("out", "resume", "device")
# what --resume may change
FREE = ("model", "motion_adapter", "data", "steps", "gradient_checkpointing", "log_interval", "save_interval")
NO_MEMORY = "not enough memory: a smaller --size, --frames (also while encoding), --batch or --lora needs less"


def make_parser() -> cli.Parser:
    example = "example: accelerate launch -m examples.finetune --model FOLDER --data clips --lora 64 --out runs/mine"
    about = {"description": "Finetune Wan, CogVideoX or AnimateDiff on the pyramid.", "epilog": example}
    parser = cli.Parser(prog="examples.finetune", **about)
    add = parser.add_argument_group("model and method").add_argument
    add("--model", help="name on Hugging Face's hub or local folder")
    add("--motion-adapter", help="AnimateDiff's, with an image model as --model")
    add("--stages", type=cli.positive_int, default=3, help="pyramid stages; 1 is vanilla")
    add("--pyramid", choices=disk.FACTORS, default="time", help="what a stage halves")
    add("--shift", type=cli.real_number(0.01, 100), help="time shift, above 1 for noisier times [the model's own]")
    add("--lora", type=cli.non_negative_int, default=64, help="rank; 0 trains all weights and needs a smaller --lr")
    pairing = "noise permuted within a batch, the nearest of 8, or neither [assignment; with --batch 1 nearest]"
    add("--align", choices=["assignment", "nearest", "none"], help=pairing)
    add("--prompt-dropout", type=cli.real_number(0, 1), default=0.1, help="share of prompts dropped, for guidance")
    add = parser.add_argument_group("data").add_argument
    add("--data", help="folder of videos or animations, each beside its caption, a .txt of its name")
    add("--frames", type=cli.positive_int, help="longer files become several clips [Wan 81, CogVideoX 49, else 16]")
    add("--size", type=cli.positive_int, nargs="+", action=cli.OneOrMore, help="clips are cropped to it [the model's]")
    add("--fps", type=cli.real_number(0, 1000), help="rate to count frames at; 0: each file's own [the model's]")
    add = parser.add_argument_group("optimization").add_argument
    add("--steps", type=cli.positive_int, default=5000, help="optimizer steps; --resume may change it")
    add("--batch", type=cli.positive_int, default=1, help="clips a process in one forward pass")
    add("--accumulate", type=cli.positive_int, default=1, help="micro-batches a step")
    add("--lr", type=cli.real_number(0, 1), default=1e-4, help="learning rate of AdamW")
    add("--warmup", type=cli.non_negative_int, default=100, help="steps of linear warm-up; then the rate stays")
    add("--clip", type=cli.real_number(0, 1e9), default=1.0, help="largest norm of the gradient; 0 does not clip")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 on a GPU that has it")
    add("--gradient-checkpointing", action=BooleanOptionalAction, default=True, help="less memory for more time")
    cli.add_device(add)
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=cli.non_negative_int, default=0, help="of everything random")
    add("--out", type=Path, required=True, help="folder of the run")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--log-interval", type=cli.positive_int, default=10, help="steps between rows of metrics.jsonl")
    add("--save-interval", type=cli.positive_int, default=250, help="steps between checkpoints")
    return parser


def parse_args(argv: list[str] | None) -> tuple[Namespace, Family]:
    """The arguments, on --resume those of the run, and the model's row. Raises ValueError."""
    parser = make_parser()
    args, was = parser.parse_args(argv), {}
    check_packages()
    if not args.resume:
        disk.check_new(args.out, args.data)
    elif not (args.out / "checkpoint.pt").exists():
        raise ValueError(f"--out {args.out} holds no checkpoint.pt to resume from")
    else:
        was = json.loads((args.out / "run.json").read_text())
        parser.set_defaults(**{name: value for name, value in was.items() if name != "step"})
        args = parser.parse_args(argv)
        args.precision = was["precision"] if args.precision == "auto" else args.precision
    if not args.model or not args.data:
        raise ValueError("--model and --data are needed")
    family = models.family_of(args.model, args.motion_adapter)
    args.frames, args.size = args.frames or family.frames, height_width(args.size or family.size)
    args.fps = family.fps if args.fps is None else args.fps
    args.shift = args.shift or family.schedule(args.model).get("shift")
    args.candidates, args.stage_odds = 8, None  # what train.py's draws also take
    args.align = args.align or ("nearest" if args.batch == 1 else "assignment")
    if args.align == "assignment" and args.batch == 1:
        raise ValueError("--align assignment exchanges noises within a batch: --batch 1 needs --align nearest or none")
    args.encoded_by = was.get("encoded_by", [args.model, args.motion_adapter])
    for name, now in settings(args).items():
        if args.resume and name not in FREE and was[name] != now:
            flag, before, now = "--" + name.replace("_", "-"), disk.as_typed(was[name]), disk.as_typed(now)
            raise ValueError(f"{args.out} was trained with {flag} {before}; --resume cannot change it to {now}")
    return args, family


def settings(args: Namespace) -> dict:
    """What run.json keeps of the arguments, as JSON has it."""
    return json.loads(json.dumps({name: value for name, value in vars(args).items() if name not in UNSAVED}))


# ---- Clips and captions become files, once


def read_captions(dataset: FolderClips) -> list[str]:
    """Each clip's caption. Raises DataError if one is missing."""
    files = [source.files[0].with_suffix(".txt") for source in dataset.sources]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise DataError(f"no caption for {cli.count(len(missing), 'clip')}, first {missing[0]} (it may be empty)")
    return [" ".join(file.read_text(encoding="utf-8").split()) for file in files]


def prepare_clips(args: Namespace, family: Family, network: Module, pyramid: Pyramid, accelerator, patient) -> int:
    """Fills --out/cache, unless it is full of the same clips, and says how many there are: files NUMBER.safetensors
    with `latent` (C, t, h, w) and `prompt` (tokens, channels), and empty.safetensors with the empty prompt. Of a clip
    every whole run of --frames is one. Processes wait for each other in the group `patient`. Raises ValueError for data
    or sizes that do not fit."""
    open_clips = partial(FolderClips, args.data, args.frames, args.size, index=args.out / "index.json")
    dataset = cli.in_turn(accelerator.process_index, partial(open_clips, fps=args.fps or None), patient)
    if dataset.latent:
        raise DataError(f"{args.data} holds latents: clips of pictures are wanted, which the model's VAE encodes")
    captions, cache = read_captions(dataset), args.out / "cache"
    windows = [
        (source, start, caption)
        for source, caption in zip(dataset.sources, captions, strict=True)
        for start in range(0, source.frames - args.frames + 1, args.frames)
    ]
    named = [[str(source.files[0].relative_to(args.data)), source.stamp[1], *rest] for source, *rest in windows]
    made_of = [named, *args.encoded_by, args.frames, args.size, args.fps]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    encoded = (cache / "digest").exists() and (cache / "digest").read_text() == digest
    if args.resume and not encoded:
        raise ValueError(f"{args.data} holds other clips than when {args.out} began: --resume cannot go on")
    vae = models.load_part(family.vae, args.model, "vae")
    models.check_frames(family, network, models.latent_shape(family, vae, pyramid, args.frames, args.size)[0])
    if encoded:
        return len(windows)
    accelerator.print(dataset.summary)
    cache.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    encoder = models.load_text_encoder(family, args.model, dtype).to(accelerator.device)
    prompts = {"": models.encode_prompts(family, encoder, [""], accelerator.device)[0]}
    begun, first = cache / "begun", accelerator.is_main_process
    if first and not (begun.exists() and begun.read_text() == digest):  # else what is there is of these clips
        for file in [cache / "digest", *cache.glob("*.safetensors")]:
            file.unlink(missing_ok=True)
        save_tensors({"prompt": prompts[""]}, cache / "empty.safetensors")
        begun.write_text(digest)
    wait(patient)
    vae.to(accelerator.device).requires_grad_(False)
    mine = range(accelerator.process_index, len(windows), accelerator.num_processes)
    mine = [number for number in mine if not (cache / f"{number}.safetensors").exists()]
    for number in tqdm(mine, desc="encoding", unit="clip", disable=not first):
        source, start, caption = windows[number]
        if caption not in prompts:  # the last one is kept, for the next window of the same clip
            encoded = models.encode_prompts(family, encoder, [caption], accelerator.device)[0]
            prompts = {"": prompts[""], caption: encoded}
        latent = models.encode(vae, read_window(dataset, source, start)[None])[0].cpu()
        save_tensors({"latent": latent, "prompt": prompts[caption]}, cache / f"{number}.safetensors")
    wait(patient)
    if first:
        begun.replace(cache / "digest")
    return len(windows)


def wait(group: dist.ProcessGroup | None) -> None:
    if group:
        dist.barrier(group)


def read_window(dataset: FolderClips, source, start: int) -> Tensor:
    """(3, T, H, W) from frame `start` of a clip on. Raises DataError that names a damaged file."""
    try:
        return dataset.window(source, start)
    except Exception as error:  # Pillow and FFmpeg raise many kinds
        raise DataError(f"{source.files[0]} cannot be used: {cli.reason(error)}") from None


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file, whole or not there."""
    aside = path.with_name(path.name + ".tmp")
    library("safetensors.torch").save_file({name: each.contiguous() for name, each in tensors.items()}, aside)
    os.replace(aside, path)


# ---- Training


def draw(cache: Path, count: int, numbers: range, pyramid: Pyramid, k: int, args: Namespace) -> tuple[Tensor, ...]:
    """Clips of these sample numbers with their noise at stage k, their place u in it and their prompts, on the CPU."""
    load, clips, prompts = library("safetensors.torch").load_file, [], []
    generators = [cli.generator_for(args.seed, cli.TRAINING, number) for number in numbers]
    u, dropout = torch.stack([torch.rand(2, generator=generator) for generator in generators]).unbind(1)
    for number, drop in zip(numbers, dropout < args.prompt_dropout, strict=True):
        epoch, place = divmod(number, count)
        order = torch.randperm(count, generator=cli.generator_for(args.seed, ORDER, epoch))
        clip = load(cache / f"{order[place]}.safetensors")
        clips.append(clip["latent"])
        prompts.append(load(cache / "empty.safetensors")["prompt"] if drop else clip["prompt"])
    x0 = torch.stack(clips)
    return x0, draw_noise(pyramid.down(x0, k), generators, args), u, torch.stack(prompts)


def draw_batches(cache: Path, count: int, pyramid: Pyramid, step: int, accelerator, args: Namespace) -> Iterator:
    """This process's micro-batches of a step, all of one stage. Processes take turns at the sample numbers."""
    for micro in range(step * args.accumulate, (step + 1) * args.accumulate):
        first = (micro * accelerator.num_processes + accelerator.process_index) * args.batch
        numbers = range(first, first + args.batch)
        x0, noise, u, text = draw(cache, count, numbers, pyramid, draw_stage(step, args), args)
        yield x0.to(accelerator.device), noise.to(accelerator.device), u, text.to(accelerator.device)


def training_loss(model: Callable, pyramid: Pyramid, k: int, x0: Tensor, noise: Tensor, u: Tensor, text: Tensor):
    """Algorithm 2 at stage k; target and times are float32."""
    x_start, x_end = pyramid.endpoints(x0, noise, k)  # Eq. 7-8
    x_t, target, t = pyramid.interpolate(x_start, x_end, k, u)  # Eq. 10-13
    return (model(x_t, t, k, text) - target).square().mean()


def load_trainable(args: Namespace, family: Family, bf16: bool) -> Module:
    """The network to train: all of its weights in float32, or LoRA's in float32 beside frozen ones that may be bf16."""
    dtype = torch.bfloat16 if bf16 and args.lora else torch.float32
    network = models.load_network(family, args.model, args.motion_adapter, dtype)
    network.requires_grad_(not args.lora).train()
    if args.lora:
        torch.manual_seed(args.seed)
        lora = {"r": args.lora, "lora_alpha": args.lora, "target_modules": list(family.lora)}
        network.add_adapter(library("peft").LoraConfig(**lora, init_lora_weights="gaussian"))
        for weight in trained(network).values():
            weight.data = weight.data.float()
    if args.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return network


def trained(network: Module) -> dict[str, Tensor]:
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}


def frozen(network: Module) -> Tensor:
    """A number of each weight that is not trained: tells a model from another."""
    return torch.tensor([weight.flatten()[0].bfloat16() for weight in network.parameters() if not weight.requires_grad])


def make_state(args: Namespace, network: Module, accelerator) -> State:
    network.to(accelerator.device)
    optimizer = torch.optim.AdamW(trained(network).values(), args.lr, weight_decay=0.0)
    state = State(network, None, [optimizer], *torch.zeros(2, 2, args.stages, device=accelerator.device))
    if args.resume:
        content = torch.load(args.out / "checkpoint.pt", map_location="cpu", weights_only=True)
        if content["world"] != accelerator.num_processes:
            raise ValueError(f"{args.out} was trained by {content['world']} processes, and --resume keeps their number")
        try:
            if not torch.equal(content["frozen"], frozen(network)):
                raise ValueError
            network.load_state_dict(content["weights"], strict=False)
            optimizer.load_state_dict(content["optimizer"])
        except (KeyError, RuntimeError, ValueError):  # older versions did not keep what tells models apart
            another = f"{args.model} is not the model that {args.out} was trained on"
            raise ValueError(f"{another}, or an older version trained it: begin a new run") from None
        state.step, state.seconds, state.skipped = content["step"], content["seconds"], content["skipped"]
    return state


def save(state: State, args: Namespace, world: int) -> None:
    """What generate.py reads, and last what --resume does."""
    if args.lora:
        state.model.save_lora_adapter(args.out, weight_name="lora.safetensors")
    else:
        state.model.save_pretrained(args.out / "network")
    cli.write_text_whole(args.out / "run.json", json.dumps(settings(args) | {"step": state.step}))
    content = {"weights": trained(state.model), "optimizer": state.optimizers[0].state_dict(), "world": world}
    content |= {name: getattr(state, name) for name in ("step", "seconds", "skipped")} | {"frozen": frozen(state.model)}
    disk.write_whole(content, args.out / "checkpoint.pt")


def optimize(state: State, called: Module, model: Callable, pyramid: Pyramid, batches: Iterator, accelerator, args):
    """One optimizer step. Raises what `end_step` does."""
    k, bf16 = draw_stage(state.step, args), args.precision == "bf16"
    total = torch.zeros((), device=accelerator.device)
    for micro, batch in enumerate(batches):
        last = micro == args.accumulate - 1
        with nullcontext() if last else accelerator.no_sync(called):
            # frozen bf16 weights take bf16 clips as in sampling; those trained in float32 are cast as they are used
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16 and not args.lora):
                loss = training_loss(model, pyramid, k, *batch)
            (loss / args.accumulate).backward()
        total += loss.detach()
    end_step(state, total, k, learning_rate(state.step, args), args)


def learning_rate(step: int, args: Namespace) -> float:
    return args.lr * min(1.0, (step + 1) / (args.warmup + 1))


def train(args: Namespace, family: Family, accelerator, patient: dist.ProcessGroup | None) -> int:
    """The whole run. Returns 0, or 128 + the number of the signal that stopped it."""
    pyramid = models.make_pyramid(family, args.model, args.stages, args.pyramid, args.shift)
    first, device = accelerator.is_main_process, accelerator.device
    args.precision = "bf16" if models.use_bf16(args.precision, device) else "fp32"  # a resumed run keeps it
    network = load_trainable(args, family, args.precision == "bf16")
    count = prepare_clips(args, family, network, pyramid, accelerator, patient)
    state = make_state(args, network, accelerator)
    called = accelerator.prepare_model(network)
    model, metrics = models.make_model(family, network, pyramid, called), args.out / "metrics.jsonl"
    weights = sum(weight.numel() for weight in trained(network).values())
    accelerator.print(f"{count} clips, {weights:,} weights to train, {pyramid.mode}, {args.stages} stages")
    if first:
        disk.start_metrics(metrics, state.step)
    stop, mark, begun, end = cli.StopRequest(), time.perf_counter(), state.step, state.step >= args.steps
    with tqdm(total=args.steps, initial=state.step, unit="step", disable=not first) as bar:
        while not end:
            batches = draw_batches(args.out / "cache", count, pyramid, state.step, accelerator, args)
            try:
                optimize(state, called, model, pyramid, batches, accelerator, args)
                stopped = accelerator.reduce(torch.tensor(float(stop.signal > 0), device=device)).item() > 0
            except Exception:
                if first and state.step > 0 and not state.moving:  # the steps before the one that failed
                    state.seconds += time.perf_counter() - mark
                    save(state, args, accelerator.num_processes)
                raise
            bar.update()
            end = stopped or state.step == args.steps
            save_due = end or state.step % args.save_interval == 0
            if save_due or state.step % args.log_interval == 0:
                seconds, clips = time.perf_counter() - mark, (state.step - begun) * args.batch * args.accumulate
                state.seconds += seconds
                rate = clips * accelerator.num_processes / seconds
                loss = disk.write_metrics(metrics, state, learning_rate(state.step - 1, args), rate, first)
                bar.set_postfix(loss="none" if loss is None else loss)
                if save_due and first:
                    save(state, args, accelerator.num_processes)
                mark, begun = time.perf_counter(), state.step
    accelerator.wait_for_everyone()
    accelerator.print(f"step {state.step}: saved; python -m examples.generate --lora {args.out} --prompt ... --out ...")
    return 128 + (stop.signal or 15) if state.step < args.steps else 0


def make_accelerator(args: Namespace) -> tuple:
    """accelerate's, and a group for long waits: while the first process looks at all clips, and until the slowest has
    encoded its part; None for one process. Raises ValueError if gradients would be shared in another way than DDP's."""
    on_cpu = cli.choose_device(args.device).type == "cpu"
    saving = library("accelerate").InitProcessGroupKwargs(timeout=timedelta(hours=2))  # the others wait meanwhile
    accelerator = library("accelerate").Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[saving])
    kind = accelerator.distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(f"accelerate's configuration asks for {kind}: run accelerate launch --multi_gpu")
    patient = dist.new_group(timeout=timedelta(hours=24), backend="gloo") if dist.is_initialized() else None
    return accelerator, patient


def claim(args: Namespace, rank: int) -> None:
    """Makes the run's folder this run's alone."""
    stamp = (args.out / "checkpoint.pt").stat().st_mtime_ns if args.resume else None  # it is read later
    disk.claim(args.out, rank, {"stamp": stamp} if args.resume else None)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    try:
        with cli.one_sentence(parser, NO_MEMORY):
            args, family = parse_args(argv)
            accelerator, patient = make_accelerator(args)
            rank = accelerator.process_index
            cli.in_turn(rank, partial(claim, args, rank), patient)
            raise SystemExit(train(args, family, accelerator, patient))
    finally:
        disk.release()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
