"""Which steps take the extra passes: a phase of training, every k-th, at random, or those with large gradients."""

from __future__ import annotations

import math
import random
from abc import abstractmethod
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from bsam_fused import checks
from bsam_fused.schedules.stepped import Stepped

LAG = 2
"""Steps until a norm has come from a GPU without anybody's waiting."""


class StepPolicy(Stepped):
    """Which steps perturb, by their number; the others are the base optimizer's: one pass, one update.

    Sets ``optimizer.active`` before every step: of several of these policies the one that is stepped last counts.
    `LargeGradients` goes with any. Whoever calls the phases by hand asks ``optimizer.passes`` how many there are.

    Args:
        optimizer: a sharpness-aware optimizer.

    Raises:
        TypeError: the optimizer is not sharpness-aware.
    """

    @abstractmethod
    def perturbs(self, t: int) -> bool:
        """Return whether the step after the first ``t`` perturbs."""

    def _apply(self, t: int) -> None:
        self.optimizer.active = self.perturbs(t)


class LatePhase(StepPolicy):
    """Perturb in the last part of training only; before it, a step is the base optimizer's.

    "Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training" (arXiv 2410.10373): a few
    epochs of SAM at the end do nearly what SAM throughout does.

    Args:
        optimizer: a sharpness-aware optimizer.
        total_steps: steps of the whole training, > 0.
        start: the share of them, in [0, 1], at which the late phase starts.
        early: the mirror experiment: perturb before ``start``, not from there on.
        every: within the phase, perturb in its first step and every ``every``-th from there, > 0.

    Raises:
        TypeError: the optimizer is not sharpness-aware.
        ValueError: ``start`` outside [0, 1], or ``total_steps`` or ``every`` that is no integer > 0.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        start: float = 0.9,
        *,
        early: bool = False,
        every: int = 1,
    ) -> None:
        super().__init__(optimizer)
        checks.share("start", start)
        self.total_steps = checks.integer("total_steps", total_steps, 1)
        self.start, self.early = start, checks.flag("early", early)
        self.every = checks.integer("every", every, 1)
        self._apply(0)

    def perturbs(self, t: int) -> bool:
        """Return whether the step after the first ``t`` perturbs."""
        switch = round(self.start * self.total_steps)
        begin, end = (0, switch) if self.early else (switch, math.inf)
        return begin <= t < end and (t - begin) % self.every == 0


class EveryKth(StepPolicy):
    """Perturb in the first step, and in every k-th after it: 1 + 1/k passes a step, where there are two in those.

    Args:
        optimizer: a sharpness-aware optimizer.
        k: > 0.
        scale_radius: perturb k times as far, for as much in all: sets ``optimizer.radius_factor``, by which all radii
            are multiplied. It stays: set it to 1 for training without this policy.

    Raises:
        TypeError: the optimizer is not sharpness-aware.
        ValueError: ``k`` is no integer > 0, or ``scale_radius`` neither True nor False.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, k: int, *, scale_radius: bool = False) -> None:
        super().__init__(optimizer)
        self.k, self.scale_radius = checks.integer("k", k, 1), checks.flag("scale_radius", scale_radius)
        self._apply(0)

    def perturbs(self, t: int) -> bool:
        """Return whether the step after the first ``t`` perturbs."""
        return t % self.k == 0

    def _apply(self, t: int) -> None:
        super()._apply(t)
        if self.scale_radius:
            self.optimizer.radius_factor = float(self.k)


