"""The model: its shapes, its positions, what it sees, how it starts from another, and its optimizer."""

from dataclasses import replace

import pytest
import torch
from conftest import seeded, small_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import model as network
from model import (
    LONGEST,
    Attention,
    Block,
    DiT,
    DiTConfig,
    Muon,
    angles,
    attention,
    fused_attention,
    positions_of,
    rotate,
    spatial_angles,
    spatial_positions,
    temporal_positions,
)


@pytest.mark.parametrize("T, H, W, channels", [(8, 16, 16, 1), (4, 8, 24, 3), (2, 16, 16, 1), (1, 4, 4, 2)])
def test_model_keeps_the_shape_at_every_stage_and_its_first_output_is_zero(T, H, W, channels):
    for live in (False, True):
        model = small_model(live=live, channels=channels)
        for stage in range(3):
            out = model(torch.randn(2, channels, T, H, W), torch.rand(2), stage)
            assert out.shape == (2, channels, T, H, W) and out.dtype == torch.float32
            assert bool(out.abs().max() > 0) == live


def of_stage(stage: int, *counts: int, **options) -> tuple:
    """`positions_of` a small model."""
    return positions_of(small_model(**options).config, stage, *counts, torch.float32, torch.device("cpu"))


def test_positions_are_kept_for_training_though_sampling_asked_first():
    positions_of.cache_clear()
    model, x = small_model(), torch.randn(1, 1, 4, 8, 8)
    with torch.inference_mode():
        model(x, torch.tensor([0.5]), 1)
    model(x, torch.tensor([0.5]), 1).square().sum().backward()
    assert positions_of.cache_info().misses == 1 and model.embed_patch.weight.grad.abs().sum() > 0


def test_same_instant_has_the_same_temporal_position_at_every_rate():
    full, (_, _, rotation) = temporal_positions(21, 1), of_stage(0, 21, 2, 2)
    assert torch.equal(full, torch.arange(21))
    for stride, frames in ((2, 11), (3, 7), (4, 6), (8, 3)):
        assert torch.equal(temporal_positions(frames, stride), full[::stride])
        slower = of_stage(1, frames, 2, 2, factor=(stride, 1, 1))[2]
        assert torch.equal(slower, rotation[::stride]) and slower.shape[0] == frames
    assert not torch.equal(temporal_positions(4, 2), full[:4])


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_a_patch_is_where_the_centre_of_its_block_of_full_rate_patches_is(stride):
    full = spatial_positions(6 * stride, 1)
    assert torch.equal(full, torch.arange(6.0 * stride))
    torch.testing.assert_close(spatial_positions(6, stride), full.view(6, stride).mean(1))


def test_rows_and_columns_each_have_the_stride_of_their_axis():
    rows, columns = (torch.tensor(centres) for centres in ([0.5, 2.5], [1.5, 5.5, 9.5]))  # of blocks of 2 and of 4
    y, x = spatial_angles(2, 3, 8, (2, 4)).view(2, 3, 8).split(4, dim=2)
    torch.testing.assert_close(y, angles(rows, 4, LONGEST)[:, None].expand(2, 3, 4))
    torch.testing.assert_close(x, angles(columns, 4, LONGEST)[None].expand(2, 3, 4))
    _, space, time = of_stage(1, 5, 2, 3, factor=(3, 2, 4))  # two heads of 16 channels
    angle = torch.cat([y, x], dim=2).flatten(0, 1)
    torch.testing.assert_close(space[0, :, 0, 1], torch.stack([angle.cos(), angle.sin()], dim=-1))
    angle = angles(3 * torch.arange(5), 8, LONGEST)
    torch.testing.assert_close(time[:, 0, 0, 1], torch.stack([angle.cos(), angle.sin()], dim=-1))


@pytest.mark.parametrize("factor", [(2, 1, 1), (1, 2, 2), (2, 2, 2), (1, 3, 2)])
def test_the_model_asks_for_positions_at_the_stride_of_its_stage(factor, monkeypatch):
    model, in_space, in_time = small_model(factor=factor), [], []
    space, time = network.spatial_angles, network.temporal_positions
    monkeypatch.setattr(network, "spatial_angles", lambda *a: in_space.append(a[3]) or space(*a))
    monkeypatch.setattr(network, "temporal_positions", lambda *a: in_time.append(a[1]) or time(*a))
    for stage in range(3):
        model(torch.randn(1, 1, 3, 8, 12), torch.tensor([0.5]), stage)
    assert in_time == [factor[0] ** k for k in range(3)]
    strides = [(factor[1] ** k, factor[2] ** k) for k in range(3)]
    assert in_space == [stride for stride in strides for _ in range(2)]  # added to the patches, and as rotations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_the_same_compiled_and_not(dtype, monkeypatch):
    x, angle = torch.randn(2, 3, 8, generator=seeded()).to(dtype), torch.randn(3, 4, generator=seeded())
    rotation = torch.stack([angle.cos(), angle.sin()], dim=-1)
    eager = rotate(x, rotation)
    torch.testing.assert_close(eager[..., 0], (x[..., 0] * angle[:, 0].cos() - x[..., 1] * angle[:, 0].sin()).to(dtype))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x, rotation), eager)


