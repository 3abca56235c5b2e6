"""A small factorized spatio-temporal DiT (Peebles & Xie, arXiv 2212.09748; Latte, arXiv 2401.03048), its optimizers.

Every block attends over the patches of a frame, then over the frames of a patch, then applies an MLP; each of
the three is modulated by adaLN-Zero. Nothing here knows about diffusion: a video and its conditions go in, a
video of the same shape comes out.
"""

import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

LONGEST = 100.0  # patches or frames; with the usual 10,000 most frequencies would be constant over a clip


@dataclass(frozen=True)
class DiTConfig:
    """Everything that fixes the weights' shapes. H, W and T are free: positions are computed, not stored."""

    channels: int = 1
    patch: int = 4
    width: int = 128
    depth: int = 4
    heads: int = 4
    stages: int = 3
    classes: int = 0  # 0: unconditional
    factor: tuple[int, int, int] = (2, 1, 1)  # what each stage divides time, height and width by
    temporal: bool = True  # False: an image model, whose blocks lack the temporal attention
    convolution: bool = False  # True: each MLP sees a patch's neighbours too, through a 3x3 depthwise convolution

    def __post_init__(self):
        for name in ("channels", "patch", "width", "depth", "heads", "stages", "classes"):
            least = 0 if name == "classes" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        object.__setattr__(self, "factor", tuple(self.factor))  # a list could not be looked up by
        if self.width % (4 * self.heads):
            raise ValueError(f"width {self.width} must be a multiple of {4 * self.heads}, 4 times the number of heads")


def angles(positions: Tensor, count: int, longest: float) -> Tensor:
    """`positions` (...,) times `count` frequencies falling from 1 to almost 1 / longest: (..., count)."""
    exponent = torch.arange(count, device=positions.device, dtype=torch.float32) / count
    return positions.float().unsqueeze(-1) * longest**-exponent


def embed_angles(angle: Tensor) -> Tensor:
    """(..., count) -> (..., 2 * count): cosines and sines."""
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def temporal_positions(frames: int, stride: int, device: torch.device | str | None = None) -> Tensor:
    """When the frames of a stage are shown, counted in full-rate frames (index times the stage's stride): (frames,).
    Frame 2 at half the rate and frame 4 at the full rate show the same instant, so they get the same position."""
    return torch.arange(frames, device=device) * stride


