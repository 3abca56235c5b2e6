"""Other people's models on the pyramid: the code of the pages as it stands."""

import pytest
import torch
from conftest import clips, page_code

from test_tpdiff import SCALED_LINEAR
from tpdiff import Pyramid, align


def test_readme_example_trains_and_samples_a_model_of_the_user_s_own():
    network = torch.nn.Conv3d(2, 1, 3, padding=1)
    before = network.weight.clone()

    def model(x, t, k):
        return network(torch.cat([x, t.view(-1, 1, 1, 1, 1).expand_as(x)], 1))

    names = {"torch": torch, "Pyramid": Pyramid, "align": align, "model": model}
    names |= {"alphas_cumprod": SCALED_LINEAR, "videos": torch.randn(3, 5, 1, 7, 4, 4)}
    names |= {"optimizer": torch.optim.AdamW(network.parameters(), 1e-3)}
    exec(page_code("videos"), names)
    assert names["clips"].shape == (4, 1, 7, 4, 4) and names["clips"].isfinite().all()
    assert not torch.equal(network.weight, before)


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers", reason="other people's models need: pip install diffusers==0.42.1")


@pytest.fixture
def animate_diff(diffusers):
    """(unet, model as the pages wrap it, alphas_cumprod): AnimateDiff's network, tiny, and its schedule."""
    from diffusers.models.embeddings import SinusoidalPositionalEmbedding

    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion")}
    blocks |= {"up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "block_out_channels": (16, 32)}
    heads = {"num_attention_heads": 2, "motion_num_attention_heads": 2, "cross_attention_dim": 16}
    unet = diffusers.UNetMotionModel(**blocks, **heads, layers_per_block=1, norm_num_groups=8).eval()
    for module in unet.modules():  # new motion modules end in zeros, and would hide the positions
        if type(module).__name__ == "AnimateDiffTransformer3D":
            torch.nn.init.normal_(module.proj_out.weight, std=0.1)
    schedule = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012}
    alphas_cumprod = diffusers.DDIMScheduler(**schedule).alphas_cumprod
    names = {"unet": unet, "alphas_cumprod": alphas_cumprod, "text": torch.randn(1, 2, 16)}
    names |= {"SinusoidalPositionalEmbedding": SinusoidalPositionalEmbedding}
    exec(page_code("SinusoidalPositionalEmbedding"), names)
    return unet, with_text(names), alphas_cumprod


@pytest.fixture
def wan_model(diffusers):
    """(network, model as the pages wrap it, its pyramid): Wan's video transformer, tiny."""
    torch.manual_seed(0)
    size = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "ffn_dim": 64}
    wan = diffusers.WanTransformer3DModel(
        **size, in_channels=4, out_channels=4, text_dim=16, rope_max_seq_len=64
    ).eval()
    names = {"wan": wan, "pyramid": Pyramid("flow", 3), "text": torch.randn(1, 2, 16)}
    exec(page_code("wan"), names)
    return wan, with_text(names), names


def with_text(names: dict):
    """The adapter's `model`, its `text` repeated for as many clips as it gets."""
    text = names["text"]

    def model(x, t, k):
        names["text"] = text.expand(len(x), -1, -1)
        return names["model"](x, t, k)

    return model


def lowers_the_loss(network: torch.nn.Module, model, p: Pyramid) -> None:
    """Training steps of every stage of the pyramid on one batch, with fixed draws; then a few clips."""
    x0, optimizer = clips(2, 4, 8, 8, 8).float(), torch.optim.AdamW(network.parameters(), 3e-3)
    for k in range(len(p)):
        x0_k = p.down(x0, k)
        x_start, x_end = p.endpoints(x0, align(x0_k, torch.randn_like(x0_k)), k)
        x_t, target, t = p.interpolate(x_start, x_end, k, torch.tensor([0.3, 0.8]))
        losses = []
        for _ in range(8):
            losses.append((model(x_t, t, k) - target).square().mean())
            losses[-1].backward(), optimizer.step(), optimizer.zero_grad()
        assert losses[-1] < 0.9 * losses[0]
    sampled = p.sample(model, (3, 4, 8, 8, 8), steps=6)
    assert sampled.shape == (3, 4, 8, 8, 8) and sampled.isfinite().all()


def positions(unet: torch.nn.Module, frames: int) -> list[torch.Tensor]:
    """What the motion modules add to the frames."""
    modules = [module for module in unet.modules() if type(module).__name__ == "SinusoidalPositionalEmbedding"]
    return [module(torch.zeros(1, frames, module.pe.shape[2])) for module in modules]


def test_animatediff_of_diffusers_trains_and_samples_on_the_pyramid(animate_diff):
    unet, model, alphas_cumprod = animate_diff
    lowers_the_loss(unet, model, Pyramid("ddim", 3, alphas_cumprod))


def test_one_ddim_stage_is_the_loop_of_diffusers_with_its_own_scheduler(animate_diff, diffusers):
    _, model, alphas_cumprod = animate_diff
    noise, steps = torch.randn(2, 4, 8, 8, 8, generator=torch.Generator().manual_seed(3)), 10
    ours = Pyramid("ddim", 1, alphas_cumprod).sample(
        model, noise.shape, steps, generator=torch.Generator().manual_seed(3)
    )
    options = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    scheduler = diffusers.DDIMScheduler(**options, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        x = noise
        for step in scheduler.timesteps:
            x = scheduler.step(model(x, (step + 1) / 1000 * torch.ones(2), 0), step, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3 * x.abs().max().item())


def test_wan_of_diffusers_trains_and_samples_on_the_pyramid(wan_model):
    wan, model, names = wan_model
    lowers_the_loss(wan, model, names["pyramid"])


@pytest.mark.parametrize("k", [1, 2])
def test_other_models_see_the_frames_of_a_stage_where_they_are_in_the_clip(k, animate_diff, wan_model):
    x = torch.randn(1, 4, 8, 8, 8)
    (unet, unet_model, _), (wan, wan_as_model, _) = animate_diff, wan_model
    seen = []
    for stage in (0, k):
        x_stage = x[:, :, :: 2**stage]
        unet_model(x_stage, torch.tensor([0.5]), stage), wan_as_model(x_stage, torch.tensor([0.5]), stage)
        angles = [each.unflatten(1, (8 // 2**stage, 16)) for each in wan.rope(x_stage)]
        seen.append(positions(unet, 8 // 2**stage) + angles)
    assert len(seen[0]) == 9
    for full_rate, this_rate in zip(*seen, strict=True):
        assert torch.equal(full_rate[:, :: 2**k], this_rate)


def test_one_flow_stage_is_the_loop_of_diffusers_with_its_own_scheduler(wan_model, diffusers):
    _, model, names = wan_model
    names["pyramid"] = Pyramid("flow", 1)
    noise, steps = torch.randn(2, 4, 8, 8, 8, generator=torch.Generator().manual_seed(3)), 10
    ours = names["pyramid"].sample(model, noise.shape, steps, generator=torch.Generator().manual_seed(3))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    with torch.no_grad():
        x = noise
        for step in scheduler.timesteps:
            x = scheduler.step(model(x, step / 1000 * torch.ones(2), 0), step, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3 * x.abs().max().item())
