"""Make videos with someone else's model, as it is or as finetune.py left it: one by one, stage by stage.

  python -m examples.generate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --lora runs/wan --prompt "a cat on a skateboard"

--model is a name on Hugging Face's hub or a local folder. families.py says which kinds are known.
"""

import gc
import json
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module

import cli
from checkpoint import FACTORS, make_folder
from data import height_width
from examples.families import FAMILIES, Family, check_packages, library
from sample import said_cost, save_gif, save_video
from tpdiff import Pyramid, split_steps
from video import import_av

TIMES = 1000  # num_train_timesteps of the flow models' schedulers
NO_MEMORY = "not enough memory: a smaller --size or --frames needs less, and --tiling decodes piece by piece"

# ---- A model and its parts. finetune.py loads the same


def family_of(model: str, motion_adapter: str | None = None) -> Family:
    """The row of a model, by its model_index.json. Raises ValueError if there is none, or for a missing part."""
    index = library().DiffusionPipeline.load_config(model)
    name = index["_class_name"]
    if name not in FAMILIES:
        known = f"known are {', '.join(FAMILIES)}; to add one, write a row like WAN in examples/families.py"
        raise ValueError(f"{model} is a {name}, which is not supported: {known}")
    if index.get("transformer_2", [None, None])[1]:
        raise ValueError(f"{model} has two networks, for early and late times: only models of one are known")
    if index.get("expand_timesteps"):
        raise ValueError(f"{model} is a Wan 2.2, whose sizes and rate are others: of Wan only 2.1 is known")
    if name == "StableDiffusionPipeline" and not motion_adapter:
        example = "guoyww/animatediff-motion-adapter-v1-5-2"
        raise ValueError(f"{model} makes images: give --motion-adapter, such as {example}")
    if motion_adapter and FAMILIES[name].folder != "unet":
        raise ValueError(f"{model} is a {name} and takes no --motion-adapter")
    return FAMILIES[name]


def make_pyramid(family: Family, model: str, stages: int, pyramid: str, shift: float | None) -> Pyramid:
    """The pyramid over a model's own schedule."""
    schedule = family.schedule(model)
    return Pyramid(stages=stages, factor=FACTORS[pyramid], **schedule | ({"shift": shift} if shift else {}))


def load_network(family: Family, model: str, motion_adapter: str | None, dtype: torch.dtype) -> Module:
    """The denoiser alone, told to heed its `stride`. Of an image model and a motion adapter, AnimateDiff's."""
    if motion_adapter:
        image = library().UNet2DConditionModel.from_pretrained(model, subfolder=family.folder, dtype=dtype)
        motion = library().MotionAdapter.from_pretrained(motion_adapter, dtype=dtype)
        network = library().UNetMotionModel.from_unet2d(image, motion)
    else:
        network = load_part(family.network, model, family.folder, dtype)
    family.tell(network)
    return network


def load_part(name: str, model: str | Path, folder: str | None = None, dtype: torch.dtype = torch.float32) -> Module:
    return getattr(library(), name).from_pretrained(model, subfolder=folder, dtype=dtype)


def load_text_encoder(family: Family, model: str, dtype: torch.dtype):
    """The model's pipeline with nothing in it but what encodes prompts."""
    without = {family.folder: None, "vae": None} | ({"motion_adapter": None} if family.folder == "unet" else {})
    return getattr(library(), family.pipeline).from_pretrained(model, dtype=dtype, **without)


def encode_prompts(family: Family, pipeline, prompts: list[str], device: torch.device) -> Tensor:
    """(B, tokens, channels), as the network takes them. Warns if the end of one is cut off."""
    most = family.prompt.get("max_sequence_length", pipeline.tokenizer.model_max_length)
    for prompt in prompts:
        if len(pipeline.tokenizer(prompt, verbose=False).input_ids) > most:
            warnings.warn(f"the end of {prompt[:40]!r} is cut off: the model takes {most} tokens", stacklevel=2)
    options = {"device": device, "do_classifier_free_guidance": False} | family.prompt
    with torch.no_grad():
        return pipeline.encode_prompt(prompts, **options)[0].cpu()


