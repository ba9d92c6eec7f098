"""The scalars of a step in torch: math.h's step length and rules, and groups.h's Direction, under the same names.

Written once for sums that the host knows, floats, and for those on a device, tensors without dimensions, which is not
asked: `_root`, `_ratio` and `_where` alone tell the two apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bsam_fused.ops.contract import (
    ASCENT,
    GIVEN_KEPT,
    GIVEN_LAST,
    MAX,
    MIN,
    PRODUCT,
    SCALE,
    SQUARE,
    Radius,
    Rule,
)

_OUT_OF_REACH = 2.0**126
"""Of a coefficient: float32, in which d is mixed, is near its end."""

Number = float | Tensor
Sums = Sequence[float] | Tensor


def _root(square: Number) -> Number:
    """Return √x, and 0 where rounding took x below it."""
    if isinstance(square, Tensor):
        return square.clamp(min=0).sqrt()
    return math.sqrt(max(square, 0.0))


def _ratio(x: Number, y: Number) -> Number:
    """Return x / y, and 0 where y = 0."""
    if isinstance(y, Tensor):
        return torch.where(y == 0, 0.0, x / y)
    return x / y if y else 0.0


def _where(condition: bool | Tensor, x: Number, y: Number) -> Number:
    if isinstance(condition, Tensor):
        return torch.where(condition, x, y)
    return x if condition else y


def _larger(x: Number, y: Number) -> Number:
    return _where(x > y, x, y)


def _is_finite(x: Number) -> bool | Tensor:
    return x - x == 0


# ---- perturbations


def step_length(radius: Radius, sum_ascent: Number, norm_eps: float) -> Number:
    """Return the factor of T² g: radius / (‖T g‖ + norm_eps), |radius| at most budget / ‖T g‖; 0 where it divides by 0.

    LE-SAM 2605.10183, where there is a budget.
    """
    norm = _root(sum_ascent)
    most = math.copysign(1.0, radius.radius) * _ratio(radius.budget, norm)
    reach = _where(abs(radius.radius) * norm > radius.budget, most, radius.radius)
    return _ratio(reach, norm + norm_eps)


def is_out_of_reach(radius: Radius, sum_ascent: Number, norm_eps: float, limit: float) -> bool | Tensor:
    """Return whether a step length, of any group, is beyond ``limit``: nothing is perturbed, the step skipped."""
    return step_length(Radius(radius.largest), sum_ascent, norm_eps) > limit


# ---- directions


class Mix(NamedTuple):
    """A direction d = kept · x + last · y: x what the phases before kept, y the last gradient."""

    kept: Number
    last: Number

    def times(self, factor: Number) -> Mix:
        """Return the mix that gives ``factor`` d."""
        return Mix(factor * self.kept, factor * self.last)


def bilateral(c: Number) -> Mix:
    """BSAM, of g + g_max and g_min: d = g + g_max − c g_min."""
    return Mix(1.0, -c)


def extrapolated(c: Number, r: float) -> Mix:
    """Return the same of g and g_max, with ĝ_min = g − r (g_max − g) for g_min."""
    return Mix(1 - c * (1 + r), 1 + c * r)


def surrogate_gap(alpha: float, product: Number, square_max: Number) -> Mix:
    """GSAM 2203.08065: d = g_max − α g⊥, g⊥ = g − (⟨g, g_max⟩ / ‖g_max‖²) g_max, and 0 where g_max = 0."""
    one_or_none = _ratio(square_max, square_max)
    return Mix(-alpha * one_or_none, 1 + alpha * _ratio(product, square_max))


def weighted(gamma: float) -> Mix:
    """WSAM 2305.15817: d = (1 − 2γ)/(1 − γ) g + γ/(1 − γ) g_max."""
    last = gamma / (1 - gamma)
    return Mix(1 - last, last)


def reused(alpha: float, square_g: Number, square_v: Number) -> Mix:
    """LookSAM 2203.02714 between its k-th steps, of the v that these remembered and of g: d = g + α (‖g‖ / ‖v‖) v."""
    return Mix(alpha * _norm_ratio(square_g, square_v), 1.0)


class Memory(NamedTuple):
    """What is remembered: kept · x + last · y + history · h, of what was kept, the last gradient and what was before.

    What a coefficient of 0 leaves out is not read: 0 · ∞ is no number.
    """

    kept: Number
    last: Number
    history: Number


def orthogonal(product: Number, square_g: Number) -> Memory:
    """LookSAM's v, of g and g_max: g_max − (⟨g, g_max⟩ / ‖g‖²) g, the part of g_max that is orthogonal to g."""
    return Memory(-_ratio(product, square_g), 1.0, 0.0)


