"""Networks that people would use instead of ours: the same transformer as it is usually written, and two packages'."""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import DiTConfig, angles, embed_angles


class UsualDiT(nn.Module):
    """The same factorized DiT as most repositories write it: LayerNorm modules, every attention by SDPA, the frames
    folded into the batch for space and the patches for time, sine positions."""

    def __init__(self, config: DiTConfig, frames: int, tokens: int):
        super().__init__()
        width, self.config, pixels = config.width, config, config.channels * config.patch**2
        self.embed = nn.Conv3d(config.channels, width, (1, config.patch, config.patch), (1, config.patch, config.patch))
        self.space, self.time = nn.Parameter(torch.randn(1, 1, tokens, width)), nn.Parameter(torch.randn(frames, width))
        self.embed_t = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(UsualBlock(width, config.heads) for _ in range(config.depth))
        self.norm, self.unembed = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, pixels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        (B, C, T, H, W), patch = x.shape, self.config.patch
        x = self.embed(x).flatten(3).permute(0, 2, 3, 1) + self.space + self.time[:, None]
        condition = self.embed_t(embed_angles(angles(1000 * t, 128, 1e4)))
        for block in self.blocks:
            x = block(x, condition)
        x = self.unembed(self.norm(x)).view(B, T, H // patch, W // patch, patch, patch, C)
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(B, C, T, H, W)


class UsualBlock(nn.Module):
    """Of UsualDiT: attention over space, over time, and an MLP, each after a LayerNorm that the time modulates."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(3))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(width, 9 * width))

    def attend(self, x: Tensor, index: int) -> Tensor:
        q, k, v = self.qkv[index](x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out[index](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        B, T, N, _ = x.shape
        modulation = self.condition(condition)[:, None, None].unflatten(-1, (3, 3, -1))
        shift, scale, gate = modulation.permute(4, 3, 0, 1, 2, 5)
        y = (self.norms[0](x) * (1 + scale[0]) + shift[0]).flatten(0, 1)
        x = x + gate[0] * self.attend(y, 0).unflatten(0, (B, T))
        y = (self.norms[1](x) * (1 + scale[1]) + shift[1]).transpose(1, 2).flatten(0, 1)
        x = x + gate[1] * self.attend(y, 1).unflatten(0, (B, N)).transpose(1, 2)
        return x + gate[2] * self.mlp(self.norms[2](x) * (1 + scale[2]) + shift[2])


def closest(make: Callable, sizes: range, parameters: int) -> nn.Module:
    """Of the models that `make` builds of the sizes, the one nearest in parameters."""
    return min((make(size) for size in sizes), key=lambda model: abs(count_parameters(model) - parameters))


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def make_peers(config: DiTConfig, size: int, args: argparse.Namespace) -> dict[str, tuple[nn.Module, Callable]]:
    """Name -> (model, its call on (x, t)) of networks for the clips of `args`, of about `size` parameters. Of those
    that are not installed it says what to install."""
    usual = UsualDiT(config, args.frames, (args.size // args.patch) ** 2)
    peers = {"usual DiT, SDPA": (usual, usual)}
    try:
        from diffusers import LatteTransformer3DModel

        def latte_of(layers: int) -> nn.Module:
            heads = {"num_attention_heads": args.heads, "attention_head_dim": args.width // args.heads}
            clip = {"sample_size": args.size, "patch_size": args.patch, "video_length": args.frames}
            channels = {"in_channels": config.channels, "out_channels": config.channels, "caption_channels": args.width}
            return LatteTransformer3DModel(**heads, **clip, **channels, num_layers=layers, norm_type="ada_norm_single")

        latte = closest(latte_of, range(1, 2 * args.depth + 1), size)
        caption = torch.zeros(args.batch, 1, args.width)
        peers["Latte (diffusers)"] = latte, lambda x, t: latte(x, 1000 * t, caption.to(x.device), return_dict=False)[0]
    except ImportError:
        print("diffusers is not installed: Latte is left out (pip install diffusers)")
    try:
        from video_diffusion_pytorch import Unet3D

        unet = closest(lambda dim: Unet3D(dim=dim, channels=config.channels), range(8, 65, 8), size)
        peers["Unet3D (video-diffusion-pytorch)"] = unet, lambda x, t: unet(x, 1000 * t)
    except ImportError:
        print("video-diffusion-pytorch is not installed: its Unet3D is left out (pip install video-diffusion-pytorch)")
    return peers
