"""The operators in plain torch on a CPU: a call over all tensors a formula, and torch's own fused updates.

On a CPU the host reads sums for nothing, so what is to be done is decided there, and scales are Python's floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from bsam_fused.ops import holders
from bsam_fused.ops.contract import (
    ASCENT,
    MAX,
    AdamScalars,
    Radius,
    SGDScalars,
)
from bsam_fused.ops.flat_params import SMALL_BYTES, Call, DirectionScales, Update, pick
from bsam_fused.ops.torch_flat import TorchFlatParams, adaptivity, is_too_long, perturbed

BLOCK = 1 << 14  # elements that are summed in their own dtype
LARGE = 1 << 16  # elements from which on a tensor is summed in blocks
SMALL = 1024  # elements of tensors that are summed together
MANY = 32  # from so many tensors on, small ones are worth putting together
LEAST, MOST = 1e-10, 1e18  # between these norms squares neither vanish from float32 nor overflow it

Tensors = list[Tensor]
Options = TypeVar("Options", SGDScalars, AdamScalars)


def sum_of_squares(tensors: Tensors) -> float:
    """Return Σ x² of dense tensors: of blocks in their dtype, many small tensors together, of all blocks in float64."""
    pieces = tensors
    if len(tensors) >= MANY:
        pieces = [x for x in tensors if x.numel() > SMALL]
        if len(pieces) < len(tensors):
            pieces.append(torch._utils._flatten_dense_tensors([x for x in tensors if x.numel() <= SMALL]))
    large = [x for x in pieces if x.numel() > LARGE]
    if not large:
        return _sum_of_pieces(pieces)
    rows = [x.as_strided((x.numel() // BLOCK, BLOCK), (BLOCK, 1)) for x in large]
    rests = [x.as_strided((x.numel(),), (1,))[blocks.numel() :] for x, blocks in zip(large, rows, strict=True)]
    return _sum_of_pieces([x for x in pieces if x.numel() <= LARGE] + rests) + sum(map(_sum_of_rows, rows))


def _sum_of_pieces(pieces: Tensors) -> float:
    norms = [norm.item() for norm in torch._foreach_norm(pieces)] if pieces else []
    if norms and not (min(norms) > LEAST and max(norms) < MOST):
        outside = [i for i, norm in enumerate(norms) if not LEAST < norm < MOST]
        for i, norm in zip(outside, torch._foreach_norm(pick(pieces, outside), dtype=torch.float64), strict=True):
            norms[i] = norm.item()
    return sum([norm * norm for norm in norms])


def _sum_of_rows(rows: Tensor) -> float:
    norms = torch.linalg.vector_norm(rows, dim=1).tolist()
    if not (min(norms) > LEAST and max(norms) < MOST):
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).tolist()
    return sum([norm * norm for norm in norms])


def perturb(ws: Tensors, gs: Tensors, step: float, radius: Radius) -> Call:
    """Prepare w = w + step T² g, T = |w| + η if adaptive, else 1. SAM, ASAM, BSAM."""
    numbers = torch.finfo(ws[0].dtype)
    if not radius.adaptive and abs(radius.radius) < numbers.max * numbers.eps / 4:  # |w_max − w|: too short to overflow
        return partial(torch._foreach_add_, ws, gs, alpha=step)
    return partial(torch._foreach_copy_, ws, [perturbed(w, g, step, radius) for w, g in zip(ws, gs, strict=True)])


def sgd(ws: Tensors, ds: Tensors, ms: Tensors, o: SGDScalars, first: bool) -> Call:
    """Prepare torch.optim.SGD's rule; ``first``: the momentum starts as d."""
    return partial(
        torch._fused_sgd_,
        ws,
        ds,
        ms,
        lr=o.lr,
        momentum=o.momentum,
        dampening=o.dampening,
        weight_decay=o.weight_decay,
        nesterov=o.nesterov,
        maximize=o.maximize,
        is_first_step=first,
    )


def adam(ws: Tensors, ds: Tensors, ms: Tensors, vs: Tensors, steps: Tensors, o: AdamScalars) -> Call:
    """Prepare torch.optim.Adam's and AdamW's rule; ``steps``: this one counted."""
    return partial(
        torch._fused_adamw_ if o.decoupled else torch._fused_adam_,
        ws,
        ds,
        ms,
        vs,
        [],
        steps,
        lr=o.lr,
        beta1=o.beta1,
        beta2=o.beta2,
        weight_decay=o.weight_decay,
        eps=o.eps,
        amsgrad=False,
        maximize=o.maximize,
    )


