"""TPDiff, Section 3: stage-wise diffusion over a temporal pyramid (arXiv 2503.09566).

Copy this one file into your project: it knows tensors and nothing else. Equation numbers are the paper's.

Conventions
  t       noise time in [0, 1]: 1 is noise, 0 is data. Sampling runs t downward.
  stage k runs at frame stride 2^k: k = K - 1 is the first and noisiest, k = 0 the last, at the full frame rate.
  videos  (B, C, T, H, W), or anything else with time in dimension 2.

Both forms of diffusion are x_t = gamma_t x0 + sigma_t noise (Eq. 6):
  flow    gamma = 1 - t,         sigma = t              (Eq. 4)
  ddim    gamma = sqrt(abar_t),  sigma = sqrt(1 - abar_t)  (Eq. 1)

and in both, a stage is one straight line between its noisy start and its cleaner end, in coordinates of its own:
  flow    x         is linear in  t' = (t - t_end) / (t_start - t_end),  with slope v_k    (Eq. 12-13)
  ddim    x / gamma is linear in  r = sigma / gamma,                     with slope eps_k  (Eq. 10-11)
`Pyramid._coordinates` is the only place that tells them apart; training and sampling are written once.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Integral

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__version__ = "0.2.0"

Generators = torch.Generator | Sequence[torch.Generator] | None


def downsample(x: Tensor, stride: int) -> Tensor:
    """Down(x, stride) of Eq. 7-8: every stride-th frame. (B, C, T, H, W) -> (B, C, T / stride, H, W).

    Raises ValueError if T does not divide by the stride.
    """
    if stride < 1 or x.shape[2] % stride:
        raise ValueError(f"{x.shape[2]} frames do not divide by the stride {stride}")
    return x[:, :, ::stride]


def upsample(x: Tensor) -> Tensor:
    """Up(x, 2) of Eq. 7 and 14: nearest, every frame twice. (B, C, T, H, W) -> (B, C, 2 T, H, W)."""
    return x.repeat_interleave(2, dim=2)


def align(x: Tensor, noise: Tensor) -> Tensor:
    """Data-noise alignment, Algorithm 1: `noise` permuted along the batch to lie nearest to the clips `x`.

    The permutation minimizes the sum of the distances ||x_i - noise_i|| and is found on the CPU. `x` is
    Down(x0, 2^k), of the noise's shape (B, ...). Raises ValueError if the shapes differ or a distance is NaN.
    """
    if x.shape != noise.shape:
        raise ValueError(f"clips of shape {tuple(x.shape)} cannot be aligned with noise of {tuple(noise.shape)}")
    # One matrix product, in float32 also under autocast.
    cost = torch.cdist(x.flatten(1).float(), noise.flatten(1).float(), compute_mode="use_mm_for_euclid_dist")
    _, columns = linear_sum_assignment(cost.detach().cpu().numpy())
    return noise[torch.as_tensor(columns, device=noise.device)]


def randn(shape: Sequence[int], generator: Generators = None, device=None, dtype=None) -> Tensor:
    """Gaussian noise (B, ...) on `device`: from one generator, or clip i's from the i-th of B generators,
    so that a clip's noise does not depend on the batch it is in. Raises ValueError if there are not B of them."""
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}: give one, or one per clip")
        return torch.stack([randn(shape[1:], g, g.device, dtype) for g in generator]).to(device)
    source = generator.device if generator is not None else device
    return torch.randn(*shape, generator=generator, device=source, dtype=dtype).to(device)


def draw_nearest(x: Tensor, candidates: int, generator: Generators = None) -> Tensor:
    """For each clip of `x` the nearest of as many noises (B, ...), drawn for it alone. Past the paper: "KNN noise
    selection" of Improved Immiscible Diffusion (arXiv 2505.18521), alignment at any batch size.

    The result is not exactly Gaussian. With D elements a clip, m the mean of x^2, and c the expected maximum of as many
    normal numbers, the mean of noise^2 is 1 - 2 c / s and the mean of x noise 2 c m / s, where s = sqrt(D (2 + 4 m)).
    Draws in turn, so memory does not grow. Raises ValueError if there is no candidate.
    """
    if candidates < 1:
        raise ValueError(f"the nearest of {candidates} noises cannot be drawn: at least 1")
    draw = functools.partial(randn, x.shape, generator, x.device, x.dtype)
    noise = draw()
    for _ in range(candidates - 1):
        other = draw()
        nearer = (x - other).flatten(1).float().norm(dim=1) < (x - noise).flatten(1).float().norm(dim=1)
        noise = torch.where(nearer.view(-1, *[1] * (x.ndim - 1)), other, noise)
    return noise


