"""Small random models of the real classes, saved as their publishers do, with tokenizers of single letters."""

import string
from pathlib import Path

import diffusers
import torch
import transformers

SCALED = {"beta_start": 0.00085, "beta_end": 0.012}


def save_wan(folder: Path) -> None:
    config = transformers.UMT5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    latents = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.5, 1.0, 2.0]}
    shape = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 32, "freq_dim": 32}
    diffusers.WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=transformers.UMT5EncoderModel(config),
        vae=diffusers.AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **latents),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=diffusers.WanTransformer3DModel(
            **shape, in_channels=4, out_channels=4, text_dim=16, rope_max_seq_len=64
        ),
    ).save_pretrained(folder)


def save_cogvideox(folder: Path, rotary: bool) -> None:
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    shape = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "time_embed_dim": 8}
    shape |= {"sample_height": 4, "sample_width": 6, "sample_frames": 9, "text_embed_dim": 16}
    diffusers.CogVideoXPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=transformers.T5EncoderModel(config),
        vae=diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False,
            snr_shift_scale=1.0 if rotary else 3.0, timestep_spacing="trailing",
        ),
        transformer=diffusers.CogVideoXTransformer3DModel(
            **shape, in_channels=4, out_channels=4, use_rotary_positional_embeddings=rotary
        ),
    ).save_pretrained(folder)  # fmt: skip


def save_animatediff(folder: Path) -> None:
    """An image model, and in adapter/ its motion adapter."""
    config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    vocabulary = {word: number for number, word in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    text = transformers.CLIPTextConfig(vocab_size=64, **config, max_position_embeddings=8, eos_token_id=1)
    vae = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    blocks = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
    blocks |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "attention_head_dim": 2}
    diffusers.StableDiffusionPipeline(
        tokenizer=transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8),
        text_encoder=transformers.CLIPTextModel(text),
        vae=diffusers.AutoencoderKL(**vae, block_out_channels=[4] * 4, norm_num_groups=2, latent_channels=4),
        unet=diffusers.UNet2DConditionModel(
            **blocks, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4, cross_attention_dim=16
        ),
        scheduler=diffusers.PNDMScheduler(**SCALED, beta_schedule="scaled_linear", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    motion = {"motion_layers_per_block": 1, "motion_num_attention_heads": 2, "motion_norm_num_groups": 4}
    adapter = diffusers.MotionAdapter(block_out_channels=(8, 16), **motion)
    for module in adapter.modules():  # new motion modules end in zeros, and would hide the positions
        if type(module).__name__ == "AnimateDiffTransformer3D":
            torch.nn.init.normal_(module.proj_out.weight, std=0.1)
    adapter.save_pretrained(folder / "adapter")


def t5_tokenizer():
    return transformers.T5TokenizerFast(
        vocab=[(piece, -1.0) for piece in ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]], extra_ids=0
    )


def save_all(root: Path) -> dict[str, list[str]]:
    """The options that name each model to the commands, by what it is."""
    torch.manual_seed(0)
    save_wan(root / "wan")
    save_cogvideox(root / "cogvideox-2b", rotary=False)
    save_cogvideox(root / "cogvideox-5b", rotary=True)
    save_animatediff(root / "animatediff")
    options = {folder.name: ["--model", str(folder)] for folder in root.iterdir()}
    options["animatediff"] += ["--motion-adapter", str(root / "animatediff" / "adapter")]
    return options
