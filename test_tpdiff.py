"""The proof, in the paper's order. A test's name says what is true; break the formula it guards and it goes red."""

import argparse
import contextlib
import functools
import gc
import itertools
import json
import math
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import bench
import data as data_module
import evaluate
import sample
import tpdiff
import train
from data import DataError, FolderClips, MovingDigits, save_gif, save_strip
from model import Attention, Block, DiT, DiTConfig, Muon, attention, fused_attention, rotate, temporal_positions
from tpdiff import Pyramid, align, downsample, draw_nearest, randn, split_steps, upsample

ROOT = Path(__file__).parent
# A schedule of another kind than the default: Stable Diffusion's, 300 steps, and one far from linear.
SCALED_LINEAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 300, dtype=torch.float64) ** 2 * 3).cumprod(0)
COSINE = torch.cos(torch.linspace(0.05, 1.55, 50, dtype=torch.float64)) ** 2
NEARLY_ZERO_SNR = torch.cos(torch.linspace(0.02, math.pi / 2 - 1e-4, 1000, dtype=torch.float64)) ** 2
PYRAMIDS = [("flow", None), ("ddim", None), ("ddim", SCALED_LINEAR), ("ddim", COSINE)]
every_pyramid = pytest.mark.parametrize("mode, alphas_cumprod", PYRAMIDS)
every_depth = pytest.mark.parametrize("stages", [1, 2, 3, 4])
both_modes = pytest.mark.parametrize("mode", ["flow", "ddim"])


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
    log_abar = np.concatenate([[0.0], np.log(np.asarray(alphas_cumprod))])
    abar = math.exp(np.interp(t, np.linspace(0, 1, len(log_abar)), log_abar))
    return math.sqrt(abar), math.sqrt(1 - abar)


# ---- Section 3.1: vanilla diffusion is the one-stage pyramid (Eq. 1-5)


def test_one_stage_of_flow_is_vanilla_flow_matching():
    p, x0, noise, u = (
        Pyramid("flow", 1),
        clips(3, 2, 5, 4, 4),
        clips(3, 2, 5, 4, 4, seed=1),
        torch.tensor([0.0, 0.3, 1.0]),
    )
    x_t, target, t = p.interpolate(*p.endpoints(x0, noise, 0), 0, u)
    t_ = u.double().view(3, 1, 1, 1, 1)
    assert_exact(t, u.double())
    assert_exact(x_t, (1 - t_) * x0 + t_ * noise)  # Eq. 4
    assert_exact(target, noise - x0)  # Eq. 5


def test_one_stage_of_ddim_is_vanilla_ddim():
    p, x0, noise, u = (
        Pyramid("ddim", 1),
        clips(3, 2, 5, 4, 4),
        clips(3, 2, 5, 4, 4, seed=1),
        torch.tensor([0.0, 0.3, 1.0]),
    )
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
    x = torch.arange(8.0).view(1, 1, 8, 1, 1)
    assert downsample(x, 1).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert downsample(x, 4).flatten().tolist() == [0, 4]
    assert upsample(downsample(x, 4)).flatten().tolist() == [0, 0, 4, 4]
    with pytest.raises(ValueError, match="8 frames.*3"):
        downsample(x, 3)


@every_pyramid
@every_depth
def test_stage_ends_are_uniform_and_ratio_of_next_start_is_sqrt_2_larger(mode, alphas_cumprod, stages):
    """Eq. 16."""
    p = Pyramid(mode, stages, alphas_cumprod)
    assert len(p) == stages and [s.index for s in p] == list(range(stages))
    assert [s.stride for s in p] == [2**k for k in range(stages)]
    assert [s.t_end for s in p] == [k / stages for k in range(stages)] and p[stages - 1].t_start == 1
    assert (p[0].gamma_end, p[0].sigma_end) == (1, 0)
    for s in p:
        assert (s.gamma_start, s.sigma_start) == pytest.approx(gamma_sigma(mode, s.t_start, alphas_cumprod), abs=1e-12)
        assert (s.gamma_end, s.sigma_end) == pytest.approx(gamma_sigma(mode, s.t_end, alphas_cumprod), abs=1e-12)
        assert s.t_start > s.t_end and all(type(value) in (int, float) for value in vars(s).values())
    for s, noisier in itertools.pairwise(p):
        assert noisier.sigma_end / noisier.gamma_end == pytest.approx(
            s.sigma_start / s.gamma_start / math.sqrt(2), rel=1e-12
        )
        assert noisier.t_end < s.t_start < noisier.t_start  # neighbouring windows overlap


def test_flow_windows_of_three_stages_are_those_of_the_closed_form():
    windows = [(s.t_start, s.t_end) for s in Pyramid("flow", 3)]
    starts = [math.sqrt(2) * e / ((1 - e) + math.sqrt(2) * e) for e in (1 / 3, 2 / 3)] + [1]
    assert windows == [pytest.approx((s, e)) for s, e in zip(starts, (0, 1 / 3, 2 / 3), strict=True)]


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


def test_a_schedule_may_be_a_list_a_tensor_or_an_array_in_full_precision():
    expected = list(Pyramid("ddim", 3, SCALED_LINEAR))
    for alphas_cumprod in (SCALED_LINEAR.tolist(), SCALED_LINEAR.numpy(), tuple(SCALED_LINEAR.tolist())):
        assert list(Pyramid("ddim", 3, alphas_cumprod)) == expected
    assert Pyramid("ddim", 1, [1 - 1e-9, 0.5])[0].gamma_start == math.sqrt(0.5)


# ---- Algorithm 1: data-noise alignment


def distance(x: torch.Tensor, noise: torch.Tensor) -> float:
    return (x - noise).flatten(1).norm(dim=1).sum().item()


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
        rows = torch.zeros(dimensions, shape[2], dtype=torch.float64)
        rows[drawn[0] : drawn[0] + shape[2]] = torch.eye(shape[2], dtype=torch.float64)
        drawn[0] += shape[2]
        return rows.view(dimensions, 1, shape[2], 1, 1)

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
    coarse = down if k == len(p) - 1 else down_matrix(frames, 2 ** (k + 1)).repeat_interleave(2, 0)
    start = torch.cat([s.gamma_start * coarse, s.sigma_start * eye], 1)
    end = torch.cat([s.gamma_end * down, s.sigma_end * eye], 1)
    return start, end


def pair_covariance(frames: int, stage_frames: int) -> torch.Tensor:
    return torch.block_diag(data_covariance(frames), torch.eye(stage_frames, dtype=torch.float64))


@every_pyramid
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_renoised_stage_end_is_start_of_next(mode, alphas_cumprod, stages, monkeypatch):
    """Mean and covariance, pairs of frames included; without the noise the covariance is off."""
    p, T = Pyramid(mode, stages, alphas_cumprod), 16
    for k in range(1, stages):
        frames = T // 2**k
        _, end = start_and_end_matrices(p, k, T)
        start, _ = start_and_end_matrices(p, k - 1, T)
        as_clips = torch.eye(frames, dtype=torch.float64).view(frames, 1, frames, 1, 1)
        with monkeypatch.context() as patch:
            patch.setattr(tpdiff, "randn", lambda shape, *rest: torch.zeros(*shape, dtype=torch.float64))
            carry = p.renoise(as_clips, k).flatten(1).T
        with monkeypatch.context() as patch:
            give_basis_noise(patch, frames)
            inject = p.renoise(torch.zeros_like(as_clips), k).flatten(1).T

        torch.testing.assert_close(carry @ end[:, :T], start[:, :T])  # means match for every x0
        x_end_covariance = end @ pair_covariance(T, frames) @ end.T
        wanted = start @ pair_covariance(T, 2 * frames) @ start.T
        torch.testing.assert_close(carry @ x_end_covariance @ carry.T + inject @ inject.T, wanted)
        without_noise = carry @ x_end_covariance @ carry.T
        assert (without_noise - wanted).norm() > 0.05 * wanted.norm()


def optimal_predictor(p: Pyramid, T: int):
    """E[target | x_t] for Gaussian clips, in closed form from Eq. 7-13: the predictor that a perfect training gives."""

    def predict(x, t, k):
        start, end = start_and_end_matrices(p, k, T)
        s, now = p[k], t[0].item()
        if p.mode == "flow":
            w = (now - s.t_end) / (s.t_start - s.t_end)
            point, target = w * start + (1 - w) * end, start - end
        else:
            gamma, sigma = gamma_sigma("ddim", now)
            r, r_s, r_e = sigma / gamma, s.sigma_start / s.gamma_start, s.sigma_end / s.gamma_end
            target = (end / s.gamma_end - start / s.gamma_start) / (r_e - r_s)
            point = gamma * (start / s.gamma_start + (r - r_s) * target)
        covariance = pair_covariance(T, len(start))
        regression = torch.linalg.solve(point @ covariance @ point.T, point @ covariance @ target.T)
        return (x.flatten(1) @ regression).view_as(x)

    return predict


