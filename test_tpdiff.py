"""The equations, in the paper's order. A test's name says what is true; break the formula it guards and it goes red.

This file needs tpdiff.py alone, and torch, numpy and pytest.
"""

import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tpdiff
from tpdiff import Pyramid, align, downsample, draw_nearest, randn, split_steps, upsample

ROOT = Path(__file__).parent
# A schedule of another kind than the default: Stable Diffusion's, 300 steps, and one far from linear.
SCALED_LINEAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 300, dtype=torch.float64) ** 2 * 3).cumprod(0)
COSINE = torch.cos(torch.linspace(0.05, 1.55, 50, dtype=torch.float64)) ** 2
NEARLY_ZERO_SNR = torch.cos(torch.linspace(0.02, math.pi / 2 - 1e-4, 1000, dtype=torch.float64)) ** 2
PYRAMIDS = [("flow", None), ("ddim", None), ("ddim", SCALED_LINEAR), ("ddim", COSINE)]
every_pyramid = pytest.mark.parametrize("mode, alphas_cumprod", PYRAMIDS)
every_depth = pytest.mark.parametrize("stages", [1, 2, 3, 4])
PREDICTIONS = ["epsilon", "velocity", "sample"]
both_modes = pytest.mark.parametrize("mode", ["flow", "ddim"])


def distance(x: torch.Tensor, noise: torch.Tensor) -> float:
    return (x - noise).flatten(1).norm(dim=1).sum().item()


