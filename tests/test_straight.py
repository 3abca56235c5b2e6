"""Where digits leave their path: clips from a true start, and the best answer that any network can give."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample
from checkpoint import SHIPPED, load_weights
from experiments import straight
from experiments.metrics import REAL, real_clips
from tpdiff import Pyramid


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    """Nothing is kept from one test to the next."""
    for kept in (straight.random_paths, straight.random_places):
        monkeypatch.setattr(straight, kept.__name__, kept.__wrapped__)


def noisy(clip: torch.Tensor, t: float) -> torch.Tensor:
    return (1 - t) * clip + t * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))


def test_clips_from_a_true_start_begin_where_real_clips_do_and_go_on_through_the_later_stages(monkeypatch):
    pyramid, calls = Pyramid("flow", 3), []

    def predict(x, t, k):
        calls.append((k, x))
        return torch.zeros_like(x)

    monkeypatch.setattr(sample, "make_predict", lambda *_: predict)
    args = SimpleNamespace(batch=3, reference=100, smoke=False, runs=None)
    clips = straight.from_true_start("shipped-flow-3", 1, 2, args, 1, 5)
    assert [k for k, _ in calls] == [1, 1, 0, 0] * 2 and clips.shape == (5, 1, 16, 32, 32)
    frames = real_clips(105, 3)[:, :, ::4].repeat_interleave(2, dim=2)  # as blurred as stage 2 leaves them
    noise = (calls[0][1] - pyramid[1].gamma_start * frames) / pyramid[1].sigma_start
    assert noise.std().item() == pytest.approx(1, abs=0.02) and (noise * frames).mean().abs() < 0.02
    pairs = calls[2][1].unflatten(2, (8, 2))  # renoised: a pair's mean is the frame before, scaled
    torch.testing.assert_close(pairs.mean(3), pyramid[0].gamma_start / pyramid[1].gamma_end * calls[1][1])
    assert pairs.diff(dim=3).std() > 0.1

    drawn, both = [], {run: load_weights(SHIPPED / "flow-3.pt") for run in ("flow-3-first", "shipped-flow-3")}
    monkeypatch.setattr(straight, "weights_of", lambda run, _: both[run])
    monkeypatch.setattr(sample, "make_predict", lambda network, *_: lambda x, t, k: drawn.append((k, network)) or x)
    straight.from_true_start("flow-3-first", 2, 1, args, 0, 1)
    networks = [both[run].model for run in ("flow-3-first", "shipped-flow-3", "shipped-flow-3")]
    assert drawn == list(zip((2, 1, 0), networks, strict=True))
    monkeypatch.setattr(straight, "exact_velocity", lambda _p, _labels, x, t, k: drawn.append(k) or x)
    straight.from_true_start("exact", 2, 1, args, 0, 1)
    assert drawn[3] == 2 and drawn[4:] == list(zip((1, 0), networks[1:], strict=True))


def test_the_exact_answer_is_the_mean_of_clips_by_their_probability(monkeypatch):
    monkeypatch.setattr(straight, "PATHS", 500)
    monkeypatch.setattr(straight, "FEW", 0)  # no new paths
    clip, (label, *_), t = real_clips(0, 1)[0, :, ::4], REAL.tracks(0)[0], 0.9
    x = noisy(clip, t)
    shown = straight.pictures(label)[straight.random_places(label, 4)].transpose(0, 1).double()  # (PATHS, T, H W)
    weights = (-(x.flatten(2) - (1 - t) * shown).square().sum((1, 2)) / (2 * t**2)).softmax(0)
    expected = (weights[:, None, None] * shown).sum(0).view(x.shape)
    assert 2 < 1 / weights.square().sum() < 100
    torch.testing.assert_close(straight.exact_clip(x, t, label, 4).double(), expected, rtol=1e-3, atol=1e-3)


def test_the_exact_answer_knows_the_clip_where_there_is_little_noise(monkeypatch):
    monkeypatch.setattr(straight, "PATHS", 20_000)
    clips, off, pyramid = real_clips(0, 4), {}, Pyramid("flow", 3)
    labels = torch.tensor([REAL.tracks(number)[0][0] for number in range(4)])
    for t, few in ((1.0, 100), (0.85, 100), (0.68, 100), (0.68, 0)):
        monkeypatch.setattr(straight, "FEW", few)  # 0: no new paths
        x = noisy(pyramid.down(clips, 2), t)
        velocity = straight.exact_velocity(pyramid, labels, x, torch.full((4,), t), 2)
        error = x - 3 * t * velocity - pyramid.down(clips, 2)  # v is (noise - x0) / 3
        off[t, few] = error.square().mean().sqrt()
    assert off[0.68, 100] < 0.2 < off[0.85, 100] < 0.5 < off[1.0, 100] < 0.9
    assert off[0.68, 100] < 0.7 * off[0.68, 0]


def test_random_paths_are_drawn_as_those_of_the_data(monkeypatch):
    monkeypatch.setattr(straight, "PATHS", 100_000)
    tracks = (REAL.tracks(number)[0] for number in range(20_000))
    own = np.array([places for label, *places in tracks if label == 3])[:, :, [0, 4, 12]]  # (N, down and across, T)
    shown, columns = straight.random_places(3, 4)[[0, 1, 3]].numpy(), int(straight.rooms(3)[1] / straight.APART) + 1
    drawn = np.stack([shown // columns, shown % columns]).transpose(2, 0, 1) * straight.APART

    def assert_alike(one: np.ndarray, other: np.ndarray, tolerance: float) -> None:
        one, other = (np.quantile(each, np.linspace(0.05, 0.95, 10), axis=0) for each in (one, other))
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)

    assert_alike(own[:, :, 0], drawn[:, :, 0], 0.6)
    for first, then in ((0, 1), (1, 2), (0, 2)):
        assert_alike(*(abs(each[:, :, then] - each[:, :, first]) for each in (own, drawn)), 0.4)


def test_new_paths_are_even_in_cells_that_do_not_overlap_and_weigh_as_much_as_the_data_has_of_them():
    best = torch.tensor([[1.0, 2.0, 0.7, 1.0], [1.1, 2.1, 0.7, 1.1], [7.0, 2.0, -0.7, -1.0]], dtype=torch.float64)
    size = torch.tensor(straight.CELL, dtype=torch.float64)
    cells, counts = (straight.paths_near(best) / size).floor().unique(dim=0, return_counts=True)
    assert torch.equal(cells, (best[1:] / size).floor().flip(0).unique(dim=0)) and counts.unique().numel() == 1
    paths = straight.random_paths(3)
    share = (-straight.log_density(paths, 3)).exp()  # of random paths: they cover velocities evenly with it
    speed = paths[:, 2:].norm(dim=1)
    slow, fast = (share[(low <= speed) & (speed <= low + 0.3)].sum() for low in (0.9, 1.6))
    assert slow / fast == pytest.approx((1.2**2 - 0.9**2) / (1.9**2 - 1.6**2), rel=0.02)
    outside = torch.tensor([[-0.1, 2, 1, 1], [1, 40, 1, 1], [1, 2, 0.1, 0.1], [1, 2, 3, 3]], dtype=torch.float64)
    assert share.isfinite().all() and straight.log_density(outside, 3).isneginf().all()


def test_no_network_has_a_lower_loss_than_the_exact_answer(monkeypatch):
    monkeypatch.setattr(straight, "PATHS", 20_000)
    monkeypatch.setattr(straight, "TIMES", (0.9, 0.8))
    args = SimpleNamespace(batch=2, number=4, reference=100, smoke=False, runs=None)
    exact, network = (straight.losses(run, args) for run in (straight.EXACT, "shipped-flow-3"))
    assert exact[1] < exact[0] < network[0] < 0.1 and exact[1] < 0.8 * network[1]
    together = straight.losses("shipped-flow-3", SimpleNamespace(**vars(args) | {"batch": 4}))
    assert together == pytest.approx(network, rel=1e-4)  # a clip's noise does not depend on the batch
