"""The operators in plain torch, on any device and of any dtype, a tensor at a time.

Nothing here reads a device value on the host: whether a step is skipped is chosen elementwise, so that a GPU is never
waited for. What is readable, and has each formula as the papers have it, is the tests' oracle, tests/reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bsam_fused.ops import rounding
from bsam_fused.ops.contract import (
    ASCENT,
    MASTER_WEIGHT,
    MAX,
    MIN,
    PRODUCT,
    SQUARE,
    AdamScalars,
    Radius,
    Rule,
    SGDScalars,
)
from bsam_fused.ops.directions import (
    Memory,
    Mix,
    Number,
    both_gradients,
    extrapolated_gradient,
    friendly_gradient,
    is_out_of_reach,
    step_length,
)
from bsam_fused.ops.flat_params import Call, PythonFlatParams, Update, pick


class Next(NamedTuple):
    """What a rule makes of a parameter: not rounded yet."""

    w: Tensor
    state: Mapping[str, Tensor]


BaseRule = Callable[[int, Tensor, Tensor], Next]
"""(parameter, w, d) -> what an update makes of it."""


def adaptivity(w: Tensor, g: Tensor, eta: float) -> Tensor:
    """Return T = |w| + η, and 0 where g is: nothing counts or moves there, even if w is infinite. ASAM."""
    return torch.where(g == 0, 0.0, w.abs() + eta)


def perturbed(w: Tensor, g: Tensor, step: Tensor | float, radius: Radius, dtype: torch.dtype | None = None) -> Tensor:
    """Return w + step T² g, T = |w| + η if adaptive, else 1; w where that is beyond ``dtype``. SAM, ASAM, BSAM."""
    if radius.adaptive:
        t = adaptivity(w, g, radius.eta)
        moved = w + step * t * (t * g)
    else:
        moved = w + step * g
    return torch.where(moved.abs() <= torch.finfo(dtype or w.dtype).max, moved, w)


def bounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x as far as ``dtype`` can store it: at most its largest number, but where x is none."""
    most = torch.finfo(dtype).max
    return torch.where(x.isfinite() & (x.abs() > most), x.sign() * most, x)


def is_too_long(g_plus_g_max: Tensor) -> Tensor:
    """Return where d may be beyond what it is computed in, from g + g_max, if c g_min is at most half as long."""
    s = g_plus_g_max.to(torch.promote_types(g_plus_g_max.dtype, torch.float32))
    return ~(s + s).isfinite()


def decayed(d: Tensor, w: Tensor, weight_decay: float) -> Tensor:
    """Return d + weight_decay w; where there is no decay, d: 0 · ∞ is no number."""
    return d + weight_decay * w if weight_decay else d