def averaged(sigma: float, decay: float, square_m: Number) -> Memory:
    """Friendly SAM 2403.12350: m = λ m + (1 − λ) g of q = g − σ m, which was kept; the first, where m is 0, is g."""
    one_or_none = _ratio(square_m, square_m)
    return Memory(1 - decay * one_or_none, 0.0, (decay + (1 - decay) * sigma) * one_or_none)


def mixed_square(mix: Mix, square_kept: Number, product: Number, square_last: Number) -> Number:
    """Return ‖d‖² of a mix, from ‖x‖², ⟨x, y⟩ and ‖y‖²."""
    a, b = mix
    return a * a * square_kept + b * (2 * a * product + b * square_last)


def direction_factor(norm: Number, scale: Number, max_norm: float) -> Number:
    """Return the factor of d, whose norm is ``norm``: 1 / scale, and what clips ‖d‖ / scale to max_norm.

    The loss was multiplied by scale, if that is not 0. As torch.nn.utils.clip_grad_norm_ has it.
    """
    unscaled = _ratio(1.0, scale) + (scale == 0)
    clip = max_norm / (norm * unscaled + 1e-6)
    return _where(clip < 1, clip, 1.0) * unscaled


class Direction(NamedTuple):
    """How an update's direction comes about, of all param groups: from the sums and a group's number, r, α, γ or σ."""

    rule: Rule
    summed: bool
    """Whether `SQUARE` and `PRODUCT` are of this step."""
    max_norm: float
    """Of d."""
    limit: float
    """Of what d is made of."""
    largest: float
    """Of the groups' numbers, by which all decide alike."""

    def of(self, sums: Sums, number: float, both: bool) -> Mix:
        """Return the mix of a tensor, which has ``both`` gradients, of the first pass and the last; else ĝ_min is 0."""
        if self.rule is Rule.BILATERAL:
            return bilateral(_norm_ratio(sums[MAX], sums[MIN]))
        if self.rule is Rule.EXTRAPOLATED:
            return extrapolated(_norm_ratio(sums[MAX], sums[MIN]), number) if both else Mix(1.0, 1.0)
        if self.rule is Rule.SURROGATE_GAP:
            return surrogate_gap(number, sums[PRODUCT], sums[MAX])
        if self.rule is Rule.WEIGHTED:
            return weighted(number)
        if self.rule is Rule.GIVEN:
            return Mix(sums[GIVEN_KEPT], sums[GIVEN_LAST])
        if self.rule is Rule.REUSED:
            return reused(number, sums[MAX], sums[SQUARE])
        return Mix(0.0, 1.0)

    def factor(self, sums: Sums) -> Number:
        """Return what all of d is multiplied by.

        With the extrapolated rule the sums are of g + g_max and ĝ_min, as if that was measured; the others' are of one
        mix, as groups' numbers may differ only where d is not clipped.
        """
        extrapolates = self.rule is Rule.EXTRAPOLATED
        mix = bilateral(_norm_ratio(sums[MAX], sums[MIN])) if extrapolates else self.of(sums, self.largest, True)
        square = sums[MIN if extrapolates else self.rule.last_slot]
        if self.rule.mixes:
            square = mixed_square(mix, sums[SQUARE], sums[PRODUCT], square)
        return direction_factor(_root(square), sums[SCALE], self.max_norm)

    def can_update(self, sums: Sums) -> bool | Tensor:
        """Return whether an update can be made: else the step is skipped."""
        finite = _is_finite(sums[ASCENT]) & _is_finite(sums[MAX]) & _is_finite(sums[MIN]) & _is_finite(sums[SCALE])
        return finite & self._is_within(sums)

    def _is_within(self, sums: Sums) -> bool | Tensor:
        """Whether no coefficient and no d, of any group, can be beyond the limit."""
        factor, longest_last = self.factor(sums), _root(sums[self.rule.last_slot])
        if not self.rule.mixes:
            within = (factor <= 1) | (factor * longest_last <= self.limit)
            return within & self._can_remember(sums) if self.rule.remembers else within
        a, b = self._most(sums, factor)
        longest = self._longest_kept(sums, a) + b * longest_last
        is_norm = factor > 0  # ‖d‖, by which d is clipped, is not beyond float64
        return is_norm & (a <= self.limit) & (b <= self.limit) & (longest <= self.limit)

    def _most(self, sums: Sums, factor: Number) -> Mix:
        """Return what |a| and |b| times ``factor``, of any group, are at most: they are monotonous in the number."""
        most = self.of(sums, self.largest, True).times(factor)
        least = self.of(sums, 0.0, self.rule is not Rule.EXTRAPOLATED).times(factor)
        return Mix(*(_larger(_larger(x, -x), _larger(y, -y)) for x, y in zip(most, least, strict=True)))

    def headroom(self, sums: Tensor) -> Tensor:
        """Return the power of two, 1 where it can be, by which d is divided not to be beyond the limit.

        Args:
            sums: (SLOTS, n), of n directions that are divided alike, of gradients whose elements are within the limit.
        """
        a, b = self._most(sums, 1.0)
        longest = a * self._norm_kept(sums) + b * _root(sums[self.rule.last_slot])
        none = torch.zeros_like(sums[MAX])
        times = torch.minimum(none + a + b, none + longest / self.limit)
        most = torch.where((times > 1) & (times < _OUT_OF_REACH), times, 0.5).max()  # of others the step is skipped
        return torch.ldexp(torch.ones_like(most), torch.frexp(most).exponent)

    def memory(self, sums: Sums, number: float, decay: float) -> Memory:
        """Return what the history becomes, of a group's numbers. Of what came, whatever d was scaled by."""
        if self.rule is Rule.ORTHOGONAL:
            return orthogonal(sums[PRODUCT], sums[SQUARE])
        return averaged(number, decay, sums[SQUARE])

    def _can_remember(self, sums: Sums) -> bool | Tensor:
        """Whether neither its coefficients nor it can be beyond the limit, of any group: λ is at most 1."""
        if self.rule is Rule.FRIENDLY:
            return _root(sums[PRODUCT]) + max(self.largest, 1.0) * _root(sums[SQUARE]) <= self.limit
        kept = self.memory(sums, 0.0, 0.0).kept
        kept = _larger(kept, -kept)
        return (kept <= self.limit) & (kept * _root(sums[SQUARE]) + _root(sums[MAX]) <= self.limit)

    def _longest_kept(self, sums: Sums, a: Number) -> Number:
        """Return what no element of a x, x what was kept, can be beyond.

        Of exact BSAM's x descend saw to limit / 2, which is enough but where the loss was scaled below 1: a is above 1.
        """
        longest = a * self._norm_kept(sums)
        return _where(a <= 1, a * (self.limit / 2), longest) if self.rule is Rule.BILATERAL else longest

    def _norm_kept(self, sums: Sums) -> Number:
        """Return what the norm of what was kept is at most."""
        square = sums[SQUARE if self.summed else ASCENT]
        if self.rule is Rule.BILATERAL:
            return _root(square) + _root(sums[MAX])
        return _root(square + sums[MAX] + sums[MIN] if self.rule is Rule.EXTRAPOLATED else square)


def _norm_ratio(square_x: Number, square_y: Number) -> Number:
    """Return x / y from their squares, and 0 where y = 0."""
    return _ratio(_root(square_x), _root(square_y))


# ---- elements


def both_gradients(g: Tensor, g_max: Tensor) -> Tensor:
    """Return what exact BSAM keeps of the first two passes: g + g_max."""
    return g + g_max


def extrapolated_gradient(g: Tensor, g_max: Tensor, r: float) -> Tensor:
    """Return ĝ_min = g − r (g_max − g)."""
    return g + r * (g - g_max)


def friendly_gradient(g: Tensor, m: Tensor, sigma: float) -> Tensor:
    """Return Friendly SAM's q = g − σ m: g without the part that the batches have in common."""
    return g - sigma * m
