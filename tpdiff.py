"""TPDiff, Section 3: stage-wise diffusion over a temporal pyramid (arXiv 2503.09566).

Copy this one file into your project: it knows tensors and nothing else. Equation numbers are the paper's; primed
ones (10', 15', 16') are the same in a more general form: any number of frames, any factor, any target.
  t       noise time in [0, 1]: 1 is noise, 0 is data. Sampling runs t downward.
  stage   k runs at 1 / 2^k of the frame rate: k = K - 1 is the first and noisiest, k = 0 the last, at the full rate.
  videos  (B, C, T, H, W). If yours are (B, T, C, H, W), call transpose(1, 2) on the way in and on the way out.
  dtype   arithmetic in float32, or in float64 for float64 clips. Points and targets of bf16 clips are in float32.
Both forms of diffusion are x_t = gamma_t x0 + sigma_t noise (Eq. 6):
  flow    gamma = 1 - t,         sigma = t                 (Eq. 4)
  ddim    gamma = sqrt(abar_t),  sigma = sqrt(1 - abar_t)  (Eq. 1)
In both, a stage is one straight line from its noisy start x_s to its cleaner end x_e:
  flow    x         is linear in  t' = (t - t_end) / (t_start - t_end),  with slope v_k = x_s - x_e  (Eq. 12-13)
  ddim    x / gamma is linear in  r = sigma / gamma,                     with slope eps_k            (Eq. 10-11)
The second line is also x_t = gamma_t X_k + sigma_t eps_k: the schedule's own mixture, of a clean clip X_k (Eq. 10').
"""

import math
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Integral

import torch
from scipy.interpolate import make_interp_spline
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__version__ = "0.4.0"

Generators = torch.Generator | Sequence[torch.Generator] | None


