"""The sampler beside its equations: steps, callbacks, dtypes, batches, what is refused. It needs tpdiff.py alone."""

import math
import re

import numpy as np
import pytest
import torch

from test_tpdiff import COSINE, DTYPES, assert_exact, both_modes, both_solvers, clips, gamma_sigma, seeded, unshifted
from tpdiff import Pyramid, align, draw_nearest, split_steps


def same(x, t, k):
    return x


def test_steps_are_split_evenly_with_the_remainder_to_the_noisiest():
    assert split_steps(30, 3) == [10, 10, 10] and split_steps(32, 3) == [12, 10, 10]
    assert split_steps([15, 10, 5], 3) == [15, 10, 5]
    assert split_steps(4, 3, [0.01, 0.98, 0.01]) == [1, 2, 1]  # a short stage takes its one step from the longest
    assert split_steps(10, 3, [0.01, 0.01, 0.98]) == [8, 1, 1]
    assert split_steps(30, 3, [1, 1, 2]) == split_steps(30, 3, [0.25, 0.25, 0.5]) == [16, 7, 7]  # what counts is ratios
    for steps, said in ((2, "2"), ([10, 10], "10, 10"), ((5,), "5"), ([10, 0, 10], "10, 0, 10"), ([], "none")):
        with pytest.raises(ValueError, match=f"counts above 0, not {said}$"):
            split_steps(steps, 3)


@pytest.mark.parametrize("shift, share, counts", [(3, 0.6, [19, 7, 4]), (5, 5 / 7, [23, 5, 2]), (8, 0.8, [25, 4, 1])])
def test_steps_are_split_by_the_stages_unshifted_lengths(shift, share, counts):
    p, calls = Pyramid("flow", shift=shift), []
    assert p.lengths == pytest.approx((unshifted(1 / 3, shift), 1 - share - unshifted(1 / 3, shift), share))
    p.sample(lambda x, t, k: calls.append(k) or x, (1, 1, 4, 1, 1), 30)
    assert [calls.count(k) for k in (2, 1, 0)] == split_steps(30, 3, p.lengths) == counts


@pytest.mark.parametrize("shift", [1, 4])
@both_solvers
def test_every_step_is_one_call_and_a_callback_sees_x_after_it_and_after_renoising_with_its_time(solver, shift):
    p, events = Pyramid("flow", 2, shift=shift), []

    def predict(x, t, k):
        events.append((f"predict {k} of {x.shape[2]}", x, t.tolist()))
        return torch.zeros_like(x)

    def callback(x, t, k):
        events.append((f"callback {k} of {x.shape[2]}", x, t.tolist()))

    out = p.sample(predict, (2, 3, 4, 2, 2), [2, 1], solver, callback=callback, dtype=torch.float64)
    v = (1 + unshifted(0.5, shift)) / 2
    middle, start = shift * v / (1 + (shift - 1) * v), p[0].t_start
    names, x, times = zip(*events, strict=True)
    assert names == (
        "predict 1 of 2", "callback 1 of 2", "predict 1 of 2", "callback 1 of 2", "callback 0 of 4", "predict 0 of 4",
        "callback 0 of 4",
    )  # fmt: skip
    assert sum(times, []) == pytest.approx([t for t in (1, middle, middle, 0.5, start, start, 0) for _ in range(2)])
    assert torch.equal(x[1], x[2]) and torch.equal(x[4], x[5]) and torch.equal(x[6], out) and out.shape[:2] == (2, 3)


@pytest.mark.parametrize("shift", [1, 3])
@both_modes
def test_ab2_adds_half_the_change_of_the_slope_since_the_last_step(mode, shift):
    """h h / (2 h_before) times it, along the line: of x over t, or in ddim mode of x / gamma over r = sigma / gamma."""
    p, x1, given = Pyramid(mode, 1, shift=shift), clips(1, 1, 2, 2, 2), clips(3, 1, 1, 2, 2, 2, seed=1)
    calls = iter(given)
    ours = p.integrate(lambda x, t, k: next(calls), x1, 0, 3, "ab2")
    times = [shift * u / (1 + (shift - 1) * u) for u in (1, 2 / 3, 1 / 3, 0)]
    values = [(1, t) if mode == "flow" else gamma_sigma(mode, t) for t in times]
    r, x = [sigma / gamma for gamma, sigma in values], x1 / values[0][0]
    for i in range(3):
        h, slope = r[i + 1] - r[i], given[i]
        if i > 0:
            slope = slope + h / (2 * (r[i] - r[i - 1])) * (given[i] - given[i - 1])
        x = x + h * slope
    assert_exact(ours, x)


@both_solvers
@both_modes
def test_predict_may_write_into_its_inputs_and_into_what_it_returned_before(mode, solver):
    def careless(x, t, k):
        outputs.setdefault(k, torch.empty_like(x)).copy_(x.cos())
        x.zero_()
        t.mul_(1000)
        return outputs[k]

    for dtype in (torch.float32, torch.bfloat16):
        outputs, options = {}, ((2, 1, 8, 2, 2), 9, solver)
        made = (Pyramid(mode).sample(f, *options, seeded(), dtype=dtype) for f in (careless, lambda x, t, k: x.cos()))
        assert torch.equal(*made)