def spatial_angles(rows: int, columns: int, count: int, stride: tuple[int, int], device: torch.device) -> Tensor:
    """2-D positions of a frame's patches, row by row, half the angles for each axis: (rows * columns, count). Counted
    in full-rate patches: a patch of a stage stands for `stride` of them, and its position is their centre."""
    y = angles(torch.arange(rows, device=device) * stride[0] + (stride[0] - 1) / 2, count // 2, LONGEST)
    x = angles(torch.arange(columns, device=device) * stride[1] + (stride[1] - 1) / 2, count // 2, LONGEST)
    return torch.cat([y[:, None].expand(-1, columns, -1), x[None].expand(rows, -1, -1)], dim=-1).flatten(0, 1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864): turns neighbouring channels of `x` (..., d) by the angles whose cosines and
    sines are `rotation` (..., d / 2, 2), so that attention sees how far apart two tokens are.
    A pair is a complex number: one kernel instead of seven, a fifth of the time on CPU. Compiled code fuses the seven,
    and knows no complex numbers."""
    pairs = x.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        pairs = pairs.to(rotation.dtype)  # there are no complex numbers of bf16
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    return turned.flatten(-2).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over (..., heads, tokens, d): written out for few tokens, else by torch's fused
    kernel, whose memory grows with the tokens and not with their square.

    The number of tokens decides, and no timing, so that a run can be repeated. `python -m experiments.sizes attention`
    measured it: on an H100 writing out pays up to 16 tokens. On a CPU with gradients neither is much faster up to 64
    tokens in fp32 and 128 in bf16. There the fused kernel works in fp32: in bf16 it is up to 11 times as slow."""
    tokens, on_cpu, is_bf16 = q.shape[-2], q.device.type == "cpu", q.dtype == torch.bfloat16
    most = (128 if is_bf16 else 64) * torch.is_grad_enabled() if on_cpu else 16
    if tokens > most:
        if not (on_cpu and is_bf16):
            return fused_attention(q, k, v)
        with torch.autocast("cpu", enabled=False):
            return fused_attention(q.float(), k.float(), v.float()).to(v.dtype)
    return written_attention(q, k, v)


def written_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as two products and a softmax, which holds all scores."""
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    if q.device.type == "cpu" and scores.shape[-1] * scores.element_size() < 64:  # below a vector softmax is scalar
        return scores.movedim(-1, 0).softmax(dim=0).movedim(0, -1) @ v
    return scores.softmax(dim=-1) @ v


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by torch's SDPA, whose flash kernel takes four dimensions and no more."""
    return F.scaled_dot_product_attention(*(x.flatten(0, -4) for x in (q, k, v))).unflatten(0, q.shape[:-3])


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: normalize the channels of `x` (B, T, N, D), then scale and shift them by the condition."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)


class Attention(nn.Module):
    """Multi-head self-attention over dimension `dim` of (B, T, N, D): 2 = a frame's patches, 1 = a patch's frames."""

    def __init__(self, width: int, heads: int, dim: int):
        super().__init__()
        self.heads, self.dim = heads, dim
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """`rotation`: of queries and keys by the tokens' positions, (T or 1, N or 1, 1, heads, d / 2, 2)."""
        qk, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).split((2, 1), dim=3)
        parts = *rotate(qk, rotation).unbind(3), v.squeeze(3)  # (B, T, N, heads, d) each
        y = attention(*(part.movedim(self.dim, -2) for part in parts)).movedim(-2, self.dim)
        return self.out(y.flatten(-2))  # (B, T, N, D)


class Block(nn.Module):
    """Spatial attention, temporal attention, MLP; adaLN-Zero on each, so that a new block is the identity.
    The temporal attention has its own `temporal_condition`; an image model has neither. Of `convolution` the MLP's
    input is a patch plus what a 3x3 convolution, one filter a channel, adds of its neighbours: at first nothing."""

    def __init__(self, width: int, heads: int, temporal: bool = True, convolution: bool = False):
        super().__init__()
        self.spatial = Attention(width, heads, dim=2)
        self.temporal = Attention(width, heads, dim=1) if temporal else None
        self.neighbours = nn.Conv2d(width, width, 3, padding=1, groups=width) if convolution else None
        if convolution:  # stored as its input and its gradient are, or DDP warns of it
            self.neighbours.to(memory_format=torch.channels_last)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.condition = nn.Linear(width, 6 * width)
        self.temporal_condition = nn.Linear(width, 3 * width) if temporal else None

    def forward(self, x: Tensor, condition: Tensor, space: Tensor, time: Tensor, rows: int) -> Tensor:
        """x (B, T, N, D) of N patches in `rows`, condition (B, D), rotations by place and by time. The time enters the
        temporal attention alone: with that attention's gate at zero a video model is its image model on every frame."""
        shift, scale, gate, *mlp = self.condition(condition)[:, None, None].to(x.dtype).chunk(6, dim=-1)  # (B, 1, 1, D)
        x = torch.addcmul(x, gate, self.spatial(modulate(x, shift, scale), space))
        if self.temporal is not None:
            shift, scale, gate = self.temporal_condition(condition)[:, None, None].to(x.dtype).chunk(3, dim=-1)
            x = torch.addcmul(x, gate, self.temporal(modulate(x, shift, scale), time))
        shift, scale, gate = mlp
        y = modulate(x, shift, scale)
        if self.neighbours is not None:
            frames = y.unflatten(2, (rows, -1)).flatten(0, 1).permute(0, 3, 1, 2)  # (B T, D, rows, columns)
            y = y + self.neighbours(frames).permute(0, 2, 3, 1).reshape(y.shape)
        return torch.addcmul(x, gate, self.mlp(y))


@lru_cache(maxsize=32)
def positions_of(
    config: DiTConfig, stage: int, frames: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """What a stage's positions come to: the patches' embedding (N, D), and the rotations' cosines and sines, of the
    patches (1, N, 1, heads, d / 2, 2) and of the frames (T, 1, 1, heads, d / 2, 2). Kept, as they take long."""
    count, stride = config.width // config.heads // 2, tuple(n**stage for n in config.factor)
    with torch.inference_mode(False):  # what is kept may later be needed where gradients are recorded
        embedding = embed_angles(spatial_angles(rows, columns, config.width // 2, stride[1:], device)).to(dtype)
        space = spatial_angles(rows, columns, count, stride[1:], device)[None]
        time = angles(temporal_positions(frames, stride[0], device), count, LONGEST)[:, None]
        turns = (torch.stack([angle.cos(), angle.sin()], dim=-1)[:, :, None, None] for angle in (space, time))
        # A copy for every head: to broadcast over the inner dimensions takes longer than the product itself.
        precise = torch.promote_types(dtype, torch.float32)
        copies = (turn.to(precise).expand(-1, -1, 1, config.heads, -1, -1).contiguous() for turn in turns)
        return embedding, *copies


class DiT(nn.Module):
    """Predicts a video from a video, a time `t`, a stage and, if the config has classes, a label."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # True: the blocks keep no activations, and run again during backward
        width, pixels = config.width, config.channels * config.patch**2
        self.embed_patch = nn.Linear(pixels, width)
        self.embed_t = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_stage = nn.Embedding(config.stages, width)
        self.embed_label = nn.Embedding(config.classes + 1, width) if config.classes else None
        shape = width, config.heads, config.temporal, config.convolution
        self.blocks = nn.ModuleList(Block(*shape) for _ in range(config.depth))
        self.final_condition = nn.Linear(width, 2 * width)
        self.unembed = nn.Linear(width, pixels)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)  # as large as the time embedding, so that labels count early
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.zeros_(module.bias)
            # adaLN-Zero: gates and convolutions start at 0, so every block is the identity and the output is 0.
            if name.endswith(("condition", "neighbours", "unembed")):
                nn.init.zeros_(module.weight)

    @torch.no_grad()
    def start_from(self, other: "DiT") -> None:
        """Copies another model's weights. Temporal attention and convolutions that `other` lacks stay the identity, and
        the embedding of its one stage goes to all: so every frame comes out as the image model makes it. Raises
        ValueError if the models differ in anything else."""
        was, alone = other.config, other.config.stages == 1
        grown = {"temporal": not was.temporal, "convolution": not was.convolution, "stages": alone, "factor": alone}
        for name, given in asdict(was).items():
            wanted = getattr(self.config, name)
            if given != wanted and not grown.get(name):
                raise ValueError(f"a model of {name} {wanted} cannot start from one of {name} {given}")
        weights = other.state_dict()
        weights["embed_stage.weight"] = weights["embed_stage.weight"].expand(self.config.stages, -1)
        self.load_state_dict(weights, strict=False)

    def compile_blocks(self) -> None:
        """torch.compile, one graph a stage (of eight at most) for all blocks: the whole model would take longer."""
        for block in self.blocks:
            block.compile(dynamic=False)

    @property
    def null_label(self) -> int:
        """The label that means "no label": trained by dropping labels, used by classifier-free guidance."""
        return self.config.classes

    def forward(self, x: Tensor, t: Tensor, stage: int, y: Tensor | None = None) -> Tensor:
        """x (B, C, T, H, W) as large as `stage` has it (1 / factor^stage of the full size), t (B,) in [0, 1],
        y (B,) labels in [0, classes], where `classes` is the null label, as is y = None. Returns x's shape and dtype.
        Raises ValueError if H or W does not divide by the patch, the channels differ, the stage is unknown, or labels
        are given to an unconditional model. Under autocast to bf16 what the blocks hand on is bf16, too."""
        channels, patch = self.config.channels, self.config.patch
        (B, C, T, H, W), dtype = x.shape, x.dtype
        if channels != C or H % patch or W % patch:
            raise ValueError(f"the model takes {channels} channels, H and W divisible by {patch}, not {tuple(x.shape)}")
        if not 0 <= stage < self.config.stages:
            raise ValueError(f"stage {stage} is not one of the model's {self.config.stages}")
        if y is not None and self.embed_label is None:
            raise ValueError("labels were given to a model without classes")

        angle = angles(1000 * t.float(), 128, 10_000.0)
        condition = self.embed_t(embed_angles(angle).to(self.unembed.weight.dtype)) + self.embed_stage.weight[stage]
        if self.embed_label is not None:
            y = torch.full((B,), self.null_label, device=x.device) if y is None else y
            condition = condition + self.embed_label(y)
        condition = F.silu(condition)

        rows, columns = H // patch, W // patch
        x = x.view(B, C, T, rows, patch, columns, patch).permute(0, 2, 3, 5, 1, 4, 6)
        x = self.embed_patch(x.reshape(B, T, rows * columns, -1))  # (B, T, N, D)
        positions = positions_of.__wrapped__ if torch.compiler.is_compiling() else positions_of  # a trace is not kept
        embedding, space, time = positions(self.config, stage, T, rows, columns, x.dtype, x.device)
        x = x + embedding
        again = self.gradient_checkpointing and torch.is_grad_enabled()  # in backward; nothing in a block is random
        for block in self.blocks:
            run = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False) if again else block
            x = run(x, condition, space, time, rows)
        shift, scale = self.final_condition(condition)[:, None, None].to(x.dtype).chunk(2, dim=-1)
        x = self.unembed(modulate(x, shift, scale)).to(dtype)  # the clip's own, also under autocast

        x = x.view(B, T, rows, columns, C, patch, patch).permute(0, 4, 1, 2, 5, 3, 6)
        return x.reshape(B, C, T, H, W)


class AtStage(nn.Module):
    """The model at one stage."""

    def __init__(self, model: DiT, k: int):
        super().__init__()
        self.model, self.k = model, k

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.model(x, t, self.k, y)


class Captured(nn.Module):
    """The model, its forward and backward passes recorded once a stage as a CUDA graph, and replayed. A small model's
    kernels are over before Python has launched the next: on an H100 a step of the default run took 8 ms in place of 26.

    `inputs`: for each stage a batch (x, t) or (x, t, y) on the GPU; all later batches have these shapes. `bf16`: record
    under autocast. The graphs keep their memory: the activations of the largest stage, and gradients for each. Replays
    overwrite gradients: one backward pass a step, no more."""

    def __init__(self, model: DiT, inputs: list[tuple[Tensor, ...]], bf16: bool):
        super().__init__()
        self.at_stage, pool = [], torch.cuda.graph_pool_handle()
        # torch 2.10 and later warn in a long paragraph that graphs are recorded on a stream of their own, as is meant
        getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", bool)(False)
        for k, batch in enumerate(inputs):
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16, cache_enabled=False):
                self.at_stage.append(torch.cuda.make_graphed_callables(AtStage(model, k), batch, pool=pool))

    def forward(self, x: Tensor, t: Tensor, k: int, y: Tensor | None = None) -> Tensor:
        return self.at_stage[k](x, t) if y is None else self.at_stage[k](x, t, y)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Moves a model's moving average towards it, at first in large steps, while the weights move fast."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def make_optimizers(model: DiT, kind: str, lr: float, weight_decay: float, dtype: torch.dtype) -> list[Optimizer]:
    """AdamW for everything; or, if `kind` is "muon", at the same learning rate, Muon (in `dtype`) for the matrices of
    the attentions and MLPs and AdamW for the rest."""
    named = model.blocks.named_parameters() if kind == "muon" else ()
    matrices = [parameter for name, parameter in named if parameter.ndim == 2 and "condition" not in name]
    others = [parameter for parameter in model.parameters() if not any(parameter is matrix for matrix in matrices)]
    adamw = torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    return [adamw, Muon(matrices, lr, weight_decay, dtype)] if matrices else [adamw]


class Muon(Optimizer):
    """Momentum made orthogonal, for matrices, scaled to the size of AdamW's updates (arXiv 2502.16982).
    The same update as torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), which always works in bfloat16, one matrix at
    a time: on a CPU without bf16 units that takes longer than the model's forward and backward. Here matrices of a
    shape go together, in `dtype`."""

    def __init__(self, parameters: list[Tensor], lr: float, weight_decay: float, dtype: torch.dtype):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for parameter in (each for each in group["params"] if each.grad is not None):
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                same_shape[parameter.shape].append(parameter)
            for shape, parameters in same_shape.items():
                gradients = [parameter.grad for parameter in parameters]
                means = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
                torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, means, group["momentum"])  # by one step: Nesterov's
                update = orthogonalize(torch.stack(ahead).to(self.dtype))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                scale = 0.2 * math.sqrt(max(shape))
                torch._foreach_add_(parameters, update.to(parameters[0].dtype).unbind(), alpha=-group["lr"] * scale)


def orthogonalize(x: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with their singular values brought near 1 (0.7 to 1.2, but for the very small) by
    five Newton-Schulz steps, with Keller Jordan's coefficients (2024)."""
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.mT).mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x
