"""The models that finetune.py and generate.py know: a table with a row for each family.

Facts come from diffusers 0.42 (file and class named beside them) and from each model's own configuration, which is
read from its folder. Real weights were never loaded here: tests/test_finetune.py builds small random models of the
same classes.

A row is enough for a family whose time shift is fixed, whose network takes no mask of the prompt, and whose VAE has the
statistics of its latents in its configuration and decodes with `vae.decode(z)`. LTX is none of these: `Pyramid` takes
its shift, exp(mu), but the commands would have to change.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad

PACKAGES = "diffusers==0.42.1 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 safetensors"  # as tested
MORE = "sentencepiece protobuf ftfy av"  # what tokenizers, prompts and videos need


def library(name: str = "diffusers") -> ModuleType:
    """The package, or a module of it. Raises ValueError that says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{error.name or name} is missing: pip install {PACKAGES} {MORE}") from None


def check_packages() -> None:
    """Raises ValueError if one of PACKAGES is missing. Their parts are loaded late, and fail less clearly."""
    for package in PACKAGES.split():
        library(package.split("==")[0])
    library("diffusers.utils.logging").set_verbosity_error()  # its warnings are of what is done on purpose here


# ---- Schedules: what `Pyramid` takes


def flow_schedule(model: str) -> dict:
    """The time shift of UniPCMultistepScheduler (flow_shift: 3 or 5) or FlowMatchEulerDiscreteScheduler (shift).
    Raises ValueError for a shift that depends on the clip's size, as LTX has it."""
    config = library().FlowMatchEulerDiscreteScheduler.load_config(model, subfolder="scheduler")
    if config.get("use_dynamic_shifting"):
        raise ValueError(f"{model} has a time shift that depends on the clip's size, which is not supported")
    return {"mode": "flow", "shift": config.get("flow_shift", config.get("shift", 1.0))}


def cogvideox_schedule(model: str) -> dict:
    """scheduling_ddim_cogvideox.py: snr_shift_scale, then rescaled to end without signal."""
    return ddim_schedule(library().CogVideoXDDIMScheduler.from_pretrained(model, subfolder="scheduler"))


def animatediff_schedule(model: str) -> dict:
    """Motion modules were trained on linear betas, unlike their image models (the page of AnimateDiffPipeline)."""
    return ddim_schedule(library().DDIMScheduler.from_pretrained(model, subfolder="scheduler", beta_schedule="linear"))


def ddim_schedule(scheduler) -> dict:
    target = {"epsilon": "epsilon", "v_prediction": "velocity", "sample": "sample"}[scheduler.config.prediction_type]
    return {"mode": "ddim", "alphas_cumprod": scheduler.alphas_cumprod, "prediction": target}


# ---- Positions: `network.stride` (time, height, width) is that of the stage it works for. Element i of a stage has the
# position of element i * stride of the clip, as the network's own code computes it for the whole clip. (In space it is
# a block's mean, and the block's first position stands for its centre. Rotary attention sees differences alone, so to
# Wan they are the same. CogVideoX-5B does not rotate its prompt, and 2B adds sines: to these they are off by up to half
# a block in space.)


