"""The model: its shapes, its positions, what it sees, how it starts from another, and its optimizer."""

from dataclasses import replace

import pytest
import torch
from conftest import seeded, small_model
from torch import nn
from torch.nn.functional import layer_norm, pad, scaled_dot_product_attention
from torch.testing import assert_close

import model as network
from model import LONGEST, Attention, Block, DiT, DiTConfig, Muon, angles, attention, fused_attention


@pytest.mark.parametrize("T, H, W, channels", [(8, 16, 16, 1), (4, 8, 24, 3), (1, 4, 4, 2)])
def test_model_keeps_the_shape_at_every_stage_and_its_first_output_is_zero(T, H, W, channels):
    x, t = torch.randn(2, channels, T, H, W), torch.rand(2)
    for live in (False, True):
        model = small_model(live=live, channels=channels)
        for stage in range(3):
            out = model(x, t, stage)
            assert out.shape == x.shape and out.dtype == torch.float32 and bool(out.abs().max() > 0) == live
            assert_close(model(x[1:], t[1:], stage), out[1:], rtol=1e-4, atol=1e-5)  # in any batch


def test_positions_are_kept_for_training_though_sampling_asked_first():
    network.positions_of.cache_clear()
    model, x, t = small_model(), torch.randn(1, 1, 4, 8, 8), torch.tensor([0.5])
    with torch.inference_mode():
        model(x, t, 1)
    model(x, t, 1).square().sum().backward()
    assert network.positions_of.cache_info().misses == 1 and model.embed_patch.weight.grad.abs().sum() > 0


def turns_by(angle: torch.Tensor) -> torch.Tensor:
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def test_frames_rows_and_columns_are_where_their_centres_are_at_the_full_rate():
    def of_patches(count):
        y, x = (angles(torch.tensor(centres), count, LONGEST) for centres in ([1.5, 5.5], [4.0, 13.0, 22.0]))
        return torch.cat([y[:, None].expand(2, 3, count), x[None].expand(2, 3, count)], dim=2).flatten(0, 1)

    config, device = small_model(factor=(4, 2, 3)).config, torch.device("cpu")  # of two heads of 16 channels
    patches, space, time = network.positions_of(config, 2, 5, 2, 3, torch.float32, device)
    assert_close(patches, network.embed_angles(of_patches(8)))
    assert_close(space[0, :, 0, 1], turns_by(of_patches(4)))
    assert_close(time[:, 0, 0, 1], turns_by(angles(16 * torch.arange(5), 8, LONGEST)))