def covariance_error(p: Pyramid, steps: int, solver: str, monkeypatch, T: int = 16) -> float:
    """Relative error of the final covariance with `steps` a stage, exactly: the sampler is run on unit vectors."""
    dimensions = T // 2 ** (len(p) - 1) + sum(T // 2**k for k in range(1, len(p)))
    with monkeypatch.context() as patch:
        give_basis_noise(patch, dimensions)
        out = p.sample(
            optimal_predictor(p, T), (dimensions, 1, T, 1, 1), [steps] * len(p), solver, dtype=torch.float64
        ).flatten(1)
    return ((out.T @ out - data_covariance(T)).norm() / data_covariance(T).norm()).item()


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

    def upsample_only(self, x_end, k, generator=None):
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
    n = torch.randn(1, 1, 4, 8, 8, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(injected[:, :, 0::2], p[0].sigma_start / math.sqrt(2) * n)
    with pytest.raises(ValueError, match="stage 0"):
        p.renoise(injected, 0)


def test_progress_bar_counts_the_steps(capfd):
    Pyramid("flow", 2).sample(lambda x, t, k: x, (1, 1, 2, 2, 2), 4, progress=True)
    assert "4/4" in capfd.readouterr().err
    Pyramid("flow", 2).sample(lambda x, t, k: x, (1, 1, 2, 2, 2), 4)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@both_modes
def test_every_function_keeps_the_dtype_of_its_clips(mode, dtype):
    p, x0, noise = Pyramid(mode, 2), clips(2, 1, 4, 2, 2).to(dtype), clips(2, 1, 4, 2, 2, seed=1).to(dtype)
    for u in (torch.tensor([0, 1]), torch.rand(2), torch.rand(2, dtype=torch.float64)):  # of any dtype itself
        results = [align(x0, noise), *p.endpoints(x0, noise, 0), *p.interpolate(x0, noise, 0, u), p.renoise(x0, 1)]
        results += [draw_nearest(x0, 2), p.sample(lambda x, t, k: x, x0.shape, steps=2, dtype=dtype)]
        assert {result.dtype for result in results} == {dtype}


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
        (lambda: Pyramid("ddim", 1, [0.9, 0.0]), "inside"),
        (lambda: Pyramid("ddim", 1, [1.0, 0.5]), "inside"),
        (lambda: Pyramid("ddim", 1, [0.9, float("nan")]), "inside"),
        (lambda: Pyramid("ddim", 1, [[0.9, 0.5]]), "1-D"),
        (lambda: Pyramid("ddim", 4, [0.9, 0.5, 0.49]), "fewer stages"),
        (lambda: downsample(clips(1, 1, 6, 2, 2), 0), "6 frames.*0"),
        (lambda: align(clips(2, 1, 2, 2, 2) / 0, clips(2, 1, 2, 2, 2)), "invalid numeric|infeasible"),
        (lambda: Pyramid("flow").endpoints(clips(1, 1, 6, 2, 2), clips(1, 1, 6, 2, 2), 0), "divisible by 4.*6"),
        (lambda: Pyramid("flow").endpoints(clips(1, 1, 8, 2, 2), clips(1, 1, 8, 2, 2), 1), "4, 2, 2.*8, 2, 2"),
        (lambda: Pyramid("flow").interpolate(clips(2, 1, 8, 2, 2), clips(2, 1, 8, 2, 2), 0, torch.rand(3)), "u.*2.*3"),
        (lambda: Pyramid("flow").sample(lambda x, t, k: x, (1, 1, 6, 2, 2)), "divisible by 4.*6"),
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
        assert (stage.index, stage.stride, stage.t_end) == (k, 2**k, k / len(p)) and stage.t_start > stage.t_end
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
        noise = torch.randn(downsample(x0, 2**k).shape, generator=generator, dtype=dtype)
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
    for k in range(1, len(p)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tpdiff, "randn", lambda *_: 0 * one)
            mean, old = (p.renoise(value * one, k).flatten() for value in (p[k].gamma_end, p[k].sigma_end))
            patch.setattr(tpdiff, "randn", lambda *_: one)
            new = p.renoise(0 * one, k).flatten()
        covariance = torch.outer(old, old) + torch.outer(new, new)
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
x[:, :, ::stride] -> x[:, :, stride - 1 :: stride]
x.repeat_interleave(2, dim=2) -> torch.cat([x, x], dim=2)
linear_sum_assignment(cost.detach().cpu().numpy()) -> linear_sum_assignment(-cost.detach().cpu().numpy())
_, columns = linear_sum_assignment -> columns, _ = linear_sum_assignment
noise.flatten(1).float(), compute_mode -> noise.flatten(1).float().abs(), compute_mode
randn(shape[1:], g, g.device, dtype) -> randn(shape[1:], generator[0], g.device, dtype)
range(candidates - 1) -> range(candidates)
< (x - noise).flatten(1).float().norm(dim=1) -> > (x - noise).flatten(1).float().norm(dim=1)
t_end, t_start = k / stages, 1.0 -> t_end, t_start = (k + 1) / (stages + 1), 1.0
self.gamma_sigma((k + 1) / stages) -> self.gamma_sigma(k / stages)
math.sqrt(2) * sigma.item() / gamma.item() -> sigma.item() / gamma.item()
math.sqrt(2) * sigma.item() / gamma.item() -> 2 * sigma.item() / gamma.item()
return Stage(k, 2**k -> return Stage(k, 2 * k
return 1 - t, t -> return t, 1 - t
(log_abar / 2).exp(), (1 -> log_abar.exp(), (1
(1 - log_abar.exp()).sqrt() -> 1 - log_abar.exp()
return r / (1 + r) -> return r
-math.log1p(r * r) -> -math.log1p(r)
torch.linspace(0, 1, len(self._log_abar) -> torch.linspace(1 / len(self._log_abar), 1, len(self._log_abar)
(t - stage.t_end) / (stage.t_start - stage.t_end) -> (t - stage.t_end)
return gamma, sigma / gamma -> return gamma, sigma
return gamma, sigma / gamma -> return torch.ones_like(gamma), sigma / gamma
x0_end = downsample(x0, stage.stride) -> x0_end = downsample(x0.flip(2), stage.stride)
first = stage.index == len(self) - 1 -> first = False and stage.index == len(self) - 1
x0_end if first else upsample(downsample(x0, 2 * stage.stride)) -> x0_end
x0_start + stage.sigma_start * noise -> x0_start - stage.sigma_start * noise
x_end = stage.gamma_end * x0_end -> x_end = stage.gamma_start * x0_end
x0_end + stage.sigma_end * noise -> x0_end + stage.sigma_start * noise
stage.t_end + u.detach() -> stage.t_start - u.detach()
(x_end / scale_e - x_start / scale_s) / (e - s) -> (x_start / scale_s - x_end / scale_e) / (e - s)
(x_end / scale_e - x_start / scale_s) / (e - s) -> (x_end / scale_e - x_start / scale_s)
w = (position_t - s) / (e - s) -> w = (position_t - e) / (s - e)
scale_t / scale_s * (1 - w) -> scale_t * (1 - w)
scale_t / scale_e * w -> scale_t / scale_s * w
following = self[stage.index - 1] -> following = self[stage.index]
torch.stack([n, -n], dim=3) -> torch.stack([n, n], dim=3)
pairs = torch.stack([n, -n], dim=3).flatten(2, 3) -> pairs = torch.cat([n, -n], dim=2)
following.gamma_start / stage.gamma_end -> following.gamma_end / stage.gamma_end
following.sigma_start / math.sqrt(2) * pairs -> following.sigma_start * pairs
reversed(range(len(self))), counts -> range(len(self)), counts
if k > 0: -> if k > 1:
linspace(stage.t_start, stage.t_end, steps + 1 -> linspace(stage.t_start, stage.t_end, steps + 2
predict(x, times[i].to(x) -> predict(x, times[i + 1].to(x)
h / (2 * previous_h) * (output - previous) -> h / (2 * previous_h) * (previous - output)
h / (2 * previous_h) * (output - previous) -> h / previous_h * (output - previous)
x = scale[i + 1] * (x / scale[i] + h * slope) -> x = scale[i + 1] * (x / scale[i] - h * slope)
x = scale[i + 1] * (x / scale[i] + h * slope) -> x = scale[i] * (x / scale[i] + h * slope)
previous, previous_h = output, h -> previous, previous_h = slope, h
[each + rest] + [each] * (stages - 1) -> [each] * (stages - 1) + [each + rest]
torch.cat([abar.new_zeros(1), abar.log()]) -> torch.cat([abar.log()[:1], abar.log()])
.clamp(1, len(xs) - 1) -> .clamp(2, len(xs) - 1)
"""


@pytest.mark.trial
@pytest.mark.parametrize("mutation", MUTATIONS.strip().splitlines())
def test_the_suite_catches_a_broken_line(mutation, tmp_path):
    """One line of tpdiff.py broken in a copy; the tests of the paper's equations must go red there."""
    right, wrong = mutation.split(" -> ")
    source = (ROOT / "tpdiff.py").read_text()
    assert source.count(right) == 1, "the line to break is no longer there, or there twice"
    for path in [*ROOT.glob("*.py"), ROOT / "README.md", ROOT / "pyproject.toml"]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    (tmp_path / "tpdiff.py").write_text(source.replace(right, wrong))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = command("-m", "pytest", "-x", "-k", EQUATIONS, cwd=tmp_path, env=environment)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 1 and "1 failed" in out, out


EQUATIONS = (
    "not train and not sample_ and not videos and not evaluate and not benchmark and not folder and not processes"
)


# ---- The model


def small_model(classes: int = 0, live: bool = True, **options) -> DiT:
    torch.manual_seed(0)
    model = DiT(DiTConfig(width=32, depth=2, heads=2, classes=classes, **options))
    if live:  # away from the zero init, where the output is 0 whatever goes in
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("T, H, W, channels", [(8, 16, 16, 1), (4, 8, 24, 3), (2, 16, 16, 1), (1, 4, 4, 2)])
def test_model_keeps_the_shape_at_every_stage_and_its_first_output_is_zero(T, H, W, channels):
    for live in (False, True):
        model = small_model(live=live, channels=channels)
        for stage in range(3):
            out = model(torch.randn(2, channels, T, H, W), torch.rand(2), stage)
            assert out.shape == (2, channels, T, H, W) and out.dtype == torch.float32
            assert bool(out.abs().max() > 0) == live


def test_same_instant_has_the_same_temporal_position_at_every_rate():
    full, model = temporal_positions(16, 0), small_model(stages=4)
    rotation = model._rotations(16, 2, 2, 0, torch.zeros(1))[1]
    for stage in (1, 2, 3):
        assert torch.equal(temporal_positions(16 // 2**stage, stage), full[:: 2**stage])
        slower = model._rotations(16 // 2**stage, 2, 2, stage, torch.zeros(1))[1]
        assert torch.equal(slower, rotation[:: 2**stage]) and slower.shape[0] == 16 // 2**stage
    assert not torch.equal(temporal_positions(4, 1), full[:4])


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
    with pytest.raises(ValueError, match="temporal"):
        other.start_from(small_model(stages=1))
    with pytest.raises(ValueError, match="stages"):
        small_model(stages=3).start_from(small_model(stages=2))


@pytest.mark.parametrize("tokens", [7, 40])  # short rows go another way
def test_attention_on_cpu_is_scaled_dot_product_attention(tokens):
    q, k, v = torch.randn(3, 2, 4, tokens, 8)
    reference = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention(q, k, v), reference)


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


# ---- Data


def test_moving_digits_are_pixels_in_range_with_their_label_and_move_smoothly():
    data, seen = MovingDigits(), set()
    for n in range(40):
        clip, label = data[n]
        seen.add(label)
        assert clip.shape == (1, 16, 32, 32) and clip.dtype == torch.float32
        assert clip.min() >= -1 and clip.max() <= 1 and clip.max() > 0.5
        ink = (clip[0] + 1) / 2
        mass = ink.sum((1, 2))
        assert mass.std() < 0.02 * mass.mean()  # the same digit in every frame, whole
        center = torch.stack([(ink.sum(d) * torch.arange(32)).sum(1) / mass for d in (1, 2)], 1)
        speed = center.diff(dim=0).norm(dim=1)
        assert 0.3 < speed.max() < 32 / 16 + 0.01
    assert seen == set(range(10))
    two, one = MovingDigits(digits=2)[0][0], MovingDigits()[0][0]
    assert two.sum() > one.sum()
    with pytest.raises(DataError, match="size >= 16"):
        MovingDigits(size=8)


def test_a_sample_number_is_the_same_clip_in_every_process():
    data = MovingDigits(seed=3)
    batches = [list(range(i, i + 4)) for i in range(0, 16, 4)]
    here = list(DataLoader(data, batch_sampler=batches))
    workers = list(DataLoader(data, batch_sampler=batches, num_workers=2))
    for (clip, label), (clip_, label_) in zip(here, workers, strict=True):
        assert torch.equal(clip, clip_) and torch.equal(label, label_)
    assert torch.equal(here[1][0][0], MovingDigits(seed=3)[4][0])
    assert not torch.equal(here[1][0][0], MovingDigits(seed=4)[4][0])
    assert not torch.equal(data[0][0], data[1][0])


def animation(path: Path, frames: int, size: tuple[int, int] = (20, 30), mode: str = "RGB", green=100, **options):
    """Frame i is one plain colour, 10 i of red."""
    colors = [(10 * i, green, 200) + ((0,) if mode == "RGBA" else ()) for i in range(frames)]
    images = [Image.new(mode, size, color) for color in colors]
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=80, **options)


@pytest.fixture
def clip_folder(tmp_path) -> Path:
    folder = tmp_path / "clips"
    animation(folder / "a.gif", 8)
    animation(folder / "deep" / "b.webp", 9, lossless=True)
    animation(folder / "deep" / "er" / "c.png", 8)
    animation(folder / "clear.webp", 8, mode="RGBA", lossless=True)
    animation(folder / "short.gif", 3)
    animation(folder / "still.gif", 1)
    Image.new("RGB", (9, 9)).save(folder / "still.png")
    (folder / "broken.gif").write_bytes(b"GIF89a, not really")
    (folder / "empty.webp").write_bytes(b"")
    (folder / "notes.txt").write_text("not a clip")
    return folder


def test_folder_finds_animations_and_counts_what_it_skips(clip_folder):
    data = FolderClips(clip_folder, frames=6, size=8)
    assert {source.files[0].name for source in data.sources} == {"a.gif", "b.webp", "c.png", "clear.webp"}
    assert "\n" not in data.summary and all(
        str(clip_folder / name) in data.summary for name in ("broken.gif", "empty.webp")
    )
    for part in (
        "9 files found",
        "4 used, 4 clips of 33 frames",
        "1 shorter than 6 frames",
        "2 that cannot be decoded",
        "2 stills",
    ):
        assert part in data.summary
    windows = [data[n][0] for n in range(40)]
    assert all(w.shape == (3, 6, 8, 8) and w.min() >= -1 and w.max() <= 1 for w in windows)
    white = [n for n, w in enumerate(windows) if w.min() == 1]  # the fully transparent clip is white
    assert len(white) == 10 and {n // 4 for n in white} == set(range(10))  # every epoch shows every file once
    starts = set()
    for w in windows:
        if w.min() < 1 and w[2].std() < 0.01:  # a window is consecutive frames of one file
            red = (w[0, :, 4, 4] + 1) * 127.5
            starts.add(round(red[0].item() / 10))
            assert (red.diff() - 10).abs().max() < 6
    assert starts >= {0, 1, 2}
    assert torch.equal(FolderClips(clip_folder, 6, 8)[17][0], windows[17])
    assert torch.equal(FolderClips(clip_folder, 6, 8, cache_bytes=0)[17][0], windows[17])


def test_folder_crops_without_distortion(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (10, 0, 30, 20))  # the central square, and nothing else
    image.save(tmp_path / "a.gif", save_all=True, append_images=[image.rotate(180), image.rotate(90)])
    clip, label = FolderClips(tmp_path, frames=1, size=10)[0]
    assert label == -1 and clip.max() == -1


def test_sub_folders_are_the_labels(tmp_path):
    for name in ("zebra/a.gif", "ape/a.gif", "ape/deep/b.gif", "rootless.gif"):
        animation(tmp_path / name, 3)
    data = FolderClips(tmp_path, frames=2, size=8, labels=True)
    assert data.classes == ("ape", "zebra") and "1 in no sub-folder" in data.summary
    assert sorted(data.classes[data[n][1]] for n in range(3)) == ["ape", "ape", "zebra"]
    animation(tmp_path / "zebra" / "a.gif", 3, green=250)
    data = FolderClips(tmp_path, frames=2, size=8, labels=True)
    assert all((data[n][0][1].mean() > 0.5) == (data[n][1] == 1) for n in range(6))


def numbered_stills(folder: Path, numbers, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.new("RGB", (16, 16), (10 * number, 0, 0)).save(folder / f"frame{number}{suffix}", quality=95)


def reds(window: torch.Tensor) -> list[int]:
    """The numbers of a window's frames, read off their red."""
    return [round((red.item() + 1) * 127.5 / 10) for red in window[0].mean((1, 2))]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_numbered_stills_of_a_folder_are_a_clip_in_the_order_of_their_numbers(tmp_path, suffix):
    numbered_stills(tmp_path / "clip", range(3, 13), suffix)
    numbered_stills(tmp_path / "gap", [1, 2, 3, 5, 6, 7], suffix)
    numbered_stills(tmp_path / "clip", range(13, 20), suffix.upper().replace("PNG", "jpeg").replace("JPG", "png"))
    data = FolderClips(tmp_path, frames=4, size=8)
    assert "23 files found, 17 used, 2 clips of 17 frames in all; skipped: 6 shorter than 4 frames" in data.summary
    assert len(FolderClips(tmp_path, frames=1, size=8).sources) == 23  # pictures alone
    data.sources = [source for source in data.sources if source.frames == 10]
    windows = [reds(data[n][0]) for n in range(40)]
    assert all(window == list(range(window[0], window[0] + 4)) for window in windows)
    assert {window[0] for window in windows} == set(range(3, 10))


def test_pictures_of_all_kinds_look_as_they_should(tmp_path):
    ramp = np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)
    Image.fromarray(ramp).save(tmp_path / "sixteen.png")
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    turned, exif = Image.new("RGB", (4, 4), "white"), Image.Exif()
    turned.paste("black", (0, 0, 4, 2))
    exif[0x0112] = 6  # to be seen turned by a quarter
    turned.save(tmp_path / "turned.png", exif=exif)
    data = FolderClips(tmp_path, frames=1, size=4)
    seen = {source.files[0].stem: data._window(source, 0)[:, 0] for source in data.sources}
    assert torch.equal(seen["sixteen"][0], torch.from_numpy(ramp // 256).float() / 127.5 - 1)
    assert ((seen["cmyk"] - torch.tensor([1.0, -1, -1]).view(3, 1, 1)).abs() < 0.1).all()
    assert seen["turned"][0].mean(0).tolist() == [1, 1, -1, -1]


def test_animations_whose_names_are_numbered_stay_animations(tmp_path):
    for number in (1, 2):
        animation(tmp_path / f"{number}.png", 6)
    data = FolderClips(tmp_path, frames=4, size=8)
    assert [source.frames for source in data.sources] == [6, 6]


def test_frame_stride_flip_and_grayscale(tmp_path):
    numbered_stills(tmp_path, range(9))
    data = FolderClips(tmp_path, frames=3, size=8, frame_stride=3)
    assert {tuple(reds(data[n][0])) for n in range(30)} == {(0, 3, 6), (1, 4, 7), (2, 5, 8)}
    with pytest.raises(DataError, match="shorter than 10 frames"):
        FolderClips(tmp_path, frames=4, size=8, frame_stride=3)
    with pytest.raises(DataError, match="a latent scale is for latents"):
        FolderClips(tmp_path, frames=4, size=8, latent_scale=2)
    image = Image.new("RGB", (16, 16), "red")
    image.paste("white", (0, 0, 8, 16))
    image.save(tmp_path / "a.gif", save_all=True, append_images=[image.rotate(180)])
    for path in tmp_path.glob("frame*"):
        path.unlink()
    plain, flipped, grey = (FolderClips(tmp_path, 1, 8, **flag) for flag in ({}, {"flip": True}, {"grayscale": True}))
    mirrored = [torch.equal(flipped[n][0], plain[n][0].flip(-1)) for n in range(64)]
    assert all(mirrored[n] or torch.equal(flipped[n][0], plain[n][0]) for n in range(64)) and 16 < sum(mirrored) < 48
    assert grey.channels == 1 and grey[0][0].shape == (1, 1, 8, 8)
    assert {round(grey[n][0].min().item(), 1) for n in range(9)} == {round(76 / 127.5 - 1, 1)}  # the luminance of red


def write_video(path: Path, codec: str = "h264", times: Sequence[int] = range(40), aspect: int = 1, **options) -> None:
    """Frame i is grey, 6 i bright, and shown from times[i] tenths of a second on; a key frame every ten."""
    av = pytest.importorskip("av", reason="pip install av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"g": "10", **options})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 32, 32, "yuv420p", 10**7
        stream.codec_context.sample_aspect_ratio = aspect
        for index, time in enumerate(times):
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (6 * index,) * 3))
            frame.pts, frame.time_base = time, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def numbers_in(window: torch.Tensor) -> torch.Tensor:
    return ((window.mean((0, 2, 3)) + 1) * 127.5 / 6).round()


@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("a.mp4", "mpeg4", {}),
        ("a.mp4", "mpeg4", {"bf": "2"}),  # frames that lean on later ones
        ("a.mov", "h264", {}),
        ("a.avi", "h264", {"bf": "3"}),  # whose first frame is not at the stream's start
        ("a.avi", "mpeg4", {"bf": "2"}),
        ("a.mkv", "mpeg4", {}),
        ("a.webm", "libvpx", {}),
        ("a.mp4", "libx265", {"x265-params": "bframes=4:open-gop=1:keyint=10:min-keyint=10:scenecut=0:log-level=none"}),
    ],
)
def test_videos_are_read_from_any_frame_on(tmp_path, name, codec, options):
    write_video(tmp_path / name, codec, **options)
    data = FolderClips(tmp_path, frames=3, size=8, frame_stride=2)
    assert "1 clips of 40 frames" in data.summary
    for start in range(36):
        assert numbers_in(data._window(data.sources[0], start)).tolist() == [start, start + 2, start + 4]


def test_a_window_late_in_a_video_is_not_decoded_from_its_beginning(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", "mpeg4")
    import av

    data, decoded, decode = FolderClips(tmp_path, frames=3, size=8), [], av.container.InputContainer.decode

    class Counted:
        def __init__(self, container):
            self.container, self.streams, self.seek = container, container.streams, container.seek

        def decode(self, stream):
            for frame in decode(self.container, stream):
                decoded.append(frame.pts)
                yield frame

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.container.close()

    opened = av.open
    monkeypatch.setattr(av, "open", lambda path: Counted(opened(path)))
    assert numbers_in(data._window(data.sources[0], 35)).tolist() == [35, 36, 37]
    assert len(decoded) < 12


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_frames_of_uneven_length_are_shown_for_as_long_as_they_last(tmp_path, name):
    write_video(tmp_path / name, times=[*range(0, 80, 8), *range(80, 90)])  # 8 s of slow frames, then 1 s of fast ones
    data = FolderClips(tmp_path, frames=8, size=8)
    (source,), seen = data.sources, set()
    for start in range(source.frames - 7):
        numbers = numbers_in(data._window(source, start))
        assert (numbers.diff() >= 0).all()
        seen |= set(numbers.tolist())
    times = torch.tensor([0 if n < 1 else 8 * n if n < 10 else 80 + n - 10 for n in sorted(seen)])
    assert seen >= set(range(10)) and times.diff().max() <= 8 and 19 in seen  # slow ones all, and the last


def test_videos_are_seen_with_square_pixels_and_turned_as_they_were_held(tmp_path):
    write_video(tmp_path / "a.mp4", aspect=2)
    data = FolderClips(tmp_path, frames=1, size=8)
    (image,) = data_module._read_video(tmp_path / "a.mp4", range(1))
    assert image.size == (64, 32) and data[0][0].shape == (3, 1, 8, 8)

    class Frame:
        rotation = 90  # counter-clockwise, as PyAV has it

        def to_image(self):
            image = Image.new("RGB", (4, 2), "white")
            image.paste("black", (0, 0, 1, 2))
            return image

    turned = np.asarray(data_module._upright(Frame(), None).convert("L"))
    assert turned.shape == (4, 2) and turned[:, 0].tolist() == [255, 255, 255, 0]


def test_a_video_that_ends_early_is_skipped_by_name(tmp_path):
    write_video(tmp_path / "a.mkv", "mpeg4")
    write_video(tmp_path / "whole.mkv", "mpeg4")
    data = FolderClips(tmp_path, frames=36, size=8)
    content = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="a.mkv cannot be decoded.*ends at frame"):
        assert all(numbers_in(data[n][0]).tolist()[-1] >= 35 for n in range(2))


def test_a_video_of_no_seconds_is_skipped_by_name(tmp_path):
    write_video(tmp_path / "a.mp4")
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: whole.index(b"mdat") - 4])
    write_video(tmp_path / "c.mp4", times=[0])
    (tmp_path / "d.webm").write_bytes(b"")
    data = FolderClips(tmp_path, frames=8, size=16)
    assert "4 files found, 1 used" in data.summary and "1 stills" in data.summary
    assert "2 that cannot be decoded" in data.summary and "b.mp4" in data.summary and "d.webm" in data.summary


def test_a_video_without_pyav_says_what_to_install(tmp_path, monkeypatch, capsys):
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "a.mp4").write_bytes(b"any")
    words, message = (
        ["--data", clips, "--out", tmp_path / "run"],
        "a.mp4 is a video, which needs PyAV to read: pip install av",
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "av", None)
        assert message in fails_with_one_line(capsys, train.main, *words)
    write_video(clips / "a.mp4")
    data_module.find_sources(clips, tmp_path / "run" / "index.json")
    monkeypatch.setitem(sys.modules, "av", None)  # gone again, with an index that knows the file
    assert message in fails_with_one_line(capsys, train.main, *words)


def test_latents_are_cropped_at_the_centre_and_scaled(tmp_path):
    latent = torch.randn(5, 9, 8, 12, generator=seeded())
    np.save(tmp_path / "a.npy", latent.numpy())
    data = FolderClips(tmp_path, frames=9, size=8, latent_scale=0.5)
    assert data.latent and data.channels == 5
    torch.testing.assert_close(data[0][0], latent[..., 2:10] * 0.5)
    (tmp_path / "a.npy").unlink()
    for name, content in {"list": [1], "flat": latent[0], "complex": latent.to(torch.complex64)}.items():
        torch.save(content, tmp_path / f"{name}.pt")
    torch.save(latent.bfloat16().requires_grad_(), tmp_path / "a.pt")
    assert "3 that cannot be decoded" in FolderClips(tmp_path, frames=9, size=8).summary
    torch.testing.assert_close(FolderClips(tmp_path, frames=9, size=8)[0][0], latent[..., 2:10].bfloat16().float())
    with pytest.raises(DataError, match="neither mirrored nor made grey"):
        FolderClips(tmp_path, frames=9, size=8, flip=True)
    with pytest.raises(DataError, match="smaller than 16"):
        FolderClips(tmp_path, frames=9, size=16)
    animation(tmp_path / "b.gif", 9)
    with pytest.raises(DataError, match="a.pt and .*b.gif are not alike"):
        FolderClips(tmp_path, frames=9, size=8)


def test_train_on_latents_then_sample_some(tmp_path, capsys):
    (tmp_path / "latents").mkdir()
    np.save(tmp_path / "latents" / "a.npy", np.full((4, 8, 8, 8), 20, np.float32))
    words = ["--steps", "2", "--data", str(tmp_path / "latents"), "--latent-scale", "0.05", "--sample-interval", "2"]
    run_training(tmp_path / "run", *words, "--size", "8")
    assert np.load(tmp_path / "run" / "step-0000002.npy").shape == (10, 4, 8, 8, 8)
    words = ["--checkpoint", tmp_path / "run", "--out", tmp_path / "it", "--number", 2, "--steps", 3]
    sample.main([*map(str, words)])
    assert "it.npy" in capsys.readouterr().out
    clips = np.load(tmp_path / "it.npy")
    weights = sample.load_weights(tmp_path / "run" / "weights.pt")
    expected = sample.generate(weights, Pyramid("flow", 3), None, 2, 3) / 0.05
    assert clips.shape == (2, 4, 8, 8, 8) and np.allclose(clips, expected)
    assert "it.npy exists already" in fails_with_one_line(capsys, sample.main, *words)


def test_the_index_spares_files_that_have_not_changed(clip_folder, tmp_path, monkeypatch):
    index, opened = tmp_path / "run" / "index.json", []
    probe = data_module._probe
    monkeypatch.setattr(data_module, "_probe", lambda files: opened.append(files[0].name) or probe(files))
    numbered_stills(clip_folder / "stills", range(6))
    first = FolderClips(clip_folder, 6, 8, index=index)
    assert len(opened) == 10
    again, broken = FolderClips(clip_folder, 6, 8, index=index), ["broken.gif", "empty.webp"]
    assert opened[10:] == broken and again.summary == first.summary and torch.equal(again[7][0], first[7][0])
    animation(clip_folder / "short.gif", 7)
    os.utime(clip_folder / "short.gif", (1, 1))
    (clip_folder / "a.gif").unlink()
    changed = FolderClips(clip_folder, 6, 8, index=index)
    assert opened[12:] == [*broken, "short.gif"] and "5 clips" in changed.summary
    assert "a.gif" not in index.read_text()
    status = (clip_folder / "short.gif").stat()
    animation(clip_folder / "short.gif", 6)
    os.utime(clip_folder / "short.gif", ns=(status.st_mtime_ns, status.st_mtime_ns))  # as old as what it replaces
    assert "of 37 frames" in FolderClips(clip_folder, 6, 8, index=index).summary
    index.write_text("[")  # damaged: written anew
    assert "of 37 frames" in FolderClips(clip_folder, 6, 8, index=index).summary and "a.gif" not in index.read_text()


def test_a_run_s_own_pictures_are_not_its_data(clip_folder):
    animation(clip_folder / "run" / "step-1.gif", 9)
    data = FolderClips(clip_folder, 6, 8, index=clip_folder / "run" / "index.json")
    assert len(data.sources) == 4 and len(FolderClips(clip_folder, 6, 8).sources) == 5


def test_train_on_labels_then_sample_one_by_its_name(tmp_path, capsys):
    for name in ("cat", "dog"):
        animation(tmp_path / "clips" / name / "a.gif", 8)
    run_training(tmp_path / "run", "--steps", "2", "--data", str(tmp_path / "clips"), "--labels", "folder")
    assert torch.load(tmp_path / "run" / "weights.pt", weights_only=True)["classes"] == ["cat", "dog"]
    capsys.readouterr()
    words = ["--checkpoint", tmp_path / "run", "--out", tmp_path / "it", "--number", 2, "--steps", 3]
    assert "its labels are cat, dog" in fails_with_one_line(capsys, sample.main, *words, "--label", "cow")
    sample.main([*map(str, words), "--label", "cat", "--guidance", "2"])
    assert sample.choose_labels(("ape", "cat", "dog"), 3, ["dog", "ape"]).tolist() == [2, 0, 2]
    assert sample.choose_labels(("ape", "cat"), 3).tolist() == [0, 1, 0]
    capsys.readouterr()
    animation(tmp_path / "clips" / "eel" / "a.gif", 8)
    resumed = fails_with_one_line(capsys, train.main, "--resume", "--out", tmp_path / "run", "--steps", 3)
    assert "other clips than when" in resumed


def test_a_file_damaged_further_in_is_named_and_skipped(clip_folder):
    whole = (clip_folder / "deep" / "er" / "c.png").read_bytes()
    (clip_folder / "damaged.png").write_bytes(whole[:150] + bytes(len(whole) - 150))
    data = FolderClips(clip_folder, frames=6, size=8)
    with pytest.warns(UserWarning, match="damaged.png"):
        whole = [data[n][0] for n in range(30)]
    assert all(window.shape == (3, 6, 8, 8) for window in whole)
    again = FolderClips(clip_folder, frames=6, size=8)
    with pytest.warns(UserWarning, match="damaged.png"):  # whatever was decoded before, a number is the same clip
        assert all(torch.equal(again[n][0], whole[n]) for n in reversed(range(30)))
    scarce = FolderClips(clip_folder, frames=6, size=8, cache_bytes=3000)
    with pytest.warns(UserWarning, match="damaged.png"):
        assert all(torch.equal(scarce[n][0], whole[n]) for n in range(30)) and scarce.room >= 0


@pytest.mark.filterwarnings("ignore:.*cannot be decoded")
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_folder_of_files_all_damaged_further_in_ends_in_one_sentence(tmp_path, capfd, workers):
    (tmp_path / "clips").mkdir()
    np.save(tmp_path / "clips" / "a.npy", np.full((2, 8, 16, 16), np.nan, np.float32))
    words = [*TINY, "--data", str(tmp_path / "clips"), "--out", str(tmp_path / "run"), "--workers", workers]
    with pytest.raises(SystemExit) as stopped:
        train.main(words)
    error = capfd.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error
    assert f"train.py: {tmp_path}/clips: not one file can be decoded" in error.splitlines()[-1]


def test_nothing_usable_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(DataError, match="gone is not a folder"):
        FolderClips(tmp_path / "gone")
    animation(tmp_path / "short.gif", 3)
    with pytest.raises(DataError, match=f"{tmp_path}.*1 files found, 0 used.*1 shorter than 16"):
        FolderClips(tmp_path)


def test_gif_and_strip_show_every_clip_and_frame(tmp_path):
    x = torch.stack([torch.full((1, 6, 8, 8), value) for value in (-1.0, 0.0, 1.0)])
    x = x * torch.linspace(0.5, 1, 6).view(1, 1, 6, 1, 1)
    save_gif(x, tmp_path / "a.gif", columns=3, scale=2)
    save_strip(x, tmp_path / "a.png", scale=2)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 6 and gif.size == (64, 24) and gif.info["loop"] == 0
        gif.seek(5)
        assert [gif.convert("L").getpixel((12 + 20 * i, 12)) for i in range(3)] == pytest.approx([0, 128, 255], abs=2)
    with Image.open(tmp_path / "a.png") as strip:
        assert strip.size == ((6 * 10 + 2) * 2, (3 * 10 + 2) * 2)
    with pytest.raises(ValueError, match="4 channels"):
        save_gif(torch.zeros(1, 4, 2, 4, 4), tmp_path / "b.gif")


# ---- Training

TINY = "--frames 8 --size 16 --patch 8 --width 32 --depth 1 --heads 2 --batch 4 --precision fp32 --workers 0".split()
TINY += "--log-interval 2 --save-interval 100 --sample-interval 100".split()


def run_training(out: Path, *options: str) -> dict:
    """train.py in this process, and the checkpoint it leaves."""
    with pytest.raises(SystemExit) as stopped:
        train.main([*TINY, "--out", str(out), *options])
    assert stopped.value.code == 0
    checkpoint, weights = (torch.load(out / name, weights_only=True) for name in ("checkpoint.pt", "weights.pt"))
    assert all(torch.equal(weights["ema"][name], value.bfloat16()) for name, value in checkpoint["ema"].items())
    return checkpoint


def small_state(*options: str, stage: int | None = None) -> tuple[train.State, argparse.Namespace, Iterator]:
    """A run of a small model before its first step, its arguments and its batches, of the steps' stages or of one."""
    args = train.make_parser().parse_args([*TINY, *options])
    data, device = MovingDigits(8, 16), torch.device("cpu")
    state = train.make_state(train.make_model(data, args), args, device, None)
    return state, args, train.make_batches(data, args, 0, 0, 1, device, stage)


def gradient_of_first_step(*options: str) -> torch.Tensor:
    """The gradient that the optimizer sees."""
    state, args, batches = small_state("--optimizer", "adamw", *options, stage=0)
    gradients = []
    state.optimizers[0].register_step_pre_hook(
        lambda *_: gradients.append(torch.cat([p.grad.flatten() for p in state.model.parameters()]))
    )
    train.optimize(state, state.model, Pyramid("flow"), batches, 0, args)
    return gradients[0]


def assert_same_weights(a: dict, b: dict, **tolerance) -> None:
    for part in ("model", "ema"):
        for name in a[part]:
            torch.testing.assert_close(a[part][name], b[part][name], rtol=0, **(tolerance or {"atol": 0}))


@both_modes
@pytest.mark.parametrize("stages", [1, 3])
def test_loss_falls_on_one_batch(mode, stages):
    args = train.make_parser().parse_args([*TINY, "--mode", mode, "--stages", str(stages)])
    p, data, model = Pyramid(mode, stages), MovingDigits(8, 16), small_model(classes=10, live=False, stages=stages)
    x0, labels = torch.stack([data[n][0] for n in range(4)]), torch.tensor([data[n][1] for n in range(4)])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for k in range(stages):
        losses = []
        for _ in range(80):
            batch = train.draw(x0, labels, 10, k, [0, 1, 2, 3], args)
            losses.append(train.training_loss(model, p, *batch, k, args))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < 0.7 * losses[0], (k, losses[0], losses[-1])


class Spy(DiT):
    """Returns zeros, and keeps what it was asked."""

    def forward(self, x, t, stage, y=None):
        self.asked = x, t, stage, y
        return torch.zeros_like(x)


@both_modes
@pytest.mark.parametrize("alignment", ["assignment", "nearest", "none"])
def test_training_loss_is_that_of_algorithm_2(mode, alignment):
    args = train.make_parser().parse_args([*TINY, "--align", alignment, "--candidates", "3"])
    p, data, model = Pyramid(mode, 3), MovingDigits(8, 16), Spy(DiTConfig(width=8, depth=1, heads=1))
    x0 = torch.stack([data[n][0] for n in range(8)])
    for k in range(3):
        batch = train.draw(x0, torch.full((8,), -1), 0, k, list(range(8)), args)
        loss = train.training_loss(model, p, *batch, k, args)
        generators = [sample.generator_for(0, sample.TRAINING, n) for n in range(8)]
        u = torch.stack([torch.rand(2, generator=generator)[0] for generator in generators])
        if alignment == "nearest":
            noise = draw_nearest(downsample(x0, 2**k), 3, generators)
        else:
            noise = randn((8, 1, 8 // 2**k, 16, 16), generators)
            noise = align(downsample(x0, 2**k), noise) if alignment == "assignment" else noise
        x_t, target, t = p.interpolate(*p.endpoints(x0, noise, k), k, u)
        if mode == "ddim":  # the network's error in the velocity, eps_k = sigma x_t + gamma velocity
            gamma, sigma = (value.float().view(-1, 1, 1, 1, 1) for value in p.gamma_sigma(t))
            target = (target - sigma * x_t) / gamma
        torch.testing.assert_close(loss, target.square().mean())
        for asked, expected in zip(model.asked, (x_t, t, k, None), strict=True):
            torch.testing.assert_close(asked, expected) if expected is not None else None
        assert model.asked[3] is None


def stage_args(seed, *options):
    return train.make_parser().parse_args(["--seed", str(seed), *options])


def test_the_reported_loss_is_the_mean_over_micro_batches():
    whole, accumulated = (
        small_state(*options, "--align", "none", stage=1) for options in (["--batch", "8"], ["--accumulate", "2"])
    )
    for state, args, batches in (whole, accumulated):
        train.optimize(state, state.model, Pyramid("flow"), batches, 1, args)
    assert accumulated[0].losses[1].tolist() == [0, 2, 0]
    means = [(state.losses[0, 1] / state.losses[1, 1]).item() for state, *_ in (whole, accumulated)]
    assert means[0] == pytest.approx(means[1], rel=1e-4)


def test_the_average_follows_the_weights_and_the_rate_its_schedule():
    state, args, batches = small_state("--steps", "100", "--warmup", "9", "--lr", "0.1", "--clip", "0.5")
    average = [parameter.clone() for parameter in state.ema.parameters()]
    stages = [train.draw_stage(step, stage_args(0)) for step in range(3)]
    for step, k in enumerate(stages):
        train.optimize(state, state.model, Pyramid("flow"), batches, k, args)
        decay = (1 + step) / (10 + step)
        new = [parameter.detach() for parameter in state.model.parameters()]
        average = [decay * old + (1 - decay) * now for old, now in zip(average, new, strict=True)]
    for ours, theirs in zip(state.ema.parameters(), average, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not ours.requires_grad
    assert [train.learning_rate(step, args) for step in (0, 50, 100)] == pytest.approx([0.01, 0.05, 0], abs=1e-9)
    assert state.losses[1].tolist() == [stages.count(k) for k in range(3)]
    assert ((state.losses[0] > 0) == (state.losses[1] > 0)).all() and len(set(stages)) > 1


def test_the_gradient_is_clipped_to_the_given_norm_and_not_at_zero():
    assert gradient_of_first_step("--clip", "1e-3").norm() == pytest.approx(1e-3, rel=1e-3)
    assert gradient_of_first_step("--clip", "0").norm() > 0.01


def test_accumulated_gradients_are_those_of_the_large_batch():
    options = "--clip", "0", "--align", "none", "--precision", "fp32"
    accumulated = gradient_of_first_step("--batch", "4", "--accumulate", "2", *options)
    torch.testing.assert_close(accumulated, gradient_of_first_step("--batch", "8", *options))


def test_compile_makes_one_graph_a_stage(tmp_path, monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(Block, "compile", functools.partialmethod(torch.nn.Module.compile, backend=counter))
    torch._dynamo.reset()
    run_training(tmp_path, "--compile", "--depth", "3", "--steps", "12")
    drawn = {train.draw_stage(step, stage_args(0)) for step in range(12)}
    assert counter.frame_count == len(drawn) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs")
@pytest.mark.parametrize("option", ["--steps=10", "--compile", "--gradient-checkpointing", "--precision=bf16"])
@pytest.mark.parametrize("classes", [MovingDigits.classes, ()])
def test_captured_model_has_the_gradients_of_the_model(option, classes, monkeypatch):
    monkeypatch.setattr(MovingDigits, "classes", classes)
    args, data = train.make_parser().parse_args([*TINY, option]), MovingDigits(8, 16)
    state = train.make_state(train.make_model(data, args), args, sample.choose_device(), None)
    captured, parameters = train.fast_form(state.model, args, sample.choose_device()), list(state.model.parameters())
    assert isinstance(captured, train.Captured)
    with torch.no_grad():  # as steps of training will
        [parameter.add_(0.1 * torch.randn_like(parameter)) for parameter in parameters]
    for k in (2, 0, 1, 0):
        batch = next(train.make_batches(data, args, 0, 0, 1, sample.choose_device(), k))
        gradients = []
        for model in (captured, state.model):
            loss = train.training_loss(model, Pyramid("flow"), *batch, k, args)
            loss.backward()
            gradients.append([loss.detach(), *(parameter.grad.clone() for parameter in parameters)])
            state.model.zero_grad()
        tolerance = {"rtol": 0.1, "atol": 1e-3} if "bf16" in option else {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(*gradients, **tolerance)
    args.accumulate = 2  # whose second backward pass would write over the gradients of the first
    assert train.fast_form(state.model, args, sample.choose_device()) is state.model


def test_noise_and_time_follow_the_seed_and_the_sample_number():
    draws = {
        torch.rand(4, generator=sample.generator_for(*numbers)).sum().item()
        for numbers in itertools.product(range(3), repeat=3)
    }
    assert len(draws) == 27
    losses = set()
    for seed in ("0", "1"):
        args = train.make_parser().parse_args([*TINY, "--seed", seed])
        for numbers in ([0, 1], [2, 3]):
            x0, labels = torch.zeros(2, 1, 8, 16, 16), torch.tensor([-1, -1])
            batch = train.draw(x0, labels, 0, 0, numbers, args)
            losses.add(train.training_loss(small_model(live=False), Pyramid("flow"), *batch, 0, args).item())
    assert len(losses) == 4


def test_labels_are_dropped_at_the_given_rate():
    args = train.make_parser().parse_args([*TINY, "--label-dropout", "0.25"])
    labels = train.draw(torch.zeros(400, 1, 4, 8, 8), torch.full((400,), 7), 10, 2, list(range(400)), args)[3]
    assert set(labels.tolist()) == {7, 10} and 0.15 < (labels == 10).float().mean() < 0.35


def test_stages_are_drawn_evenly_or_as_the_odds_say_and_by_the_step_alone():
    drawn = [train.draw_stage(step, stage_args(0)) for step in range(3000)]
    assert drawn == [train.draw_stage(step, stage_args(0)) for step in range(3000)]
    assert drawn != [train.draw_stage(step, stage_args(1)) for step in range(3000)]
    assert all(900 < drawn.count(k) < 1100 for k in range(3))
    noisiest = [train.draw_stage(step, stage_args(0, "--stage-odds", "4", "1", "1")) for step in range(3000)]
    assert all(abs(noisiest.count(k) - expected) < 100 for k, expected in enumerate((500, 500, 2000)))


def test_shifted_times_have_the_given_median_and_a_shift_of_one_changes_nothing():
    def times(count, *options):
        args = stage_args(0, *TINY, "--align", "none", *options)
        return train.draw(torch.zeros(count, 1, 4, 4, 4), torch.full((count,), -1), 0, 2, range(count), args)[2]

    draws = {shift: times(4000, "--time-shift", shift) for shift in ("1", "3")}
    same = times(9)
    assert torch.equal(same, draws["1"][:9]) and abs(draws["1"].median() - 0.5) < 0.03
    assert abs(draws["3"].median() - 0.75) < 0.03 and 0 <= draws["3"].min() and draws["3"].max() <= 1


@pytest.mark.parametrize("options", [["--mode", "flow"], ["--mode", "ddim", "--accumulate", "2"]])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(options, tmp_path, monkeypatch):
    whole = run_training(tmp_path / "whole", "--steps", "7", *options)
    asked = []
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:

        def stop_at_step_3(request):
            asked.append(0)
            request.signal = signal.SIGTERM if len(asked) == 3 else 0
            return request.signal

        patch.setattr(train.StopRequest, "agreed", stop_at_step_3)
        train.main([*TINY, "--out", str(tmp_path / "halves"), "--steps", "7", *options])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert torch.load(tmp_path / "halves" / "checkpoint.pt", weights_only=True)["step"] == 3
    with pytest.raises(SystemExit) as finished:
        train.main(["--resume", "--out", str(tmp_path / "halves"), "--workers", "1"])
    assert finished.value.code == 0
    halves = torch.load(tmp_path / "halves" / "checkpoint.pt", weights_only=True)
    assert_same_weights(whole, halves)
    for a, b in zip(whole["optimizers"], halves["optimizers"], strict=True):
        for index, values in a["state"].items():
            assert all(torch.equal(values[name], b["state"][index][name]) for name in values)
    whole_rows, halves_rows = (
        {row["step"]: row["loss_by_stage"] for row in map(json.loads, (tmp_path / run / "metrics.jsonl").open())}
        for run in ("whole", "halves")
    )
    assert list(whole_rows) == [2, 4, 6, 7] and list(halves_rows) == [2, 3, 4, 6, 7]
    for step in (2, 6, 7):  # the row at 4 covers the steps since the stop at 3
        assert whole_rows[step] == halves_rows[step] and len(whole_rows[step]) == 3


def test_rows_after_the_checkpoint_and_a_half_written_one_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"ste')
    train.start_metrics(path, 4)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'


def train_as_rank(rank: int, world: int, port: int, out: Path, options: list[str]) -> None:
    """One process of a gloo group; each keeps a checkpoint of its own, for the test to compare."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    args, checkpoint = train.parse_args([*TINY, "--out", str(out / str(rank)), *options])
    dataset, state, *place = train.set_up(args, checkpoint)
    args.out.mkdir(parents=True, exist_ok=True)
    destroy = train.dist.destroy_process_group

    def destroy_last():  # seen once: otherwise a rank may never end
        assert not any(type(thing) is train.DistributedDataParallel for thing in gc.get_objects())
        destroy()

    train.dist.destroy_process_group = destroy_last
    train.train(args, dataset, state, *place)
    train.save(state, dataset, args, world)


def test_two_processes_train_the_weights_of_one_with_the_doubled_batch(tmp_path):
    options = ["--steps", "4", "--align", "none"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(train_as_rank, (2, port, tmp_path, options), nprocs=2)
    ranks = [torch.load(tmp_path / str(rank) / "checkpoint.pt", weights_only=True) for rank in (0, 1)]
    assert_same_weights(*ranks)
    one = run_training(tmp_path / "one", *options, "--batch", "8")
    assert_same_weights(ranks[0], one, atol=2e-5)
    accumulated = run_training(tmp_path / "accumulated", *options, "--accumulate", "2")
    assert_same_weights(accumulated, one, atol=2e-5)
    other = run_training(tmp_path / "other", *options, "--batch", "8", "--seed", "1")
    with pytest.raises(AssertionError):
        assert_same_weights(other, one, atol=1e-3)


def test_a_process_without_a_gpu_of_its_own_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        train.main(["--out", "nowhere"])
    assert stopped.value.code == 2
    assert "process 1 of this machine finds 1 GPU(s): start no more processes than GPUs" in capsys.readouterr().err


def test_digits_on_a_cpu_are_drawn_by_the_training_process_and_files_read_by_a_worker(monkeypatch):
    class Loader:
        def __init__(self, *_, num_workers, **__):
            asked.append(num_workers)

        def __iter__(self):
            return iter(())

    monkeypatch.setattr(train, "DataLoader", Loader)
    asked, digits = [], MovingDigits()
    for words, device in (([], "cpu"), (["--data", "clips"], "cpu"), (["--workers", "3"], "cpu"), ([], "cuda")):
        args = train.make_parser().parse_args([*words, "--steps", "1"])
        assert not list(train.make_batches(digits, args, 0, 0, 1, torch.device(device)))
    assert asked == [0, 1, 3, 4]


def test_workers_and_torchrun_of_one_process_change_nothing(tmp_path):
    whole = run_training(tmp_path / "whole", "--steps", "5")
    assert_same_weights(run_training(tmp_path / "workers", "--steps", "5", "--workers", "2"), whole)
    words = ["-m", "torch.distributed.run", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    process = command(*words, ROOT / "train.py", *TINY, "--steps", 5, "--out", tmp_path / "torchrun")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_same_weights(torch.load(tmp_path / "torchrun" / "checkpoint.pt", weights_only=True), whole)


def command(*words: str | Path, **options) -> subprocess.Popen:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], **streams, **options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_first(number, tmp_path):
    """As Ctrl-C in a terminal and torchrun send it: the process that prepares the clips must live on meanwhile."""
    run = tmp_path / "run"
    process = command(ROOT / "train.py", *TINY, "--workers", 1, "--steps", 10**6, "--out", run, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "--resume" in out and "Traceback" not in err
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] > 0
    assert not list(run.glob("*.tmp"))


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


def test_gradient_checkpointing_keeps_less_and_changes_nothing(tmp_path):
    plain = run_training(tmp_path / "plain", "--steps", "3")
    assert_same_weights(run_training(tmp_path / "less", "--steps", "3", "--gradient-checkpointing"), plain)
    model, x, kept = small_model(), torch.randn(2, 1, 8, 16, 16), {}
    for model.gradient_checkpointing in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            model(x, torch.rand(2), 0).sum()
        kept[model.gradient_checkpointing] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


def test_training_in_bf16_gives_finite_weights(tmp_path):
    content = run_training(tmp_path / "run", "--steps", "3", "--precision", "bf16")
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in content["model"].values())


LOSS = train.training_loss


def broken_loss(bad: set[int]):
    """training_loss that is NaN at these steps of a run of one micro-batch a step."""
    true_loss, steps = LOSS, itertools.count()

    def loss(*batch):
        value = true_loss(*batch)
        return value * math.nan if next(steps) in bad else value

    return loss


def test_a_step_whose_gradient_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
    options = ["--steps", "6", "--log-interval", "1", "--stages", "1"]
    whole = run_training(tmp_path / "whole", *options)
    monkeypatch.setattr(train, "training_loss", broken_loss({0, 1, 4}))
    content = run_training(tmp_path / "run", *options)
    assert (content["skipped"], content["skipped_in_a_row"], whole["skipped"]) == (3, 0, 0)
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["skipped"] for row in rows] == [1, 2, 2, 2, 3, 3]
    assert [row["loss"] is None for row in rows] == [True, True, False, False, True, False]
    assert all(value.isfinite().all() for part in ("model", "ema") for value in content[part].values())
    states = [state for optimizer in content["optimizers"] for state in optimizer["state"].values()]
    assert {int(state["step"]) for state in states if "step" in state} == {3}  # of the six, AdamW took three


def test_ten_skipped_steps_in_a_row_end_the_run_and_the_message_says_where(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "training_loss", broken_loss(set(range(4, 13)) | set(range(14, 30))))
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        train.main([*TINY, "--steps", "40", "--save-interval", "3", "--out", str(run)])
    stage = train.draw_stage(23, stage_args(0))  # steps count from 0 here, and from 1 in what is printed
    assert f"10 steps in a row, last at step 24, stage {stage}" in str(stopped.value)
    assert f"the last checkpoint is {run / 'checkpoint.pt'}" in str(stopped.value)
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    assert content["step"] == 21 and all(value.isfinite().all() for value in content["model"].values())
    monkeypatch.setattr(train, "training_loss", broken_loss(set(range(40))))
    with pytest.raises(SystemExit, match="there is no checkpoint yet"):
        train.main([*TINY, "--steps", "40", "--out", str(tmp_path / "other")])


def test_the_newest_two_checkpoints_and_the_best_are_kept(tmp_path, monkeypatch):
    losses = iter([5.0, 4.0, 1.0, 2.0, 3.0, 3.0, 9.0])

    def loss(model, *_):
        return 0 * sum(parameter.sum() for parameter in model.parameters()) + next(losses)

    monkeypatch.setattr(train, "training_loss", loss)
    run, names = tmp_path / "run", ("checkpoint.pt", "checkpoint-previous.pt", "checkpoint-best.pt")
    run_training(run, "--stages", "1", "--steps", "7", "--save-interval", "2")
    contents = [torch.load(run / name, weights_only=True) for name in names]
    assert [content["step"] for content in contents] == [7, 6, 4] and contents[0]["best"] == 1.5
    assert {path.name for path in run.glob("checkpoint*")} == set(names)


def test_a_second_name_is_a_copy_where_there_are_no_links(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("one")

    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    train.keep_as(tmp_path / "a", "b")
    assert (tmp_path / "b").read_text() == "one" and len(list(tmp_path.iterdir())) == 2


def full_disk(room: int) -> None:
    """Lets no file of this process grow past `room` bytes; what a full disk does to a write, without a disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    run = tmp_path / "run"
    run_training(run, "--steps", "2")
    before = (run / "checkpoint.pt").read_bytes()
    words = ["--resume", "--out", run, "--steps", "4"]
    process = command(ROOT / "train.py", *words, preexec_fn=lambda: full_disk(len(before) // 2))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in err
    assert f"{run / 'checkpoint.pt'} could not be written" in err and "continue with --resume" in err
    assert (run / "checkpoint.pt").read_bytes() == before and not list(run.glob("*.tmp"))
    assert run_training(run, "--resume", "--steps", "4")["step"] == 4


@pytest.mark.trial
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """The same on a disk that is full, where one may be mounted."""
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path / "disk"], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        run = tmp_path / "disk" / "run"
        process = command(ROOT / "train.py", *TINY, "--steps", 40, "--save-interval", 2, "--out", run)
        while process.poll() is None:  # something else fills the disk
            if (run / "checkpoint.pt").exists():
                with contextlib.suppress(OSError), open(tmp_path / "disk" / "other", "ab") as file:
                    file.write(bytes(200_000))
            time.sleep(0.05)
        err = process.communicate()[1]
        assert process.returncode == 2 and "could not be written" in err and "Traceback" not in err, err
        assert "No space left" in err or "unexpected pos" in err, err
        (tmp_path / "disk" / "other").unlink()
        assert 0 < train.load_checkpoint(run / "checkpoint.pt")["step"] < 40
        assert run_training(run, "--resume")["step"] == 40
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


def start_in_child(words: list[str], log: Path) -> None:
    torch.set_num_threads(1)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    train.main(words)


@pytest.mark.trial
@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_killed_at_any_moment_goes_on_as_if_it_had_not_been(tmp_path):
    """At least 200 kills of short runs that save after every step; each finished run has the weights of one that no
    one killed, and after each kill the checkpoint is whole and no older than before."""
    words = ["--steps", "60", "--save-interval", "1", "--sample-interval", "25"]
    whole = run_training(tmp_path / "whole", *words)
    processes, random = mp.get_context("forkserver"), np.random.default_rng(0)
    processes.set_forkserver_preload(["test_tpdiff"])
    kills = writing = finished = 0
    while kills < 200:
        run, step = tmp_path / f"run-{finished}", 0
        while True:
            resume = ["--resume"] if (run / "checkpoint.pt").exists() else []
            options = [*(resume or [*TINY, *words]), "--out", str(run)]
            process = processes.Process(target=start_in_child, args=(options, tmp_path / "log"))
            process.start()
            process.join(random.uniform(0, 1.5))
            process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL), (process.exitcode, (tmp_path / "log").read_text())
            if process.exitcode == 0:
                break
            kills += 1
            writing += bool(list(run.glob("*.tmp")))
            if (run / "checkpoint.pt").exists():
                now = train.load_checkpoint(run / "checkpoint.pt")["step"]
                assert now >= step
                step = now
        assert_same_weights(torch.load(run / "checkpoint.pt", weights_only=True), whole)
        ours, theirs = ((folder / "step-0000060.gif").read_bytes() for folder in (run, tmp_path / "whole"))
        assert ours == theirs
        kept = {path.name: train.load_checkpoint(path)["step"] for path in run.glob("*-*.pt")}
        assert kept["checkpoint-previous.pt"] < 60 and 0 < kept.get("checkpoint-best.pt", 60) <= 60
        finished += 1
    print(f"{kills} kills, {writing} of them during the writing of a checkpoint, {finished} runs finished")
    assert writing >= 20 and finished >= 3


def test_when_one_of_two_processes_is_killed_the_other_ends_and_says_so(tmp_path):
    run = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    words = [ROOT / "train.py", *TINY, "--steps", 10**6, "--save-interval", 2, "--out", run]
    ranks = [
        command(*words, env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"})
        for rank in (0, 1)
    ]
    deadline = time.monotonic() + 120
    while not (run / "checkpoint.pt").exists():
        assert ranks[0].poll() is None and time.monotonic() < deadline, ranks[0].communicate()
        time.sleep(0.1)
    ranks[1].kill()
    _, err = ranks[0].communicate(timeout=60)
    ranks[1].communicate()
    assert ranks[0].returncode == 1 and "Traceback" not in err
    assert "another process of the run has ended" in err and f"--resume --out {run}" in err
    assert train.load_checkpoint(run / "checkpoint.pt")["step"] > 0


# ---- The commands


def fails_with_one_line(capsys, main, *words: str | Path) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    "words, message",
    [
        ("--frames 10", "--frames 10 does not divide by 4"),
        ("--size 30", "--size 30 does not divide by --patch 4"),
        ("--stage-odds 2 1", "--stage-odds needs a number up to 1000 for each of --stages 3"),
        ("--stage-odds 2 1 0", "--stage-odds"),
        ("--time-shift 0", "--time-shift"),
        ("--stage-odds 2 1 5000", "--stage-odds needs a number up to 1000"),
        ("--steps 0", "--steps"),
        ("--stages -1", "--stages"),
        ("--mode edm", "edm"),
        ("--align no", "--align"),
        ("--candidates 4", "--candidates has no meaning with --align assignment"),
        ("--lr -1", "--lr"),
        ("--lr nan", "--lr"),
        ("--width 30", "30"),
        ("--size 8 --patch 4", "size >= 16"),
        ("--data {tmp}/gone", "gone is not a folder"),
        ("--data {tmp}/nothing", "0 files found"),
        ("--resume", "checkpoint.pt does not exist"),
        ("--frames 0", "--frames"),
        ("--frames -4", "--frames"),
        ("--frames 1.5", "--frames"),
        ("--frames 1", "--frames 1 does not divide by 4"),
        ("--size 0", "--size"),
        ("--patch 0", "--patch"),
        ("--depth 0", "--depth"),
        ("--heads 5", "heads, 5"),
        ("--batch 0", "--batch"),
        ("--accumulate 0", "--accumulate"),
        ("--steps 1e3", "--steps"),
        ("--seed -1", "--seed"),
        ("--seed 99999999999999999999", "--seed"),
        ("--stages 40", "does not divide by 549755813888"),
        ("--ema 2", "--ema"),
        ("--clip -1", "--clip"),
        ("--label-dropout 1.5", "--label-dropout"),
        ("--precision fp8", "--precision"),
        ("--optimizer sgd", "--optimizer"),
        ("--labels yes", "--labels"),
        ("--labels folder", "--labels has no meaning without --data"),
        ("--latent-scale 0", "--latent-scale"),
        ("--frame-stride 0", "--frame-stride"),
        ("--align nearest --candidates 0", "--candidates"),
        ("--workers -1", "--workers"),
        ("--wings 2", "--wings"),
        ("--data {tmp}/file", "file is not a folder"),
        ("--data {tmp}/clips --labels folder", "skipped: 1 in no sub-folder"),
        ("--data {tmp}/clips --latent-scale 2", "latent scale is for latents"),
        ("--data {tmp}/clips --frames 32", "skipped: 1 shorter than 32 frames"),
        ("--data {tmp}/stills", "skipped: 1 stills"),
        ("--data {tmp}/empty", "skipped: 5 that cannot be decoded"),
        ("--data {tmp}/bomb", "skipped: 1 that cannot be decoded"),
        ("--init {tmp}/gone.pt", "gone.pt does not exist"),
        ("--init {tmp}/empty/d.pt", "not a whole checkpoint"),
        ("--init {tmp}/hostile.pt", "not a whole checkpoint"),
        ("--mode ddim --init {weights}", "trained with --mode flow, not ddim"),
        ("--data {tmp}/clips --init {weights}", "trained with labels, unlike this"),
        ("--data {tmp}/out", "is --data: the run's own GIFs would be trained on"),
    ],
)
def test_train_refuses_bad_input_in_one_sentence(words, message, tmp_path, capsys):
    places = {"tmp": tmp_path, "weights": ROOT / "weights" / "flow-3.pt"}
    (tmp_path / "file").write_text("not a folder")
    save_hostile(tmp_path / "hostile.pt")
    animation(tmp_path / "clips" / "a.gif", 16)
    animation(tmp_path / "stills" / "a.gif", 1)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty").mkdir()
    for name in ("a.webp", "b.apng", "c.npy", "d.pt", "e.gif"):
        (tmp_path / "empty" / name).write_bytes(b"")
    (tmp_path / "bomb").mkdir()
    (tmp_path / "bomb" / "a.png").write_bytes(decompression_bomb())
    words = [word.format(**places) for word in words.split()]
    assert message in fails_with_one_line(capsys, train.main, *words, "--out", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {"index.json"} and not (
        tmp_path / "run-by-hostile-code"
    ).exists()


@pytest.mark.parametrize("out, message", [("file", "File exists"), ("file/run", "Not a directory")])
def test_train_says_so_when_its_folder_cannot_be_made(out, message, tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    assert message in fails_with_one_line(capsys, train.main, *TINY, "--out", tmp_path / out)
    assert (tmp_path / "file").read_text() == "precious"


def test_too_little_memory_is_one_sentence(tmp_path, capsys, monkeypatch):
    words = [*TINY, "--width", 2**40, "--heads", 4, "--out", tmp_path / "out"]
    assert "not enough memory" in fails_with_one_line(capsys, train.main, *words)

    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sample, "generate", refuse)
    words = ["--out", tmp_path / "clips"]
    assert "--number" in fails_with_one_line(capsys, sample.main, *words)
    assert not list(tmp_path.glob("clips*"))


class Hostile:
    """A pickle that leaves a file when it is read by what runs the code in it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def save_hostile(path: Path) -> None:
    torch.save({"format": sample.FORMAT, "ema": Hostile(path.parent / "run-by-hostile-code")}, path)


def test_code_in_a_file_of_tensors_is_never_run(tmp_path, capsys):
    """Weights, checkpoints and latents. That it would run without weights_only shows that the test can fail."""
    (tmp_path / "run").mkdir()
    (tmp_path / "data").mkdir()
    mark = tmp_path / "run-by-hostile-code"
    save_hostile(tmp_path / "hostile.pt")
    for path in (tmp_path / "run" / "checkpoint.pt", tmp_path / "run" / "weights.pt", tmp_path / "data" / "clip.pt"):
        path.write_bytes((tmp_path / "hostile.pt").read_bytes())
    for main, *words in (
        (sample.main, "--checkpoint", tmp_path / "run"),
        (sample.main, "--checkpoint", tmp_path / "hostile.pt"),
        (evaluate.main, "quality", "--checkpoint", tmp_path / "run", "--out", tmp_path / "results"),
        (train.main, "--resume", "--out", tmp_path / "run"),
        (train.main, "--init", tmp_path / "hostile.pt", "--out", tmp_path / "other"),
        (train.main, "--data", tmp_path / "data", "--out", tmp_path / "other"),
    ):
        fails_with_one_line(capsys, main, *words)
        assert not mark.exists()
    torch.load(tmp_path / "hostile.pt", weights_only=False)
    assert mark.exists()


def test_names_in_data_and_weights_are_never_paths(tmp_path, monkeypatch):
    """A mode or a class called ../x: nothing is written but where it was asked for."""
    good = torch.load(ROOT / "weights" / "flow-3.pt", weights_only=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    torch.save(good | {"classes": ["../x", "/y", *good["classes"][2:]]}, "names.pt")
    torch.save(good | {"mode": "../flow"}, "mode.pt")
    sample.main(["--checkpoint", "names.pt", "--label", "../x", "--number", "1", "--steps", "3"])
    with pytest.raises(SystemExit):
        sample.main(["--checkpoint", "mode.pt", "--number", "1", "--steps", "3"])
    assert sorted(path.name for path in Path("samples").iterdir()) == ["flow-3-000.gif", "flow-3-000.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def decompression_bomb() -> bytes:
    """A PNG of a few hundred bytes whose header says 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def test_a_clip_of_one_pixel_is_a_clip(tmp_path):
    animation(tmp_path / "a.gif", 8, size=(1, 1))
    assert FolderClips(tmp_path, frames=8, size=16)[0][0].shape == (3, 8, 16, 16)


def test_train_from_an_image_model(tmp_path, capsys):
    image, video = tmp_path / "image", tmp_path / "video"
    run_training(image, "--steps", "2", "--frames", "1", "--stages", "1")
    options = ["--init", str(image), "--lr", "0", "--weight-decay", "0"]
    checkpoint = run_training(video, "--steps", "2", *options)
    ema = sample.load_weights(image / "weights.pt").model.state_dict()
    assert all(torch.equal(checkpoint["model"][name], ema[name]) for name in ema if name != "embed_stage.weight")
    (image / "weights.pt").unlink()  # is not needed any more
    run_training(video, "--steps", "4", "--resume")
    capsys.readouterr()
    for words, message in ((options, "does not exist"), (["--init", str(video), "--mode", "ddim"], "--mode flow")):
        assert message in fails_with_one_line(capsys, train.main, *TINY, *words, "--out", tmp_path / "x")
    animation(tmp_path / "clips" / "a.gif", 8)
    words = [*TINY, "--init", str(video), "--data", str(tmp_path / "clips"), "--out", str(tmp_path / "x")]
    assert "was trained with labels, unlike this" in fails_with_one_line(capsys, train.main, *words)
    options = ["--init", str(video), "--depth", "2"]
    assert "depth 2" in fails_with_one_line(capsys, train.main, *TINY, *options, "--out", tmp_path / "x")
    assert not (tmp_path / "x" / "metrics.jsonl").exists()


def test_labels_of_the_model_to_start_from_go_by_name(tmp_path):
    for name in ("cat/a.gif", "dog/a.gif"):
        animation(tmp_path / "old" / name, 8)
    for name in ("ant/a.gif", "dog/a.gif"):
        animation(tmp_path / "new" / name, 8)
    words = ["--steps", "1", "--lr", "0", "--weight-decay", "0", "--labels", "folder", "--data"]
    run_training(tmp_path / "a", *words, str(tmp_path / "old"))
    old = sample.load_weights(tmp_path / "a" / "weights.pt").model.embed_label.weight  # cat, dog, none
    new = run_training(tmp_path / "b", *words, str(tmp_path / "new"), "--init", str(tmp_path / "a"))
    assert torch.equal(new["model"]["embed_label.weight"], old[[2, 1, 2]])  # ant, dog, none


def test_resuming_a_run_older_than_a_flag_takes_it_at_its_default_alone(tmp_path, capsys):
    run_training(tmp_path / "run", "--steps", "1")
    content = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    del content["args"]["stage_odds"], content["args"]["time_shift"]
    torch.save(content, tmp_path / "run" / "checkpoint.pt")
    capsys.readouterr()
    for words in (["--stage-odds", "4", "2", "1"], ["--time-shift", "3"]):
        error = fails_with_one_line(capsys, train.main, "--resume", "--out", tmp_path / "run", *words)
        assert f"--resume cannot change it to {[4, 2, 1] if len(words) == 4 else 3.0}" in error
    assert run_training(tmp_path / "run", "--resume", "--steps", "2")["step"] == 2


def test_train_does_not_overwrite_a_run_nor_resume_it_as_another(tmp_path, capsys, monkeypatch):
    run_training(tmp_path / "run", "--steps", "1")
    capsys.readouterr()
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert "--resume" in fails_with_one_line(capsys, train.main, *TINY, "--out", tmp_path / "run")
    error = fails_with_one_line(capsys, train.main, "--resume", "--out", tmp_path / "run", "--width", "64")
    assert "--width 32" in error and "64" in error
    with monkeypatch.context() as patch:
        patch.setattr(train, "start_processes", lambda: (0, 2, torch.device("cpu")))
        assert "1 processes" in fails_with_one_line(capsys, train.main, "--resume", "--out", tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").write_bytes(before[: len(before) // 2])
    assert "not a whole checkpoint" in fails_with_one_line(capsys, train.main, "--resume", "--out", tmp_path / "run")
    (tmp_path / "run" / "checkpoint-previous.pt").write_bytes(before)
    assert "previous.pt is the one before it" in fails_with_one_line(
        capsys, train.main, "--resume", "--out", tmp_path / "run"
    )
    torch.save({"weights": 1}, tmp_path / "run" / "checkpoint.pt")
    assert "format" in fails_with_one_line(capsys, train.main, "--resume", "--out", tmp_path / "run")


def test_train_on_a_folder_then_sample_writes_a_gif_with_every_frame(clip_folder, tmp_path, capsys):
    run_training(
        tmp_path / "run", "--steps", "2", "--data", str(clip_folder), "--mode", "ddim", "--sample-interval", "2"
    )
    assert (tmp_path / "run" / "step-0000002.gif").exists()
    assert "4 used" in capsys.readouterr().out
    words = ["--checkpoint", tmp_path / "run", "--out", tmp_path / "it", "--number", 3, "--solver", "ab2"]
    sample.main([*map(str, words), "--mode", "ddim", "--steps", "4", "2", "1"])
    out = capsys.readouterr().out
    assert f"{4 / 4 + 2 / 2 + 1:.4g} full-rate network calls" in out and str(tmp_path / "it.gif") in out
    with Image.open(tmp_path / "it.gif") as gif:
        assert gif.n_frames == 8
    sampled = fails_with_one_line(capsys, sample.main, *words, "--mode", "ddim")
    assert "it.gif exists already" in sampled


@both_modes
def test_shipped_weights_sample_in_a_fresh_clone(mode, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sample.find_weights(mode, 3) == ROOT / "weights" / f"{mode}-3.pt"
    assert (ROOT / "weights" / f"{mode}-3.pt").stat().st_size < 8e6
    sample.main(["--mode", mode, "--stages", "3", "--number", "2", "--steps", "3", "--label", "7", "--guidance", "2"])
    assert "[1, 1, 1] (noisiest first) with euler: 3.5 full-rate" in capsys.readouterr().out  # two calls a step
    with Image.open(tmp_path / "samples" / f"{mode}-3-000.gif") as gif:
        assert gif.n_frames == 16
    sample.main(["--mode", mode, "--number", "1", "--steps", "3"])
    assert (tmp_path / "samples" / f"{mode}-3-001.png").exists()


def test_the_newest_matching_run_is_sampled(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for index, (name, mode) in enumerate([("old", "flow"), ("new", "flow"), ("other", "ddim")]):
        run_training(Path("runs") / name, "--steps", "1", "--mode", mode)
        os.utime(Path("runs") / name / "weights.pt", (index, index))
    assert sample.find_weights("flow", 3) == Path("runs/new/weights.pt")
    assert sample.find_weights("ddim", 3) == Path("runs/other/weights.pt")
    Path("runs/new/weights.pt").write_bytes(b"torn")
    assert sample.find_weights("flow", 3) == Path("runs/old/weights.pt")
    assert "passed over: runs/new/weights.pt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        ("--stages 1 --checkpoint {weights}", "trained with --stages 3, not --stages 1"),
        ("--mode ddim --checkpoint {weights}", "trained with --mode flow, not --mode ddim"),
        ("--checkpoint {tmp}/bare.pt", "lacks classes"),
        ("--checkpoint {tmp}/other.pt", "does not fit this version of the model"),
        ("--guidance nan", "--guidance"),
        ("--mode flow --stages 5", "train.py --mode flow --stages 5"),
        ("--steps 2", "3 stages need at least one whole step each"),
        ("--steps 5 5", "[5, 5]"),
        ("--steps 10 0 10", "--steps"),
        ("--label cat", "cat is unknown"),
        ("--solver heun", "heun"),
        ("--checkpoint {tmp}/gone.pt", "gone.pt does not exist"),
        ("--checkpoint {tmp}/hostile.pt", "not a whole checkpoint"),
        ("--number 0", "--number"),
        ("--stages 0", "--stages"),
        ("--seed -1", "--seed"),
        ("--seed 1e5", "--seed"),
        ("--steps -3", "--steps"),
        ("--steps 5 5 5 5", "[5, 5, 5, 5]"),
        ("--label 10", "its labels are 0, 1, 2"),
        ("--checkpoint {tmp}", "weights.pt does not exist"),
        ("--checkpoint {tmp}/empty.pt", "not a whole checkpoint"),
        ("--checkpoint {tmp}/text.pt", "not a whole checkpoint"),
        ("--checkpoint {tmp}/cut.pt", "not a whole checkpoint"),
        ("--checkpoint {tmp}/old.pt", "not a checkpoint of this version"),
        ("--checkpoint {tmp}/stages.pt", "damaged: mode 'flow', {{'stages': 'three'"),
        ("--checkpoint {tmp}/mode.pt", "damaged: mode 'edm'"),
        ("--checkpoint {tmp}/frames.pt", "'frames': -3"),
        ("--checkpoint {tmp}/classes.pt", "labels or stages are not those of its model"),
        ("--checkpoint {tmp}/nan.pt", "weights that are NaN or infinite"),
        ("--out {tmp}/text.pt/a", "File exists"),
        ("--out {tmp}/taken.gif", "taken.png exists already"),
    ],
)
def test_sample_refuses_bad_input_in_one_sentence(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_hostile(tmp_path / "hostile.pt")
    torch.save({"format": sample.FORMAT}, tmp_path / "bare.pt")
    places = {"tmp": tmp_path, "weights": ROOT / "weights" / "flow-3.pt"}
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("not weights")
    (tmp_path / "taken.png").write_text("precious")
    (tmp_path / "cut.pt").write_bytes(places["weights"].read_bytes()[:-1000])
    good = torch.load(places["weights"], weights_only=True)
    wrong = {"old": ("format", 3), "stages": ("stages", "three"), "mode": ("mode", "edm"), "frames": ("frames", -3)}
    wrong |= {
        "other": ("config", {"wings": 2}),
        "classes": ("classes", ["a"]),
        "nan": ("ema", {k: v * math.nan for k, v in good["ema"].items()}),
    }
    for name, (key, value) in wrong.items():
        torch.save(good | {key: value}, tmp_path / f"{name}.pt")
    words = [word.format(**places) for word in words.split()]
    assert message.format() in fails_with_one_line(capsys, sample.main, *words)
    assert not (tmp_path / "samples").exists() and not list(tmp_path.glob("*.gif"))
    assert (tmp_path / "taken.png").read_text() == "precious"


@both_modes
def test_guidance_is_the_line_through_both_predictions(mode):
    model, x, t, y = small_model(classes=3), torch.randn(2, 1, 4, 8, 8), torch.rand(2), torch.tensor([0, 2])
    p = Pyramid(mode)
    a, b = sample.output_coefficients(p, x, t)
    conditional, unconditional = (a * x + b * model(x, t, 1, *label) for label in ([y], []))
    torch.testing.assert_close(sample.make_predict(model, p, y, 1.0, False)(x, t, 1), conditional)
    guided = sample.make_predict(model, p, y, 3.0, False)(x, t, 1)
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-5)


@both_modes
@pytest.mark.parametrize("stages", [1, 3])
def test_the_network_says_the_velocity(mode, stages):
    p, x0, k = Pyramid(mode, stages), clips(3, 1, 8, 4, 4), stages - 1  # where the stage's clip is the clip itself
    noise = clips(3, 1, 8 // 2**k, 4, 4, seed=1)
    x_t, target, t = p.interpolate(*p.endpoints(x0, noise, k), k, torch.tensor([0.0, 0.4, 1.0]).double())
    a, b = sample.output_coefficients(p, x_t, t)
    output, x0 = (target - a * x_t) / b, downsample(x0, 2**k)
    for i in range(3):
        gamma, sigma = gamma_sigma("ddim", t[i].item())
        velocity = target[i] if mode == "flow" else gamma * noise[i] - sigma * x0[i]  # arXiv 2202.00512
        torch.testing.assert_close(output[i], velocity, rtol=1e-9, atol=1e-9)


def test_sampled_clip_is_the_same_in_any_batch(tmp_path):
    weights = sample.load_weights(ROOT / "weights" / "flow-3.pt")
    p, labels = Pyramid("flow", 3), torch.arange(3)
    three = sample.generate(weights, p, labels, 3, steps=3, precision="fp32")
    one = sample.generate(weights, p, labels[:1], 1, steps=3, precision="fp32")
    torch.testing.assert_close(three[:1], one, rtol=1e-4, atol=1e-4)


# ---- The benchmark


@pytest.mark.parametrize("what", ["step", "peers"])
def test_benchmark_times_a_run_at_every_stage(what, tmp_path, capsys):
    tiny = ["--frames", "4", "--size", "16", "--width", "8", "--depth", "1", "--heads", "1", "--batch", "2"]
    bench.main([what, "--repeats", "1", *tiny, "--json", str(tmp_path / "found.json")])
    out, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    assert all(re.search(rf"^\| (ours, stage )?{k} \|", out, re.MULTILINE) for k in range(3))
    assert all(bench.markdown(*table) in out for table in found["tables"])
    assert found["command"].startswith(f"python bench.py {what} --repeats 1 --frames 4") and found["machine"]


def test_benchmark_counts_the_flops_of_the_linear_layers():
    run = bench.Run(train.parse_args(["--out", "nowhere", "--batch", "2", "--frames", "4", "--width", "128"])[0])
    products, flops = bench.matrix_products(run, 0)
    second_attention = 2 * run.tokens(0) * 128 * (3 * 128 + 128)
    linear = 4 * (flops / 3 + second_attention)  # of four blocks, forward
    assert run.tokens(0) == 512 and linear < run.forward_flops(0) < 1.2 * linear


def test_benchmark_compiles_the_network_that_it_samples_with_and_counts_it_as_it_is(monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(Block, "compile", functools.partialmethod(torch.nn.Module.compile, backend=counter))
    torch._dynamo.reset()
    words = ["--out", "nowhere", "--frames", "4", "--width", "8", "--depth", "3", "--heads", "1", "--batch", "2"]
    plain, compiled = (bench.Run(train.parse_args([*words, *flag])[0]) for flag in ([], ["--compile"]))
    plain.sampling_step(0)
    assert counter.frame_count == 0
    compiled.sampling_step(0)
    assert counter.frame_count == 1
    assert compiled.forward_flops(0) == plain.forward_flops(0) > 0 and counter.frame_count == 1


@pytest.mark.parametrize("divisor", [1, 4, 8, 64, 128])
@pytest.mark.parametrize("most", [20, 70, 500])
def test_largest_clip_is_found_to_a_tenth_or_a_multiple(divisor, most, monkeypatch):
    monkeypatch.setattr(bench, "measured_apart", lambda options, k: float(options[-1]))
    found, peak, too_many = map(int, re.findall(r"\d+", bench.largest_clip([], divisor, most + 0.5)))
    assert found == peak <= most < too_many <= max(found + divisor, 1.1 * found)
    assert found % divisor == too_many % divisor == 0


# ---- The README


def readme_code() -> list[str]:
    """The Python of the README, block by block: the example, AnimateDiff's adapter, Wan's."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_example_trains_and_samples_a_model_of_the_user_s_own():
    network = torch.nn.Conv3d(2, 1, 3, padding=1)
    before = network.weight.clone()

    def model(x, t, k):
        return network(torch.cat([x, t.view(-1, 1, 1, 1, 1).expand_as(x)], 1))

    names = {"torch": torch, "Pyramid": Pyramid, "align": align, "downsample": downsample, "model": model}
    names |= {"alphas_cumprod": SCALED_LINEAR, "videos": torch.randn(3, 5, 1, 8, 4, 4)}
    names |= {"optimizer": torch.optim.AdamW(network.parameters(), 1e-3)}
    exec(readme_code()[0], names)
    assert names["clips"].shape == (4, 1, 8, 4, 4) and names["clips"].isfinite().all()
    assert not torch.equal(network.weight, before)


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers", reason="other people's models need: pip install diffusers==0.42.1")


@pytest.fixture
def animate_diff(diffusers):
    """(unet, model as the README wraps it, alphas_cumprod): AnimateDiff's network, tiny, and its schedule."""
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
    exec(readme_code()[1], names)
    return unet, with_text(names), alphas_cumprod


@pytest.fixture
def wan_model(diffusers):
    """(network, model as the README wraps it, its pyramid): Wan's video transformer, tiny."""
    torch.manual_seed(0)
    size = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "ffn_dim": 64}
    wan = diffusers.WanTransformer3DModel(
        **size, in_channels=4, out_channels=4, text_dim=16, rope_max_seq_len=64
    ).eval()
    names = {"wan": wan, "pyramid": Pyramid("flow", 3), "text": torch.randn(1, 2, 16)}
    exec(readme_code()[2], names)
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
        x0_k = downsample(x0, 2**k)
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
        x_stage = downsample(x, 2**stage)
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


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_flow_target_of_a_still_clip_is_the_whole_velocity_times_the_stage_s_length(stages):
    p, still = Pyramid("flow", stages), clips(2, 1, 1, 3, 3).expand(-1, -1, 8, -1, -1)
    for k in range(stages):
        noise = clips(2, 1, 8 // 2**k, 3, 3, seed=1)
        x_start, x_end = p.endpoints(still, noise, k)
        _, target, _ = p.interpolate(x_start, x_end, k, torch.tensor([0.2, 0.7]))
        torch.testing.assert_close(target, (p[k].t_start - p[k].t_end) * (noise - downsample(still, 2**k)))


def test_every_test_that_the_readme_names_exists():
    table = (ROOT / "README.md").read_text().split("## Paper to code")[1].split("Both modes are")[0]
    rows = [row for row in table.splitlines() if row.startswith("|")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.rpartition(" | ")[2])}
    assert len(named) > 12 and all(f"test_{name}" in globals() for name in named), named


# ---- evaluate.py: what a number means


def noisy(x: torch.Tensor, strength: float) -> torch.Tensor:
    return x + strength * torch.randn(x.shape, generator=seeded())


def blurred(x: torch.Tensor, sigma: float) -> torch.Tensor:
    weights = torch.exp(-torch.arange(-6, 7).float().square() / (2 * sigma**2))
    weights, frames = weights / weights.sum(), x.transpose(1, 2).flatten(0, 1)
    frames = nn.functional.pad(frames, (6, 6, 6, 6), mode="replicate")
    for shape in ((1, 1, 1, -1), (1, 1, -1, 1)):
        frames = nn.functional.conv2d(frames, weights.view(shape))
    return frames.unflatten(0, (len(x), -1)).transpose(1, 2)


def with_frames_shuffled(x: torch.Tensor, swaps: int) -> torch.Tensor:
    random, shuffled = np.random.default_rng(0), x.clone()
    for clip in shuffled:
        for _ in range(swaps):
            i, j = random.choice(x.shape[2], 2, replace=False)
            clip[:, [i, j]] = clip[:, [j, i]]
    return shuffled


def with_frames_doubled(x: torch.Tensor, count: int) -> torch.Tensor:
    """Every second one of the first `count` frames is the one before it again."""
    numbers = torch.arange(x.shape[2])
    return x[:, :, numbers.where(numbers >= count, numbers // 2 * 2)]


def with_patches_permuted(x: torch.Tensor, count: int) -> torch.Tensor:
    """`count` pairs of the clip's 16 patches of 8 x 8 change places, the same in all frames: brightness is kept."""
    random, patches = np.random.default_rng(0), x.unflatten(4, (4, 8)).unflatten(3, (4, 8)).clone()
    for clip in patches:
        for _ in range(count):
            a, b, c, d = random.integers(4, size=4)
            clip[:, :, a, :, b], clip[:, :, c, :, d] = clip[:, :, c, :, d].clone(), clip[:, :, a, :, b].clone()
    return patches.flatten(5, 6).flatten(3, 4)


def with_phases_scrambled(x: torch.Tensor, share: float) -> torch.Tensor:
    """The strength of every spatial frequency is kept, its place is not."""
    spectrum = torch.fft.rfft2(x)
    phases = 2 * math.pi * share * torch.rand(len(x), 1, 1, *spectrum.shape[-2:], generator=seeded())
    phases[..., 0, 0] = 0
    return torch.fft.irfft2(spectrum * torch.exp(1j * phases), s=x.shape[-2:])


@pytest.fixture(scope="module")
def judged():
    judge = evaluate.load_judge()
    return judge, judge.features(evaluate.real_clips(0, 1000)), evaluate.real_clips(1000, 500)


@pytest.mark.parametrize(
    "damage, strengths",
    [
        (noisy, (0.2, 0.4, 0.8)),
        (blurred, (1, 2, 4)),
        (with_frames_shuffled, (1, 2, 4)),
        (with_frames_doubled, (4, 8, 16)),
        (with_patches_permuted, (2, 8, 32)),
        (with_phases_scrambled, (0.1, 0.25, 0.5)),
    ],
)
def test_judge_distance_grows_with_damage_of_every_kind(damage, strengths, judged):
    judge, reference, clips = judged
    distances = [evaluate.frechet_distance(judge.features(damage(clips, s)), reference) for s in strengths]
    real = evaluate.frechet_distance(judge.features(clips), reference)
    assert real < 0.3  # near zero: the strongest damage is at 8 to 36, doubled frames at 0.6
    assert all(less < more for less, more in itertools.pairwise([1.2 * real, *distances])), (real, distances)


@pytest.mark.parametrize(
    "damage, strengths",
    [
        (noisy, (0.2, 0.8)),
        (blurred, (1, 2)),
        (with_frames_shuffled, (1, 4)),
        (with_frames_doubled, (4, 8)),
        (with_patches_permuted, (2, 32)),
        (with_phases_scrambled, (0.1, 0.5)),
    ],
)
def test_efficientnet_distance_grows_with_damage_of_every_kind(damage, strengths):
    pytest.importorskip("efficientnet_lite_pytorch")
    clips = evaluate.real_clips(0, 16)[:, :, :8]  # their own reference: from so few clips others are far away
    features = functools.partial(evaluate.picture_features, evaluate.load_efficientnet())
    metrics = evaluate.distances_to(clips, {"distance": features})
    distances = [metrics(damage(clips, strength))["distance"] for strength in strengths]
    assert metrics(clips)["distance"] == pytest.approx(0, abs=1e-3) and 0.01 < distances[0] < distances[1]


class FewChannels(torch.nn.Module):
    """In place of an image network."""

    def extract_features(self, frames: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(frames, 32)


def test_quality_of_a_run_on_real_clips_beside_held_out_ones(tmp_path, capsys, monkeypatch):
    (tmp_path / "clips").mkdir()
    for green in (0, 100, 250):
        animation(tmp_path / "clips" / f"{green}.webp", 12, (16, 16), green=green)
    run_training(tmp_path / "run", "--data", str(tmp_path / "clips"), "--steps", "1")
    monkeypatch.setattr(evaluate, "load_efficientnet", FewChannels)
    words = ["quality", "--data", tmp_path / "clips", "--checkpoint", tmp_path / "run", tmp_path / "run" / "weights.pt"]
    words += ["--steps", "3", "--number", "6", "--json", tmp_path / "found.json"]
    evaluate.main([str(word) for word in words])
    ((header, (made, again, real)),) = json.loads((tmp_path / "found.json").read_text())["tables"]
    assert bench.markdown(header, [made, again, real]) in capsys.readouterr().out
    assert header == ["", "efficientnet_distance", "flicker"] and made[1:] == again[1:]
    assert float(made[1].split()[0]) > 2 * float(real[1].split()[0]) >= 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is, and the usual file of I3D is made by it
def test_i3d_is_given_clips_of_224_pixels_in_three_channels(tmp_path, capsys):
    class Stub(nn.Module):
        def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
            assert not rescale and not resize and return_features
            assert x.shape[1] == 3 and x.shape[3] == 224 and x.shape[4] == 224
            return x.mean((1, 3, 4))

    torch.jit.script(Stub()).save(str(tmp_path / "i3d.pt"))
    network, clips = evaluate.load_i3d(tmp_path / "i3d.pt"), evaluate.real_clips(0, 3)
    features = torch.stack([evaluate.i3d_features(network, clip) for clip in clips])
    torch.testing.assert_close(features, clips.mean((1, 3, 4)), atol=1e-3, rtol=0)
    (tmp_path / "wrong.pt").write_text("no network")
    with pytest.raises(ValueError, match="wrong.pt is not a TorchScript file"):
        evaluate.load_i3d(tmp_path / "wrong.pt")


def test_destroyed_structure_is_farther_from_real_than_any_damage_that_leaves_the_digit(judged):
    judge, reference, clips = judged
    distance = lambda x: evaluate.frechet_distance(judge.features(x), reference)  # noqa: E731
    destroyed = min(distance(with_patches_permuted(clips, 32)), distance(with_phases_scrambled(clips, 0.5)))
    assert destroyed > 2 * max(
        distance(noisy(clips, 0.4)), distance(blurred(clips, 1)), distance(with_frames_doubled(clips, 16))
    )


def test_frechet_distance_of_gaussians_is_the_closed_form():
    a = torch.randn(100_000, 3, generator=seeded(), dtype=torch.float64)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T))).T  # mean 0, covariance 1, exactly
    scale, shift = torch.tensor([1.0, 2, 3]).double(), torch.tensor([1.0, 0, 2]).double()
    assert evaluate.frechet_distance(a, a * scale + shift) == pytest.approx(5 + 0 + 1 + 4)
    assert evaluate.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_digit_scores_are_near_one_on_real_clips_and_know_what_is_wrong(judged):
    judge, _, clips = judged
    scores = {
        name: evaluate.digit_scores(judge, damaged)
        for name, damaged in {
            "real": clips,
            "noise": torch.randn(clips.shape, generator=seeded()).clamp(-1, 1),
            "black": torch.full_like(clips, -1),
            "shuffled": with_frames_shuffled(clips, 4),
            "changing": torch.cat([clips[:, :, :8], clips.roll(1, dims=0)[:, :, 8:]], dim=2),
            "patches": with_patches_permuted(clips, 32),
        }.items()
    }
    off_track = {name: found.pop("off_track") for name, found in scores.items()}
    assert off_track["real"] < 0.5 and off_track["shuffled"] > 2
    assert min(scores["real"].values()) > 0.95
    assert max(scores["noise"].values()) < 0.01 and scores["black"]["kept"] < 0.01 and scores["patches"]["kept"] < 0.1
    assert scores["shuffled"]["kept"] > 0.9 and scores["shuffled"]["straight"] < 0.1
    assert scores["changing"]["legible"] > 0.95 and scores["changing"]["kept"] < 0.2


def test_flicker_is_the_mean_squared_second_difference():
    still_motion = torch.arange(5.0).view(1, 1, 5, 1, 1)
    assert evaluate.flicker(still_motion) == 0 and evaluate.flicker(still_motion % 2) == 4


@both_modes
def test_plain_noise_has_the_variance_of_the_paper_s_and_no_noise_has_none(mode):
    x = torch.zeros(2000, 1, 2, 3, 3, dtype=torch.float64)
    paper, plain, none = (
        kind(mode, 3).renoise(x, 1, seeded()) for kind in (Pyramid, evaluate.PlainNoise, evaluate.WithoutNoise)
    )
    assert paper.var() == pytest.approx(plain.var().item(), rel=0.03) and none.abs().max() == 0
    pairs = plain.unflatten(2, (2, 2))
    assert abs((pairs[:, :, :, 0] * pairs[:, :, :, 1]).mean()) < 0.03 * plain.var()
    torch.testing.assert_close(evaluate.HalfNoise(mode, 3).renoise(x, 1, seeded()), paper / 2)


@pytest.mark.parametrize("true_end", [1, 2])
@pytest.mark.parametrize("name", ["flow-3", "flow-1"])
def test_sampling_goes_on_from_the_true_end_of_a_stage(name, true_end, monkeypatch):
    first, p, inputs, labels = evaluate.REAL_ENDS + 5 * 6, Pyramid("flow", 3), [], []
    x0, k_next = evaluate.real_clips(first, 6), true_end - 1

    def oracle(x, t, k):
        """x_start - x0, of the pyramid's stage 0 and of vanilla, and anything at stage 1."""
        inputs.append((x, t[0].item(), k))
        return 0 * x if k else (x - x0) / sample.per_clip(t, x) * (p[0].t_start if name == "flow-3" else 1)

    def make_predict(model, pyramid, given, *rest):
        labels.extend(given.tolist())
        return oracle

    monkeypatch.setattr(sample, "make_predict", make_predict)
    weights = sample.load_weights(sample.SHIPPED / f"{name}.pt")
    cell = evaluate.Cell(name, (4, 3, 2) if name == "flow-3" else 5, true_end=true_end)
    torch.testing.assert_close(evaluate.finish(weights, cell, 6, 5, 6), x0)
    assert labels == [evaluate.REAL[number][1] for number in range(first, first + 6)]
    x, t, _ = inputs[0]
    assert t == pytest.approx(p[k_next].t_start)
    if name == "flow-3":
        assert [k for *_, k in inputs] == ([1, 1, 1, 0, 0] if true_end == 2 else [0, 0])
        pairs, end = x.unflatten(2, (-1, 2)).mean(3), p[true_end]  # without the renoising noise
        clean = end.gamma_end * downsample(x0, end.stride)
        noise = (pairs / p[k_next].gamma_start * end.gamma_end - clean) / end.sigma_end
    else:
        assert len(inputs) == 5
        noise = (x - p[k_next].gamma_start * x0) / p[k_next].sigma_start
    assert abs(noise.mean()) < 0.02 and noise.std() == pytest.approx(1, rel=0.02)


def test_predicted_speedup():
    without_attention = evaluate.predicted_speedup([10, 10, 10], 16, 1, 10**9, 4, "full")
    assert without_attention == pytest.approx(12 / 7)  # 1.71, the paper's Table 1
    assert evaluate.predicted_speedup([30], 16, 64, 128, 4, "factorized") == 1
    half_fixed = evaluate.predicted_speedup([15, 10, 5], 16, 1, 10**9, 4, "full", fixed=0.5)
    assert half_fixed == pytest.approx(30 / (15 * 0.625 + 10 * 0.75 + 5))
    size = DiTConfig()
    model, x, t = DiT(size).eval(), torch.randn(1, 1, 16, 32, 32), torch.zeros(1)
    with FlopCounterMode(display=False) as counter:
        model(x, t, 0)
    ours = 2 * evaluate.network_cost(16, 64, size.width, size.depth, "factorized")
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_fixed_share_is_what_does_not_shrink_with_the_frames():
    size = (64, 96, 4, "factorized")
    full, quarter = (evaluate.network_cost(frames, *size) for frames in (16, 4))
    assert evaluate.fixed_share(full, quarter, 16, *size) == pytest.approx(0)
    assert evaluate.fixed_share(1.0, 1.0, 16, *size) == pytest.approx(1)
    assert evaluate.fixed_share(1.0, 1.1, 16, *size) == 1 and evaluate.fixed_share(full, 0.5 * quarter, 16, *size) == 0
    a = full / 3  # added to both: a quarter of the longer time
    assert evaluate.fixed_share(full + a, quarter + a, 16, *size) == pytest.approx(0.25)


def test_evaluate_measures_the_shipped_weights(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there are no runs
    evaluate.main("quality --number 3 --reference 20 --seeds 0 5 --steps 3 --batch 2".split())
    header, _, ours, real = capsys.readouterr().out.strip().splitlines()
    assert "judge_distance" in header and "off_track" in header
    assert "flow-3.pt (flow, 3 stages, step 12000)" in ours and real.startswith("| real | ")


def test_a_clip_off_a_straight_bouncing_path_by_a_pixel_is_said_to_be_so():
    path = data_module.bounce(3.0, 1.7, 16, 10.0)
    assert evaluate.off_track(path, 10.0) < 0.3
    path[7] += 2.0
    assert 0.7 < evaluate.off_track(path, 10.0) < 1.5


def test_time_to_a_distance_is_interpolated_and_none_if_never_reached():
    curve = [(1.0, [8.0, 8.0]), (2.0, [4.0, 4.0]), (3.0, [1.0, 1.0])]
    assert evaluate.time_to(8.0, curve) == 1.0 and evaluate.time_to(9.0, curve) == 1.0
    assert evaluate.time_to(2.0, curve) == pytest.approx(2.5)  # halfway from 4 to 1 in the logarithm
    assert evaluate.time_to(0.5, curve) is None


@both_modes
def test_alignment_removes_more_variance_in_a_larger_batch_and_none_without_a_choice(mode, monkeypatch):
    assert evaluate.variance_removed(mode, 1, batch=1, seed=0, clips=64) == 0
    small, large = (evaluate.variance_removed(mode, 1, batch, seed=0, clips=256) for batch in (2, 64))
    assert 0 < small < large < 0.1
    clips, generator_for = evaluate.real_clips(0, 256), sample.generator_for
    with monkeypatch.context() as patch:  # other noise, and then other clips
        patch.setattr(evaluate, "real_clips", lambda *_: clips)
        assert evaluate.variance_removed(mode, 1, batch=64, seed=1, clips=256) != large
    monkeypatch.setattr(sample, "generator_for", lambda _, *rest: generator_for(0, *rest))
    assert evaluate.variance_removed(mode, 1, batch=64, seed=1, clips=256) != large


def test_milliseconds_are_the_median_and_the_quartiles():
    assert bench.in_milliseconds([0.001 * n for n in range(1, 10)]) == "5.0 [3.0, 7.0]"


def test_latency_shows_the_measured_and_the_predicted_milliseconds_of_a_clip(monkeypatch):
    curves, seconds = {}, {"vanilla": [3.0, 4.0, 5.0], "quarter": [2.0, 2.5, 3.0], "pyramid": [2.0, 3.0, 4.0]}
    monkeypatch.setattr(evaluate, "sampling_times", lambda *_: seconds)
    monkeypatch.setattr(evaluate, "draw_curves", lambda found, *_: curves.update(found))
    args = evaluate.make_parser().parse_args(["latency"])
    ((header, rows),) = evaluate.latency(args)
    assert [row[:2] for row in rows] == [[mode, batch] for mode in ("flow", "ddim") for batch in (1, 2, 4, 8)]
    row = dict(zip(header, rows[-1], strict=True))
    assert (row["3 stages, ms"], row["3 stages, clips/s"]) == ("3000.0 [2000.0, 4000.0]", "2.67")
    assert row["times as fast"] == "1.33"
    assert curves["ddim, vanilla"][-1] == (8, [375, 500, 625]) and curves["ddim, 3 stages"][0] == (1, [2e3, 3e3, 4e3])
    fixed = evaluate.fixed_share(4.0, 2.5, 16, 64, 96, 4, "factorized")
    predicted = evaluate.predicted_speedup([10, 10, 10], 16, 64, 96, 4, "factorized", fixed=fixed)
    assert curves["ddim, 3 stages, predicted"][-1] == (8, [pytest.approx(500 / predicted)])


def test_growth_has_a_row_of_vanilla_three_stages_and_as_many_as_fit(monkeypatch):
    curves, asked = {}, []

    def times(settings, _):
        asked.append(settings)
        return {name: [frames * 0.1 / stages] * 3 for name, (_, stages, frames, _) in settings.items()}

    monkeypatch.setattr(evaluate, "sampling_times", times)
    monkeypatch.setattr(evaluate, "draw_curves", lambda found, *_: curves.update(found))
    ((header, rows),) = evaluate.growth(evaluate.make_parser().parse_args(["growth"]))
    found = [dict(zip(header, row, strict=True)) for row in rows]
    most = [(row["frames"], row["stages"]) for row in found if row["stages"] not in (1, 3)]
    assert most == [(16, 4), (32, 5), (64, 6)]
    assert {row["times as fast"] for row in found if row["stages"] == 1} == {"1.00"}
    assert {row["full-rate calls"] for row in found if row["stages"] == 3} == {"17.5"}
    assert found[-1]["ms"] == "1066.7 [1066.7, 1066.7]" and found[-1]["times as fast"] == "6.00"
    assert all(settings["quarter"][2] * 4 == settings[1][2] for settings in asked)
    assert curves["as many as fit"][-1] == (64, [pytest.approx(6400 / 6)] * 3)


@pytest.fixture
def tiny_claims(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    words = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "results"), "--number", "3", "--reference", "20"]
    monkeypatch.setattr(
        evaluate, "RUNS", {run: f"--mode {run[:4]} --stages {run[5]} --steps 20" for run in evaluate.RUNS}
    )
    return lambda claim: evaluate.main([claim, *words, "--smoke", "--seeds", "0", "5", "--batch", "2"])


def test_a_claim_trains_what_it_needs_writes_its_table_and_does_nothing_twice(
    tiny_claims, tmp_path, capsys, monkeypatch
):
    tiny_claims("renoising")
    content = json.loads((tmp_path / "results" / "renoising.json").read_text())
    (header, rows) = content["tables"][0]
    assert (
        content["command"].startswith("python evaluate.py renoising --runs") and content["torch"] == torch.__version__
    )
    assert len(rows) == 21 and all(len(row) == len(header) for row in rows)
    assert (
        len({tuple(row[1:]) for row in rows}) == 9
    )  # each way gives other clips; here the long runs are the short ones
    assert bench.markdown(header, rows) in capsys.readouterr().out
    assert (tmp_path / "results" / "renoising.png").exists()
    cells = json.loads((tmp_path / "results" / "cells.json").read_text())
    monkeypatch.setattr(evaluate.subprocess, "Popen", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(evaluate, "scores_of", lambda *_: pytest.fail("measured again"))
    tiny_claims("renoising")
    assert json.loads((tmp_path / "results" / "cells.json").read_text()) == cells
    with open(tmp_path / "runs" / "ddim-3" / "weights-20.pt", "ab") as file:
        file.write(b" ")  # other weights: their numbers no longer count
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        tiny_claims("renoising")


def claimed_tables() -> list[tuple[Path, list[str], list[list[str]]]]:
    """Every table of results/: its file, header and rows as they are printed."""
    contents = {path: json.loads(path.read_text()) for path in (ROOT / "results").rglob("*.json")}
    tables = [(path, *table) for path, content in contents.items() for table in content.get("tables", [])]
    return [(path, header, [[str(value) for value in row] for row in rows]) for path, header, rows in tables]


def test_every_claim_has_its_table_and_its_figure_in_results():
    for claim in evaluate.CLAIMS:
        assert (ROOT / "results" / f"{claim}.json").exists() and list((ROOT / "results").glob(f"{claim}*.png")), claim


def test_every_table_of_results_is_whole_in_their_readme():
    readme, tables = (ROOT / "results" / "README.md").read_text(), claimed_tables()
    assert len(tables) >= 15
    for path, header, rows in tables:
        assert bench.markdown(header, rows) in readme, path


def test_rows_of_the_readme_are_rows_of_results():
    """A table of the README whose columns are those of a claim, or some of them, has rows of that claim alone."""
    found, lines = 0, (ROOT / "README.md").read_text().splitlines()
    cells = [line[2:-2].split(" | ") if line.startswith("|") else None for line in lines]
    for start in [i for i, line in enumerate(lines) if line.startswith("| ---")]:
        names, rows = cells[start - 1], list(itertools.takewhile(lambda row: row, cells[start + 1 :]))
        claimed = []
        for _, header, whole in claimed_tables():
            if names == header:
                claimed += whole
            elif set(names) <= set(header) and len(names) > 2:
                claimed += [[row[header.index(name)] for name in names] for row in whole]
        found += bool(claimed)
        assert not claimed or all(row in claimed for row in rows), names
    assert found == 12


def test_scores_name_no_commit_where_there_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    assert bench.commit.__wrapped__() == ""


def test_clips_in_batches_are_those_of_one_batch():
    weights = sample.load_weights(sample.SHIPPED / "flow-3.pt")
    labels, p = sample.choose_labels(weights.classes, 3), Pyramid("flow", 3)
    together = sample.generate(weights, p, labels, 3, steps=3)
    last = sample.generate(weights, p, labels[2:], 1, steps=3, first=2)
    torch.testing.assert_close(last, together[2:], rtol=1e-3, atol=1e-4)


def test_evaluate_refuses_what_the_judge_does_not_know(tmp_path, capsys):
    run_training(tmp_path / "run", "--steps", "1")
    capsys.readouterr()
    words = ["quality", "--checkpoint", tmp_path / "run"]
    assert "give real clips with --data" in fails_with_one_line(capsys, evaluate.main, *words)
    shipped = [sample.SHIPPED / "flow-3.pt", sample.SHIPPED / "flow-1.pt"]
    words = ["quality", "--checkpoint", shipped[0]]  # of several runs each is looked at, not only the first
    assert "give real clips with --data" in fails_with_one_line(capsys, evaluate.main, *words, tmp_path / "run")
    words = ["quality", "--checkpoint", *shipped, "--steps", "9", "9", "9"]
    assert "flow-1.pt: " in fails_with_one_line(capsys, evaluate.main, *words)
    words = ["quality", "--data", tmp_path, "--checkpoint", shipped[0], tmp_path / "run"]
    assert "another shape" in fails_with_one_line(capsys, evaluate.main, *words)


def test_a_file_of_results_is_whole_or_the_one_before(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("before")
    monkeypatch.setattr(bench.os, "replace", lambda *_: None)  # stopped just before
    bench.write_json(tmp_path / "a.json", {"tables": []})
    assert (tmp_path / "a.json").read_text() == "before"


@pytest.mark.parametrize("main, what", [(evaluate.main, "quality"), (bench.main, "step")])
def test_tables_are_written_to_a_file_or_refused_at_once(main, what, tmp_path, capsys):
    assert "there is no folder" in fails_with_one_line(capsys, main, what, "--json", tmp_path / "no" / "a.json")
    for path in (tmp_path, "/dev/null", "a" * 300 + "/b"):
        fails_with_one_line(capsys, main, what, "--json", path)
    assert not list(tmp_path.iterdir())
    assert "--json is of quality" in fails_with_one_line(capsys, evaluate.main, "cost", "--json", tmp_path / "a.json")
