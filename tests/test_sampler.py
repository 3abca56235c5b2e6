"""The sampler beside its equations: steps, callbacks, dtypes, batches, what is refused. It needs tpdiff.py alone."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from test_tpdiff import (
    COSINE,
    DTYPES,
    assert_exact,
    both_modes,
    clips,
    gamma_sigma,
    seeded,
    unshifted,
)
from tpdiff import Pyramid, align, draw_nearest, split_steps


def test_steps_are_split_evenly_with_the_remainder_to_the_noisiest():
    assert split_steps(30, 3) == [10, 10, 10]
    assert split_steps(32, 3) == [12, 10, 10]
    assert split_steps([15, 10, 5], 3) == [15, 10, 5]
    assert split_steps(4, 3, [0.01, 0.98, 0.01]) == [1, 2, 1]  # a short stage takes its one step from the longest
    assert split_steps(10, 3, [0.01, 0.01, 0.98]) == [8, 1, 1]
    assert split_steps(3, 3, [0.01, 0.01, 0.98]) == [1, 1, 1]
    for steps in (2, [10, 10], [10, 0, 10], [1, 1, 1, 1]):
        with pytest.raises(ValueError, match=re.escape(str(steps))):
            split_steps(steps, 3)


@pytest.mark.parametrize("shift, share, counts", [(3, 0.6, [19, 7, 4]), (5, 5 / 7, [23, 5, 2]), (8, 0.8, [25, 4, 1])])
def test_steps_are_split_by_the_stages_unshifted_lengths(shift, share, counts):
    p, calls = Pyramid("flow", shift=shift), []
    assert p.lengths == pytest.approx((unshifted(1 / 3, shift), 1 - share - unshifted(1 / 3, shift), share))
    p.sample(lambda x, t, k: calls.append(k) or x, (1, 1, 4, 1, 1), 30)
    assert [calls.count(k) for k in (2, 1, 0)] == split_steps(30, 3, p.lengths) == counts


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


@pytest.mark.parametrize("shift", [1, 3])
def test_ab2_in_ddim_adds_gamma_h_h_over_2_h_before_times_the_change_of_eps(shift):
    p, x1, given = Pyramid("ddim", 1, COSINE, shift=shift), clips(1, 1, 2, 2, 2), clips(3, 1, 1, 2, 2, 2, seed=1)
    calls = iter(given)
    ours = p.integrate(lambda x, t, k: next(calls), x1, 0, 3, "ab2")
    u = [1, 2 / 3, 1 / 3, 0]
    values = [gamma_sigma("ddim", shift * i / (1 + (shift - 1) * i), COSINE) for i in u]
    r, x = [sigma / gamma for gamma, sigma in values], x1 / values[0][0]
    for i in range(3):  # x / gamma is a line in r
        h, slope = r[i + 1] - r[i], given[i]
        if i > 0:
            slope = slope + h / (2 * (r[i] - r[i - 1])) * (given[i] - given[i - 1])
        x = x + h * slope
    assert_exact(ours, x)


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


def test_progress_bar_of_each_stage_counts_its_steps(capfd):
    pytest.importorskip("tqdm")
    Pyramid("flow", 2).sample(lambda x, t, k: x, (1, 1, 2, 2, 2), 5, progress=True)
    shown = capfd.readouterr().err
    assert re.search("stage 1: 100%.*3/3", shown) and re.search("stage 0: 100%.*2/2", shown)
    Pyramid("flow", 2).sample(lambda x, t, k: x, (1, 1, 2, 2, 2), 4)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("shift", [1, 4])
def test_callback_sees_x_after_every_step_and_every_renoising_with_its_time(shift):
    p, events = Pyramid("flow", 2, shift=shift), []

    def predict(x, t, k):
        events.append(("predict", k, *t.tolist(), x))
        return torch.zeros_like(x)

    def callback(x, t, k):
        events.append(("callback", k, *t.tolist(), x))

    out = p.sample(predict, (2, 1, 3, 2, 2), [2, 1], callback=callback, dtype=torch.float64)
    u = (1 + unshifted(0.5, shift)) / 2
    middle, start = shift * u / (1 + (shift - 1) * u), p[0].t_start
    times = [1, middle, middle, 0.5, start, start, 0]
    assert [f"{name} {k}" for name, k, *_ in events] == [
        "predict 1", "callback 1", "predict 1", "callback 1", "callback 0", "predict 0", "callback 0",
    ]  # fmt: skip
    assert [t for event in events for t in event[2:4]] == pytest.approx([t for t in times for _ in range(2)])
    x = [event[4] for event in events]
    assert torch.equal(x[1], x[2]) and torch.equal(x[4], x[5]) and torch.equal(x[6], out)


@both_modes
def test_what_a_callback_returns_replaces_x(mode):
    p, first = Pyramid(mode), clips(1, 2, 1, 2, 2)

    def predict(x, t, k):
        assert t[0] == 1 or torch.equal(x[:, :, :1], first + t.view(-1, 1, 1, 1, 1))
        return x

    def hold(x, t, k):
        return torch.cat([first + t.view(-1, 1, 1, 1, 1), x[:, :, 1:]], 2)

    out = p.sample(predict, (1, 2, 5, 2, 2), 6, callback=hold, dtype=torch.float64)
    assert torch.equal(out[:, :, :1], first)
    with pytest.raises(ValueError, match="callback"):
        p.sample(predict, (1, 2, 5, 2, 2), 6, callback=lambda x, t, k: x[:, :, :1])


@pytest.mark.parametrize("dtype", DTYPES)
@both_modes
def test_every_function_gives_float32_or_the_float64_of_its_clips(mode, dtype):
    p, x0, noise = Pyramid(mode, 2), clips(2, 1, 4, 2, 2).to(dtype), clips(2, 1, 4, 2, 2, seed=1).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for u in (torch.tensor([0, 1]), torch.rand(2), torch.rand(2, dtype=torch.float64)):  # of any dtype itself
        results = [*p.endpoints(x0, noise, 0), *p.interpolate(x0, noise, 0, u), p.renoise(x0, 1), p.down(x0, 1)]
        results += [p.integrate(lambda x, t, k: x, x0, 0, 2)]
        assert {result.dtype for result in results} == {wide}
    assert {result.dtype for result in (align(x0, noise), draw_nearest(x0, 2))} == {dtype}  # these choose, no more


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode, alphas_cumprod", [("flow", None), ("ddim", None), ("ddim", COSINE)])
def test_sampling_hands_predict_the_asked_dtype_and_keeps_more_between_the_steps(mode, alphas_cumprod, dtype):
    p = Pyramid(mode, 3, alphas_cumprod)
    predictions = [clips(1, 1, n, 2, 2, seed=i).bfloat16() for i, n in enumerate([2] * 4 + [3] * 4 + [5] * 4)]

    def last_x(dtype, returned):
        given, seen, wide = iter(predictions), [], torch.promote_types(dtype, torch.float32)

        def predict(x, t, k):
            assert x.dtype == dtype and t.dtype == wide
            return next(given).to(returned)

        shape, options = (1, 1, 5, 2, 2), {"dtype": dtype, "callback": lambda x, t, k: seen.append(x)}
        assert p.sample(predict, shape, 12, "ab2", seeded(), **options).dtype == dtype
        assert {x.dtype for x in seen} == {wide}
        return seen[-1]

    like = last_x(dtype if dtype == torch.float64 else torch.float32, torch.float32)
    assert all(torch.equal(last_x(dtype, returned), like) for returned in DTYPES[1:])


@pytest.mark.parametrize(
    "wrong", [lambda x: (x,), lambda x: SimpleNamespace(sample=x), lambda x: None, lambda x: x[:, :, :1]]
)
def test_a_prediction_that_is_no_tensor_of_x_s_shape_is_told_what_to_return(wrong):
    with pytest.raises(ValueError, match=r"predict returned.*stage 2, step 1 of 10.*\.sample.*return_dict=False"):
        Pyramid("flow").sample(lambda x, t, k: wrong(x), (1, 1, 8, 2, 2))


def test_clips_and_noise_on_different_devices_are_refused():
    for function in (align, lambda x0, noise: Pyramid("flow").endpoints(x0, noise, 0)):
        with pytest.raises((ValueError, RuntimeError), match="device|meta"):
            function(torch.zeros(2, 1, 4, 2, 2), torch.zeros(2, 1, 4, 2, 2, device="meta"))


def nan_at(stage: int, t_below: float):
    """A predictor that fails from some time on."""
    return lambda x, t, k: x / 0 if k == stage and t[0] < t_below else x


@pytest.mark.parametrize(
    "mode, settings, message",
    [
        ("edm", {}, "edm"), ("flow", {"stages": 0}, "0"), ("flow", {"stages": 2.5}, "2.5"),
        ("flow", {"alphas_cumprod": [0.9, 0.5]}, "alphas_cumprod"), ("flow", {"prediction": "velocity"}, "velocity"),
        ("ddim", {"prediction": "noise"}, "noise"), ("ddim", {"alphas_cumprod": [0.5, 0.9]}, "decrease"),
        ("ddim", {"alphas_cumprod": [0.9, 0.0]}, "velocity"), ("ddim", {"alphas_cumprod": [0.9, -0.1]}, "inside"),
        ("ddim", {"alphas_cumprod": [1.0, 0.5]}, "inside"), ("ddim", {"alphas_cumprod": [0.9, math.nan]}, "inside"),
        ("ddim", {"alphas_cumprod": [[0.9, 0.5]]}, r"\(1, 2\)"), ("flow", {"factor": (2, 2)}, r"factor.*\(2, 2\)"),
        ("ddim", {"alphas_cumprod": [0.5, 0.49]}, "fewer stages"), ("flow", {"factor": (2, 0, 1)}, "factor.*2, 0, 1"),
        ("flow", {"ends": (0, 0.5)}, "ends must be 3"), ("flow", {"ends": (0.1, 0.5, 0.7)}, "begin with 0"),
        ("flow", {"ends": (0, 0.7, 0.7)}, "rise"), ("flow", {"ends": (0, 0.7, 1)}, "below 1"),
        ("flow", {"shift": 0}, "shift.*0"), ("flow", {"shift": math.nan}, "shift.*nan"),
    ],
)  # fmt: skip
def test_a_pyramid_that_cannot_be_is_refused_with_the_numbers(mode, settings, message):
    with pytest.raises(ValueError, match=message):
        Pyramid(mode, **settings)


FLOW, SPACE, CLIPS = Pyramid("flow"), Pyramid("flow", factor=(2, 2, 1)), clips(2, 1, 8, 2, 2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: align(CLIPS / 0, CLIPS), "invalid numeric|infeasible"),
        (lambda: FLOW.endpoints(CLIPS[:, :, :6], CLIPS[:, :, :6], 1), "3, 2, 2.*6, 2, 2"),
        (lambda: FLOW.interpolate(CLIPS, CLIPS, 0, torch.rand(3)), "u.*2.*3"),
        (lambda: FLOW.integrate(lambda x, t, k: x, CLIPS, 1, 0), "stage 1 needs at least one step"),
        (lambda: FLOW.integrate(lambda x, t, k: x, CLIPS, 1, 1, t=FLOW[1].t_end), "stage 1 needs at least one step"),
        (lambda: FLOW.integrate(lambda x, t, k: x, CLIPS, 1, 1, t=FLOW[1].t_start + 0.01), "stage 1 needs .* t <= 0.7"),
        (lambda: SPACE.shape((1, 1, 3, 6, 4), 0), r"divisible by \[4, 1\].*1, 1, 3, 6, 4"),
        (lambda: SPACE.shape((1, 1, 0, 4, 4), 0), "frame.*1, 1, 0, 4, 4"),
        (lambda: SPACE.down(CLIPS, 0), r"divisible by \[4, 1\]"),
        (lambda: SPACE.sample(lambda x, t, k: x, (1, 1, 3, 6, 4)), r"3 stages.*\(2, 2, 1\).*divisible by \[4, 1\]"),
        (lambda: FLOW.sample(lambda x, t, k: x, (1, 1, 8, 2, 2), steps=2), "3 stages.*2"),
        (lambda: FLOW.sample(lambda x, t, k: x, (1, 1, 8, 2, 2), solver="heun"), "heun"),
        (lambda: FLOW.sample(nan_at(1, 0.5), (1, 1, 8, 2, 2)), "NaN or infinity at stage 1, step 7 of 10"),
    ],
)
def test_bad_input_raises_value_error_that_names_the_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()