class TorchListFlatParams(TorchFlatParams):
    """`contract.FlatParams` in plain torch, of float32 and float64 on a CPU."""

    @torch.no_grad()
    def __init__(self, params: Sequence[Tensor], places: Sequence[tuple[int, int]], seed: int | None) -> None:
        super().__init__(params, places, seed)
        self._slots = self.sums.unbind()
        self._of_group: dict[int, list[int]] = {}
        for i, (group, _) in enumerate(places):
            self._of_group.setdefault(group, []).append(i)

    def _grouped(self, members: Collection[int]) -> dict[int, list[int]]:
        """Return param group -> those of ``members`` in it."""
        if len(members) == len(self.params):
            return self._of_group
        wanted = set(members)
        groups = {group: [i for i in own if i in wanted] for group, own in self._of_group.items()}
        return {group: own for group, own in groups.items() if own}

    def _weights_of(self, members: Sequence[int]) -> Tensors:
        return [self._weights(i) for i in members] if self._packed else pick(self.params, members)

    def square_norm(self, slot: int, radii: Sequence[Radius]) -> None:
        """Σ (T g)²."""
        total: float
        if any(radius.adaptive for radius in radii):
            total = sum([self._adaptive_sum(radii[group], own) for group, own in self._grouped(self._now).items()])
        else:
            total = sum_of_squares(list(self._now.values()))
        self._slots[slot].fill_(total)

    @torch.no_grad()
    def _adaptive_sum(self, radius: Radius, members: Sequence[int]) -> float:
        gs = [self._now[i] for i in members]
        if radius.adaptive:
            gs = [adaptivity(w, g, radius.eta) * g for w, g in zip(self._weights_of(members), gs, strict=True)]
        return sum_of_squares(gs)

    def _take(self) -> None:
        """Take large gradients that nobody else can see; copy the others."""
        copied = []
        for i in self._now:
            if i in self._g:
                continue
            if self._bytes[i] <= SMALL_BYTES or not self._is_ours(i):
                copied.append(i)
            else:
                self._g[i] = self._now[i]
        if copied:
            kept = [self._kept(i) for i in copied]
            torch._foreach_copy_(kept, [self._now[i] for i in copied])
            self._g.update(zip(copied, kept, strict=True))

    def _is_ours(self, i: int) -> bool:
        grad = self.params[i].grad
        staged, part_of_a_graph = grad is not self._now[i], grad is None or grad.requires_grad
        del grad  # it would count as a holder
        return staged or not (part_of_a_graph or holders.held_elsewhere(self._now, i))

    def _run_ascend(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float) -> None:
        self._save(list(self._now))
        self._perturb_all(ASCENT, sums, radii, norm_eps, self._now)

    def _run_descend(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float) -> None:
        self.square_norm(MAX, [Radius(0.0)] * len(radii))
        if self._perturbed:
            self._reset()()
        if math.isfinite(self._slots[MAX].item()):
            self._perturb_all(MAX, sums, radii, norm_eps, {i: self._g[i] for i in self._perturbed})
        both = [i for i in self._perturbed if i in self._now]
        if both:
            so_far = [self._g[i] for i in both]
            torch._foreach_add_(so_far, [self._now[i] for i in both])
            if not self._are_short(sums, radii) and any(bool(is_too_long(s).any()) for s in so_far):
                self._slots[MAX].fill_(math.nan)

    def _are_short(self, sums: Tensor, radii: Sequence[Radius]) -> bool:
        """Return whether the norms of g and g_max alone say that no g + g_max is too long."""
        adaptive = any(radius.adaptive for radius in radii)
        longest = math.sqrt(max(sums[ASCENT].item(), self._slots[MAX].item()))
        return not adaptive and longest < torch.finfo(self.dtype).max / 4

    def _reset(self) -> Call:
        """Prepare w = saved, where a phase works on it."""
        saved = pick(self._list("saved"), self._perturbed)
        return partial(torch._foreach_copy_, self._weights_of(self._perturbed), saved)

    def _perturb_all(
        self, slot: int, sums: Tensor, radii: Sequence[Radius], norm_eps: float, gradients: dict[int, Tensor]
    ) -> None:
        """Perturb all; out of reach none, which is noted in ``slot``."""
        length = math.sqrt(sums[ASCENT].item()) + norm_eps
        if not math.isfinite(length):
            return
        if length and radii[0].largest / length > self.limit:
            self._slots[slot].fill_(math.nan)
            return
        for group, members in self._grouped(gradients).items():
            step = radii[group].radius / length if length else 0.0
            gs = [gradients[i] for i in members]
            perturb(self._weights_of(members), gs, step, radii[group])()

    def _directions(self, members: Sequence[int], scales: DirectionScales) -> tuple[dict[int, Tensor], list[Call]]:
        """Return d of every member, once the calls were made: g is written to, this pass's gradients are not."""
        c, factor = scales
        if not self._bilateral and factor == 1 and len(members) == len(self._now):
            return self._now, []
        none = [i for i in members if i not in self._now and i not in self._g]
        made = {i: torch.zeros_like(self._empty(i)) for i in none}
        if not self._bilateral:
            last = self._now if factor == 1 or not self._now else scaled(self._now, factor)
            return {**last, **made}, []
        new = {i: g for i, g in self._now.items() if i not in self._g}
        made.update(scaled(new, -c) if new else {})
        both = [i for i in self._g if i in self._now]
        calls: list[Call] = []
        if both:
            calls.append(
                partial(torch._foreach_add_, [self._g[i] for i in both], [self._now[i] for i in both], alpha=-c)
            )
        ds = {**self._g, **made}
        if factor != 1 and ds:
            calls.append(partial(torch._foreach_mul_, list(ds.values()), factor))
        return ds, calls

    def _update(
        self,
        update: Update,
        groups: Sequence[Options],
        members: list[int],
        rule: Callable[[Options, list[int], Tensors, Tensors], list[Call]],
    ) -> None:
        count = partial(self.step_count.add_, 1)
        scales = self._scales(update.sums, update.max_norm)
        if scales is None:
            self._commit(*self._put_back(), partial(self.skipped.add_, 1), count)
            return
        ds, writes = self._directions(members, scales)
        if update.from_saved and self._perturbed:
            writes.append(self._reset())
        grouped = self._grouped(members)
        counted = [i for group, own in grouped.items() if groups[group].stateful for i in own]
        if len(counted) == len(self.params):
            writes.append(partial(self._steps.add_, 1.0))
        elif counted:
            writes.append(partial(torch._foreach_add_, pick(self._list("step"), counted), 1.0))
        for group, own in grouped.items():
            writes += rule(groups[group], own, self._weights_of(own), [ds[i] for i in own])
        moved = partial(torch._C._increment_version, pick(self.params, members))
        self._commit(*writes, moved, *self._written(members), count)

    def _run_sgd(self, update: Update, groups: Sequence[SGDScalars], members: list[int]) -> None:
        steps = self._steps.tolist()

        def rule(o: SGDScalars, own: list[int], ws: Tensors, ds: Tensors) -> list[Call]:
            if not o.momentum:
                return [sgd(ws, ds, [], o, False)]
            ms = pick(self._list("momentum_buffer"), own)
            if all(steps):
                return [sgd(ws, ds, ms, o, False)]
            parts = {first: [k for k, i in enumerate(own) if (steps[i] == 0) == first] for first in (False, True)}
            return [sgd(pick(ws, ks), pick(ds, ks), pick(ms, ks), o, first) for first, ks in parts.items() if ks]

        self._update(update, groups, members, rule)

    def _run_adam(self, update: Update, groups: Sequence[AdamScalars], members: list[int]) -> None:
        def rule(o: AdamScalars, own: list[int], ws: Tensors, ds: Tensors) -> list[Call]:
            ms, vs, steps = (pick(self._list(key), own) for key in ("exp_avg", "exp_avg_sq", "step"))
            return [adam(ws, ds, ms, vs, steps, o)]

        self._update(update, groups, members, rule)

    def _run_direction(self, sums: Tensor, max_norm: float) -> dict[int, Tensor]:
        ds, calls = self._directions(self._members(), DirectionScales.of(sums.tolist(), self._bilateral, max_norm))
        for call in calls:
            call()
        for i in ds:
            self._own.pop(i, None)  # it may be d now, which others will have
        return {i: d for i, d in ds.items() if d is not self.params[i].grad}


def scaled(tensors: dict[int, Tensor], factor: float) -> dict[int, Tensor]:
    """Return factor x."""
    return dict(zip(tensors, torch._foreach_mul(list(tensors.values()), factor), strict=True))


def flat_params(params: Sequence[Tensor], places: Sequence[tuple[int, int]], seed: int | None) -> TorchFlatParams:
    """Return `contract.FlatParams` in plain torch: over lists where that is possible, else a tensor at a time."""
    on_lists = params[0].device.type == "cpu" and params[0].dtype.itemsize >= torch.float32.itemsize
    return (TorchListFlatParams if on_lists else TorchFlatParams)(params, places, seed)