def assert_exact(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clips(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def gamma_sigma(mode: str, t: float, alphas_cumprod=None) -> tuple[float, float]:
    """Eq. 6 by hand, in plain Python."""
    if mode == "flow":
        return 1 - t, t
    if alphas_cumprod is None:
        alphas_cumprod = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    abar = np.concatenate([[1.0], np.asarray(alphas_cumprod)])
    angle = np.interp(t, np.linspace(0, 1, len(abar)), np.arctan2(np.sqrt(1 - abar), np.sqrt(abar)))
    return math.cos(angle), math.sin(angle)


# ---- Section 3.1: vanilla diffusion is the one-stage pyramid (Eq. 1-5)


def test_one_stage_of_flow_is_vanilla_flow_matching():
    p, x0, noise = Pyramid("flow", 1), clips(3, 2, 5, 4, 4), clips(3, 2, 5, 4, 4, seed=1)
    u = torch.tensor([0.0, 0.3, 1.0])
    x_t, target, t = p.interpolate(*p.endpoints(x0, noise, 0), 0, u)
    t_ = u.double().view(3, 1, 1, 1, 1)
    assert_exact(t, u.double())
    assert_exact(x_t, (1 - t_) * x0 + t_ * noise)  # Eq. 4
    assert_exact(target, noise - x0)  # Eq. 5


def test_one_stage_of_ddim_is_vanilla_ddim():
    p, x0, noise = Pyramid("ddim", 1), clips(3, 2, 5, 4, 4), clips(3, 2, 5, 4, 4, seed=1)
    u = torch.tensor([0.0, 0.3, 1.0])
    x_t, target, _ = p.interpolate(*p.endpoints(x0, noise, 0), 0, u)
    for i in range(3):
        gamma, sigma = gamma_sigma("ddim", float(u[i].double()))
        assert_exact(x_t[i], gamma * x0[i] + sigma * noise[i])  # Eq. 1
    assert_exact(target, noise)  # Eq. 2


def test_one_stage_sampler_is_the_vanilla_loop():
    x1, N = clips(2, 1, 3, 4, 4), 25
    predictions = clips(N, 2, 1, 3, 4, 4, seed=1)
    for mode in ("flow", "ddim"):
        given = iter(predictions)
        ours = Pyramid(mode, 1).integrate(lambda x, t, k, given=given: next(given), x1, 0, N, "euler")
        x = x1
        for i in range(N):
            (g, s), (g_, s_) = gamma_sigma(mode, 1 - i / N), gamma_sigma(mode, 1 - (i + 1) / N)
            if mode == "flow":
                x = x - predictions[i] / N
            else:
                x = g_ * (x - s * predictions[i]) / g + s_ * predictions[i]  # Eq. 3
        assert_exact(ours, x)


def test_n_steps_of_one_ddim_stage_visit_exactly_the_given_schedule():
    alphas_cumprod, visited = SCALED_LINEAR, []
    p = Pyramid("ddim", 1, alphas_cumprod)

    def predict(x, t, k):
        visited.append(t[0].item())
        return torch.zeros_like(x)

    x = p.integrate(predict, torch.ones(1, 1, 1, 1, 1, dtype=torch.float64), 0, len(alphas_cumprod), "euler")
    abar_visited = [p.gamma_sigma(t)[0].item() ** 2 for t in visited]
    torch.testing.assert_close(torch.tensor(abar_visited), alphas_cumprod.flip(0).float())
    torch.testing.assert_close(x.item(), alphas_cumprod[-1].item() ** -0.5)  # eps = 0: x0 = x / sqrt(abar_N)


# ---- Section 3.2: the stages


def test_down_takes_every_stride_th_frame_and_up_repeats_each_frame():
    """In space: the mean of a block, and every pixel of it."""
    x = torch.arange(8.0).view(1, 1, 8, 1, 1)
    assert downsample(x, (1, 1, 1)).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert downsample(x, (4, 1, 1)).flatten().tolist() == [0, 4]
    assert downsample(x, (3, 1, 1)).flatten().tolist() == [0, 3, 6]
    assert upsample(downsample(x, (4, 1, 1))).flatten().tolist() == [0, 0, 4, 4]
    # of an odd number of frames the first stands for itself, as in causal video VAEs
    assert upsample(torch.arange(4.0).view(1, 1, 4, 1, 1), frames=7).flatten().tolist() == [0, 1, 1, 2, 2, 3, 3]
    for frames in (6, 9):
        with pytest.raises(ValueError, match=f"4 frames, 2 times each, cannot become {frames}"):
            upsample(torch.zeros(1, 1, 4, 1, 1), frames=frames)

    x = torch.arange(16.0).view(1, 1, 1, 4, 4)
    assert downsample(x, (1, 2, 4)).flatten().tolist() == [3.5, 11.5]
    assert upsample(downsample(x, (1, 2, 4)), (1, 2, 4)).flatten().tolist() == [3.5] * 8 + [11.5] * 8
    with pytest.raises(ValueError, match="4 does not divide by 3"):
        downsample(x, (1, 3, 1))


def test_shapes_of_the_stages():
    for frames, left in ((21, [21, 11, 6]), (31, [31, 16, 8]), (13, [13, 7, 4]), (1, [1, 1, 1]), (16, [16, 8, 4])):
        assert [Pyramid("flow").shape((2, 3, frames, 5, 7), k)[2] for k in range(3)] == left
    p = Pyramid("flow", 3, factor=(3, 2, 1))
    assert [s.stride for s in p] == [(1, 1, 1), (3, 2, 1), (9, 4, 1)]
    assert [p.shape((1, 2, 10, 8, 5), k) for k in range(3)] == [(1, 2, 10, 8, 5), (1, 2, 4, 4, 5), (1, 2, 2, 2, 5)]
    assert all(p.down(clips(1, 2, 10, 8, 5), k).shape == p.shape((1, 2, 10, 8, 5), k) for k in range(3))


@every_pyramid
@every_depth
def test_stage_ends_are_uniform_and_ratio_of_next_start_is_sqrt_2_larger(mode, alphas_cumprod, stages):
    """Eq. 16."""
    p = Pyramid(mode, stages, alphas_cumprod)
    assert len(p) == stages and [s.index for s in p] == list(range(stages))
    assert [s.stride for s in p] == [(2**k, 1, 1) for k in range(stages)]
    assert [s.t_end for s in p] == [k / stages for k in range(stages)] and p[stages - 1].t_start == 1
    assert (p[0].gamma_end, p[0].sigma_end) == (1, 0)
    for s in p:
        assert (s.gamma_start, s.sigma_start) == pytest.approx(gamma_sigma(mode, s.t_start, alphas_cumprod), abs=1e-12)
        assert (s.gamma_end, s.sigma_end) == pytest.approx(gamma_sigma(mode, s.t_end, alphas_cumprod), abs=1e-12)
        assert s.t_start > s.t_end and all(type(value) in (int, float, tuple) for value in s)
    for s, noisier in itertools.pairwise(p):
        assert noisier.sigma_end / noisier.gamma_end == pytest.approx(
            s.sigma_start / s.gamma_start / math.sqrt(2), rel=1e-12
        )
        assert noisier.t_end < s.t_start < noisier.t_start  # neighbouring windows overlap


def test_flow_windows_of_three_stages_are_those_of_the_closed_form():
    starts = [math.sqrt(2) * e / ((1 - e) + math.sqrt(2) * e) for e in (1 / 3, 2 / 3)] + [1]
    assert [s.t_start for s in Pyramid("flow", 3)] == pytest.approx(starts)


@pytest.mark.parametrize("factor", [(2, 1, 1), (1, 2, 2), (2, 2, 2), (3, 1, 2)])
@pytest.mark.parametrize("ends", [(0, 1 / 3, 2 / 3), (0, 0.5, 0.75)])
@both_modes
def test_stages_of_any_factor_start_where_a_block_s_noise_can_be_made_independent(mode, ends, factor):
    """Eq. 16': a ratio of sqrt(n)."""
    p = Pyramid(mode, 3, SCALED_LINEAR if mode == "ddim" else None, factor=factor, ends=ends)
    assert p.ends == tuple(ends) == tuple(s.t_end for s in p) and p.factor == factor and p.stages == 3
    for s, noisier in itertools.pairwise(p):
        ratio = math.sqrt(math.prod(factor)) * noisier.sigma_end / noisier.gamma_end
        assert s.sigma_start / s.gamma_start == pytest.approx(ratio, rel=1e-9)


def zero_signal(steps: int = 1000) -> torch.Tensor:
    """Stable Diffusion's schedule, rescaled to end at zero signal (arXiv 2305.08891)."""
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2).cumprod(0).sqrt()
    return ((abar - abar[-1]) * abar[0] / (abar[0] - abar[-1])) ** 2


def test_a_schedule_may_end_at_zero_signal_but_not_for_noise_prediction():
    for prediction in ("velocity", "sample"):
        s = Pyramid("ddim", 3, zero_signal(), prediction=prediction)[2]
        assert (s.gamma_start, s.sigma_start) == (0, 1)
    for prediction in (None, "epsilon"):
        with pytest.raises(ValueError, match="velocity"):
            Pyramid("ddim", 3, zero_signal(), prediction=prediction)


# ---- Section 3.3-3.4: end points, the points between them, and the target (Eq. 7-13)


@every_pyramid
@every_depth
def test_endpoints_are_equations_7_and_8(mode, alphas_cumprod, stages):
    p, x0 = Pyramid(mode, stages, alphas_cumprod), clips(2, 3, 16, 2, 2)
    for k in range(stages):
        noise = clips(2, 3, 16 // 2**k, 2, 2, seed=k)
        gs, ss = gamma_sigma(mode, p[k].t_start, alphas_cumprod)
        ge, se = gamma_sigma(mode, p[k].t_end, alphas_cumprod)
        index = torch.arange(0, 16, 2**k)
        coarse = index if k == stages - 1 else index // 2 ** (k + 1) * 2 ** (k + 1)
        x_start, x_end = p.endpoints(x0, noise, k)
        assert_exact(x_start, gs * x0[:, :, coarse] + ss * noise)
        assert_exact(x_end, ge * x0[:, :, index] + se * noise)


@every_pyramid
@every_depth
def test_interpolate_is_equations_10_to_13(mode, alphas_cumprod, stages):
    p = Pyramid(mode, stages, alphas_cumprod)
    x_start, x_end, u = clips(5, 2, 4, 2, 2), clips(5, 2, 4, 2, 2, seed=1), torch.tensor([0, 0.1, 0.5, 0.9, 1]).double()
    for k, s in enumerate(p):
        x_t, target, t = p.interpolate(x_start, x_end, k, u)
        assert_exact(t, s.t_end + u * (s.t_start - s.t_end))
        assert_exact(x_t[0], x_end[0])
        assert_exact(x_t[4], x_start[4])
        (gs, ss), (ge, se) = (gamma_sigma(mode, time_, alphas_cumprod) for time_ in (s.t_start, s.t_end))
        for i in range(5):
            if mode == "flow":
                line, slope = u[i] * x_start[i] + (1 - u[i]) * x_end[i], x_start[i] - x_end[i]  # Eq. 12-13
            else:
                g, n = gamma_sigma(mode, t[i].item(), alphas_cumprod)
                slope = (x_end[i] / ge - x_start[i] / gs) / (se / ge - ss / gs)  # Eq. 11
                line = g / gs * x_start[i] + g * (n / g - ss / gs) * slope  # Eq. 10
            assert_exact(x_t[i], line)
            assert_exact(target[i], slope)


@every_pyramid
@every_depth
@pytest.mark.parametrize("solver", ["euler", "ab2"])
def test_constant_target_integrates_from_start_exactly_to_end(mode, alphas_cumprod, stages, solver):
    """The partitioned ODE: whatever the number of steps, the stage's line ends at its end point."""
    p, x0 = Pyramid(mode, stages, alphas_cumprod), clips(2, 1, 8, 2, 2)
    for k, steps in itertools.product(range(stages), (1, 2, 7)):
        x_start, x_end = p.endpoints(x0, clips(2, 1, 8 // 2**k, 2, 2, seed=1), k)
        x_t, target, t = p.interpolate(x_start, x_end, k, torch.full((2,), 0.6, dtype=torch.float64))
        for x, since in ((x_start, None), (x_t, t[0].item())):
            landed = p.integrate(lambda x, t, k, target=target: target, x, k, steps, solver, since)
            assert_exact(landed, x_end)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_flow_target_of_a_still_clip_is_the_whole_velocity_times_the_stage_s_length(stages):
    p, still = Pyramid("flow", stages), clips(2, 1, 1, 3, 3).expand(-1, -1, 8, -1, -1)
    for k in range(stages):
        noise = clips(2, 1, 8 // 2**k, 3, 3, seed=1)
        x_start, x_end = p.endpoints(still, noise, k)
        _, target, _ = p.interpolate(x_start, x_end, k, torch.tensor([0.2, 0.7]))
        torch.testing.assert_close(target, (p[k].t_start - p[k].t_end) * (noise - downsample(still, p[k].stride)))


@both_modes
def test_a_stage_is_integrated_from_a_time_within_it_in_one_step_or_more(mode):
    p, x = Pyramid(mode, 3), torch.zeros(1, 1, 4, 2, 2)
    for steps, t in ((0, None), (1, p[1].t_end), (1, p[1].t_start + 0.01)):
        with pytest.raises(ValueError, match="stage 1 needs at least one step"):
            p.integrate(lambda x, t, k: x, x, 1, steps, t=t)


@pytest.mark.parametrize("mode, alphas_cumprod", [*PYRAMIDS, ("ddim", NEARLY_ZERO_SNR)])
@pytest.mark.parametrize("stages", [1, 3])
def test_float32_is_close_to_float64(mode, alphas_cumprod, stages):
    """Also where x / gamma is in the thousands: at the start of a schedule that ends in almost pure noise."""
    p, x0, u = Pyramid(mode, stages, alphas_cumprod), clips(4, 1, 8, 4, 4), torch.tensor([0, 0.01, 0.6, 1])
    for k in range(stages):
        noise = clips(4, 1, 8 // 2**k, 4, 4, seed=1)
        exact = p.interpolate(*p.endpoints(x0, noise, k), k, u)
        single = p.interpolate(*p.endpoints(x0.float(), noise.float(), k), k, u)
        for a, b in zip(single, exact, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_each_target_is_of_one_line_from_a_clean_clip_to_a_noise(prediction):
    """Eq. 10': x_t = gamma X + sigma E. Whatever is predicted, one step lands where the line says."""
    p, x0, noise = Pyramid("ddim", 3, SCALED_LINEAR, prediction=prediction), clips(2, 1, 8, 2, 2), clips(2, 1, 4, 2, 2)
    x_start, x_end = p.endpoints(x0, noise, 1)
    x_t, target, t = p.interpolate(x_start, x_end, 1, torch.tensor([0.3, 0.9]))
    eps = Pyramid("ddim", 3, SCALED_LINEAR).interpolate(x_start, x_end, 1, torch.tensor([0.3, 0.9]))[1]
    gamma, sigma = (value.view(2, 1, 1, 1, 1) for value in p.gamma_sigma(t))
    clean = (x_t - sigma * eps) / gamma
    assert_exact(target, {"epsilon": eps, "velocity": gamma * eps - sigma * clean, "sample": clean}[prediction])
    for i in range(2):
        landed = p.integrate(lambda x, t, k, i=i: target[i : i + 1], x_t[i : i + 1], 1, 1, t=t[i].item())
        assert_exact(landed, x_end[i : i + 1])


def test_a_shift_places_times_and_steps_evenly_in_unshifted_time():
    for shift in (1.0, 3.0, 8.0):
        p, calls = Pyramid("flow", 3, shift=shift), []
        at_start, at_end = (t / (shift - (shift - 1) * t) for t in (p[1].t_start, p[1].t_end))
        grid = at_end + torch.linspace(0, 1, 5, dtype=torch.float64) * (at_start - at_end)
        t = p.interpolate(clips(5, 1, 2, 1, 1), clips(5, 1, 2, 1, 1), 1, torch.linspace(0, 1, 5))[2]
        assert_exact(t, shift * grid / (1 + (shift - 1) * grid))
        p.integrate(lambda x, t, k, calls=calls: (calls.append(t.item()), x)[1], clips(1, 1, 2, 1, 1), 1, 4)
        assert calls == pytest.approx(t.flip(0)[:-1].tolist())
    shares = [Pyramid("flow", 3, shift=shift).lengths[2] for shift in (1, 3, 5, 8)]
    assert shares == pytest.approx([1 / 3, 0.6, 5 / 7, 0.8])
    p, stages = Pyramid("flow", 3, shift=3), []
    assert split_steps(30, 3, p.lengths) == [19, 7, 4]
    p.sample(lambda x, t, k: (stages.append(k), x)[1], (1, 1, 4, 1, 1), 30)
    assert [stages.count(k) for k in (2, 1, 0)] == [19, 7, 4]
    assert split_steps(4, 3, (0.98, 0.01, 0.01)) == [1, 1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_targets_of_half_precision_clips_are_exact(prediction, dtype):
    p = Pyramid("ddim", 3, NEARLY_ZERO_SNR, prediction=prediction)
    x0, noise, u = (
        clips(4, 1, 8, 2, 2).to(dtype),
        clips(4, 1, 2, 2, 2, seed=1).to(dtype),
        torch.tensor([0, 0.5, 0.99, 1]),
    )
    exact = p.interpolate(*p.endpoints(x0.double(), noise.double(), 2), 2, u)
    for ours, expected in zip(p.interpolate(*p.endpoints(x0, noise, 2), 2, u), exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_schedule_may_be_a_list_a_tensor_or_an_array_in_full_precision():
    expected = list(Pyramid("ddim", 3, SCALED_LINEAR))
    for alphas_cumprod in (SCALED_LINEAR.tolist(), SCALED_LINEAR.numpy(), tuple(SCALED_LINEAR.tolist())):
        assert list(Pyramid("ddim", 3, alphas_cumprod)) == expected
    assert Pyramid("ddim", 1, [1 - 1e-9, 0.5])[0].gamma_start == pytest.approx(math.sqrt(0.5), rel=1e-15)


# ---- Algorithm 1: data-noise alignment


def test_alignment_returns_the_same_noises_at_no_greater_distance():
    for seed in range(5):
        x, noise = clips(32, 1, 4, 3, 3, seed=seed), clips(32, 1, 4, 3, 3, seed=seed + 100)
        aligned = align(x, noise)
        assert sorted(n.sum().item() for n in aligned) == sorted(n.sum().item() for n in noise)
        assert {tuple(n.flatten().tolist()) for n in aligned} == {tuple(n.flatten().tolist()) for n in noise}
        assert distance(x, aligned) < distance(x, noise)
        assert torch.equal(aligned, align(x, noise))


def test_alignment_is_optimal_by_brute_force():
    for seed in range(20):
        x, noise = clips(6, 1, 2, 1, 2, seed=seed), clips(6, 1, 2, 1, 2, seed=seed + 100)
        best = min(distance(x, noise[list(order)]) for order in itertools.permutations(range(6)))
        assert distance(x, align(x, noise)) == pytest.approx(best, rel=1e-5)


def test_alignment_of_one_clip_is_the_identity_and_shapes_must_agree():
    noise = clips(1, 1, 4, 2, 2)
    assert torch.equal(align(clips(1, 1, 4, 2, 2, seed=1), noise), noise)
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 2, 2\).*\(2, 1, 2, 2, 2\)"):
        align(clips(2, 1, 4, 2, 2), clips(2, 1, 2, 2, 2))


def test_alignment_is_not_rounded_by_autocast():
    x = 30 + clips(16, 1, 4, 4, 4).float()
    noise = 30 + clips(16, 1, 4, 4, 4, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = align(x, noise)
    assert torch.equal(inside, align(x, noise))


def test_nearest_noise_is_the_nearest_of_each_clip_s_own_draws():
    x = clips(5, 1, 4, 2, 2)

    def generators():
        return [torch.Generator().manual_seed(index) for index in range(5)]

    chosen, draws = draw_nearest(x, 6, generators()), generators()
    all_of_them = torch.stack([randn(x.shape, draws, None, x.dtype) for _ in range(6)])
    distances = (all_of_them - x).flatten(2).norm(dim=2)
    assert torch.equal(chosen, all_of_them[distances.argmin(dim=0), torch.arange(5)])
    assert torch.equal(draw_nearest(x[2:3], 6, generators()[2:3]), chosen[2:3])  # no batch is needed
    assert torch.equal(draw_nearest(x, 1, generators()), all_of_them[0])
    with pytest.raises(ValueError, match="nearest of 0"):
        draw_nearest(x, 0)


@pytest.mark.parametrize("candidates, c", [(2, 0.5642), (8, 1.4236)])  # the expected maximum of that many normals
def test_nearest_noise_is_biased_as_its_docstring_says(candidates, c):
    generator, draws = torch.Generator().manual_seed(0), 20_000
    x = torch.randn(1, 1, 4, 16, 16, generator=generator)
    noise, m, D = draw_nearest(x.expand(draws, -1, -1, -1, -1), candidates, generator), x.square().mean(), x.numel()
    s = (D * (2 + 4 * m.item())) ** 0.5
    for values, expected in (noise.square() - 1, -2 * c / s), (x * noise, 2 * c * m.item() / s):
        assert values.mean().item() == pytest.approx(expected, rel=0.1)  # 4 standard errors, or more


# ---- Section 3.5: renoising (Eq. 14-16) and the whole sampler, against matrices


def give_basis_noise(monkeypatch, dimensions: int) -> None:
    """Lets clip i's draws, all of them in a row, be the i-th unit vector: a run then returns the sampler's matrix."""
    drawn = [0]

    def unit_vectors(shape, generator=None, device=None, dtype=None):
        size = math.prod(shape[1:])
        rows = torch.zeros(dimensions, size, dtype=torch.float64)
        rows[drawn[0] : drawn[0] + size] = torch.eye(size, dtype=torch.float64)
        drawn[0] += size
        return rows.view(dimensions, *shape[1:])

    monkeypatch.setattr(tpdiff, "randn", unit_vectors)


def down_matrix(frames: int, stride: int) -> torch.Tensor:
    return torch.eye(frames, dtype=torch.float64)[::stride]


def data_covariance(frames: int) -> torch.Tensor:
    i = torch.arange(frames, dtype=torch.float64)
    return torch.exp(-(i[:, None] - i[None]).abs() / 5)


def start_and_end_matrices(p: Pyramid, k: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 7-8 by hand, as matrices on the pair (x0, noise)."""
    s, down = p[k], down_matrix(frames, 2**k)
    eye = torch.eye(len(down), dtype=torch.float64)
    coarse = down if k == len(p) - 1 else down_matrix(frames, 2 ** (k + 1)).repeat_interleave(2, 0)[-len(down) :]
    start = torch.cat([s.gamma_start * coarse, s.sigma_start * eye], 1)
    end = torch.cat([s.gamma_end * down, s.sigma_end * eye], 1)
    return start, end


def pair_covariance(frames: int, stage_frames: int) -> torch.Tensor:
    return torch.block_diag(data_covariance(frames), torch.eye(stage_frames, dtype=torch.float64))


@every_pyramid
@pytest.mark.parametrize("stages, T", [(2, 16), (3, 16), (4, 16), (3, 21), (3, 13), (2, 1)])
def test_renoised_stage_end_is_start_of_next(mode, alphas_cumprod, stages, T, monkeypatch):
    """Mean and covariance, pairs of frames included; without the noise the covariance is off."""
    p = Pyramid(mode, stages, alphas_cumprod)
    for k in range(1, stages):
        frames, following = (p.shape((1, 1, T), stage)[2] for stage in (k, k - 1))
        _, end = start_and_end_matrices(p, k, T)
        start, _ = start_and_end_matrices(p, k - 1, T)
        as_clips = torch.eye(frames, dtype=torch.float64).view(frames, 1, frames, 1, 1)
        with monkeypatch.context() as patch:
            patch.setattr(tpdiff, "randn", lambda shape, *rest: torch.zeros(*shape, dtype=torch.float64))
            carry = p.renoise(as_clips, k, frames=following).flatten(1).T
        with monkeypatch.context() as patch:
            give_basis_noise(patch, 2 * frames)
            zeros = torch.zeros(2 * frames, 1, frames, 1, 1, dtype=torch.float64)
            inject = p.renoise(zeros, k, frames=following).flatten(1).T

        torch.testing.assert_close(carry @ end[:, :T], start[:, :T])  # means match for every x0
        x_end_covariance = end @ pair_covariance(T, frames) @ end.T
        wanted = start @ pair_covariance(T, following) @ start.T
        torch.testing.assert_close(carry @ x_end_covariance @ carry.T + inject @ inject.T, wanted)
        without_noise = carry @ x_end_covariance @ carry.T
        assert (without_noise - wanted).norm() > 0.05 * wanted.norm()


@pytest.mark.parametrize("frames", [None, 5])
@pytest.mark.parametrize("factor", [(2, 1, 1), (1, 2, 2), (2, 2, 2), (3, 1, 2), (1, 1, 1)])
def test_renoised_blocks_are_independent_with_the_next_start_s_variance(factor, frames, monkeypatch):
    """Eq. 15', propagated, not sampled; also where odd frames cut the first block."""
    p = Pyramid("flow", 3, factor=factor)
    frames = frames if frames and factor[0] > 1 else 2 * factor[0]
    shape = (1, 1, -(-frames // factor[0]), 2, 2)
    count, whole = math.prod(shape), math.prod(shape) * math.prod(factor)
    unit = torch.eye(count, dtype=torch.float64).view(count, *shape[1:])
    with monkeypatch.context() as patch:
        patch.setattr(tpdiff, "randn", lambda shape, *rest: torch.zeros(*shape, dtype=torch.float64))
        old = p.renoise(p[1].sigma_end * unit, 1, frames=frames).flatten(1)
    with monkeypatch.context() as patch:
        give_basis_noise(patch, whole)
        new = p.renoise(torch.zeros(whole, *shape[1:], dtype=torch.float64), 1, frames=frames).flatten(1)
    assert_exact(old.T @ old + new.T @ new, p[0].sigma_start ** 2 * torch.eye(old.shape[1], dtype=torch.float64))


def optimal_predictor(p: Pyramid, shape: tuple[int, int, int], covariance: torch.Tensor):
    """E[target | x_t] for any pyramid: Eq. 7-13 applied to unit vectors of (x0, noise), then a linear regression."""
    known = {}

    def predict(x, t, k):
        now, size = t[0].item(), x[0].numel()
        if (k, now) not in known:
            both = torch.eye(len(covariance) + size, dtype=torch.float64)
            x0, noise = both.split([len(covariance), size], dim=1)
            ends = p.endpoints(x0.reshape(-1, 1, *shape), noise.reshape(-1, *x.shape[1:]), k)
            u, start, end = (time / (p.shift - (p.shift - 1) * time) for time in (now, p[k].t_start, p[k].t_end))
            place = torch.full((len(both),), (u - end) / (start - end), dtype=torch.float64)
            point, target = (each.flatten(1) for each in p.interpolate(*ends, k, place)[:2])
            joint = torch.block_diag(covariance, torch.eye(size, dtype=torch.float64))
            known[k, now] = torch.linalg.solve(point.T @ joint @ point, point.T @ joint @ target)
        return (x.flatten(1) @ known[k, now]).view_as(x)

    return predict


def covariance_error(p: Pyramid, steps: int, solver: str, monkeypatch, shape=(16, 1, 1)) -> float:
    """Relative error of the final covariance with `steps` a stage, exactly: the sampler is run on unit vectors."""
    wanted, full = torch.eye(1, dtype=torch.float64), (1, 1, *shape)
    for length in shape:
        wanted = torch.kron(wanted, data_covariance(length))
    sizes = [math.prod(p.shape(full, k)) for k in range(len(p))]
    dimensions = sizes[-1] + math.prod(p.factor) * sum(sizes[1:])
    predict = optimal_predictor(p, shape, wanted)
    with monkeypatch.context() as patch:
        give_basis_noise(patch, dimensions)
        out = p.sample(predict, (dimensions, *full[1:]), [steps] * len(p), solver, dtype=torch.float64).flatten(1)
    return ((out.T @ out - wanted).norm() / wanted.norm()).item()


# EQUATIONS, "What was checked": three stages, error by steps per stage.
KNOWN_ERRORS = {
    ("flow", "euler"): {5: 1.9e-1, 10: 1.0e-1, 20: 5.2e-2, 100: 1.1e-2, 1000: 1.1e-3},
    ("flow", "ab2"): {5: 4.1e-2, 10: 1.0e-2, 20: 2.5e-3, 100: 9.8e-5, 1000: 9.8e-7},
    ("ddim", "euler"): {5: 2.1e-1, 10: 1.1e-1, 20: 5.8e-2, 100: 1.2e-2, 1000: 1.2e-3},
    ("ddim", "ab2"): {5: 1.1e-1, 10: 3.3e-2, 20: 9.1e-3, 100: 4.2e-4, 1000: 3.7e-5},
}


@pytest.mark.parametrize("mode, solver", KNOWN_ERRORS)
def test_whole_sampler_reproduces_gaussian_covariance_with_the_known_errors(mode, solver, monkeypatch):
    for steps, known in KNOWN_ERRORS[mode, solver].items():
        error = covariance_error(Pyramid(mode, 3), steps, solver, monkeypatch)
        assert error == pytest.approx(known, rel=0.06), (steps, error)


# The same for the general forms: clips (T, H, W), Euler with 10 and 40 steps a stage, ab2 with 10, 40 and 160.
GENERAL_ERRORS = [
    ({}, (21, 1, 1), (1.0e-1, 2.6e-2, 1.0e-2, 6.2e-4, 3.8e-5)),
    ({}, (13, 1, 1), (1.0e-1, 2.6e-2, 1.0e-2, 6.1e-4, 3.8e-5)),
    ({}, (31, 1, 1), (1.0e-1, 2.6e-2, 1.0e-2, 6.2e-4, 3.8e-5)),
    ({}, (1, 1, 1), (9.4e-2, 2.4e-2, 9.1e-3, 5.6e-4, 3.5e-5)),
    ({"stages": 4}, (7, 1, 1), (9.4e-2, 2.4e-2, 9.1e-3, 5.5e-4, 3.4e-5)),
    ({"factor": (1, 2, 2)}, (2, 4, 4), (1.1e-1, 2.8e-2, 1.1e-2, 6.8e-4, 4.2e-5)),
    ({"factor": (2, 2, 2)}, (4, 4, 4), (1.4e-1, 3.6e-2, 1.4e-2, 8.7e-4, 5.3e-5)),
    ({"factor": (2, 2, 2)}, (5, 4, 4), (1.3e-1, 3.5e-2, 1.4e-2, 8.7e-4, 5.4e-5)),
    ({"ends": (0, 0.5, 0.75)}, (16, 1, 1), (9.5e-2, 2.5e-2, 1.0e-2, 6.4e-4, 4.0e-5)),
    ({"shift": 5}, (21, 1, 1), (1.1e-1, 2.9e-2, 1.4e-3, 8.6e-5, 5.6e-6)),
    ({"prediction": "epsilon"}, (16, 1, 1), (1.1e-1, 2.9e-2, 3.3e-2, 2.4e-3, 1.8e-4)),
    ({"prediction": "velocity"}, (16, 1, 1), (1.1e-1, 2.9e-2, 3.3e-2, 2.4e-3, 1.8e-4)),
    ({"prediction": "velocity", "zero": True}, (13, 1, 1), (9.8e-2, 2.7e-2, 2.6e-2, 2.0e-3, 1.4e-4)),
    ({"prediction": "sample", "zero": True}, (13, 1, 1), (9.8e-2, 2.7e-2, 2.6e-2, 2.0e-3, 1.4e-4)),
    ({"prediction": "velocity", "zero": True, "factor": (2, 2, 2)}, (5, 4, 4), (1.2e-1, 3.2e-2, 4.4e-2, 3.5e-3, 0)),
]


@pytest.mark.parametrize("options, shape, errors", GENERAL_ERRORS)
def test_general_sampler_reproduces_gaussian_covariance_with_the_known_errors(options, shape, errors, monkeypatch):
    options = dict(options)
    mode = "ddim" if "prediction" in options else "flow"
    p = Pyramid(mode, options.pop("stages", 3), zero_signal() if options.pop("zero", False) else None, **options)
    for solver, steps, known in zip(["euler"] * 2 + ["ab2"] * 3, (10, 40, 10, 40, 160), errors, strict=True):
        if steps < 160 or math.prod(shape) < 40:  # else a minute
            assert covariance_error(p, steps, solver, monkeypatch, shape) == pytest.approx(known, rel=0.06), (
                solver,
                steps,
            )


@both_modes
@every_depth
def test_error_shrinks_at_first_order_with_euler_and_second_with_ab2(mode, stages, monkeypatch):
    p = Pyramid(mode, stages)
    for solver, order in (("euler", 1), ("ab2", 2)):
        coarse, fine = (covariance_error(p, steps, solver, monkeypatch) for steps in (40, 80))
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


@both_modes
@pytest.mark.parametrize("scaled", [True, False])
def test_without_the_noise_an_error_stays_that_no_number_of_steps_removes(mode, scaled, monkeypatch):
    """0.14 with Eq. 15's scaling alone; with neither scaling nor noise 1.07 in flow, 2.26 in ddim mode."""

    def upsample_only(self, x_end, k, generator=None, frames=None):
        return (self[k - 1].gamma_start / self[k].gamma_end if scaled else 1) * upsample(x_end)

    monkeypatch.setattr(Pyramid, "renoise", upsample_only)
    errors = [covariance_error(Pyramid(mode, 3), steps, "euler", monkeypatch) for steps in (100, 400)]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
    assert errors[1] == pytest.approx(0.137 if scaled else {"flow": 1.07, "ddim": 2.26}[mode], rel=0.02)


# ---- The sampler's interface


def test_steps_are_split_evenly_with_the_remainder_to_the_noisiest():
    assert split_steps(30, 3) == [10, 10, 10]
    assert split_steps(32, 3) == [12, 10, 10]
    assert split_steps([15, 10, 5], 3) == [15, 10, 5]
    for steps in (2, [10, 10], [10, 0, 10], [1, 1, 1, 1]):
        with pytest.raises(ValueError, match=re.escape(str(steps))):
            split_steps(steps, 3)


@pytest.mark.parametrize("solver", ["euler", "ab2"])
def test_every_step_is_one_call_at_its_stage_s_rate_and_time(solver):
    p, calls = Pyramid("flow", 3), []

    def predict(x, t, k):
        calls.append((k, x.shape[2], t.tolist()))
        return torch.zeros_like(x)

    assert p.sample(predict, (2, 3, 8, 4, 4), steps=[1, 3, 2], solver=solver).shape == (2, 3, 8, 4, 4)
    assert [(k, frames) for k, frames, _ in calls] == [(2, 2)] + [(1, 4)] * 3 + [(0, 8)] * 2
    s1, s0 = p[1], p[0]
    expected = [1.0] + [s1.t_start + i / 3 * (s1.t_end - s1.t_start) for i in range(3)] + [s0.t_start, s0.t_start / 2]
    assert [t for _, _, (t, _) in calls] == pytest.approx(expected)


def test_ab2_corrects_the_slope_by_the_change_since_the_last_step():
    """On a slope that is linear in the line's position, ab2 after its first step is exact to the midpoint's rule."""
    p, s = Pyramid("flow", 1), torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64)
    x = p.integrate(lambda x, t, k: t.view(-1, 1, 1, 1, 1).expand_as(x), s, 0, 4, "ab2")
    assert x.item() == pytest.approx(-(0.25 * 1 + 0.25 * 0.625 + 0.25 * 0.375 + 0.25 * 0.125))


def test_a_clip_s_noise_does_not_depend_on_its_batch():
    p, predict = Pyramid("ddim", 3), lambda x, t, k: 0.1 * x
    together = p.sample(predict, (3, 1, 8, 4, 4), 6, generator=[seeded(i) for i in range(3)])
    for i in range(3):
        alone = p.sample(predict, (1, 1, 8, 4, 4), 6, generator=[seeded(i)])
        assert torch.equal(together[i : i + 1], alone)
    assert torch.equal(*(p.sample(predict, (3, 1, 8, 4, 4), 6, generator=seeded(7)) for _ in range(2)))
    with pytest.raises(ValueError, match="2 generators.*3"):
        p.sample(predict, (3, 1, 8, 4, 4), 6, generator=[seeded(0), seeded(1)])


def test_sampling_records_no_gradients_and_takes_whole_numbers_of_any_kind():
    weight = torch.ones(1, requires_grad=True)
    out = Pyramid("flow").sample(lambda x, t, k: weight * x, (1, 1, 4, 2, 2), np.int64(3))
    assert not out.requires_grad


def test_renoising_adds_opposite_noise_to_the_two_frames_of_a_pair():
    p = Pyramid("flow", 3)
    injected = p.renoise(torch.zeros(1, 1, 4, 8, 8, dtype=torch.float64), 1, seeded())
    torch.testing.assert_close(injected[:, :, 0::2], -injected[:, :, 1::2])
    z = torch.randn(1, 1, 8, 8, 8, generator=seeded(), dtype=torch.float64)  # n' / sqrt(2) of Eq. 15 is half of z - z'
    torch.testing.assert_close(injected[:, :, 0::2], p[0].sigma_start * (z[:, :, 0::2] - z[:, :, 1::2]) / 2)
    with pytest.raises(ValueError, match="stage 0"):
        p.renoise(injected, 0)


def test_progress_bar_counts_the_steps(capfd):
    Pyramid("flow", 2).sample(lambda x, t, k: x, (1, 1, 2, 2, 2), 4, progress=True)
    printed = capfd.readouterr().err
    assert "stage 1" in printed and "stage 0" in printed and "2/2" in printed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@both_modes
def test_results_are_float32_at_least_and_samples_of_the_dtype_asked_for(mode, dtype):
    p, x0, noise = Pyramid(mode, 2), clips(2, 1, 4, 2, 2).to(dtype), clips(2, 1, 4, 2, 2, seed=1).to(dtype)
    precise, seen = torch.promote_types(dtype, torch.float32), set()
    for u in (torch.tensor([0, 1]), torch.rand(2), torch.rand(2, dtype=torch.float64)):  # of any dtype itself
        results = [*p.endpoints(x0, noise, 0), *p.interpolate(x0, noise, 0, u), p.renoise(x0, 1), p.down(x0, 1)]
        assert {result.dtype for result in results} == {precise}
    assert {align(x0, noise).dtype, draw_nearest(x0, 2).dtype} == {dtype}

    def predict(x, t, k):
        seen.add((x.dtype, t.dtype))
        return x.float()  # guidance is often computed in float32

    assert p.sample(predict, x0.shape, steps=2, dtype=dtype).dtype == dtype
    assert seen == {(dtype, precise)}
    first, still = [], Pyramid("flow", 1)  # the first noise, drawn before predict's dtype rounds it

    def keep(x, t, k):
        first.append(x)

    still.sample(lambda x, t, k: 0 * x, (1, 1, 9), 1, generator=seeded(), dtype=dtype, callback=keep)
    assert torch.equal(first[0], torch.randn(1, 1, 9, generator=seeded(), dtype=precise))

    # between steps in float32, so that small steps are not lost
    one = torch.ones(1, 1, 1, 1, 1)
    landed = Pyramid("flow", 1).integrate(lambda x, t, k: 0 * x + 0.5, one.to(dtype), 0, 500)
    assert landed.item() == pytest.approx(0.5, abs=1e-4)


def test_a_callback_sees_every_step_and_every_renoising_and_may_replace_the_clip():
    p, seen = Pyramid("flow", 2), []

    def callback(x, t, k):
        seen.append((k, x.shape[2], t.tolist()))
        return torch.full_like(x, 7.0) if len(seen) == 5 else None

    out = p.sample(lambda x, t, k: torch.zeros_like(x), (2, 1, 4, 1, 1), [2, 2], callback=callback)
    middle = (p[1].t_start + p[1].t_end) / 2
    times = [(1, middle), (1, p[1].t_end), (0, p[0].t_start), (0, p[0].t_start / 2), (0, 0.0)]
    assert [(k, t) for k, _, (t, _) in seen] == [(k, pytest.approx(t)) for k, t in times]
    assert [frames for _, frames, _ in seen] == [2, 2, 4, 4, 4] and (out == 7).all()


def test_clips_and_noise_on_different_devices_are_refused():
    for function in (align, lambda x0, noise: Pyramid("flow").endpoints(x0, noise, 0)):
        with pytest.raises((ValueError, RuntimeError), match="device|meta"):
            function(torch.zeros(2, 1, 4, 2, 2), torch.zeros(2, 1, 4, 2, 2, device="meta"))


def nan_at(stage: int, t_below: float):
    """A predictor that fails from some time on."""
    return lambda x, t, k: x / 0 if k == stage and t[0] < t_below else x


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Pyramid("edm"), "edm"),
        (lambda: Pyramid("flow", 0), "0"),
        (lambda: Pyramid("flow", 2, [0.9, 0.5]), "alphas_cumprod"),
        (lambda: Pyramid("ddim", 1, [0.5, 0.9]), "decrease"),
        (lambda: Pyramid("ddim", 1, [0.9, -0.1]), "inside"),
        (lambda: Pyramid("ddim", 1, [1.0, 0.5]), "inside"),
        (lambda: Pyramid("ddim", 1, [0.9, float("nan")]), "inside"),
        (lambda: Pyramid("ddim", 1, [[0.9, 0.5]]), "inside"),
        (lambda: Pyramid("ddim", 4, [0.9, 0.5, 0.49]), "fewer stages"),
        (lambda: Pyramid("flow", 2.5), "whole number"),
        (lambda: Pyramid("flow", factor=(2, 1)), "three whole numbers"),
        (lambda: Pyramid("flow", factor=(2, 0, 1)), "three whole numbers"),
        (lambda: Pyramid("flow", 3, ends=(0, 0.7, 0.5)), "ends must be 3 times"),
        (lambda: Pyramid("flow", 2, ends=(0, 1.0)), "below 1"),
        (lambda: Pyramid("flow", 2, ends=(0.1, 0.5)), "begin with 0"),
        (lambda: Pyramid("flow", shift=0), "shift"),
        (lambda: Pyramid("flow", prediction="velocity"), "velocity"),
        (lambda: Pyramid("ddim", prediction="v"), "velocity.*v"),
        (lambda: Pyramid("flow").down(clips(1, 1, 0, 2, 2), 0), "a frame at least"),
        (lambda: Pyramid("flow", factor=(1, 2, 2)).down(clips(1, 1, 3, 6, 8), 0), r"divisible by \[4, 4\].*6, 8"),
        (
            lambda: Pyramid("flow").sample(lambda x, t, k: (x,), (1, 1, 8, 2, 2)),
            "tuple, not a tensor.*return_dict",
        ),
        (lambda: align(clips(2, 1, 2, 2, 2) / 0, clips(2, 1, 2, 2, 2)), "invalid numeric|infeasible"),
        (lambda: Pyramid("flow").endpoints(clips(1, 1, 8, 2, 2), clips(1, 1, 8, 2, 2), 1), "4, 2, 2.*8, 2, 2"),
        (lambda: Pyramid("flow").interpolate(clips(2, 1, 8, 2, 2), clips(2, 1, 8, 2, 2), 0, torch.rand(3)), "u.*2.*3"),
        (lambda: Pyramid("flow").sample(lambda x, t, k: x, (1, 1, 8, 2, 2), steps=2), "3 stages.*2"),
        (lambda: Pyramid("flow").sample(lambda x, t, k: x, (1, 1, 8, 2, 2), solver="heun"), "heun"),
        (lambda: Pyramid("flow").sample(lambda x, t, k: x[:, :, :1], (1, 1, 8, 2, 2)), "predict returned"),
        (lambda: Pyramid("flow").sample(nan_at(1, 0.5), (1, 1, 8, 2, 2)), "NaN or infinity at stage 1, step 7 of 10"),
    ],
)
def test_bad_input_raises_value_error_that_names_the_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- The same for any input (Eq. 7-16): properties, and a suite that sees when one no longer holds


def for_all(describe):
    """A property test of hypothesis where that is installed; elsewhere the test is skipped, saying so."""
    try:
        from hypothesis import given, settings, strategies
    except ImportError:
        return pytest.mark.skip(reason="a property test: pip install hypothesis")
    return lambda test: settings(deadline=None, derandomize=True)(given(**describe(strategies))(test))


def any_pyramid(st) -> dict:
    kinds = st.tuples(
        st.sampled_from(["flow", "ddim"]), st.integers(1, 5), st.lists(st.floats(1e-3, 0.999), max_size=40)
    )
    return {"kind": kinds, "dtype": st.sampled_from([torch.float32, torch.float64]), "seed": st.integers(0, 2**32)}


def make_pyramid(kind) -> Pyramid:
    """Of the drawn mode, stages and alphas_cumprod, made to decrease and to end in almost pure noise."""
    mode, stages, values = kind
    alphas_cumprod = sorted({round(value, 6) for value in values}, reverse=True) + [1e-6]
    return Pyramid(mode, stages, None if mode == "flow" else alphas_cumprod)


@for_all(any_pyramid)
def test_any_pyramid_s_windows_tile(kind, dtype, seed):
    """Eq. 16, starts noisier than ends, and neighbours that overlap exactly because of its sqrt(2)."""
    p = make_pyramid(kind)
    for k, stage in enumerate(p):
        assert (stage.index, stage.stride, stage.t_end) == (k, (2**k, 1, 1), k / len(p)) and stage.t_start > stage.t_end
        assert stage.sigma_start * stage.gamma_end > stage.sigma_end * stage.gamma_start
        if k < len(p) - 1:
            ratio = math.sqrt(2) * p[k + 1].sigma_end / p[k + 1].gamma_end
            assert stage.sigma_start / stage.gamma_start == pytest.approx(ratio, rel=1e-9)
            assert p[k + 1].t_end < stage.t_start < 1
    assert p[len(p) - 1].t_start == 1 and p[0].sigma_end == 0 and p[0].gamma_end == 1


@for_all(lambda st: any_pyramid(st) | {"frames": st.integers(1, 3), "steps": st.integers(1, 9)})
def test_any_pyramid_s_constant_target_integrates_exactly(kind, dtype, seed, frames, steps):
    p, generator = make_pyramid(kind), seeded(seed)
    x0 = torch.randn(2, 1, frames * 2 ** (len(p) - 1), 2, 1, generator=generator, dtype=dtype)
    for k in range(len(p)):
        noise = torch.randn(p.shape(x0.shape, k), generator=generator, dtype=dtype)
        x_start, x_end = p.endpoints(x0, noise, k)
        x_t, target, t = p.interpolate(x_start, x_end, k, torch.tensor([1.0, 0.0]))
        assert x_t.dtype == target.dtype == t.dtype == dtype
        tolerance = 1e-9 if dtype == torch.float64 else 1e-2  # the target is a quotient by a window's small length
        torch.testing.assert_close(x_t[0], x_start[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(x_t[1], x_end[1], rtol=tolerance, atol=tolerance)
        for solver in ("euler", "ab2"):
            there = p.integrate(lambda x, t, k, target=target: target, x_start, k, steps, solver)
            torch.testing.assert_close(there, x_end, rtol=tolerance, atol=tolerance)


@for_all(any_pyramid)
def test_any_pyramid_s_renoised_pairs_have_the_next_start_s_covariance(kind, dtype, seed):
    """Propagated, not sampled: a stage's end with unit noise in it and none added, and the other way round."""
    p, one = make_pyramid(kind), torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    new = torch.empty(2, 2, dtype=torch.float64)
    for k in range(1, len(p)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tpdiff, "randn", lambda *_: torch.zeros(1, 1, 2, 1, 1, dtype=torch.float64))
            mean, old = (p.renoise(value * one, k).flatten() for value in (p[k].gamma_end, p[k].sigma_end))
            for i in range(2):
                patch.setattr(tpdiff, "randn", lambda *_, i=i: torch.eye(2, dtype=torch.float64)[i].view(1, 1, 2, 1, 1))
                new[i] = p.renoise(0 * one, k).flatten()
        covariance = torch.outer(old, old) + new.T @ new
        assert_exact(covariance, p[k - 1].sigma_start ** 2 * torch.eye(2, dtype=torch.float64))
        assert_exact(mean, torch.full((2,), p[k - 1].gamma_start, dtype=torch.float64))


@for_all(lambda st: any_pyramid(st) | {"batch": st.integers(1, 5)})
def test_any_alignment_is_an_optimal_permutation(kind, dtype, seed, batch):
    x, noise = torch.randn(2, batch, 1, 2, 2, 2, generator=seeded(seed), dtype=dtype)
    distances, aligned = torch.cdist(x.flatten(1).double(), noise.flatten(1).double()), align(x, noise)
    assert sorted(aligned.flatten(1).tolist()) == sorted(noise.flatten(1).tolist()) and aligned.dtype == dtype
    best = min(
        sum(distances[i, j].item() for i, j in enumerate(order)) for order in itertools.permutations(range(batch))
    )
    assert (x - aligned).flatten(1).double().norm(dim=1).sum().item() == pytest.approx(best, abs=1e-3)


MUTATIONS = """
x[:, :, :: stride[0]] -> x[:, :, stride[0] - 1 :: stride[0]]
(1, *stride[1:]) -> (1, 1, 1)
x = x.repeat_interleave(copies, dim) -> x = torch.cat([x] * copies, dim)
return x[:, :, whole - frames :] -> return x[:, :, :frames]
x.unflatten(dim, (-1, size)).mean(dim + 1) -> x.unflatten(dim, (-1, size)).select(dim + 1, 0)
linear_sum_assignment(cost.detach().cpu().numpy()) -> linear_sum_assignment(-cost.detach().cpu().numpy())
_, columns = linear_sum_assignment -> columns, _ = linear_sum_assignment
noise.flatten(1).float(), compute_mode -> noise.flatten(1).float().abs(), compute_mode
randn(shape[1:], g, g.device, dtype) -> randn(shape[1:], generator[0], g.device, dtype)
range(candidates - 1) -> range(candidates)
< (_precise(x) - noise).flatten(1).norm(dim=1) -> > (_precise(x) - noise).flatten(1).norm(dim=1)
k / stages for k in range(stages) -> k / (stages + 1) for k in range(stages)
self.gamma_sigma(self.ends[k + 1]) -> self.gamma_sigma(self.ends[k])
math.sqrt(math.prod(self.factor)) * sigma -> sigma
math.sqrt(math.prod(self.factor)) * sigma -> math.prod(self.factor) * sigma
tuple(n**k for n in self.factor) -> tuple(n * k for n in self.factor)
return 1 - t, t -> return t, 1 - t
angle.cos().where(angle < math.pi / 2, 0.0) -> angle.cos()
torch.atan2((1 - abar).sqrt(), abar.sqrt()) -> torch.atan2(1 - abar, abar)
torch.cat([abar.new_ones(1), abar]) -> torch.cat([abar[:1] + 1e-3, abar])
return r / (1 + r) -> return r
self._time_at(math.atan(r)) -> self._time_at(r)
self.shift * u / (1 + (self.shift - 1) * u) -> u
t / (self.shift - (self.shift - 1) * t) -> t
u[k + 1] - u[k] -> u[k + 1]
*(-(-size // n) for -> *(size // n for
n ** (self.stages - 1) for n -> n**self.stages for n
x0_end.shape[2]) -> 2 * downsample(x0_end, self.factor).shape[2])[:, :, : x0_end.shape[2]]
if stage.index < self.stages - 1: -> if False:
x0_start + stage.sigma_start * noise -> x0_start - stage.sigma_start * noise
x_end = stage.gamma_end * x0_end -> x_end = stage.gamma_start * x0_end
x0_end + stage.sigma_end * noise -> x0_end + stage.sigma_start * noise
u_end + u.detach() -> u_start - u.detach()
_per_clip((t - s.t_end) / (s.t_start - s.t_end), x_start) -> _per_clip(t - s.t_end, x_start)
place * x_start + (1 - place) * x_end -> (1 - place) * x_start + place * x_end
x_end, x_start - x_end, t.to -> x_end, x_end - x_start, t.to
s.gamma_end * s.sigma_start - s.gamma_start * s.sigma_end -> s.gamma_end * s.sigma_start + s.gamma_start * s.sigma_end
(s.sigma_start * x_end - s.sigma_end * x_start) / det -> (s.sigma_start * x_end - s.sigma_end * x_start)
(s.gamma_end * x_start - s.gamma_start * x_end) / det -> (s.gamma_start * x_end - s.gamma_end * x_start) / det
gamma * eps - sigma * clean -> gamma * eps + sigma * clean
gamma * clean + sigma * eps, targets -> gamma * clean - sigma * eps, targets
(x - sigma * output) / gamma, output -> (x - sigma * output), output
output, (x - gamma * output) / sigma -> output, x - gamma * output
gamma * x - sigma * output, sigma * x -> gamma * x + sigma * output, sigma * x
sigma * x + gamma * output -> sigma * x - gamma * output
following, factor = self[stage.index - 1] -> following, factor = self[stage.index]
z - upsample(_block_mean(z, factor), factor) -> z
[:, :, -x.shape[2] :] -> [:, :, : x.shape[2]]
following.gamma_start / stage.gamma_end -> following.gamma_end / stage.gamma_end
following.sigma_start * z -> following.sigma_start / math.sqrt(2) * z
reversed(range(self.stages)), counts -> range(self.stages), counts
torch.promote_types(dtype, torch.float32)) -> dtype)
if k > 0: -> if k > 1:
steps + 1, dtype=torch.float64 -> steps + 2, dtype=torch.float64
x.to(dtype), times[i] -> x.to(dtype), times[i + 1]
x.to(dtype), times[i] -> x, times[i]
x + h * slope -> x - h * slope
gammas[i + 1] * clean + sigmas[i + 1] * slope -> gammas[i] * clean + sigmas[i + 1] * slope
scale * h * h / (2 * before[0]) * (slope - before[1]) -> scale * h * h / (2 * before[0]) * (before[1] - slope)
scale * h * h / (2 * before[0]) -> scale * h * h / before[0]
sigmas[i + 1] * slope, gammas[i + 1] -> sigmas[i + 1] * slope, gammas[i]
_called_back(callback, following, times[i + 1], k) -> _called_back(callback, following, times[i], k)
self[k - 1].t_start, k - 1) -> self[k].t_end, k - 1)
split_steps(steps, self.stages, self.lengths) -> split_steps(steps, self.stages)
dtype or x.dtype, _precise(x) -> dtype or x.dtype, x
counts[0] += max -> counts[-1] += max
math.floor(steps * n + 1e-9) -> math.floor(steps * n)
counts[counts.index(max(counts))] -= 1 -> counts[0] -= 1
"""


@pytest.mark.trial
@pytest.mark.parametrize("mutation", MUTATIONS.strip().splitlines())
def test_the_suite_catches_a_broken_line(mutation, tmp_path):
    """One line of tpdiff.py broken in a copy; with no other file beside the two, the tests must go red there."""
    right, wrong = mutation.split(" -> ")
    source = (ROOT / "tpdiff.py").read_text()
    assert source.count(right) == 1, "the line to break is no longer there, or there twice"
    (tmp_path / "tpdiff.py").write_text(source.replace(right, wrong))
    (tmp_path / "test_tpdiff.py").write_bytes(Path(__file__).read_bytes())
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not trial", "test_tpdiff.py"]
    options = {"cwd": tmp_path, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True}
    process = subprocess.run(words, timeout=600, **options)
    assert process.returncode == 1 and "1 failed" in process.stdout, process.stdout + process.stderr