@both_modes
@pytest.mark.parametrize("stages", range(2, 9))
def test_a_stage_can_be_entered_at_its_start_as_float32_rounds_it(mode, stages):
    p, x = Pyramid(mode, stages), clips(2, 1, 4, 2, 2).float()
    for k in range(stages):
        t = p.interpolate(x, x, k, torch.ones(2))[2][0].item()
        torch.testing.assert_close(p.integrate(same, x, k, 2, t=t), p.integrate(same, x, k, 2), rtol=1e-5, atol=1e-5)


def test_a_clip_s_noise_does_not_depend_on_its_batch():
    p, predict = Pyramid("ddim", 3), lambda x, t, k: 0.1 * x
    together = p.sample(predict, (3, 1, 8, 4, 4), 6, generator=[seeded(i) for i in range(3)])
    for i in range(3):
        assert torch.equal(together[i : i + 1], p.sample(predict, (1, 1, 8, 4, 4), 6, generator=[seeded(i)]))


def test_sampling_records_no_gradients_takes_any_whole_number_and_shows_its_steps_if_asked(capfd):
    pytest.importorskip("tqdm")
    weight = torch.ones(1, requires_grad=True)
    for progress, shown in ((False, "^$"), (True, "sampling: 100%.* 5/5 [^\\n]*\\n$")):
        out = Pyramid("flow", 2).sample(lambda x, t, k: weight * x, (1, 1, 2, 2, 2), np.int64(5), progress=progress)
        assert re.search(shown, capfd.readouterr().err, re.DOTALL) and not out.requires_grad
    with pytest.raises(ValueError, match="no tensor|not a tensor"):
        Pyramid("flow").sample(lambda x, t, k: None, (1, 1, 4, 2, 2), 3, progress=True)
    assert capfd.readouterr().err.endswith("\n")  # the bar is closed before the error is told


