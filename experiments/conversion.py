"""How many steps of finetuning turn a vanilla model into a pyramid, and what that saves.

  python -m experiments.emoji                  the clips
  python -m experiments.conversion             a few hours of one core

A Wan of 3.9 million random weights (diffusers' class, as examples/families.py drives it) is trained as vanilla on
real clips of 16x16 pixels. From there it is finetuned twice, by the same code: on the time pyramid, and as vanilla.
What a clip shows is told as the text: a fixed random vector for each class.
"""

import argparse
import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import cli
from checkpoint import write_whole
from data import FolderClips
from examples import generate as models
from examples.families import WAN, check_packages, library
from examples.finetune import training_loss
from experiments.figures import draw_clips, figure_class
from experiments.metrics import distances_to, load_efficientnet, picture_features, real_clips
from experiments.report import publish, run_command
from sample import full_rate_steps
from tpdiff import Pyramid, align, randn, split_steps

FRAMES, SIZE, CHANNELS = 16, 16, 32  # of clips, and of the text
FINETUNED = (200, 2000)  # steps
SHAPE = {"num_attention_heads": 4, "attention_head_dim": 48, "num_layers": 6, "ffn_dim": 768, "patch_size": (1, 4, 4)}
SHAPE |= {"in_channels": 3, "out_channels": 3, "text_dim": CHANNELS, "freq_dim": 64, "rope_max_seq_len": 64}


def new_network(args: argparse.Namespace) -> torch.nn.Module:
    """A Wan of random weights that heeds its `stride`."""
    torch.manual_seed(args.seed)
    network = library().WanTransformer3DModel(**SHAPE | ({"num_layers": 1} if args.smoke else {}))
    WAN.tell(network)
    return network


def texts(classes: int) -> Tensor:
    """A vector for each class, (classes + 1, 1, channels); the last is zero and stands for no label."""
    vectors = torch.randn(classes, 1, CHANNELS, generator=torch.Generator().manual_seed(0))
    return torch.cat([vectors, torch.zeros(1, 1, CHANNELS)])


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device.type, torch.bfloat16, enabled=cli.use_bf16("auto", args.device))


def draw(data: FolderClips, pyramid: Pyramid, k: int, numbers: range, seed: int, dropout: float) -> tuple[Tensor, ...]:
    """Clips of these sample numbers, their noise at stage k, places u in it and texts."""
    clips, labels = zip(*(data[number] for number in numbers), strict=True)
    generators = [cli.generator_for(seed, cli.TRAINING, number) for number in numbers]
    u, drop = torch.stack([torch.rand(2, generator=generator) for generator in generators]).unbind(1)
    x0, labels = torch.stack(clips), torch.tensor(labels)
    noise = randn(pyramid.down(x0, k).shape, generators, "cpu", x0.dtype)
    text = texts(len(data.classes))[labels.where(drop >= dropout, len(data.classes))]
    return x0, align(pyramid.down(x0, k), noise), u, text