def latent_shape(family: Family, vae: Module, pyramid: Pyramid, frames: int, size: tuple[int, int]) -> tuple[int, ...]:
    """(T, H, W) of a clip's latent. Raises ValueError, with the nearest that fit, for what the VAE or the pyramid does
    not divide."""
    every, pixels = family.compression(vae.config)
    steps = [pixels * family.patch * n ** (len(pyramid) - 1) for n in pyramid.factor[1:]]
    fits = [max(1, -(-(2 * length - step) // (2 * step))) * step for length, step in zip(size, steps, strict=True)]
    if fits != list(size):
        why = f"{len(pyramid)} stages need height and width divisible by {steps}"
        raise ValueError(f"--size {size[0]} {size[1]}: {why}; the nearest is --size {fits[0]} {fits[1]}")
    step = every * family.together
    nearest = max(0, round((frames - 1) / step)) * step + 1
    if nearest != frames:
        raise ValueError(f"--frames {frames}: the VAE takes 1 plus a multiple of {step}; the nearest is {nearest}")
    return (frames - 1) // every + 1, size[0] // pixels, size[1] // pixels


def check_frames(family: Family, network: Module, frames: int) -> None:
    """Raises ValueError if a network has positions for fewer latent frames."""
    most = family.most_frames(network.config)
    if most and frames > most:
        raise ValueError(f"{frames} latent frames are more than the {most} that the network has positions for")


def latent_scale(vae: Module) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a VAE's latents, which networks see as (latent - mean) / deviation."""
    mean = vae.config.get("latents_mean") or [0.0]
    deviation = vae.config.get("latents_std") or [1 / vae.config.scaling_factor]
    return tuple(torch.as_tensor(values, device=vae.device).view(1, -1, 1, 1, 1) for values in (mean, deviation))


@torch.no_grad()
def encode(vae: Module, clips: Tensor) -> Tensor:
    """Pixels in [-1, 1] (B, 3, T, H, W) -> latents (B, C, t, h, w) as the network sees them, float32."""
    mean, deviation = latent_scale(vae)
    if type(vae).__name__ == "AutoencoderKL":  # of pictures
        vae.enable_slicing()  # one by one: all frames at once would need gigabytes
        frames = vae.encode(clips.transpose(1, 2).flatten(0, 1).to(vae.device)).latent_dist.mode()
        return (frames.unflatten(0, (len(clips), -1)).transpose(1, 2) - mean) / deviation
    return (vae.encode(clips.to(vae.device)).latent_dist.mode() - mean) / deviation


@torch.no_grad()
def decode(vae: Module, latents: Tensor) -> Tensor:
    """The way back: latents (B, C, t, h, w) -> pixels (B, 3, T, H, W)."""
    mean, deviation = latent_scale(vae)
    z = latents.to(vae.device, torch.float32) * deviation + mean
    if type(vae).__name__ == "AutoencoderKL":
        return vae.decode(z.transpose(1, 2).flatten(0, 1)).sample.unflatten(0, (len(z), -1)).transpose(1, 2)
    return vae.decode(z).sample


def make_model(family: Family, network: Module, pyramid: Pyramid, called: Module | None = None) -> Callable:
    """model(x, t, k, text) -> the target of stage k in float32, of clips (B, C, T, H, W) in float32 at times t (B,).
    `called` is the network as it is to be called, if another module is wrapped around it.

    A flow model says noise - x0. Over a stage of a still clip x_start - x_end is that times t_start - t_end, so a
    pretrained model starts close to its new target (Eq. 13). Noise and velocity on a ddim schedule stay as they are.
    The sinusoids of the time take fractions of a step."""

    def model(x: Tensor, t: Tensor, k: int, text: Tensor) -> Tensor:
        network.stride = pyramid[k].stride  # until the backward pass, which may run parts of the network again
        step = TIMES * t if pyramid.mode == "flow" else (t * len(pyramid.alphas_cumprod) - 1).clamp(min=0)
        output = family.call(called or network, x.to(network.dtype), step, text.to(x.device, network.dtype)).float()
        return (pyramid[k].t_start - pyramid[k].t_end) * output if pyramid.mode == "flow" else output

    return model


# ---- The command


def guided(model: Callable, prompt: Tensor, negative: Tensor, guidance: float) -> Callable:
    """The sampler's predict(x, t, k), with classifier-free guidance unless it is 1: two calls, for less memory."""

    def predict(x: Tensor, t: Tensor, k: int) -> Tensor:
        output = model(x, t, k, prompt)
        if guidance == 1:
            return output
        without = model(x, t, k, negative)
        return without + guidance * (output - without)

    return predict


def make_parser() -> cli.Parser:
    example = 'example: python -m examples.generate --model FOLDER --lora runs/mine --prompt "a cat" --out cat.mp4'
    about = {"description": "Make videos with Wan, CogVideoX or AnimateDiff.", "epilog": example}
    parser = cli.Parser(prog="examples.generate", **about)
    add = parser.add_argument
    add("--model", help="name on the hub or local folder [the run's]")
    add("--motion-adapter", help="AnimateDiff's, with an image model as --model [the run's]")
    add("--lora", type=Path, metavar="RUN", help="folder of a finetune run, also one of --lora 0 [the model as it is]")
    add("--prompt", nargs="+", required=True, help="one or several, each in quotes: a clip each, in one grid")
    add("--negative-prompt", default="", help="what guidance leads away from [nothing]")
    add("--steps", type=cli.positive_int, nargs="+", action=cli.OneOrMore, default=30,
        help="a total, or one count per stage, noisiest first")  # fmt: skip
    add("--solver", choices=["euler", "ab2"], default="euler", help="ab2: second order, with as many network calls")
    add("--guidance", type=cli.real_number(-100, 100), help="scale; 1 halves the cost [5 Wan, 6 CogVideoX, else 7.5]")
    add("--stages", type=cli.positive_int, help="1 is vanilla [the run's, else 1]")
    add("--pyramid", choices=FACTORS, help="what a stage halves [the run's, else time]")
    add("--shift", type=cli.real_number(0.01, 100), help="time shift, 1 for none [the run's, else the model's]")
    add("--frames", type=cli.positive_int, help="of the video [the run's, else the model's]")
    add("--size", type=cli.positive_int, nargs="+", action=cli.OneOrMore, help="height and width [as --frames]")
    add("--fps", type=cli.real_number(1, 50), help="frames a second of the file [the run's, else the model's]")
    add("--seed", type=cli.non_negative_int, default=0, help="of the noise; clip i has the same noise in every call")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 on a GPU that has it")
    cli.add_device(add)
    add("--tiling", action="store_true", help="decode in tiles, for less memory")
    add("--out", type=Path, required=True, help="file to write, .mp4 or .gif")
    return parser


def settle(args: Namespace) -> tuple[Namespace, Family]:
    """The arguments, what is not given being the run's, or else the model's. Raises ValueError."""
    saved = {"stages": 1, "pyramid": "time", "shift": None, "lora": None}
    if args.lora:
        if not (args.lora / "run.json").exists():
            raise ValueError(f"--lora {args.lora} holds no run.json: it is not a folder that finetune.py made")
        saved = json.loads((args.lora / "run.json").read_text())
    args.model, args.rank = args.model or saved.get("model"), saved["lora"]
    args.motion_adapter = args.motion_adapter or saved.get("motion_adapter")
    if not args.model:
        raise ValueError("--model or --lora is needed")
    family = family_of(args.model, args.motion_adapter)
    for name in ("stages", "pyramid", "shift"):
        if args.lora and getattr(args, name) not in (None, saved[name]):
            raise ValueError(f"{args.lora} was trained with --{name} {saved[name]}, not {getattr(args, name)}")
    for name in ("stages", "pyramid", "shift", "frames", "size", "fps"):  # a run's fps of 0 is each file's own
        setattr(args, name, getattr(args, name) or saved.get(name) or getattr(family, name, None))
    args.guidance = family.guidance if args.guidance is None else args.guidance
    args.size = height_width(args.size)
    return args, family


def use_bf16(precision: str, device: torch.device) -> bool:
    """On a CPU only if asked for."""
    return cli.use_bf16(precision, device) if device.type == "cuda" else precision == "bf16"


def load_finetuned(family: Family, args: Namespace, dtype: torch.dtype) -> Module:
    """The network, with what a run changed in it. Raises ValueError for a LoRA of another network's layers."""
    if args.rank == 0:
        network = load_part(family.network, args.lora / "network", dtype=dtype)
        family.tell(network)
        return network
    network = load_network(family, args.model, args.motion_adapter, dtype)
    if args.rank:
        file, ends = args.lora / "lora.safetensors", tuple(f".{layer}" for layer in family.lora)
        trained = {key.partition(".lora_")[0] for key in library("safetensors.torch").load_file(file)}
        if trained != {name for name, _ in network.named_modules() if name.endswith(ends)}:
            models = " with ".join(filter(None, [args.model, args.motion_adapter]))
            raise ValueError(f"{args.lora} was trained on another model than {models}: their layers differ")
        network.load_lora_adapter(args.lora, weight_name=file.name, prefix=None)
    return network


def run(args: Namespace) -> None:
    check_packages()
    if args.out.suffix not in (".mp4", ".gif") or args.out.exists():
        raise ValueError(f"--out {args.out} must be a new file, .mp4 or .gif")
    if args.out.suffix == ".mp4":
        import_av(args.out)  # says what to install
    make_folder(args.out.parent, args.out)  # what cannot be written shall not be found out after sampling
    args, family = settle(args)
    device = cli.choose_device(args.device)
    dtype = torch.bfloat16 if use_bf16(args.precision, device) else torch.float32
    pyramid = make_pyramid(family, args.model, args.stages, args.pyramid, args.shift)
    counts, vae = split_steps(args.steps, len(pyramid), pyramid.lengths), load_part(family.vae, args.model, "vae")
    shape = latent_shape(family, vae, pyramid, args.frames, args.size)

    encoder = load_text_encoder(family, args.model, dtype).to(device)  # one part at a time is on the device
    negative, *prompts = encode_prompts(family, encoder, [args.negative_prompt, *args.prompt], device).split(1)
    del encoder
    network, latents = load_finetuned(family, args, dtype).eval().requires_grad_(False).to(device), []
    check_frames(family, network, shape[0])
    model, start = make_model(family, network, pyramid), time.perf_counter()
    for index, prompt in enumerate(prompts):
        predict = guided(model, prompt, negative, args.guidance)
        generators = [cli.generator_for(args.seed, cli.SAMPLING, index)]
        whole = 1, network.config.in_channels, *shape
        latents.append(pyramid.sample(predict, whole, counts, args.solver, generators, device, progress=True))
    seconds = (time.perf_counter() - start) / len(prompts)
    del network, model, predict
    gc.collect()  # a told network holds itself; now there is room for the clips
    vae = vae.to(device)
    if args.tiling:
        vae.enable_tiling()
        vae.enable_slicing()
    clips = None
    with suppress(torch.OutOfMemoryError):  # the error holds what was decoded so far: on only when it is gone
        clips = torch.cat([decode(vae, latent).cpu() for latent in latents])
    if clips is None:
        print("note: too little memory to decode clips whole: decoded in tiles, as with --tiling")
        vae.enable_tiling()
        vae.enable_slicing()
        clips = torch.cat([decode(vae, latent).cpu() for latent in latents])
    save = save_video if args.out.suffix == ".mp4" else save_gif
    with cli.written_whole(args.out) as aside:
        save(clips, aside, scale=1, fps=args.fps)
    frames = cli.count(clips.shape[2], "frame")
    print(f"{cli.count(len(clips), 'clip')} of {frames}, {seconds:.2f} s a clip before decoding")
    print(said_cost(counts, pyramid, whole, args))
    print(f"wrote {args.out}")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    with cli.one_sentence(parser, NO_MEMORY):  # also for what from_pretrained raises if a model is not there
        run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