@dataclass(frozen=True)
class Stage:
    """One stage: its index k, its frame stride 2^k, and (gamma, sigma) at its start and end (Eq. 6)."""

    index: int
    stride: int
    t_start: float
    t_end: float
    gamma_start: float
    sigma_start: float
    gamma_end: float
    sigma_end: float


class Pyramid:
    """The temporal pyramid of Section 3.2: K stages, trained and sampled by one model. K = 1 is vanilla diffusion.

    mode            "flow" or "ddim".
    stages          K. Frames must divide by 2^(K - 1).
    alphas_cumprod  ddim only: any model's schedule, decreasing, in (0, 1). Its N values sit at t = 1/N, 2/N, ..., 1;
                    between them log(alphas_cumprod) is linear, and t = 0 is clean data.
                    Default: DDPM's, betas linear from 1e-4 to 0.02 over N = 1000 steps.

    `len(pyramid)` is K and `pyramid[k]` the `Stage` k. The paper partitions "uniformly": as in Pyramid Flow, the end
    points are uniform, t_end = k / K, and the starts follow by Eq. 16, so neighbouring windows overlap in t.
    Raises ValueError for another mode, K < 1, a bad schedule, or one without noise enough for a stage's start.
    """

    def __init__(self, mode: str, stages: int = 3, alphas_cumprod: Sequence[float] | Tensor | None = None):
        if mode not in ("flow", "ddim"):
            raise ValueError(f'mode must be "flow" or "ddim", not {mode!r}')
        if stages < 1:
            raise ValueError(f"stages must be at least 1, not {stages}")
        if mode == "flow" and alphas_cumprod is not None:
            raise ValueError("alphas_cumprod belongs to mode ddim; mode flow has no schedule")
        self.mode = mode
        if mode == "ddim":
            self._log_abar = _log_alphas_cumprod(alphas_cumprod)
            self._times = torch.linspace(0, 1, len(self._log_abar), dtype=torch.float64, device="cpu")
        self._stages = tuple(self._stage(k, stages) for k in range(stages))

    def __len__(self) -> int:
        return len(self._stages)

    def __getitem__(self, k: int) -> Stage:
        return self._stages[k]

    def _stage(self, k: int, stages: int) -> Stage:
        """Stage k's window. Eq. 16: sigma_end / gamma_end of stage k + 1 is sigma_start / gamma_start / sqrt(2)."""
        t_end, t_start = k / stages, 1.0
        if k < stages - 1:
            gamma, sigma = self.gamma_sigma((k + 1) / stages)
            t_start = self._time_of_ratio(math.sqrt(2) * sigma.item() / gamma.item())
        (gamma_start, gamma_end), (sigma_start, sigma_end) = self.gamma_sigma([t_start, t_end])
        values = gamma_start, sigma_start, gamma_end, sigma_end
        return Stage(k, 2**k, t_start, t_end, *(value.item() for value in values))

    def gamma_sigma(self, t: Tensor | Sequence[float] | float) -> tuple[Tensor, Tensor]:
        """Eq. 6: (gamma, sigma) of x_t = gamma x0 + sigma noise at the times `t`, in float64 on the CPU."""
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        if self.mode == "flow":
            return 1 - t, t
        log_abar = _interpolate_table(t, self._times, self._log_abar)
        return (log_abar / 2).exp(), (1 - log_abar.exp()).sqrt()

    def _time_of_ratio(self, r: float) -> float:
        """The t at which sigma / gamma = r."""
        if self.mode == "flow":
            return r / (1 + r)
        gamma, sigma = self.gamma_sigma(1.0)
        if r > sigma / gamma:
            raise ValueError(
                f"a stage would start at sigma / gamma = {r:.4g}, but alphas_cumprod ends at {sigma / gamma:.4g}: "
                "use fewer stages or a noisier schedule"
            )
        log_abar = torch.tensor(-math.log1p(r * r), dtype=torch.float64, device="cpu")
        return _interpolate_table(-log_abar, -self._log_abar, self._times).item()

    def _coordinates(self, t: Tensor | Sequence[float], stage: Stage) -> tuple[Tensor, Tensor]:
        """(scale, position) at the times `t` such that, within the stage, x / scale is a straight line in position.

        flow: (1, t'), Eq. 12. ddim: (gamma, r), Eq. 10. The line's slope is the training target in both.
        """
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        if self.mode == "flow":
            return torch.ones_like(t), (t - stage.t_end) / (stage.t_start - stage.t_end)
        gamma, sigma = self.gamma_sigma(t)
        return gamma, sigma / gamma

    def endpoints(self, x0: Tensor, noise: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Eq. 7-8: stage k's noisy start and cleaner end, both from the same noise.

        `x0` (B, C, T, H, W) is at the full frame rate, `noise` (B, C, T / 2^k, H, W) at the stage's, as are both
        results. Raises ValueError if T does not divide by 2^(K - 1) or the noise has another shape.
        """
        stage = self[k]
        self._check_frames(x0.shape)
        x0_end = downsample(x0, stage.stride)
        if noise.shape != x0_end.shape:
            raise ValueError(f"stage {k} needs noise of shape {tuple(x0_end.shape)}, not {tuple(noise.shape)}")
        first = stage.index == len(self) - 1
        x0_start = x0_end if first else upsample(downsample(x0, 2 * stage.stride))
        x_start = stage.gamma_start * x0_start + stage.sigma_start * noise  # Eq. 7
        x_end = stage.gamma_end * x0_end + stage.sigma_end * noise  # Eq. 8
        return x_start, x_end

    def interpolate(self, x_start: Tensor, x_end: Tensor, k: int, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 10-13: a training point of stage k. Returns `x_t`, the target at it, and its time `t`.

        `u` (B,) in [0, 1] places each clip between the stage's end (0) and start (1): t = t_end + u (t_start - t_end).
        The target is eps_k in ddim mode (Eq. 11) and v_k = x_start - x_end in flow mode (Eq. 13); the loss is
        its mean squared error. Keep `u` on the CPU: the few scalars are float64 and computed there.
        Raises ValueError if `u` is not of shape (B,).
        """
        stage = self[k]
        if u.shape != x_start.shape[:1]:
            raise ValueError(f"u must have shape ({x_start.shape[0]},), one per clip, not {tuple(u.shape)}")
        t = stage.t_end + u.detach().cpu().double() * (stage.t_start - stage.t_end)
        scale_t, position_t = self._coordinates(t, stage)
        (scale_s, scale_e), (s, e) = (v.tolist() for v in self._coordinates([stage.t_start, stage.t_end], stage))
        target = (x_end / scale_e - x_start / scale_s) / (e - s)  # Eq. 11 and 13
        w = (position_t - s) / (e - s)  # 0 at the start, 1 at the end
        to_start, to_end = per_clip(scale_t / scale_s * (1 - w), x_start), per_clip(scale_t / scale_e * w, x_start)
        x_t = to_start * x_start + to_end * x_end  # Eq. 10 and 12, without forming the large x / gamma
        return x_t, target, t.to(x_start)

    def renoise(self, x_end: Tensor, k: int, generator: Generators = None) -> Tensor:
        """Eq. 14-16: from stage k's end (B, C, T, H, W) to stage k - 1's start (B, C, 2 T, H, W), k >= 1.

        Nearest upsampling gives each pair of frames the same noise; adding +n to one and -n to the other makes
        their noises independent again, of the variance that stage k - 1 starts with.
        """
        stage = self[k]
        if stage.index == 0:
            raise ValueError("stage 0 is the last: no stage follows to renoise for")
        following = self[stage.index - 1]
        n = randn(x_end.shape, generator, x_end.device, x_end.dtype)
        pairs = torch.stack([n, -n], dim=3).flatten(2, 3)  # +n, -n in turn along time
        ratio = following.gamma_start / stage.gamma_end
        return ratio * upsample(x_end) + following.sigma_start / math.sqrt(2) * pairs  # Eq. 15

    def sample(
        self,
        predict: Callable[[Tensor, Tensor, int], Tensor],
        shape: Sequence[int],
        steps: int | Sequence[int] = 30,
        solver: str = "euler",
        generator: Generators = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        progress: bool = False,
    ) -> Tensor:
        """Section 3.5: clips of `shape` (B, C, T, H, W) from noise, stage by stage, renoised in between.

        predict    predict(x, t, k) -> the target's prediction: eps in ddim mode, v_k in flow mode. `x` is at stage
                   k's frame rate, `t` of shape (B,). One call a step. Gradients are not recorded.
        steps      a total, split evenly over the stages with the remainder to the noisiest, or one count per stage,
                   noisiest first. Each stage's grid is uniform in t.
        solver     "euler" (Eq. 3 in ddim mode), or "ab2": two-step Adams-Bashforth along the stage's line, Euler
                   for a stage's first step. Past the paper: as many calls, an order more accurate.
        generator  one generator, or a list of one per clip, which makes a clip independent of its batch.
        device, dtype  of the clips; the generators may live on another device, the CPU for instance.
        Raises ValueError if T does not divide by 2^(K - 1), a stage gets no step, the solver is unknown, or
        `predict` returns another shape, NaN or infinity.
        """
        self._check_frames(shape)
        counts = split_steps(steps, len(self))
        first_stride = self[len(self) - 1].stride
        x = randn((*shape[:2], shape[2] // first_stride, *shape[3:]), generator, device, dtype)
        with torch.no_grad(), _progress_bar(sum(counts)) if progress else nullcontext() as bar:
            for k, count in zip(reversed(range(len(self))), counts, strict=True):
                x = self.integrate(predict, x, k, count, solver, bar=bar)
                if k > 0:
                    x = self.renoise(x, k, generator)
        return x

    def integrate(
        self, predict: Callable, x: Tensor, k: int, steps: int, solver: str = "euler", t: float | None = None, bar=None
    ) -> Tensor:
        """Eq. 9-10: stage k alone, to its end, from its start `x` (B, C, T / 2^k, H, W) or from the time `t` within it.

        Steps uniform in t, along the line of `_coordinates`, whose slope `predict` says. Arguments and what is raised
        as in `sample`, but gradients are recorded. Raises ValueError for a `t` outside of the stage, too.
        """
        stage = self[k]
        t = stage.t_start if t is None else t
        if solver not in ("euler", "ab2"):
            raise ValueError(f'solver must be "euler" or "ab2", not {solver!r}')
        if steps < 1 or not stage.t_end < t <= stage.t_start:
            window = f"{stage.t_end:.4g} < t <= {stage.t_start:.4g}"
            raise ValueError(f"stage {k} needs at least one step, and {window}, not {steps} steps from t = {t}")
        times = torch.linspace(t, stage.t_end, steps + 1, dtype=torch.float64, device="cpu")
        scale, position = (values.tolist() for values in self._coordinates(times, stage))
        previous = previous_h = None
        for i in range(steps):
            output = predict(x, times[i].to(x).expand(x.shape[0]), k)
            if output.shape != x.shape:
                raise ValueError(f"predict returned shape {tuple(output.shape)} for x of {tuple(x.shape)}")
            if not output.isfinite().all():
                raise ValueError(f"predict returned NaN or infinity at stage {k}, step {i + 1} of {steps}")
            h = position[i + 1] - position[i]
            slope = output
            if solver == "ab2" and previous is not None:
                slope = output + h / (2 * previous_h) * (output - previous)
            x = scale[i + 1] * (x / scale[i] + h * slope)  # Eq. 10; in ddim mode with "euler" it is Eq. 3
            previous, previous_h = output, h
            if bar is not None:
                bar.update()
        return x

    def _check_frames(self, shape: Sequence[int]) -> None:
        divisor = 2 ** (len(self) - 1)
        if len(shape) < 3 or shape[2] < 1 or shape[2] % divisor:
            raise ValueError(f"{len(self)} stages need frames divisible by {divisor}; the shape is {tuple(shape)}")


def split_steps(steps: int | Sequence[int], stages: int) -> list[int]:
    """Solver steps per stage, noisiest first: a total is split evenly, its remainder goes to the noisiest.

    Raises ValueError if a stage gets no step or the counts are not one per stage.
    """
    if isinstance(steps, Integral):
        each, rest = divmod(steps, stages)
        counts = [each + rest] + [each] * (stages - 1)
    else:
        counts = list(steps) if isinstance(steps, Iterable) else []
    if len(counts) != stages or not all(isinstance(count, Integral) and count > 0 for count in counts):
        raise ValueError(f"{stages} stages need at least one whole step each, but steps = {steps}")
    return counts


def _log_alphas_cumprod(alphas_cumprod: Sequence[float] | Tensor | None) -> Tensor:
    """log(alphas_cumprod) in float64 with t = 0 (clean data, log 1 = 0) put in front: (N + 1,)."""
    if alphas_cumprod is None:
        alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device="cpu")).cumprod(0)
    abar = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu").detach()
    if abar.ndim != 1 or len(abar) < 1:
        raise ValueError(f"alphas_cumprod must be a 1-D sequence, not of shape {tuple(abar.shape)}")
    if not ((abar > 0) & (abar < 1)).all() or not (abar.diff() < 0).all():
        raise ValueError("alphas_cumprod must decrease strictly and stay inside (0, 1)")
    return torch.cat([abar.new_zeros(1), abar.log()])


def _interpolate_table(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """The piecewise linear function through the points (xs, ys), xs rising, at x."""
    right = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    left = right - 1
    return ys[left] + (x - xs[left]) / (xs[right] - xs[left]) * (ys[right] - ys[left])


def per_clip(value: Tensor, like: Tensor) -> Tensor:
    """The coefficients of Eq. 10 to 13, one per clip: (B,) -> (B, 1, 1, 1, 1), with the clips' dtype and device."""
    return value.to(like).view(-1, *[1] * (like.ndim - 1))


def _progress_bar(total: int):
    from tqdm import tqdm  # only here: the rest of the file needs torch and scipy alone

    return tqdm(total=total, desc="sampling", unit="step")