def train(name: str, stages: int, steps: int, start: Path | None, args: argparse.Namespace) -> tuple[Path, float]:
    """The weights after `steps` steps from `start`, trained now unless they are there, and the seconds that took. The
    rate of a new model falls to a tenth along a cosine; when finetuning it stays at a tenth. Finetuning goes on with
    the samples that the vanilla model has not had. Raises ValueError if the folder holds a run of other settings."""
    folder, pyramid, before = args.runs / name, Pyramid("flow", stages), args.steps if start else 0
    path, saved = folder / f"{steps}.pt", folder / "checkpoint.pt"
    made_of = [args.seed, args.lr, args.batch, str(args.data), args.smoke, args.steps]
    for file in (path, saved):
        if file.exists() and torch.load(file, map_location="cpu", weights_only=True)["made_of"] != made_of:
            raise ValueError(f"{file} is of a run with other options: move {args.runs} away")
    if path.exists():
        return path, torch.load(path, map_location="cpu", weights_only=True)["seconds"]
    folder.mkdir(parents=True, exist_ok=True)
    network, step, seconds = new_network(args).to(args.device), 0, 0.0
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.0)
    if saved.exists():
        content = torch.load(saved, map_location=args.device, weights_only=True)
        network.load_state_dict(content["weights"])
        optimizer.load_state_dict(content["optimizer"])
        step, seconds = content["step"], content["seconds"]
    elif start:
        network.load_state_dict(torch.load(start, map_location=args.device, weights_only=True)["weights"])
    model, mark = models.make_model(WAN, network, pyramid), time.perf_counter()
    while step < steps:
        k = torch.randint(stages, (), generator=cli.generator_for(args.seed, cli.STAGE, before + step)).item()
        numbers = range((before + step) * args.batch, (before + step + 1) * args.batch)
        batch = [each.to(args.device) for each in draw(args.train, pyramid, k, numbers, args.seed, 0.1)]
        with autocast(args):
            loss = training_loss(model, pyramid, k, *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        fall = 0.1 if start else 0.55 + 0.45 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = args.lr * fall * min(1, (step + 1) / 100)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 200 == 0 or step == steps:
            now = time.perf_counter()
            seconds, mark = seconds + now - mark, now
            print(f"{name}, step {step}, stage {k}: loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
            content = {"weights": network.state_dict(), "step": step, "seconds": seconds, "made_of": made_of}
            if step == steps or (start and step in FINETUNED):
                write_whole(content, folder / f"{step}.pt")
            write_whole(content | {"optimizer": optimizer.state_dict()}, saved)  # last: what a kill cost is made again
    return path, seconds


@torch.inference_mode()
def losses(model, pyramid: Pyramid, args: argparse.Namespace) -> list[float]:
    """Of each stage, k = 0 first, on held-out clips without labels, with the same noise and times at every call."""
    found = []
    for k in range(len(pyramid)):
        batches = [range(first, first + args.batch) for first in range(0, args.number, args.batch)]
        drawn = (draw(args.held_out, pyramid, k, numbers, 0, 1.0) for numbers in batches)
        with autocast(args):
            each = [training_loss(model, pyramid, k, *(part.to(args.device) for part in batch)) for batch in drawn]
        found.append(torch.stack(each).mean().item())
    return found


@torch.inference_mode()
def sampled(model, pyramid: Pyramid, steps: int, number: int, args: argparse.Namespace) -> Tensor:
    """Clips with the labels of training clips; clip i's noise depends on i alone."""
    clips, text = [], texts(len(args.train.classes))
    for numbers in torch.arange(number).split(args.batch):
        labels = torch.tensor([args.train[index][1] for index in numbers.tolist()])
        generators = [cli.generator_for(0, cli.SAMPLING, index) for index in numbers.tolist()]
        predict = models.guided(model, text[labels].to(args.device), None, 1.0)
        with autocast(args):
            shape = (len(numbers), 3, FRAMES, SIZE, SIZE)
            clips.append(pyramid.sample(predict, shape, steps, "euler", generators, args.device).cpu())
    return torch.cat(clips)


def measure(args: argparse.Namespace) -> None:
    """Loss by stage, distance to held-out clips with thirty steps and with nine, and the seconds of training."""
    check_packages()
    figure_class()  # says what to install, if anything
    args.device = cli.choose_device()
    args.train = FolderClips(args.data / "train", FRAMES, SIZE, args.seed, labels=True)
    args.held_out = FolderClips(args.data / "held-out", FRAMES, SIZE, labels=True)
    network, rows, pictures = new_network(args).to(args.device).eval(), [], {}
    reference = real_clips(0, min(400, 4 * len(args.held_out.sources)), args.held_out)
    distance = distances_to(reference, {"distance": partial(picture_features, load_efficientnet())})

    def add(name: str, path: Path, stages: int, steps: int, seconds: float) -> None:
        network.load_state_dict(torch.load(path, map_location=args.device, weights_only=True)["weights"])
        pyramid = Pyramid("flow", stages)
        model, row = models.make_model(WAN, network, pyramid), [name, steps, f"{seconds:.0f}"]
        row.append(", ".join(f"{loss:.4f}" for loss in losses(model, pyramid, args)))
        for count in (30, 9):
            cost = full_rate_steps(split_steps(count, stages), pyramid, (1, 3, FRAMES, SIZE, SIZE))
            clips = sampled(model, pyramid, count, args.number, args)
            row.append(f"{distance(clips)['distance']:.0f} ({cost:.4g} calls)")
            pictures.setdefault(f"{name}, {steps} steps", clips[:6])  # of thirty steps
        rows.append(row)
        print(row, flush=True)

    base, seconds = train("vanilla", 1, args.steps, None, args)
    add("vanilla", base, 1, args.steps, seconds)
    add("converted", base, 3, 0, 0.0)
    for name, stages in (("converted", 3), ("vanilla, continued", 1)):
        for steps in FINETUNED:
            path, seconds = train(name.replace(", ", "-").replace(" ", "-"), stages, steps, base, args)
            add(name, path, stages, steps, seconds)
    seen = torch.stack([args.train[number][0] for number in range(args.number)])
    rows.append(["real training clips", "", "", "", f"{distance(seen)['distance']:.0f}", ""])
    draw_clips(pictures | {"real": seen[:6]}, "Before and after conversion", args.out / "conversion.png")
    header = ["model", "steps", "seconds", "held-out loss by stage, 0 first"]
    header += ["distance, thirty steps", "distance, nine steps"]
    publish([(header, rows)], args.made_by, args.out / "conversion.json")


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="experiments.conversion", description=__doc__)
    parser.set_defaults(function=measure)
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/emoji64"), help="folder that experiments.emoji made")
    add("--steps", type=cli.positive_int, default=4000, help="of the vanilla model")
    add("--batch", type=cli.positive_int, default=8, help="clips a step")
    add("--lr", type=cli.real_number(0, 1), default=5e-4, help="highest learning rate")
    add("--number", type=cli.whole_number(2), default=192, help="clips that are sampled, and held-out ones of the loss")
    add("--seed", type=cli.non_negative_int, default=1, help="of the weights and of all that training draws")
    add("--runs", type=Path, default=Path("runs/conversion"), help="folder of the runs")
    add("--out", type=Path, default=Path("experiments/results"), help="folder of the table and the picture")
    add("--smoke", action="store_true", help="one block instead of six")
    return parser


def main(argv: list[str] | None = None) -> None:
    run_command(make_parser(), argv)


if __name__ == "__main__":
    main()