@pytest.mark.parametrize("compiling", [False, True])  # where rotations are written in another way
@pytest.mark.parametrize("dim", [1, 2])  # over frames, over patches
def test_attention_turns_queries_and_keys_by_their_positions_and_leaves_values(dim, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    layer, x = Attention(16, 2, dim).double(), torch.randn(2, 3, 5, 16).double()
    angle = torch.rand(x.shape[dim], 4).double()
    q, k, v = (part.movedim(dim, -2) for part in layer.qkv(x).unflatten(-1, (3, 2, 8)).unbind(3))
    q, k = (torch.view_as_complex(part.unflatten(-1, (4, 2)).contiguous()) * (1j * angle).exp() for part in (q, k))
    y = scaled_dot_product_attention(*(torch.view_as_real(part).flatten(-2) for part in (q, k)), v).movedim(-2, dim)
    rotation = turns_by(angle)[:, None, None, None].transpose(0, dim - 1)
    assert_close(layer(x, rotation), layer.out(y.flatten(-2)))


def test_model_sees_the_order_of_frames_their_place_their_rate_the_time_the_stage_and_the_label():
    model, x, t, y = small_model(classes=3), torch.randn(1, 1, 4, 8, 8), torch.tensor([0.5]), torch.tensor([0])
    others = [model(x.flip(2), t, 0, y).flip(2), model(x.flip(4), t, 0, y).flip(4)]
    others += [model(x, t + 0.1, 0, y), model(x, t, 1, y), model(x, t, 0, y + 1)]
    assert not any(torch.allclose(other, model(x, t, 0, y), atol=1e-4) for other in others)
    assert_close(model(x, t, 0), model(x, t, 0, torch.tensor([model.null_label])))
    nn.init.zeros_(model.embed_stage.weight)  # without it a stage shows in its positions alone
    assert not any(torch.allclose(model(x, t, stage), model(x, t, 0), atol=1e-4) for stage in (1, 2))


@pytest.mark.parametrize("stages", [1, 3])
def test_video_model_that_starts_from_an_image_model_makes_every_frame_as_that_does(stages):
    image_model = small_model(classes=3, stages=1, temporal=False)
    torch.manual_seed(1)
    video_model = DiT(replace(image_model.config, stages=stages, temporal=True, convolution=True))
    video_model.start_from(image_model)
    x, t, y = torch.randn(2, 1, 4, 8, 8), torch.rand(2), torch.tensor([0, 2])
    frames = torch.cat([image_model(frame, t, 0, y) for frame in x.split(1, dim=2)], dim=2)
    for stage in range(stages):
        assert_close(video_model(x, t, stage, y), frames, rtol=1e-4, atol=1e-5)
    video_model(x, t, 0, y).square().mean().backward()  # what was added is not dead: it learns at the first step
    added = [layer.weight for block in video_model.blocks for layer in (block.temporal_condition, block.neighbours)]
    assert all(weight.grad.abs().max() > 0 for weight in added)


def test_model_starts_only_from_one_that_fits():
    other, image = small_model(factor=(2, 2, 2)), small_model(stages=1, temporal=False)
    for name, value in {"width": 64, "depth": 3, "classes": 2, "stages": 2, "factor": (2, 1, 1)}.items():
        with pytest.raises(ValueError, match=f"of {name} .* cannot start from one of {name} "):
            DiT(replace(other.config, **{name: value})).start_from(other)
    with pytest.raises(ValueError, match="temporal"):
        image.start_from(small_model(stages=1))
    other.start_from(image)  # one stage has no factor of its own


def test_a_convolution_adds_a_patch_s_neighbours_to_what_the_mlp_takes():
    block, x = Block(8, 1, temporal=False, convolution=True), torch.randn(2, 3, 12, 8)  # of 3 rows of 4 patches
    block.mlp = nn.Identity()
    for parameter in (*block.condition.parameters(), *block.neighbours.parameters()):
        nn.init.zeros_(parameter)
    block.condition.bias.data[-8:] = 1  # the MLP's gate is open, the attention's is shut
    block.neighbours.weight.data[:, 0, 1, 2] = 1  # what stands on the right
    y = block(x, torch.zeros(2, 8), torch.zeros(1, 12, 1, 1, 4, 2), None, rows=3) - x
    normal = layer_norm(x, (8,)).unflatten(2, (3, 4))
    assert_close(y, (normal + pad(normal[:, :, :, 1:], (0, 0, 0, 1))).flatten(2, 3))


@pytest.mark.parametrize("dtype, longest", [(torch.float32, 64), (torch.bfloat16, 128)])
@pytest.mark.parametrize("tokens", [7, 40, 64, 65, 128, 129])  # short rows go another way, and long ones
def test_attention_on_cpu_is_scaled_dot_product_attention(tokens, dtype, longest, monkeypatch):
    q, k, v = torch.randn(3, 2, 3, 4, tokens, 8, dtype=dtype)  # five dimensions each, as in the model
    reference, fused = scaled_dot_product_attention(q.float(), k.float(), v.float()), []
    monkeypatch.setattr(network, "fused_attention", lambda *qkv: fused.extend(qkv) or fused_attention(*qkv))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = attention(q, k, v)
    assert y.dtype == dtype and bool(fused) == (tokens > longest)
    assert_close(y.float(), reference, **{} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02})
    with torch.no_grad():
        assert torch.equal(attention(q, k, v), attention(q, k, v)) and fused
    assert all(part.dtype == torch.float32 for part in fused)  # in which the fused kernel is fast


@pytest.mark.parametrize("options", [{"classes": 3}, {"temporal": False}])
def test_gradients_are_finite_in_bf16_and_reach_every_parameter(options):
    model, y = small_model(**options), torch.tensor([0, 3]) if "classes" in options else None
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(2, 1, 4, 8, 8), torch.tensor([0.0, 1.0]), 1, y)
    assert out.dtype == torch.float32
    out.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("options, shape, stage, labels, message", [
    ({"width": 30}, (1, 1, 4, 8, 8), 0, None, "30"), ({"depth": 0}, (1, 1, 4, 8, 8), 0, None, "depth"),
    ({}, (1, 1, 4, 6, 8), 0, None, "divisible by 4"), ({}, (1, 3, 4, 8, 8), 0, None, "1 channels"),
    ({}, (1, 1, 4, 8, 8), 3, None, "stage 3"), ({}, (1, 1, 4, 8, 8), 0, torch.tensor([1]), "labels"),
])  # fmt: skip
def test_model_names_what_does_not_fit(options, shape, stage, labels, message):
    with pytest.raises(ValueError, match=message):
        DiT(DiTConfig(**options))(torch.zeros(shape), torch.zeros(1), stage, labels)


@pytest.mark.parametrize("shape", [(24, 8), (8, 8), (8, 32)])
def test_muon_is_torch_s_muon(shape):
    """Same momentum, orthogonal update, scale and decay; torch works in bfloat16, so within its rounding."""
    start = torch.randn(2, *shape, generator=seeded())
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    frozen = nn.Parameter(start[0].clone())  # has no gradient
    optimizer = Muon([*ours, frozen], lr=0.1, weight_decay=0.2, dtype=torch.float32)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for seed in range(1, 4):
        for a, b, gradient in zip(ours, theirs, torch.randn(2, *shape, generator=seeded(seed)), strict=True):
            a.grad, b.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    assert torch.equal(frozen, start[0])
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.03 * (b - before).norm()


def test_a_model_that_was_exported_still_answers_as_its_export_does():
    model, x, t = small_model(), torch.randn(2, 1, 4, 8, 8), torch.rand(2)
    network.positions_of.cache_clear()
    exported = torch.export.export(model, (x, t, 1)).module()
    assert_close(exported(x, t, 1), model(x, t, 1))