class TorchFlatParams(PythonFlatParams):
    """`contract.FlatParams` in plain torch."""

    def __init__(
        self, params: Sequence[Tensor], places: Sequence[tuple[int, int]], seed: int | None, exempt: bool
    ) -> None:
        super().__init__(params, places, seed, exempt)
        self._compute = torch.promote_types(self.dtype, torch.float32)

    def _rounded(self, i: int, operand: int, x: Tensor, ahead: int = 0) -> Tensor:
        """Return x, of the i-th parameter's shape, in its dtype; ``ahead``: how many steps `step_count` is behind."""
        if self._keys:
            at = torch.arange(x.numel(), device=self.device).as_strided(x.shape, self._strides[i])
            bits = rounding.random_bits(self._keys[i], self.step_count + ahead, operand, at)
            x = rounding.rounded(x, self.dtype, bits)
        return x.to(self.dtype)

    def _run_square_norm(self, slot: int, radii: Sequence[Radius]) -> None:
        """Σ (T g)²."""
        self.sums[slot] = self._scaled_sum(self._now, radii)

    def _scaled_sum(self, gradients: Mapping[int, Tensor], radii: Sequence[Radius]) -> Number:
        """Return Σ (T g)²."""
        scaled = []
        for i, g in gradients.items():
            radius, w = radii[self.places[i][0]], self._weights(i).to(self.sums.dtype)
            scaled.append(adaptivity(w, g, radius.eta) * g if radius.adaptive else g)
        return self._square_sum(scaled)

    def _square_sum(self, tensors: list[Tensor]) -> Number:
        """Return Σ x²."""
        return torch.stack(torch._foreach_norm(tensors, 2, dtype=self.sums.dtype)).square().sum() if tensors else 0.0

    def _run_mix(self, radii: Sequence[Radius]) -> None:
        """q = g − σ m, into g; Σ (T q)², Σ m², Σ q²."""
        history = self._history()
        for i, g in self._now.items():
            sigma = self._numbers_of(self.places[i][0]).number
            q = friendly_gradient(g.to(self._compute), history[i].to(self._compute), sigma)
            self._g[i].copy_(bounded(q, self.dtype))
        self.sums[ASCENT] = self._scaled_sum(self._g, radii)
        self.sums[SQUARE] = self._square_sum([history[i] for i in self._now])
        self.sums[PRODUCT] = self._square_sum(list(self._g.values()))

    def _square_norm(self, slot: int) -> None:
        """Σ g²."""
        self._run_square_norm(slot, [Radius(0.0)] * (1 + max(group for group, _ in self.places)))

    def _run_direction_sums(self) -> None:
        """Σ y², Σ x², Σ x y of d = a x + b y; of g_max and ĝ_min, where that is extrapolated."""
        rule, zero = self._mixing.rule, torch.zeros((), dtype=self.sums.dtype, device=self.device)
        self._square_norm(rule.last_slot)
        squares, products, of_min = [zero], [zero], [zero]
        for i in self._members():
            x, y = (zero if t is None else t.to(zero.dtype) for t in (self._g.get(i), self._now.get(i)))
            if rule is Rule.EXTRAPOLATED:
                r = self._numbers_of(self.places[i][0]).number
                x, y = both_gradients(x, y), extrapolated_gradient(x, y, r) if self._has_both(i) else zero
                of_min.append(y.square().sum())
            squares.append(x.square().sum())
            products.append((x * y).sum())
        self.sums[SQUARE], self.sums[PRODUCT] = sum(squares), sum(products)
        if rule is Rule.EXTRAPOLATED:
            self.sums[MIN] = sum(of_min)

    def _take(self) -> None:
        """Copy: who else holds a gradient is not worth finding out here."""
        new = [i for i in self._now if i not in self._g]
        if new:
            torch._foreach_copy_([self._kept(i) for i in new], [self._now[i] for i in new])
        self._g.update((i, self._kept(i)) for i in new)

    def _run_ascend(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float) -> None:
        self._save(list(self._now))
        beyond = self._is_out_of_reach(sums, radii, norm_eps)
        self.sums[ASCENT].masked_fill_(beyond, math.nan)
        self._perturb(rounding.TO_MAX, sums, radii, norm_eps, sums[ASCENT].isfinite() & ~beyond, self._now)

    def _run_descend(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float) -> None:
        self._square_norm(MAX)
        self.sums[MAX].masked_fill_(self._is_out_of_reach(sums, radii, norm_eps), math.nan)
        finite = sums[ASCENT].isfinite() & self.sums[MAX].isfinite()
        self._perturb(rounding.TO_MIN, sums, radii, norm_eps, finite, {i: self._g[i] for i in self._perturbed})
        both = [i for i in self._now if i in self._ascended]
        if both:
            torch._foreach_add_([self._g[i] for i in both], [self._now[i] for i in both])
        if self._ascended:
            too_long = torch.stack([is_too_long(self._g[i]).any() for i in self._ascended]).any()
            self.sums[MAX].masked_fill_(too_long, math.nan)

    def _is_out_of_reach(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float) -> Tensor:
        return torch.as_tensor(is_out_of_reach(radii[0], sums[ASCENT], norm_eps, self.limit), device=self.device)

    def _perturb(
        self,
        operand: int,
        sums: Tensor,
        radii: Sequence[Radius],
        norm_eps: float,
        finite: Tensor,
        gradients: Mapping[int, Tensor],
    ) -> None:
        steps = [
            torch.as_tensor(step_length(r, sums[ASCENT], norm_eps), device=self.device).to(self._compute) for r in radii
        ]
        for i, g in gradients.items():
            group, w = self.places[i][0], self._view("saved", i).to(self._compute)
            moved = perturbed(w, g.to(self._compute), steps[group], radii[group], self.dtype)
            moved = torch.where(finite, moved, w)
            self._weights(i).copy_(self._rounded(i, operand, moved))

    def _mixed(self, i: int, mixes: Callable[[int, bool], Mix]) -> Tensor:
        """Return d = a x + b y; a missing gradient is zero."""
        zero = torch.zeros((), dtype=self._compute, device=self.device)
        mix = mixes(self.places[i][0], self._has_both(i))
        a, b = (torch.as_tensor(x, dtype=self._compute, device=self.device) for x in mix)
        last = b * self._now.get(i, zero).to(self._compute)
        return a * self._g.get(i, zero).to(self._compute) + last if self._mixing.rule.mixes else last

    def _run(
        self, update: Update, signs: Sequence[float], members: list[int], counted: Sequence[int], rule: BaseRule
    ) -> None:
        """Work out everything that is to be written, then write it in one go. ``signs``: of d, a param group."""
        finite = torch.as_tensor(self._direction(update.max_norm).can_update(update.sums), device=self.device)
        mixes = self._mixes(update.sums, update.max_norm, signs)
        # The weights before the step are in saved only where they were perturbed.
        before = {i: self._weights(i) for i in members} | {i: self._view("saved", i) for i in self._perturbed}
        written: list[tuple[Tensor, Tensor]] = []
        for i, kept in before.items():
            start = kept if update.from_saved else self._weights(i)
            master = self._view(MASTER_WEIGHT, i) if MASTER_WEIGHT in self._buffers else None
            w = start.to(self._compute) if master is None else rounding.update_start(start, master)
            new = rule(i, w, self._mixed(i, mixes))
            x = torch.where(finite, new.w, kept.to(self._compute))
            if master is not None:
                written.append((master, torch.where(finite, new.w, master)))
            written.append(
                (self._weights(i), x.to(self.dtype) if master is not None else self._rounded(i, rounding.WEIGHT, x))
            )
            for operand, (key, value) in enumerate(new.state.items(), rounding.FIRST_STATE):
                state = self._view(key, i)
                written.append((state, torch.where(finite, self._rounded(i, operand, value), state)))
        if self._remembering():
            history, remembered = self._history(), self._run_remember(update.sums, update.max_norm)
            written += [(history[i], torch.where(finite, x, history[i])) for i, x in remembered.items()]
        writes: list[Call] = []
        if written:
            writes.append(partial(torch._foreach_copy_, *map(list, zip(*written, strict=True))))  # type: ignore[arg-type]
        if counted:
            made = [finite.to(self._steps.dtype)] * len(counted)
            writes.append(partial(torch._foreach_add_, pick(self._list("step"), counted), made))
        self._commit(
            *writes,
            *self._written(members),
            partial(self.skipped.add_, ~finite),
            partial(self.step_count.add_, 1),
        )

    def _run_sgd(self, update: Update, groups: Sequence[SGDScalars], members: list[int]) -> None:
        def rule(i: int, w: Tensor, d: Tensor) -> Next:
            o = groups[self.places[i][0]]
            d = decayed(d, w, o.weight_decay)
            if not o.momentum:
                return Next(w - o.lr * d, {})
            averaged = o.momentum * self._view("momentum_buffer", i).to(self._compute) + (1 - o.dampening) * d
            m = torch.where(self._steps[i] == 0, d, averaged)
            d = d + o.momentum * m if o.nesterov else m
            return Next(w - o.lr * d, {"momentum_buffer": m})

        counted = [i for i in members if groups[self.places[i][0]].stateful]
        self._run(update, signs(groups), members, counted, rule)

    def _run_adam(self, update: Update, groups: Sequence[AdamScalars], members: list[int]) -> None:
        def rule(i: int, w: Tensor, d: Tensor) -> Next:
            o = groups[self.places[i][0]]
            if o.decoupled:
                w = w * (1 - o.lr * o.weight_decay)
            else:
                d = decayed(d, w, o.weight_decay)
            m, v = self._view("exp_avg", i).to(self._compute), self._view("exp_avg_sq", i).to(self._compute)
            m, v = m + (1 - o.beta1) * (d - m), o.beta2 * v + (1 - o.beta2) * d.square()
            t = self._steps[i].to(self.sums.dtype) + 1
            step_size = (o.lr / (1 - o.beta1**t)).to(self._compute)
            correction = (1 - o.beta2**t).sqrt().to(self._compute)
            return Next(w - step_size * m / (v.sqrt() / correction + o.eps), {"exp_avg": m, "exp_avg_sq": v})

        self._run(update, signs(groups), members, members, rule)

    def _run_direction(self, sums: Tensor, max_norm: float) -> dict[int, Tensor]:
        mixes = self._mixes(sums, max_norm)
        return {i: self._empty(i).copy_(self._mixed(i, mixes)) for i in self._members()}

    def _run_remember(self, sums: Tensor, max_norm: float) -> dict[int, Tensor]:
        """Return what the history becomes, of those `_remembering`, beside it."""
        history, memory, ahead = self._history(), self._memories(sums), 1
        return {
            i: self._rounded(i, rounding.TO_HISTORY, self._recalled(i, history[i], memory(self.places[i][0])), ahead)
            for i in self._remembering()
        }

    def _recalled(self, i: int, history: Tensor, memory: Memory) -> Tensor:
        """Return kept · x + last · y + history · h, of what counts."""
        total = torch.zeros_like(history, dtype=self._compute)
        for factor, x in zip(memory, (self._g.get(i), self._now.get(i), history), strict=True):
            if x is not None:
                factor = torch.as_tensor(factor, dtype=self._compute, device=self.device)
                total = torch.where(factor == 0, total, total + factor * x.to(self._compute))
        return bounded(total, self.dtype)


def signs(groups: Sequence[SGDScalars] | Sequence[AdamScalars]) -> list[float]:
    """Return d's sign a param group: maximize's."""
    return [-1.0 if o.maximize else 1.0 for o in groups]