def test_model_sees_the_order_of_frames_their_rate_the_time_the_stage_and_the_label():
    model, x, t = small_model(classes=3), torch.randn(1, 1, 4, 8, 8), torch.tensor([0.5])
    y, base = torch.tensor([0]), None
    base = model(x, t, 0, y)
    assert not torch.allclose(model(x.flip(2), t, 0, y).flip(2), base, atol=1e-4)
    assert not torch.allclose(model(x.flip(4), t, 0, y).flip(4), base, atol=1e-4)
    assert not torch.allclose(model(x, t + 0.1, 0, y), base, atol=1e-4)
    assert not torch.allclose(model(x, t, 1, y), base, atol=1e-4)
    assert not torch.allclose(model(x, t, 0, y + 1), base, atol=1e-4)
    torch.testing.assert_close(model(x, t, 0), model(x, t, 0, torch.tensor([model.null_label])))


def test_one_frame_and_any_batch_give_what_a_clip_alone_gives():
    model, x = small_model(), torch.randn(3, 1, 4, 8, 8)
    t = torch.rand(3)
    torch.testing.assert_close(model(x, t, 0)[1:2], model(x[1:2], t[1:2], 0), rtol=1e-4, atol=1e-5)
    # with the temporal attention's gate at zero, as in a new block, every frame is treated as an image
    for block in model.blocks:
        for part in (block.temporal_condition.weight, block.temporal_condition.bias):
            part.data[2 * 32 : 3 * 32] = 0
    video = model(x, t, 0)
    for frame in range(4):
        image = model(x[:, :, frame : frame + 1], t, 0)
        torch.testing.assert_close(video[:, :, frame : frame + 1], image, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stages", [1, 3])
def test_video_model_that_starts_from_an_image_model_makes_every_frame_as_that_does(stages):
    image_model = small_model(classes=3, stages=1, temporal=False)
    torch.manual_seed(1)
    video_model = DiT(replace(image_model.config, stages=stages, temporal=True))
    video_model.start_from(image_model)
    x, t, y = torch.randn(2, 1, 4, 8, 8), torch.rand(2), torch.tensor([0, 2])
    for stage in range(stages):
        frames = torch.cat([image_model(x[:, :, frame : frame + 1], t, 0, y) for frame in range(4)], dim=2)
        torch.testing.assert_close(video_model(x, t, stage, y), frames, rtol=1e-4, atol=1e-5)
    video_model(x, t, 0, y).square().mean().backward()  # what was added is not dead: it learns at the first step
    assert all(block.temporal_condition.weight.grad.abs().max() > 0 for block in video_model.blocks)


def test_image_model_has_no_weights_that_it_does_not_use():
    image_model, x = small_model(temporal=False), torch.randn(1, 1, 1, 8, 8)
    image_model(x, torch.tensor([0.5]), 0).sum().backward()
    assert all(parameter.grad is not None for parameter in image_model.parameters())


def test_model_starts_only_from_one_that_fits():
    other = small_model(stages=1, temporal=False)
    for name, value in {"width": 64, "depth": 3, "classes": 2, "channels": 3}.items():
        with pytest.raises(ValueError, match=f"{name} {value} cannot start from one of {name}"):
            DiT(replace(other.config, **{name: value})).start_from(other)
    grown = DiT(replace(other.config, stages=3, temporal=True, factor=(2, 2, 2)))
    grown.start_from(other)  # one stage has no factor of its own
    with pytest.raises(ValueError, match=r"factor \(2, 1, 1\) cannot start from one of factor \(2, 2, 2\)"):
        small_model().start_from(grown)
    with pytest.raises(ValueError, match="temporal"):
        other.start_from(small_model(stages=1))
    with pytest.raises(ValueError, match="stages"):
        small_model(stages=3).start_from(small_model(stages=2))


@pytest.mark.parametrize("dtype, longest", [(torch.float32, 64), (torch.bfloat16, 128)])
@pytest.mark.parametrize("tokens", [7, 40, 64, 65, 128, 129])  # short rows go another way, and long ones
def test_attention_on_cpu_is_scaled_dot_product_attention(tokens, dtype, longest, monkeypatch):
    q, k, v = torch.randn(3, 2, 4, tokens, 8, dtype=dtype)
    reference, fused = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float()), []
    monkeypatch.setattr(network, "fused_attention", lambda *qkv: fused.extend(qkv) or fused_attention(*qkv))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = attention(q, k, v)
    assert y.dtype == dtype and bool(fused) == (tokens > longest)
    with torch.no_grad():
        assert torch.equal(attention(q, k, v), attention(q, k, v)) and fused
    torch.testing.assert_close(y.float(), reference, **{} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02})
    assert all(part.dtype == torch.float32 for part in fused)  # in which the fused kernel is fast