def downsample(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Down of Eq. 7-8: frames 0, stride[0], 2 stride[0], ...; in space the means of stride[1] x stride[2] pixels.
    (B, C, T, H, W) -> (B, C, ceil(T / stride[0]), H / stride[1], W / stride[2]). ValueError if pixels are left."""
    return _block_mean(x[:, :, :: stride[0]], (1, *stride[1:]))


def upsample(x: Tensor, factor: Sequence[int] = (2, 1, 1), frames: int | None = None) -> Tensor:
    """Up of Eq. 7 and 14, nearest: every frame factor[0] times, every pixel factor[1] x factor[2] times.
    (B, C, T, H, W) -> (B, C, frames, factor[1] H, factor[2] W). `frames` is factor[0] T by default. If it is less, the
    first frame has fewer copies: 6 become 11, frame 0 once and each later one twice, as in causal video VAEs.
    Raises ValueError for other clips, or if downsampling so many frames would not give T."""
    whole = factor[0] * x.shape[2]
    frames = whole if frames is None else frames
    if x.ndim != 5 or not whole - factor[0] < frames <= whole:
        raise ValueError(f"{factor[0]} times the frames of (B, C, T, H, W) = {tuple(x.shape)} cannot become {frames}")
    for dim, copies in zip((2, 3, 4), factor, strict=True):
        x = x.repeat_interleave(copies, dim) if copies > 1 else x
    return x[:, :, whole - frames :]


def _block_mean(x: Tensor, block: Sequence[int]) -> Tensor:
    """The mean of each block of block[0] frames, block[1] rows and block[2] columns."""
    for dim, size in zip((2, 3, 4), block, strict=True):
        if x.ndim != 5 or x.shape[dim] % size:
            raise ValueError(f"(B, C, T, H, W) = {tuple(x.shape)} does not divide into blocks of {tuple(block)}")
        x = x.unflatten(dim, (-1, size)).mean(dim + 1) if size > 1 else x
    return x


def align(x: Tensor, noise: Tensor) -> Tensor:
    """Data-noise alignment, Algorithm 1: `noise` permuted along the batch to be near `x`, clips at a stage's rate. They
    keep their order, so prompts need not move. The permutation minimizes the sum of the distances ||x_i - noise_i||,
    in float32 also under autocast. Raises ValueError if the shapes differ or a distance is NaN."""
    if x.shape != noise.shape:
        raise ValueError(f"clips of shape {tuple(x.shape)} cannot be aligned with noise of {tuple(noise.shape)}")
    cost = torch.cdist(x.flatten(1).float(), noise.flatten(1).float(), compute_mode="use_mm_for_euclid_dist")
    _, columns = linear_sum_assignment(cost.detach().tolist())
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
    """For each clip the nearest of `candidates` noises, drawn for it alone: alignment at any batch size. Past the
    paper: "KNN noise selection" of Improved Immiscible Diffusion (arXiv 2505.18521). Not exactly Gaussian: with m the
    mean of x^2, c the expected maximum of as many normal numbers and s = sqrt(D (2 + 4 m)), in clips of many elements D
    the mean of noise^2 is about 1 - 2 c / s, and of x * noise 2 c m / s. Raises ValueError if there is no candidate."""
    if candidates < 1:
        raise ValueError(f"the nearest of {candidates} noises cannot be drawn: at least 1")
    noise = randn(x.shape, generator, x.device, x.dtype)
    for _ in range(candidates - 1):
        other = randn(x.shape, generator, x.device, x.dtype)
        nearer = (_precise(x) - other).flatten(1).norm(dim=1) < (_precise(x) - noise).flatten(1).norm(dim=1)
        noise = torch.where(_per_clip(nearer, x).bool(), other, noise)
    return noise


# One stage: its index k, its stride factor^k (time, height, width), its times, and Eq. 6 at its start and its end.
Stage = namedtuple("Stage", "index stride t_start t_end gamma_start sigma_start gamma_end sigma_end")


class Pyramid:
    """The pyramid of Section 3.2: K stages, trained and sampled by one model. K = 1 is vanilla diffusion.

    mode            "flow" or "ddim".
    alphas_cumprod  ddim only: any model's schedule, decreasing, in [0, 1). Its N values sit at t = 1/N, 2/N, ..., 1;
                    between them the angle atan2(sigma, gamma) is linear, and t = 0 is clean data.
                    Default: DDPM's, betas linear from 1e-4 to 0.02 over N = 1000 steps.
    Past the paper, whose pyramid has the defaults:
    factor          what a stage divides time, height and width by: (2, 1, 1) is TPDiff, (1, 2, 2) Pyramid Flow,
                    (2, 2, 2) PyramidalWan. Frames may be any number, height and width divide by factor^(K - 1).
    ends            the stages' end times t by index, rising from 0. Default: k / K, as in Pyramid Flow. The starts
                    follow by Eq. 16', so neighbouring windows overlap in t.
    shift           a of t = a v / (1 + (a - 1) v): training times and sampling steps are uniform in v. In diffusers
                    `flow_shift`, `shift` or, if dynamic, exp(mu) of the whole clip. shift_terminal is not modelled.
    prediction      ddim only, the target: "epsilon" (Eq. 11, the default), "velocity" gamma eps_k - sigma X_k (arXiv
                    2202.00512), or "sample" X_k. In flow mode it is v_k (Eq. 13): (t_start - t_end) times dx/dt.
    All are attributes to read. `lengths[k]` is the unshifted time from ends[k] to the next or 1, `p[k]` stage k.
    Raises ValueError for other values, or for a schedule without noise enough for a stage's start."""

    def __init__(
        self, mode: str, stages: int = 3, alphas_cumprod: Sequence[float] | Tensor | None = None, *, shift: float = 1.0,
        factor: Sequence[int] = (2, 1, 1), ends: Sequence[float] | None = None, prediction: str | None = None,
    ):  # fmt: skip
        if mode not in ("flow", "ddim"):
            raise ValueError(f'mode must be "flow" or "ddim", not {mode!r}')
        if not isinstance(stages, Integral) or stages < 1:
            raise ValueError(f"stages must be a whole number of at least 1, not {stages}")
        if len(factor) != 3 or not all(isinstance(n, Integral) and n >= 1 for n in factor):
            raise ValueError(f"factor must be three whole numbers (time, height, width) of at least 1, not {factor}")
        ends = tuple(k / stages for k in range(stages)) if ends is None else tuple(map(float, ends))
        if len(ends) != stages or ends[0] != 0 or not all(a < b for a, b in zip(ends, (*ends[1:], 1.0), strict=True)):
            raise ValueError(f"ends must be {stages} times that begin with 0, rise and stay below 1, not {ends}")
        if not 0 < shift < math.inf:
            raise ValueError(f"shift must be a number above 0, not {shift}")
        targets = ("epsilon", "velocity", "sample") if mode == "ddim" else ()
        if mode == "flow" and alphas_cumprod is not None or prediction not in (None, *targets):
            raise ValueError(f"{prediction=}: ddim has epsilon, velocity, sample; flow none, and no alphas_cumprod")
        self.mode, self.stages, self.factor, self.ends = mode, int(stages), tuple(map(int, factor)), ends
        self.shift, self.prediction, self.alphas_cumprod = float(shift), None, None
        if mode == "ddim":
            ddpm = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device="cpu")).cumprod(0)
            given = ddpm if alphas_cumprod is None else alphas_cumprod
            abar = torch.as_tensor(given, dtype=torch.float64, device="cpu").detach().clone()
            if not (abar.ndim == 1 and len(abar) and (abar.diff() < 0).all() and 0 <= abar[-1] <= 0.5 and abar[0] < 1):
                raise ValueError(f"alphas_cumprod {tuple(abar.shape)} must fall (float16 may not) from < 1 to [0, 0.5]")
            self.prediction, self.alphas_cumprod = prediction or "epsilon", abar
            if self.prediction == "epsilon" and abar[-1] < 1e-30:
                raise ValueError('where alphas_cumprod is 0, noise says nothing of the clip: use prediction="velocity"')
            abar = torch.cat([abar.new_ones(1), abar])  # t = 0: clean data
            self._angles = torch.atan2((1 - abar).sqrt(), abar.sqrt())
        self._stages = tuple(self._stage(k) for k in range(stages))
        v = [self._unshifted(end) for end in (*ends, 1.0)]
        self.lengths = tuple(v[k + 1] - v[k] for k in range(stages))

    def __len__(self) -> int:
        return self.stages

    def __getitem__(self, k: int) -> Stage:
        return self._stages[k]

    def _stage(self, k: int) -> Stage:
        """Stage k's window. Eq. 16': sigma / gamma at its start is sqrt(n) times that at stage k + 1's end, where n
        elements share one noise after upsampling: n = 2 for the paper's factor."""
        t_end, t_start = self.ends[k], 1.0
        if k < self.stages - 1:
            gamma, sigma = self.gamma_sigma(self.ends[k + 1])
            t_start = self._time_of_ratio(math.sqrt(math.prod(self.factor)) * sigma.item() / gamma.item())
        values = torch.stack(self.gamma_sigma([t_start, t_end])).T.flatten().tolist()  # gamma, sigma, gamma, sigma
        return Stage(k, tuple(n**k for n in self.factor), t_start, t_end, *values)

    def gamma_sigma(self, t: Tensor | Sequence[float] | float) -> tuple[Tensor, Tensor]:
        """Eq. 6: gamma and sigma at the times `t` in [0, 1], in float64 on the CPU. ValueError for other times."""
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        if not ((t >= 0) & (t <= 1 + 1e-6)).all():  # as float32 rounds them
            raise ValueError(f"times must be in [0, 1], not {t.ravel()[:9].tolist()}")
        if self.mode == "flow":
            return 1 - t, t
        place = t * (len(self._angles) - 1)
        before = place.long().clamp(max=len(self._angles) - 2)
        angle = torch.lerp(self._angles[before], self._angles[before + 1], place - before)
        return angle.cos().where(angle < math.pi / 2, 0.0), angle.sin()

    def _time_of_ratio(self, r: float) -> float:
        """The t at which sigma / gamma = r."""
        if self.mode == "flow":
            return r / (1 + r)
        if (angle := math.atan(r)) > self._angles[-1]:
            last = f"alphas_cumprod ends at {self._angles[-1].tan():.4g}: use fewer stages, lower end times"
            raise ValueError(f"a stage would start at sigma / gamma = {r:.4g}, but {last} or a noisier schedule")
        return float(make_interp_spline(self._angles, range(len(self._angles)), 1)(angle)) / (len(self._angles) - 1)

    def _shifted(self, v):
        return self.shift * v / (1 + (self.shift - 1) * v)

    def _unshifted(self, t):
        return t / (self.shift - (self.shift - 1) * t)

    def shape(self, shape: Sequence[int], k: int) -> tuple[int, ...]:
        """A clip's shape at stage k, from its full shape (B, C, T, H, W): of T frames ceil(T / stride) are left. Raises
        ValueError for another number of sizes, no frame, or a height or width not divisible by factor^(K - 1)."""
        blocks = [n ** (self.stages - 1) for n in self.factor[1:]]
        if len(shape) != 5 or shape[2] < 1 or any(size % n for size, n in zip(shape[3:], blocks, strict=True)):
            need = f"(B, C, T, H, W) with T > 0, H and W divisible by {blocks}, not {tuple(shape)}"
            raise ValueError(f"{self.stages} stages of factor {self.factor} need {need}")
        return (*shape[:2], *(-(-size // n) for size, n in zip(shape[2:], self[k].stride, strict=True)))

    def down(self, x0: Tensor, k: int) -> Tensor:
        """Clips (B, C, T, H, W) as stage k sees them, of the shape `p.shape(x0.shape, k)`, at least in float32."""
        self.shape(x0.shape, k)  # raises what does not fit
        return downsample(_precise(x0), self[k].stride)

    def endpoints(self, x0: Tensor, noise: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Eq. 7-8: stage k's noisy start and cleaner end, both from the same noise.
        `x0` (B, C, T, H, W) is at the full rate; `noise`, Gaussian of variance 1, and both results are of the shape
        `p.shape(x0.shape, k)`, or ValueError is raised."""
        stage, x0_end = self[k], self.down(x0, k)
        if noise.shape != x0_end.shape:
            raise ValueError(f"stage {k} needs noise of shape {tuple(x0_end.shape)}, not {tuple(noise.shape)}")
        x0_start, noise = x0_end, _precise(noise)
        if stage.index < self.stages - 1:  # a stage that another one comes before begins as blurred as that one ended
            x0_start = upsample(downsample(x0_end, self.factor), self.factor, x0_end.shape[2])
        x_start = stage.gamma_start * x0_start + stage.sigma_start * noise  # Eq. 7
        x_end = stage.gamma_end * x0_end + stage.sigma_end * noise  # Eq. 8
        return x_start, x_end

    def interpolate(self, x_start: Tensor, x_end: Tensor, k: int, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. 10-13: a training point of stage k. Returns `x_t`, the target at it, and its time `t` (B,).
        `u` (B,) in [0, 1] places each clip between the stage's end (0) and start (1), evenly in unshifted time. Keep it
        on the CPU: times and coefficients are computed there in float64. ValueError for other u or differing shapes."""
        s = self[k]
        if x_end.shape != x_start.shape or u.shape != x_start.shape[:1] or not ((u >= 0) & (u <= 1)).all():
            raise ValueError(f"x_start and x_end need one shape, u numbers in [0, 1], one per clip: {u.tolist()}")
        x_start, x_end = _precise(x_start), _precise(x_end)
        v_start, v_end = self._unshifted(s.t_start), self._unshifted(s.t_end)
        t = self._shifted(v_end + u.detach().cpu().double() * (v_start - v_end))
        if self.mode == "flow":
            place = _per_clip((t - s.t_end) / (s.t_start - s.t_end), x_start)  # t': 1 at the start, 0 at the end
            return place * x_start + (1 - place) * x_end, x_start - x_end, t.to(x_start)  # Eq. 12 and 13
        det = s.gamma_end * s.sigma_start - s.gamma_start * s.sigma_end
        clean = (s.sigma_start * x_end - s.sigma_end * x_start) / det  # X_k of Eq. 10'
        eps = (s.gamma_end * x_start - s.gamma_start * x_end) / det  # Eq. 11, without dividing by gamma
        gamma, sigma = (_per_clip(value, x_start) for value in self.gamma_sigma(t))
        targets = {"epsilon": eps, "velocity": gamma * eps - sigma * clean, "sample": clean}
        return gamma * clean + sigma * eps, targets[self.prediction], t.to(x_start)  # Eq. 10

    def _clean_and_eps(self, x: Tensor, output: Tensor, gamma: float, sigma: float) -> tuple[Tensor, Tensor]:
        """(X_k, eps_k) of x = gamma X_k + sigma eps_k from a prediction at x, in ddim mode."""
        if self.prediction == "epsilon":
            return (x - sigma * output) / gamma, output
        if self.prediction == "sample":
            return output, (x - gamma * output) / sigma
        return gamma * x - sigma * output, sigma * x + gamma * output

    def renoise(self, x_end: Tensor, k: int, generator: Generators = None, frames: int | None = None) -> Tensor:
        """Eq. 14-16: from stage k's end (B, C, T, H, W) to stage k - 1's start, k >= 1, of `frames` frames: factor[0]
        T by default; of clips of any length p.shape(shape, k - 1)[2]. Upsampling gives a block of n elements (2 frames
        in the paper) one noise. Fresh noise less its mean over the block makes them independent, with the variance of
        stage k - 1. In a pair it is +d, -d of variance 1/2: Eq. 15. ValueError for stage 0, or as `upsample`."""
        stage = self[k]
        if stage.index == 0:
            raise ValueError("stage 0 is the last: no stage follows to renoise for")
        following, factor = self[stage.index - 1], self.factor
        x = upsample(_precise(x_end), factor, frames)
        z = randn((*x.shape[:2], factor[0] * x_end.shape[2], *x.shape[3:]), generator, x.device, x.dtype)
        z = (z - upsample(_block_mean(z, factor), factor))[:, :, -x.shape[2] :]  # whole blocks, the first may be cut
        return following.gamma_start / stage.gamma_end * x + following.sigma_start * z  # Eq. 15'

    def sample(
        self, predict: Callable[[Tensor, Tensor, int], Tensor], shape: Sequence[int],
        steps: int | Sequence[int] = 30, solver: str = "euler", generator: Generators = None,
        device: torch.device | str | None = None, dtype: torch.dtype = torch.float32,
        progress: bool = False, callback: Callable[[Tensor, Tensor, int], Tensor | None] | None = None,
    ) -> Tensor:  # fmt: skip
        """Section 3.5: clips of `shape` (B, C, T, H, W) from noise (drawn first), stage by stage, renoised in between.
        predict    predict(x, t, k) -> the target's prediction, of x's shape. `x` has stage k's shape and `dtype`, `t`
                   (B,) is in float32 or more. One call a step, without gradients. It may change x, t and its output.
        steps      one count per stage, noisiest first (best if `shift` is large), or a total, shared by unshifted time.
        solver     "euler" (Eq. 3 in ddim mode), or, past the paper, "ab2": two-step Adams-Bashforth along the stage's
                   line, of second order. Its first step is Euler's (first two, if gamma starts at 0).
        generator  one, or a list of one per clip, which makes a clip independent of its batch; on any device.
        device, dtype  what `predict` takes and the result has; device None: the generator's, or torch's default.
        callback   callback(x, t, k), after every step and every renoising, with the time (B,) that x now has. What it
                   returns, if not None, replaces x: to hold a first frame, for instance. `progress` needs tqdm.
        Raises ValueError if shape, steps or solver do not fit, or a function returns another shape, NaN or infinity."""
        counts = split_steps(steps, self.stages, self.lengths)
        shapes = [self.shape(shape, k) for k in range(self.stages)]
        x = randn(shapes[-1], generator, device, torch.promote_types(dtype, torch.float32))
        with torch.no_grad(), _counted(predict, sum(counts)) if progress else nullcontext(predict) as predict:
            for k, count in zip(reversed(range(self.stages)), counts, strict=True):
                x = self.integrate(predict, x, k, count, solver, None, dtype, callback)
                if k > 0:
                    x = self.renoise(x, k, generator, shapes[k - 1][2])
                    x = _called_back(callback, x, self[k - 1].t_start, k - 1)
        return x.to(dtype)

    def integrate(
        self, predict: Callable, x: Tensor, k: int, steps: int, solver: str = "euler", t: float | None = None,
        dtype: torch.dtype | None = None, callback: Callable | None = None,
    ) -> Tensor:  # fmt: skip
        """Eq. 9-12: stage k alone, to its end, from its start `x` or from a time `t` in it. As in `sample`, but x stays
        in float32 or more, `dtype` is x's by default, and gradients are recorded. ValueError if `t` is outside it."""
        stage, dtype, x = self[k], dtype or x.dtype, _precise(x)
        k, t = stage.index, stage.t_start if t is None else t
        if solver not in ("euler", "ab2"):
            raise ValueError(f'solver must be "euler" or "ab2", not {solver!r}')
        if steps < 1 or not stage.t_end < t <= stage.t_start + 1e-6:  # as float32 rounds it
            need = f"needs at least one step, from {stage.t_end:.4g} < t <= {stage.t_start:.4g}"
            raise ValueError(f"stage {k} {need}, not {steps} steps from t = {t}")
        grid = [self._unshifted(min(t, stage.t_start)), self._unshifted(stage.t_end)]
        times = self._shifted(torch.linspace(*grid, steps + 1, dtype=torch.float64, device="cpu"))
        gammas, sigmas = self.gamma_sigma(times)
        ratio = (times - stage.t_end) / (stage.t_start - stage.t_end) if self.mode == "flow" else sigmas / gammas
        position, gammas, sigmas, before = ratio.tolist(), gammas.tolist(), sigmas.tolist(), None  # t' or r
        for i in range(steps):
            output = predict(x.to(dtype, copy=True), times[i].to(x).repeat(len(x)), k)
            slope = _checked(output, x, f"stage {k}, step {i + 1} of {steps}")
            h, scale = position[i + 1] - position[i], 1.0
            if self.mode == "flow":
                following = x + h * slope  # Eq. 12
            else:
                clean, slope = self._clean_and_eps(x, slope, gammas[i], sigmas[i])
                following, scale = gammas[i + 1] * clean + sigmas[i + 1] * slope, gammas[i + 1]  # Eq. 3 and 10
            if solver == "ab2" and before is not None:
                following = following + scale * h * h / (2 * before[0]) * (slope - before[1])
            before, x = (h, slope), _called_back(callback, following, times[i + 1], k)
        return x


def split_steps(steps: int | Sequence[int], stages: int, lengths: Sequence[float] | None = None) -> list[int]:
    """Solver steps per stage, noisiest first. A total is shared by `lengths` (of stage 0 first; evenly by default), in
    whole numbers of at least 1; the rest goes to the noisiest. Raises ValueError without a count above 0 for each."""
    counts = [*steps] if isinstance(steps, Iterable) else []
    if isinstance(steps, Integral):
        lengths = lengths or [1] * stages
        counts = [max(1, math.floor(steps * n / sum(lengths) + 1e-9)) for n in reversed(lengths)]
        counts[0] += max(0, steps - sum(counts))
        while sum(counts) > steps:  # short stages took more than their share
            counts[counts.index(max(counts))] -= 1
    if len(counts) != stages or not all(isinstance(count, Integral) and count > 0 for count in counts):
        given = (", ".join(map(str, counts)) or "none") if isinstance(steps, Iterable) else steps
        raise ValueError(f"{stages} stages need {stages} whole steps or more, or {stages} counts above 0, not {given}")
    return counts


def _precise(x: Tensor) -> Tensor:
    """In float32 at least: bf16 keeps 8 bits of a number, and differences of clips need more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_clip(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype).to(like.device).view(-1, *[1] * (like.ndim - 1))


def _checked(output: Tensor, x: Tensor, where: str, who: str = "predict") -> Tensor:
    """A copy of what `who` returned for `x`, in x's dtype. Raises ValueError if it cannot be a prediction."""
    if not isinstance(output, Tensor) or output.shape != x.shape:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"no tensor but {type(output).__name__}"
        hint = "if it is a diffusers model's, return .sample, or with return_dict=False what it gives at [0]"
        raise ValueError(f"{who} returned {got} for x of {tuple(x.shape)} at {where}: {hint}")
    if not output.isfinite().all():
        raise ValueError(f"{who} returned NaN or infinity at {where}")
    return output.to(x.dtype, copy=True)  # the next call may write into it


def _called_back(callback: Callable | None, x: Tensor, t: float | Tensor, k: int) -> Tensor:
    times = torch.as_tensor(t, dtype=x.dtype, device=x.device).repeat(len(x))
    replaced = callback(x, times, k) if callback is not None else None
    return x if replaced is None else _checked(replaced, x, f"stage {k}", "callback")


@contextmanager
def _counted(predict: Callable, steps: int) -> Iterator[Callable]:
    from tqdm import tqdm  # only here: the rest of the file needs torch and scipy alone

    with tqdm(total=steps, desc="sampling", unit="step") as bar:
        yield lambda *inputs: (predict(*inputs), bar.update())[0]