def strided(positions: Tensor, grid: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Every stride-th of a grid's positions (N, D), along time, height and width."""
    t, h, w = stride
    return positions.unflatten(0, tuple(grid))[::t, ::h, ::w].flatten(0, 2)


def tell_wan(network: Module) -> None:
    """transformer_wan.py, WanRotaryPosEmbed: angles of whole numbers."""
    full_rate, patch = network.rope.forward, network.config.patch_size

    def rope(x: Tensor) -> tuple[Tensor, ...]:
        whole = [size * n for size, n in zip(x.shape[2:], network.stride, strict=True)]
        grid = [size // p for size, p in zip(whole, patch, strict=True)]
        return tuple(strided(each[0], grid, network.stride)[None] for each in full_rate(x.new_empty(1, 0, *whole)))

    network.rope.forward = rope


def tell_cogvideox(network: Module) -> None:
    """pipeline_cogvideox.py, _prepare_rotary_positional_embeddings: the 5B model's angles are given to forward.
    embeddings.py, CogVideoXPatchEmbed: the 2B model's sines are added to the patches. Raises ValueError for the 1.5
    models, whose patches span two frames."""
    config, embed, p = network.config, network.patch_embed, network.config.patch_size
    bare = embed.forward
    if config.patch_size_t is not None:
        raise ValueError("this is a CogVideoX 1.5, whose patches span two frames: only 2B and 5B of 1.0 are known")

    def grid_of(x: Tensor) -> tuple[int, int, int]:  # (B, T, C, H, W)
        t, h, w = network.stride
        return x.shape[1] * t, x.shape[3] * h // p, x.shape[4] * w // p

    def with_angles(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        base, grid = (config.sample_width // p, config.sample_height // p), grid_of(args[0])
        crops = library("diffusers.pipelines.cogvideo.pipeline_cogvideox").get_resize_crop_region_for_grid
        angles = library("diffusers.models.embeddings").get_3d_rotary_pos_embed(
            config.attention_head_dim, crops(grid[1:], *base), grid[1:], grid[0], device=args[0].device
        )
        return args, kwargs | {"image_rotary_emb": tuple(strided(each, grid, network.stride) for each in angles)}

    def with_sines(text: Tensor, x: Tensor) -> Tensor:
        patches, scales = bare(text, x), (config.spatial_interpolation_scale, config.temporal_interpolation_scale)
        sines = cogvideox_sines(patches.shape[-1], grid_of(x), scales, network.stride, x.device)
        return patches + pad(sines, (0, 0, text.shape[1], 0)).to(patches.dtype)  # the prompt has no position

    if config.use_rotary_positional_embeddings:
        network.register_forward_pre_hook(with_angles, with_kwargs=True)
    else:
        embed.forward, embed.use_positional_embeddings = with_sines, False


@lru_cache(maxsize=8)  # large, and wanted in every call
def cogvideox_sines(width: int, grid: tuple, scales: tuple[float, float], stride: tuple, device) -> Tensor:
    embed = library("diffusers.models.embeddings").get_3d_sincos_pos_embed
    sines = embed(width, (grid[2], grid[1]), grid[0], *scales, device=device, output_type="pt")  # width first
    return strided(sines.flatten(0, 1), grid, stride)


def tell_animatediff(network: Module) -> None:
    """embeddings.py, SinusoidalPositionalEmbedding: the motion modules add rows of a table (convolutions know where a
    pixel is)."""
    for module in network.modules():
        if type(module).__name__ == "SinusoidalPositionalEmbedding":
            module.forward = lambda x, own=module: x + own.pe[:, :: network.stride[0]][:, : x.shape[1]]


# ---- Calls: x (B, C, T, H, W), the step (B,) of the family's own counting, and the prompts (B, tokens, channels)


def call_wan(network: Module, x: Tensor, step: Tensor, text: Tensor) -> Tensor:
    return network(x, step, text, return_dict=False)[0]


def call_cogvideox(network: Module, x: Tensor, step: Tensor, text: Tensor) -> Tensor:
    return network(x.transpose(1, 2), text, step, return_dict=False)[0].transpose(1, 2)


def call_animatediff(network: Module, x: Tensor, step: Tensor, text: Tensor) -> Tensor:
    return network(x, step, text.repeat_interleave(x.shape[2], dim=0), return_dict=False)[0]  # a prompt a frame


# ---- The table


@dataclass(frozen=True)
class Family:
    """A row: what the pyramid must know of a kind of models."""

    pipeline: str  # diffusers' class
    network: str  # diffusers' class, in this folder of the model:
    folder: str
    vae: str
    schedule: Callable[[str], dict]  # of a model: mode, target, schedule, shift
    tell: Callable[[Module], None]  # makes a network heed its `stride`
    call: Callable[[Module, Tensor, Tensor, Tensor], Tensor]
    lora: tuple[str, ...]  # names of the layers that LoRA adapts
    compression: Callable  # of the VAE's configuration: how many frames and pixels a latent element stands for
    patch: int  # latent elements, in height and width, of a token
    prompt: dict  # options of the pipeline's encode_prompt
    frames: int  # and the next four: as the pipeline's __call__ has them, at the rate of the published training
    size: tuple[int, int]
    guidance: float
    fps: float
    most_frames: Callable = lambda config: None  # latent frames that a network's table of positions has, if any
    together: int = 1  # so many latent frames the VAE decodes at once, after the first


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
WAN = Family(  # transformer_wan.py, pipeline_wan.py, autoencoder_kl_wan.py
    "WanPipeline", "WanTransformer3DModel", "transformer", "AutoencoderKLWan", flow_schedule, tell_wan, call_wan,
    lora=(*ATTENTION, "ffn.net.0.proj", "ffn.net.2"),  # WanTransformerBlock
    compression=lambda vae: (vae.scale_factor_temporal, vae.scale_factor_spatial), patch=2,
    prompt={"max_sequence_length": 512}, frames=81, size=(480, 832), guidance=5.0, fps=16,
    most_frames=lambda config: config.rope_max_seq_len,
)  # fmt: skip
COGVIDEOX = Family(  # cogvideox_transformer_3d.py, pipeline_cogvideox.py, autoencoder_kl_cogvideox.py
    "CogVideoXPipeline", "CogVideoXTransformer3DModel", "transformer", "AutoencoderKLCogVideoX", cogvideox_schedule,
    tell_cogvideox, call_cogvideox, lora=(*ATTENTION, "ff.net.0.proj", "ff.net.2"),  # CogVideoXBlock
    compression=lambda vae: (int(vae.temporal_compression_ratio), 2 ** (len(vae.block_out_channels) - 1)), patch=2,
    prompt={"max_sequence_length": 226}, frames=49, size=(480, 720), guidance=6.0, fps=8, together=2,
)  # fmt: skip
ANIMATEDIFF = Family(  # unet_motion_model.py, pipeline_animatediff.py, autoencoder_kl.py
    "AnimateDiffPipeline", "UNetMotionModel", "unet", "AutoencoderKL", animatediff_schedule, tell_animatediff,
    call_animatediff, lora=(*ATTENTION, "ff.net.0.proj", "ff.net.2"),  # BasicTransformerBlock: pictures' and motion's
    compression=lambda vae: (1, 2 ** (len(vae.block_out_channels) - 1)), patch=1,
    prompt={"num_images_per_prompt": 1}, frames=16, size=(512, 512), guidance=7.5, fps=8,
    most_frames=lambda config: config.motion_max_seq_length,
)  # fmt: skip
FAMILIES = {  # by the pipeline that a model's model_index.json names
    "WanPipeline": WAN,
    "CogVideoXPipeline": COGVIDEOX,
    "AnimateDiffPipeline": ANIMATEDIFF,
    "StableDiffusionPipeline": ANIMATEDIFF,  # the image model, to be given a motion adapter
}
