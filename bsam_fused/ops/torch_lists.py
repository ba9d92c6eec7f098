"""The operators in plain torch on a CPU: a call over all tensors a formula, and torch's own fused updates.

On a CPU the host reads sums for nothing, so what is to be done is decided there, and scales are Python's floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from bsam_fused.ops import holders
from bsam_fused.ops.contract import (
    ASCENT,
    MAX,
    MIN,
    PRODUCT,
    SQUARE,
    AdamScalars,
    Radius,
    Rule,
    SGDScalars,
)
from bsam_fused.ops.directions import Mix, Number, is_out_of_reach, step_length
from bsam_fused.ops.flat_params import SMALL_BYTES, Call, Update, pick
from bsam_fused.ops.torch_flat import TorchFlatParams, adaptivity, is_too_long, perturbed

BLOCK = 1 << 14  # elements that are summed in their own dtype
LARGE = 1 << 16  # elements from which on a tensor is summed in blocks
SMALL = 1024  # elements of tensors that are summed together
MANY = 32  # from so many tensors on, small ones are worth putting together
LEAST, MOST = 1e-10, 1e18  # between these norms squares neither vanish from float32 nor overflow it

Tensors = list[Tensor]
Directions = dict[int, Tensor]
Calls = list[Call]
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


def sum_of_products(xs: Tensors, ys: Tensors) -> float:
    """Return Σ x y of pairs of dense tensors, likewise: small ones together, in float64."""
    pairs = list(zip(xs, ys, strict=True))
    small = [[t for t in side if t.numel() <= BLOCK] for side in (xs, ys)]
    total = torch.dot(*map(_together, small)).item() if small[0] else 0.0
    return total + sum([_product_of_rows(x, y) for x, y in pairs if x.numel() > BLOCK])


def _together(tensors: Tensors) -> Tensor:
    return torch._utils._flatten_dense_tensors(tensors).double()


def _product_of_rows(x: Tensor, y: Tensor) -> float:
    whole = x.numel() // BLOCK * BLOCK
    a, b = (t.as_strided((t.numel(),), (1,)) for t in (x, y))
    if not all(LEAST < norm.item() < MOST for norm in torch._foreach_norm([a, b])):
        a, b = a.double(), b.double()
    rows = torch.linalg.vecdot(a[:whole].view(-1, BLOCK), b[:whole].view(-1, BLOCK))
    return rows.sum(dtype=torch.float64).item() + torch.dot(a[whole:], b[whole:]).item()


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
    def __init__(
        self, params: Sequence[Tensor], places: Sequence[tuple[int, int]], seed: int | None, exempt: bool
    ) -> None:
        super().__init__(params, places, seed, exempt)
        self._slots = self.sums.unbind()
        self._scales = False  # ‖T g‖ of this step's ascent is not ‖g‖
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

    def _run_square_norm(self, slot: int, radii: Sequence[Radius]) -> None:
        """Σ (T g)²."""
        self._slots[slot].fill_(self._scaled_sum(self._now, radii))

    def _scaled_sum(self, gradients: Mapping[int, Tensor], radii: Sequence[Radius]) -> float:
        """Return Σ (T g)²: a param group at a time where that takes memory."""
        if not any(radius.adaptive for radius in radii):
            return sum_of_squares(list(gradients.values()))
        grouped = self._grouped(gradients).items()
        return sum([self._adaptive_sum(radii[group], own, [gradients[i] for i in own]) for group, own in grouped])

    def _adaptive_sum(self, radius: Radius, members: Sequence[int], gs: Tensors) -> float:
        if radius.adaptive:
            gs = [adaptivity(w, g, radius.eta) * g for w, g in zip(self._weights_of(members), gs, strict=True)]
        return sum_of_squares(gs)

    def _run_mix(self, radii: Sequence[Radius]) -> None:
        """q = g − σ m, into g; Σ (T q)², Σ m², Σ q², of lists."""
        history = self._history()
        for group, own in self._grouped(self._now).items():
            qs = [self._g[i] for i in own]
            torch._foreach_copy_(qs, [self._now[i] for i in own])
            torch._foreach_add_(qs, [history[i] for i in own], alpha=-self._numbers_of(group).number)
        self._slots[ASCENT].fill_(self._scaled_sum(self._g, radii))
        self._slots[SQUARE].fill_(sum_of_squares([history[i] for i in self._now]))
        self._slots[PRODUCT].fill_(sum_of_squares(list(self._g.values())))

    def _run_direction_sums(self) -> None:
        """Σ y², Σ x², Σ x y of d = a x + b y, of lists."""
        rule = self._mixing.rule
        self._square_norm(rule.last_slot)
        both = [i for i in self._g if i in self._now]
        xs, ys = [self._g[i] for i in both], [self._now[i] for i in both]
        alone = [g for i, g in self._g.items() if i not in self._now]
        if rule is Rule.EXTRAPOLATED:
            alone += [g_max for i, g_max in self._now.items() if i not in self._g]
            rs = [self._numbers_of(self.places[i][0]).number for i in both]
            xs, ys = both_gradients(xs, ys), extrapolated(xs, ys, rs)
            self._slots[MIN].fill_(sum_of_squares(ys))
        self._slots[SQUARE].fill_(sum_of_squares(xs + alone))
        self._slots[PRODUCT].fill_(sum_of_products(xs, ys))

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
        self._scales = any(radius.adaptive for radius in radii)
        self._perturb_all(ASCENT, sums, radii, norm_eps, self._now)

    def _run_descend(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float) -> None:
        self._square_norm(MAX)
        if self._perturbed:
            self._reset()()
        if math.isfinite(self._slots[MAX].item()):
            self._perturb_all(MAX, sums, radii, norm_eps, {i: self._g[i] for i in self._perturbed})
        both = [i for i in self._now if i in self._ascended]
        if both:
            torch._foreach_add_([self._g[i] for i in both], [self._now[i] for i in both])
        if not self._are_short(sums) and any(bool(is_too_long(self._g[i]).any()) for i in self._ascended):
            self._slots[MAX].fill_(math.nan)

    def _are_short(self, sums: Tensor) -> bool:
        """Return whether the norms of g and g_max alone say that no g + g_max is too long."""
        unknown = self._exempt or self._scales
        longest = math.sqrt(max(sums[ASCENT].item(), self._slots[MAX].item()))
        return not unknown and longest < torch.finfo(self.dtype).max / 4

    def _reset(self) -> Call:
        """Prepare w = saved, where a phase works on it."""
        saved = pick(self._list("saved"), self._perturbed)
        return partial(torch._foreach_copy_, self._weights_of(self._perturbed), saved)

    def _perturb_all(
        self, slot: int, sums: Tensor, radii: Sequence[Radius], norm_eps: float, gradients: dict[int, Tensor]
    ) -> None:
        """Perturb all; out of reach none, which is noted in ``slot``."""
        sum_ascent = sums[ASCENT].item()
        if not math.isfinite(sum_ascent):
            return
        if is_out_of_reach(radii[0], sum_ascent, norm_eps, self.limit):
            self._slots[slot].fill_(math.nan)
            return
        for group, members in self._grouped(gradients).items():
            step = float(step_length(radii[group], sum_ascent, norm_eps))
            gs = [gradients[i] for i in members]
            perturb(self._weights_of(members), gs, step, radii[group])()

    def _directions(self, members: Sequence[int], sums: Sequence[float], max_norm: float) -> tuple[Directions, Calls]:
        """Return d of every member, once the calls were made: g is written to, gradients and history are not."""
        mixes = self._mixes(sums, max_norm)
        if self._mixing.rule.mixes:
            return self._mixed_lists(members, mixes)
        factor = mixes(0, True).last
        if factor == 1 and len(members) == len(self._now):
            return self._now, []
        made = {i: torch.zeros_like(self._empty(i)) for i in members if i not in self._now}
        return {**(self._now if factor == 1 or not self._now else scaled(self._now, factor)), **made}, []

    def _mixed_lists(self, members: Sequence[int], mixes: Callable[[int, bool], Mix]) -> tuple[Directions, Calls]:
        """Return d = a x + b y of every member, likewise: a call or two over all tensors of one mix."""
        alike: dict[Mix, list[int]] = {}
        for group, own in self._grouped(members).items():
            for both, some in self._by_gradients(own):
                alike.setdefault(mixes(group, both), []).extend(some)
        made: Directions = {}
        calls: Calls = []
        for (a, b), some in alike.items():
            kept = {i: self._g[i] for i in some if i in self._g}
            new = {i: self._now[i] for i in some if i not in self._g}
            if kept and self._mixing.rule is Rule.REUSED:
                kept = scaled(kept, a)
            elif kept and a != 1:
                calls.append(partial(torch._foreach_mul_, list(kept.values()), a))
            pairs = [(d, self._now[i]) for i, d in kept.items() if i in self._now]
            if pairs:
                calls.append(partial(torch._foreach_add_, *map(list, zip(*pairs, strict=True)), alpha=b))
            made.update({**kept, **(scaled(new, b) if new else {})})
        return made, calls

    def _by_gradients(self, members: list[int]) -> list[tuple[bool, list[int]]]:
        """Return those with both gradients, and the others, where the rule makes a difference."""
        if self._mixing.rule is not Rule.EXTRAPOLATED:
            return [(True, members)]
        return [(both, [i for i in members if self._has_both(i) == both]) for both in (True, False)]

    def _update(
        self,
        update: Update,
        groups: Sequence[Options],
        members: list[int],
        rule: Callable[[Options, list[int], Tensors, Tensors], list[Call]],
    ) -> None:
        count = partial(self.step_count.add_, 1)
        sums = update.sums.tolist()
        if not self._direction(update.max_norm).can_update(sums):
            self._commit(*self._put_back(), partial(self.skipped.add_, 1), count)
            return
        ds, writes = self._directions(members, sums, update.max_norm)
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
        writes += self._writing_history(update.sums, update.max_norm)
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
        ds, calls = self._directions(self._members(), sums.tolist(), max_norm)
        for call in calls:
            call()
        self._own = {i: own for i, own in self._own.items() if own is not ds.get(i)}  # others will have d
        return {i: d for i, d in ds.items() if d is not self.params[i].grad}

    def _run_remember(self, sums: Tensor, max_norm: float) -> dict[int, Tensor]:
        """Return what the history becomes, of those `_remembering`, beside it: kept x + last y + history h."""
        memory, history = self._memories(sums.tolist()), dict(enumerate(self._history()))
        new = {i: torch.zeros_like(history[i]) for i in self._remembering()}
        for group, own in self._grouped(new).items():
            for factor, xs in zip(memory(group), (self._g, self._now, history), strict=True):
                there = [i for i in own if i in xs] if factor else []
                if there:
                    torch._foreach_add_([new[i] for i in there], [xs[i] for i in there], alpha=float(factor))
        return new


def both_gradients(gs: Tensors, g_maxs: Tensors) -> Tensors:
    """Return g + g_max."""
    return list(torch._foreach_add(gs, g_maxs)) if gs else []


def extrapolated(gs: Tensors, g_maxs: Tensors, rs: Sequence[float]) -> Tensors:
    """Return ĝ_min = g + r (g − g_max)."""
    if not gs:
        return []
    differences = torch._foreach_sub(gs, g_maxs)
    torch._foreach_mul_(differences, rs)
    torch._foreach_add_(differences, gs)
    return list(differences)


def scaled(tensors: Directions, factor: Number) -> Directions:
    """Return factor x."""
    return dict(zip(tensors, torch._foreach_mul(list(tensors.values()), factor), strict=True))


def flat_params(
    params: Sequence[Tensor], places: Sequence[tuple[int, int]], seed: int | None, exempt: bool
) -> TorchFlatParams:
    """Return `contract.FlatParams` in plain torch: over lists where that is possible, else a tensor at a time."""
    on_lists = params[0].device.type == "cpu" and params[0].dtype.itemsize >= torch.float32.itemsize
    return (TorchListFlatParams if on_lists else TorchFlatParams)(params, places, seed, exempt)