@both_modes
def test_what_a_callback_returns_replaces_x(mode):
    first, seen = clips(1, 2, 1, 2, 2), []
    hold = {"callback": lambda x, t, k: torch.cat([first + t[0], x[:, :, 1:]], 2), "dtype": torch.float64}
    out = Pyramid(mode).sample(lambda x, t, k: seen.append((x, t)) or x, (1, 2, 5, 2, 2), 6, **hold)
    assert torch.equal(out[:, :, :1], first) and len(seen) == 6
    assert all(torch.equal(x[:, :, :1], first + t) for x, t in seen[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@both_modes
def test_every_function_gives_float32_or_the_float64_of_its_clips(mode, dtype):
    p, x0, noise = Pyramid(mode, 2), clips(2, 1, 4, 2, 2).to(dtype), clips(2, 1, 4, 2, 2, seed=1).to(dtype)
    results = [*p.endpoints(x0, noise, 0), p.renoise(x0, 1), p.down(x0, 1), p.integrate(same, x0, 0, 2)]
    for u in (torch.tensor([0, 1]), torch.rand(2), torch.rand(2, dtype=torch.float64)):  # of any dtype itself
        results += p.interpolate(x0, noise, 0, u)
    assert {result.dtype for result in results} == {torch.promote_types(dtype, torch.float32)}
    assert {result.dtype for result in (align(x0, noise), draw_nearest(x0, 2))} == {dtype}  # these choose, no more


@pytest.mark.parametrize("returned", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode, alphas_cumprod", [("flow", None), ("ddim", COSINE)])
def test_sampling_hands_predict_the_asked_dtype_and_keeps_more_between_the_steps(mode, alphas_cumprod, dtype, returned):
    p, given, seen = Pyramid(mode, 3, alphas_cumprod), ((1, 1, 5, 2, 2), 12, "ab2"), []
    wide = torch.promote_types(dtype, torch.float32)

    def predict(x, t, k):
        assert x.dtype == dtype and t.dtype == wide
        return torch.full_like(x, 0.5 + k, dtype=returned)

    out = p.sample(predict, *given, seeded(), dtype=dtype, callback=lambda x, t, k: seen.append(x))
    precise = p.sample(lambda x, t, k: torch.full_like(x, 0.5 + k), *given, seeded(), dtype=wide)
    assert {x.dtype for x in seen} == {wide} and torch.equal(seen[-1], precise) and torch.equal(out, precise.to(dtype))


@pytest.mark.parametrize("mode, settings, message", [
    ("edm", {}, "edm"), ("flow", {"stages": 0}, "0"), ("flow", {"stages": 2.5}, "2.5"),
    ("flow", {"alphas_cumprod": [0.9, 0.5]}, "alphas_cumprod"), ("flow", {"prediction": "velocity"}, "velocity"),
    ("ddim", {"prediction": "noise"}, "noise"), ("ddim", {"alphas_cumprod": [0.5, 0.9]}, "must fall"),
    ("ddim", {"alphas_cumprod": [0.9, -0.1]}, "must fall"), ("ddim", {"alphas_cumprod": [1.0, 0.5]}, "from < 1"),
    ("ddim", {"alphas_cumprod": [[0.9, 0.5]]}, r"\(1, 2\)"), ("ddim", {"alphas_cumprod": [0.5, 0.49]}, "fewer stages"),
    ("ddim", {"stages": 1, "alphas_cumprod": 1 - torch.linspace(1e-4, 0.02, 1000)}, "0.5"),  # alphas
    ("ddim", {"alphas_cumprod": [0.9, 0.1, 1e-31]}, 'use prediction="velocity"'),
    ("flow", {"factor": (2, 2)}, r"factor.*\(2, 2\)"), ("flow", {"factor": (2, 0, 1)}, "factor.*2, 0, 1"),
    ("flow", {"ends": (0, 0.5)}, "ends must be 3"), ("flow", {"ends": (0.1, 0.5, 0.7)}, "begin with 0"),
    ("flow", {"ends": (0, 0.7, 0.7)}, "rise"), ("flow", {"ends": (0, 0.7, 1)}, "below 1"),
    ("flow", {"shift": 0}, "shift.*0"), ("ddim", {"alphas_cumprod": [0.9, math.nan]}, "must fall"),
])  # fmt: skip
def test_a_pyramid_that_cannot_be_is_refused_with_the_numbers(mode, settings, message):
    with pytest.raises(ValueError, match=message):
        Pyramid(mode, **settings)


TOLD = r"predict returned.*stage 2, step 1 of 10.*\.sample.*return_dict=False"
FLOW, SPACE, CLIPS = Pyramid("flow"), Pyramid("flow", factor=(2, 2, 1)), clips(2, 1, 8, 2, 2)


@pytest.mark.parametrize("call, message", [
    (lambda: align(CLIPS / 0, CLIPS), "invalid numeric|infeasible"),
    (lambda: FLOW.endpoints(CLIPS[:, :, :6], CLIPS[:, :, :6], 1), "3, 2, 2.*6, 2, 2"),
    (lambda: FLOW.interpolate(CLIPS, CLIPS, 0, torch.ones(3)), r"u numbers in .*, one per clip: \[1.0, 1"),
    (lambda: FLOW.interpolate(CLIPS, CLIPS[:, :, :1], 0, torch.ones(2)), "x_start and x_end need one shape"),
    (lambda: FLOW.interpolate(CLIPS, CLIPS, 0, torch.tensor([0.5, 1.5])), r"in \[0, 1\].*: \[0.5, 1.5\]"),
    (lambda: FLOW.interpolate(CLIPS, CLIPS, 0, torch.tensor([0.5, math.nan])), "per clip: .*nan"),
    (lambda: FLOW.integrate(same, CLIPS, 1, 0), "stage 1 needs at least one step"),
    (lambda: FLOW.integrate(same, CLIPS, 1, 1, t=FLOW[1].t_end), "stage 1 needs at least one step"),
    (lambda: FLOW.integrate(same, CLIPS, 1, 1, t=FLOW[1].t_start + 1e-5), "stage 1 needs .* t <= 0.7"),
    (lambda: SPACE.shape((1, 1, 0, 4, 4), 0), r"T > 0, .*\(1, 1, 0, 4, 4"),
    (lambda: FLOW.down(CLIPS[0], 1), r"need \(B, C, T, H, W\) .* not \(1, 8, 2, 2\)"),
    (lambda: FLOW.gamma_sigma(500.0), r"times must be in \[0, 1\], not \[500.0\]"),
    (lambda: FLOW.gamma_sigma(math.nan), "not .*nan"),
    (lambda: SPACE.sample(same, (1, 1, 3, 6, 4)), r"3 stages.*\(2, 2, 1\).*divisible by \[4, 1\].*1, 1, 3, 6, 4"),
    (lambda: FLOW.sample(same, CLIPS.shape, solver="heun"), "heun"),
    (lambda: FLOW.sample(same, CLIPS.shape, callback=lambda x, t, k: x[:, :, :1]), "^callback returned.*stage 2"),
    (lambda: FLOW.sample(same, CLIPS.shape, generator=[seeded()]), "1 generators.*2"),
    (lambda: FLOW.sample(lambda x, t, k: x / (k != 1 or t[0] > 0.5), CLIPS.shape), "NaN .* stage 1, step 7 of 10"),
    (lambda: FLOW.sample(lambda x, t, k: (x,), CLIPS.shape), TOLD),
    (lambda: FLOW.sample(lambda x, t, k: x[:, :, :1], CLIPS.shape), TOLD),
])  # fmt: skip
def test_bad_input_raises_value_error_that_names_the_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_stage_counted_from_the_end_is_told_by_its_own_number():
    told = []
    FLOW.integrate(lambda x, t, k: told.append(k) or x, CLIPS[:, :, :2], -1, 2, callback=lambda x, t, k: told.append(k))
    assert told == [2] * 4
