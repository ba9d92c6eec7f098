"""The operators in plain torch: the readable one, on any device.

One tensor at a time, each formula as the papers have it. Nothing here reads a device value on the host:
whether a step is skipped is chosen elementwise, so that a GPU is never waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bsam_fused.ops import contract, rounding
from bsam_fused.ops.contract import (
    ASCENT,
    CHECKED,
    CROSS,
    MAX,
    MIN,
    SCALE,
    SLOTS,
    SO_FAR,
    AdamScalars,
    Radius,
    SGDScalars,
)

Rule = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(parameter, w, d, finite) -> the next weights; updates the state where finite."""


def perturbed(w: Tensor, g: Tensor, step: Tensor, radius: Radius) -> Tensor:
    """Return w + step T² g, T = |w| + η if adaptive, else 1. SAM, ASAM, BSAM."""
    t_squared = (w.abs() + radius.eta).square() if radius.adaptive else 1.0
    return w + step * t_squared * g


def bilateral_coefficient(sums: Tensor) -> Tensor:
    """Return c = ‖g_max‖ / ‖g_min‖, 0 where ‖g_min‖ = 0. BSAM."""
    norm_max, norm_min = sums[MAX].sqrt(), sums[MIN].sqrt()
    return torch.where(norm_min > 0, norm_max / norm_min, torch.zeros_like(norm_max))


def direction_scales(sums: Tensor, bilateral: bool, max_norm: float) -> tuple[Tensor, Tensor]:
    """Return c, and the factor of d = s − c g_min: 1 / scale, times what clips ‖d‖ / scale to ``max_norm``."""
    c = bilateral_coefficient(sums)
    square = (sums[SO_FAR] - 2 * c * sums[CROSS] + c.square() * sums[MIN]).clamp(min=0) if bilateral else sums[MAX]
    unscaled = torch.where(sums[SCALE] == 0, 1.0, 1 / sums[SCALE])
    clip = max_norm / (square.sqrt() * unscaled + 1e-6)
    return c, torch.where(clip < 1, clip * unscaled, unscaled)