class RandomSteps(StepPolicy):
    """Perturb in steps drawn at random, each on its own: RST (arXiv 2203.09962) at a constant probability.

    What is drawn is a function of the seed and the step's number alone: the same on every rank and after a resume, and
    it takes no number from anybody's generator.

    Args:
        optimizer: a sharpness-aware optimizer.
        probability: of a step to perturb, in [0, 1].
        seed: ≥ 0.

    Raises:
        TypeError: the optimizer is not sharpness-aware.
        ValueError: ``probability`` outside [0, 1], or ``seed`` that is no integer ≥ 0.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, probability: float = 0.5, *, seed: int = 0) -> None:
        super().__init__(optimizer)
        self.probability, self.seed = checks.share("probability", probability), checks.integer("seed", seed, 0)
        self._apply(0)

    def perturbs(self, t: int) -> bool:
        """Return whether the step after the first ``t`` perturbs."""
        # Seeded by text, which Python hashes: numbers that follow each other would give draws that are alike.
        return random.Random(f"{self.seed}, {t}").random() < self.probability


class LargeGradients(Stepped):
    """Perturb in steps whose gradient is large, for those of late: AE-SAM (arXiv 2304.14647).

    With n = ‖g‖², over all parameters, of the first pass of the step after the first t:

        μ = δ μ + (1 − δ) n
        σ² = δ σ² + (1 − δ) (n − μ)²
        c = (t/T) λ_1 + (1 − t/T) λ_2

    both 0 at first, it goes on to the other passes where n ≥ μ + c σ, and else is the base optimizer's, with d = g: few
    perturb early in training, many late. Sets ``optimizer.decide``. By hand, ``optimizer.passes`` is asked after the
    first backward pass, and not between the step and this policy's: it would weigh the gradients that are left. A step
    that is given up leaves μ and σ as they were; so does an n that is not finite, with which all passes are taken.

    On a GPU n is that of two steps before, of which the host has heard without waiting, so that every run decides
    alike; the first two steps take all their passes there. Measuring n costs a step one more reading of g.

    Not for `LookSAM`'s steps of one pass, which ask nobody. Not with ``sync="last"``, ``ascent_closure``, a GradScaler
    or `GraphedStep`, which say so.

    Args:
        optimizer: a sharpness-aware optimizer.
        total_steps: T, steps of the whole training, > 0.
        lambda_1: λ_1, c at the end.
        lambda_2: λ_2, c at the beginning.
        decay: δ, in [0, 1).

    Raises:
        TypeError: the optimizer is not sharpness-aware.
        ValueError: ``total_steps`` that is no integer > 0, or a number that is not finite or outside its range.
    """

    _unsaved = Stepped._unsaved | {"_next"}

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        *,
        lambda_1: float = -1.0,
        lambda_2: float = 1.0,
        decay: float = 0.9,
    ) -> None:
        super().__init__(optimizer)
        self.total_steps = checks.integer("total_steps", total_steps, 1)
        self.lambda_1, self.lambda_2 = checks.finite("lambda_1", lambda_1), checks.finite("lambda_2", lambda_2)
        self.decay = checks.below_one("decay", decay)
        self.mean = self.variance = 0.0
        self.norms: list[SupportsFloat] = []  # n of the last two steps, on a GPU
        self._apply(0)

    def _apply(self, t: int) -> None:
        self._next = self.mean, self.variance, self.norms  # once the step is made
        self.optimizer.decide = self._decide

    def step(self) -> None:
        """Count a step of the optimizer, and take what it has decided by into the means."""
        self.mean, self.variance, self.norms = self._next
        super().step()

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the optimizer; waits for a GPU."""
        return {**super().state_dict(), "norms": [*map(float, self.norms)]}

    def _decide(self, square: Tensor) -> bool:
        """Return whether a step perturbs, ``square`` being ‖g‖² of its first pass."""
        norms = [*self.norms, _Arriving(square) if square.is_cuda else float(square)]
        mean, variance, is_large = self.mean, self.variance, True
        if len(norms) > (LAG if square.is_cuda else 0):
            mean, variance, is_large = self._weigh(float(norms.pop(0)))
        self._next = mean, variance, norms
        return is_large

    def _weigh(self, n: float) -> tuple[float, float, bool]:
        """Return the means with ``n``, and whether it is large; one that is not finite is, and is in no mean."""
        mean = self.decay * self.mean + (1 - self.decay) * n
        deviation = n - mean
        variance = self.decay * self.variance + (1 - self.decay) * deviation * deviation
        if not math.isfinite(variance):
            return self.mean, self.variance, True
        late = min(self.last_step / self.total_steps, 1.0)
        c = late * self.lambda_1 + (1 - late) * self.lambda_2
        return mean, variance, n >= mean + c * math.sqrt(variance)


class _Arriving:
    """A number on its way from a GPU: nobody waits for it before it is read."""

    def __init__(self, number: Tensor) -> None:
        self._there = torch.empty((), dtype=number.dtype, device="cpu", pin_memory=True)
        self._there.copy_(number, non_blocking=True)
        self._arrival = torch.cuda.Event()
        self._arrival.record(torch.cuda.current_stream(number.device))

    def __float__(self) -> float:
        self._arrival.synchronize()
        return float(self._there)

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        """Copy and pickle as the number."""
        return float, (float(self),)