def test_a_convolution_adds_a_patch_s_neighbours_to_what_the_mlp_takes_and_at_first_nothing():
    new, plain = small_model(live=False, convolution=True), small_model()
    new.start_from(plain)
    x, t = torch.randn(1, 1, 2, 16, 16), torch.tensor([0.5])
    torch.testing.assert_close(new(x, t, 0), plain(x, t, 0))
    block, x = Block(8, 1, temporal=False, convolution=True), torch.randn(2, 3, 12, 8)  # of 3 rows of 4 patches
    block.mlp = torch.nn.Identity()
    for parameter in (*block.condition.parameters(), *block.neighbours.parameters()):
        torch.nn.init.zeros_(parameter)
    block.condition.bias.data[-8:] = 1  # the MLP's gate is open, the attention's is shut
    block.neighbours.weight.data[:, 0, 1, 2] = 1  # what stands on the right
    y = block(x, torch.zeros(2, 8), torch.zeros(1, 12, 1, 1, 4, 2), torch.zeros(3, 1, 1, 1, 4, 2), 3) - x
    normal = torch.nn.functional.layer_norm(x, (8,)).unflatten(2, (3, 4))
    right = torch.nn.functional.pad(normal[:, :, :, 1:], (0, 0, 0, 1))
    torch.testing.assert_close(y, (normal + right).flatten(2, 3))


@pytest.mark.parametrize("dim", [1, 2])  # over frames, over patches
def test_attention_turns_queries_and_keys_by_their_positions_and_leaves_values(dim):
    layer, x = Attention(16, 2, dim).double(), torch.randn(2, 3, 5, 16).double()
    angle = torch.rand(x.shape[dim], 4).double()
    rotation = torch.stack([angle.cos(), angle.sin()], dim=-1)[:, None, None, None].transpose(0, dim - 1)
    turns = torch.stack([torch.block_diag(*map(turn_by, row)) for row in angle])  # (tokens, d, d)
    q, k, v = (part.movedim(dim, -2) for part in layer.qkv(x).unflatten(-1, (3, 2, 8)).unbind(3))
    q, k = ((turns @ part.unsqueeze(-1)).squeeze(-1) for part in (q, k))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v).movedim(-2, dim)
    torch.testing.assert_close(layer(x, rotation), layer.out(y.flatten(-2)))


def turn_by(angle: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])


def test_attention_elsewhere_can_use_the_flash_kernel():
    q, k, v = torch.randn(3, 2, 3, 4, 7, 8)  # five dimensions each, as in the model; the kernel takes four
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.testing.assert_close(fused_attention(q, k, v), attention(q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_converted_to_another_dtype_answers_in_it(dtype):
    model, x, t = small_model(classes=3), torch.randn(2, 1, 4, 8, 8), torch.tensor([0.2, 0.9])
    expected, y = model(x, t, 1, torch.tensor([0, 2])), model.to(dtype)(x.to(dtype), t, 1, torch.tensor([0, 2]))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)


def test_gradients_are_finite_in_bf16_and_reach_every_parameter():
    model, x = small_model(classes=3), torch.randn(2, 1, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, torch.tensor([0.0, 1.0]), 1, torch.tensor([0, 3]))
    assert out.dtype == torch.float32
    out.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: DiTConfig(width=30), "30"),
        (lambda: DiTConfig(depth=0), "depth"),
        (lambda: small_model()(torch.zeros(1, 1, 4, 6, 8), torch.zeros(1), 0), "divisible by 4"),
        (lambda: small_model()(torch.zeros(1, 3, 4, 8, 8), torch.zeros(1), 0), "1 channels"),
        (lambda: small_model()(torch.zeros(1, 1, 4, 8, 8), torch.zeros(1), 3), "stage 3"),
        (lambda: small_model()(torch.zeros(1, 1, 4, 8, 8), torch.zeros(1), 0, torch.tensor([1])), "labels"),
    ],
)
def test_model_names_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- The optimizer


@pytest.mark.parametrize("shape", [(24, 8), (8, 8), (8, 32)])
def test_muon_is_torch_s_muon(shape):
    """Same momentum, orthogonal update, scale and decay; torch works in bfloat16, so within its rounding."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for _ in range(2)]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    start = [parameter.detach().clone() for parameter in ours]
    optimizer = Muon(ours, lr=0.1, weight_decay=0.2, dtype=torch.float32)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(shape)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.03 * (b - before).norm()