class TorchFlatParams:
    """`contract.FlatParams` in plain torch."""

    @torch.no_grad()
    def __init__(self, params: Sequence[Tensor], places: Sequence[tuple[int, int]], seed: int | None) -> None:
        self.params, self.places = list(params), list(places)
        self.device, self.dtype = self.params[0].device, self.params[0].dtype
        self._compute = torch.promote_types(self.dtype, torch.float32)
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        self.sums = torch.zeros(SLOTS, dtype=wide, device=self.device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.step_count = torch.zeros((), dtype=torch.int64, device=self.device)
        self._steps = torch.zeros(len(self.params), device=self.device)
        self._keys = [rounding.tensor_key(seed, *place) for place in places] if seed is not None else []
        self._layouts = [(p.shape, p.stride()) for p in self.params]
        # An element's place in the flat buffers: its parameter's strides, or dense ones where they have gaps.
        self._strides = [torch.empty_like(p).stride() for p in self.params]
        offsets = [0]
        for p in self.params:
            offsets.append(offsets[-1] + p.numel())
        self._offsets, self._numel = offsets[:-1], offsets[-1]
        self._views: dict[str, list[Tensor]] = {}
        self._now: dict[int, Tensor] = {}
        self._g: dict[int, Tensor] = {}
        self._perturbed: list[int] = []
        self._bilateral = False
        self._at_w = False

    @property
    def skipped(self) -> int:
        """Updates that were skipped."""
        return int(self._skipped)

    @property
    def extra_bytes(self) -> int:
        """Bytes of the flat buffers."""
        return len(self._views) * self._numel * self.params[0].element_size()

    def state(self, key: str) -> list[Tensor]:
        """Views of the flat buffer ``key``."""
        if key == "step":
            return list(self._steps.unbind())
        if key not in self._views:
            flat = torch.zeros(self._numel, dtype=self.dtype, device=self.device)
            self._views[key] = [
                flat.as_strided(p.shape, strides, offset)
                for p, strides, offset in zip(self.params, self._strides, self._offsets, strict=True)
            ]
        return self._views[key]

    @torch.no_grad()
    def clear_state(self, i: int) -> None:
        """Zero the i-th parameter's state."""
        self._steps[i].zero_()
        for key, views in self._views.items():
            if key not in {"saved", "g"}:
                views[i].zero_()

    def _write(self, to: Tensor, i: int, operand: int, x: Tensor) -> None:
        """Round x, of the i-th parameter's shape, into a tensor of its dtype."""
        if self._keys and self.dtype.itemsize == 2:
            at = torch.arange(x.numel(), device=self.device).as_strided(x.shape, self._strides[i])
            bits = rounding.random_bits(self._keys[i], self.step_count, operand, at)
            x = rounding.rounded(x, self.dtype, bits)
        to.copy_(x)

    def read_gradients(self) -> None:
        """Note the gradients of this pass."""
        self._now = {}
        for i, (param, layout) in enumerate(zip(self.params, self._layouts, strict=True)):
            grad = param.grad
            moved = param.dtype != self.dtype or param.device != self.device
            if moved or (param.shape, param.stride()) != layout:
                contract.reject(self, i)
            if grad is None:
                continue
            if grad.layout != torch.strided or grad.dtype != self.dtype or grad.device != self.device:
                contract.reject(self, i)
            self._now[i] = grad.detach()

    def clear_gradients(self) -> None:
        """Set every .grad to None."""
        for param in self.params:
            param.grad = None

    def _end_pass(self) -> None:
        for i in self._now:
            self.params[i].grad = None
        self._now = {}

    @torch.no_grad()
    def square_norm(self, slot: int, radii: Sequence[Radius]) -> None:
        """Σ (T g)²."""
        scaled = []
        for i, g in self._now.items():
            radius, w = radii[self.places[i][0]], self.params[i]
            scaled.append((w.to(self.sums.dtype).abs() + radius.eta) * g if radius.adaptive else g)
        self.sums[slot] = 0
        if scaled:
            norms = torch._foreach_norm(scaled, 2, dtype=self.sums.dtype)
            self.sums[slot] = torch.stack(norms).square().sum()

    @torch.no_grad()
    def direction_sums(self) -> None:
        """Σ g_min², Σ s², Σ s g_min."""
        self.square_norm(MIN, [Radius(0.0)] * (1 + max(group for group, _ in self.places)))
        so_far = {i: g.to(self.sums.dtype) for i, g in self._g.items()}
        self.sums[SO_FAR] = sum(g.square().sum() for g in so_far.values())
        self.sums[CROSS] = sum((so_far[i] * g).sum() for i, g in self._now.items() if i in so_far)

    @torch.no_grad()
    def ascend(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float, keep: bool) -> None:
        """Save w, then w = w_max."""
        saved = self.state("saved")
        self._bilateral, self._g = keep, {}
        if self._now:
            torch._foreach_copy_([saved[i] for i in self._now], [self.params[i] for i in self._now])
        self._perturbed = list(self._now)  # only now: an interrupted copy must not be restored from
        self._perturb(rounding.TO_MAX, sums, radii, norm_eps, sums[ASCENT].isfinite(), self._now)
        if keep:
            self._take(self._now)
        self._end_pass()

    @torch.no_grad()
    def descend(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float) -> None:
        """From the saved w, w = w_min; g = g + g_max."""
        self.square_norm(MAX, [Radius(0.0)] * len(radii))
        finite = sums[ASCENT].isfinite() & self.sums[MAX].isfinite()
        self._perturb(rounding.TO_MIN, sums, radii, norm_eps, finite, {i: self._g[i] for i in self._perturbed})
        both = [i for i in self._now if i in self._g]
        if both:
            torch._foreach_add_([self._g[i] for i in both], [self._now[i] for i in both])
            if self.dtype == torch.float16:  # overflows at 65504: a g + g_max that did must not reach the weights
                self.sums[MAX] += 0 * torch.stack(torch._foreach_norm([self._g[i] for i in both])).sum()
        self._take({i: g for i, g in self._now.items() if i not in self._g})
        self._end_pass()

    def _perturb(
        self,
        operand: int,
        sums: Tensor,
        radii: Sequence[Radius],
        norm_eps: float,
        finite: Tensor,
        gradients: dict[int, Tensor],
    ) -> None:
        length = sums[ASCENT].sqrt() + norm_eps
        inverse = torch.where(length == 0, 0.0, 1 / length)
        saved = self.state("saved")
        for i, g in gradients.items():
            radius, w = radii[self.places[i][0]], saved[i].to(self._compute)
            step = (radius.radius * inverse).to(self._compute)
            moved = torch.where(finite, perturbed(w, g.to(self._compute), step, radius), w)
            self._write(self.params[i], i, operand, moved)

    def _take(self, gradients: dict[int, Tensor]) -> None:
        """Copy gradients into the flat buffer of g: who else holds their storage is not known in Python."""
        if not gradients:
            return
        kept = self.state("g")
        for i in gradients:
            self._g[i] = kept[i]
        torch._foreach_copy_([kept[i] for i in gradients], list(gradients.values()))

    def _direction(self, i: int, c: Tensor, factor: Tensor) -> Tensor:
        """Return d: factor times g_max (SAM), or g + g_max − c g_min (BSAM); a missing gradient is zero."""
        zero = torch.zeros((), dtype=self._compute, device=self.device)
        last = self._now[i].to(self._compute) if i in self._now else zero
        if self._bilateral:
            so_far = self._g[i].to(self._compute) if i in self._g else zero
            last = so_far - c.to(self._compute) * last
        return factor.to(self._compute) * last

    def _members(self) -> list[int]:
        return sorted({*self._perturbed, *self._g, *self._now})

    def _update(
        self, sums: Tensor, from_saved: bool, max_norm: float, counted: Callable[[int], bool], rule: Rule
    ) -> list[int]:
        finite, scales = sums[:CHECKED].isfinite().all(), direction_scales(sums, self._bilateral, max_norm)
        saved = self.state("saved")
        # The weights before the step are in saved only where they were perturbed.
        before = {i: saved[i] if i in self._perturbed else self.params[i] for i in self._members()}
        members = [i for i in before if counted(i)]
        for i in members:
            self._steps[i] += finite
        for i, kept in before.items():
            start = kept if from_saved else self.params[i]
            new = rule(i, start.to(self._compute), self._direction(i, *scales), finite)
            self._write(self.params[i], i, rounding.WEIGHT, torch.where(finite, new, kept.to(self._compute)))
        self._skipped += ~finite
        self.step_count += 1
        self.release()
        # On a GPU asking which ones began would wait for it; naming one again does no harm.
        return [i for i in members if self.device.type != "cpu" or self._steps[i] == 1]

    @torch.no_grad()
    def update_sgd(self, sums: Tensor, groups: Sequence[SGDScalars], from_saved: bool, max_norm: float) -> list[int]:
        """torch.optim.SGD's rule."""
        buffers = self.state("momentum_buffer") if any(o.momentum for o in groups) else []

        def rule(i: int, w: Tensor, d: Tensor, finite: Tensor) -> Tensor:
            o = groups[self.places[i][0]]
            d = (-d if o.maximize else d) + o.weight_decay * w
            if o.momentum:
                m = buffers[i].to(self._compute)
                averaged = o.momentum * m + (1 - o.dampening) * d
                new = torch.where(self._steps[i] == 1, d, averaged)
                self._write(buffers[i], i, rounding.FIRST_STATE, torch.where(finite, new, m))
                d = d + o.momentum * new if o.nesterov else new
            return w - o.lr * d

        return self._update(sums, from_saved, max_norm, lambda i: groups[self.places[i][0]].momentum != 0, rule)

    @torch.no_grad()
    def update_adam(self, sums: Tensor, groups: Sequence[AdamScalars], from_saved: bool, max_norm: float) -> list[int]:
        """torch.optim.Adam's and AdamW's rule."""
        exp_avg, exp_avg_sq = self.state("exp_avg"), self.state("exp_avg_sq")

        def rule(i: int, w: Tensor, d: Tensor, finite: Tensor) -> Tensor:
            o = groups[self.places[i][0]]
            d = -d if o.maximize else d
            if o.decoupled:
                w = w * (1 - o.lr * o.weight_decay)
            else:
                d = d + o.weight_decay * w
            m, v = exp_avg[i].to(self._compute), exp_avg_sq[i].to(self._compute)
            new_m, new_v = m + (1 - o.beta1) * (d - m), o.beta2 * v + (1 - o.beta2) * d.square()
            self._write(exp_avg[i], i, rounding.FIRST_STATE, torch.where(finite, new_m, m))
            self._write(exp_avg_sq[i], i, rounding.SECOND_STATE, torch.where(finite, new_v, v))
            t = self._steps[i].to(self.sums.dtype)
            step_size = (o.lr / (1 - o.beta1**t)).to(self._compute)
            correction = (1 - o.beta2**t).sqrt().to(self._compute)
            return w - step_size * new_m / (new_v.sqrt() / correction + o.eps)

        return self._update(sums, from_saved, max_norm, lambda i: True, rule)

    @torch.no_grad()
    def combine(self, sums: Tensor, from_saved: bool, max_norm: float) -> bool:
        """Put d into .grad, w into the weights."""
        self.step_count += 1
        if not sums[:CHECKED].isfinite().all():
            self._skipped += 1
            self.restore()
            return False
        scales = direction_scales(sums, self._bilateral, max_norm)
        directions = {i: self._direction(i, *scales) for i in self._members()}
        if from_saved:
            self._write_saved()
        for i, d in directions.items():
            self.params[i].grad = torch.empty_like(self.params[i], requires_grad=False).copy_(d)
        return True

    @torch.no_grad()
    def _write_saved(self) -> None:
        if self._perturbed and not self._at_w:
            saved = self.state("saved")
            torch._foreach_copy_([self.params[i] for i in self._perturbed], [saved[i] for i in self._perturbed])

    def restore(self) -> None:
        """Saved w back into the weights."""
        self._write_saved()
        self.release()

    def release(self) -> None:
        """Forget the step."""
        self._perturbed, self._g, self._now, self._at_w = [], {}, {}, False

    @torch.no_grad()
    def show_w(self, at_w: bool) -> None:
        """Exchange perturbed weights and saved w, if that is not so already."""
        if at_w == self._at_w:
            return
        saved = self.state("saved")
        for i in self._perturbed:
            kept = self.params[i].clone()
            self.params[i].copy_(saved[i])
            saved[i].copy_(kept)
        self._at_w = at_w
