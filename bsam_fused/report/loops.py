"""SAM, BSAM and their relatives as the papers write them: plain loops, a tensor at a time. What people run today.

For comparison only; nothing else in the package uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Closure = Callable[[], Tensor]


class PlainSAM:
    """SAM by loops (arXiv 2010.01412), the update by the base optimizer.

    Args:
        params: float parameters, those that are perturbed.
        base: the base optimizer over the same parameters, and perhaps more.
        rho: radius ρ ≥ 0.
    """

    calls: tuple[str, ...] = ("ascend", "step")

    def __init__(self, params: Iterable[Tensor], base: torch.optim.Optimizer, rho: float = 0.05) -> None:
        self.params, self.base, self.rho = list(params), base, rho
        self.param_groups = base.param_groups
        self.saved: dict[Tensor, Tensor] = {}
        self.g: dict[Tensor, Tensor] = {}
        self.norm = torch.zeros(())

    @torch.no_grad()
    def ascend(self) -> None:
        """w = w + ρ g / ‖g‖."""
        self.norm = _norm(self.params)
        for p in self.params:
            if p.grad is None:
                continue
            self.saved[p] = p.clone()
            self.g[p] = p.grad.clone()
            p.add_(p.grad * (self.rho / (self.norm + 1e-12)))
        self.base.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        """Back to w, and the base optimizer's step with the gradient at w_max."""
        for p in self.params:
            if p in self.saved:
                p.copy_(self.saved[p])
        self.base.step()

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self.base.zero_grad()


class PlainASAM(PlainSAM):
    """ASAM by loops (arXiv 2102.11600) with η = 0: T = |w|."""

    @torch.no_grad()
    def ascend(self) -> None:
        """w = w + ρ T² g / ‖T g‖."""
        scaled = {p: p.abs() * p.grad for p in self.params if p.grad is not None}
        self.norm = _total([*scaled.values()])
        for p, g in scaled.items():
            self.saved[p] = p.clone()
            p.add_(p.abs() * g * (self.rho / (self.norm + 1e-12)))
        self.base.zero_grad()


class PlainBSAM(PlainSAM):
    """BSAM by loops (arXiv 2409.13173), the update by the base optimizer.

    Args:
        params: float parameters.
        base: the base optimizer over the same parameters.
        rho: radius ρ ≥ 0 towards w_max.
        rho_min: radius ρ_min ≥ 0 towards w_min at the learning rate that ``base`` has now; falls with it.
    """

    calls = ("ascend", "descend", "step")

    def __init__(
        self, params: Iterable[Tensor], base: torch.optim.Optimizer, rho: float = 0.05, rho_min: float = 0.05
    ) -> None:
        super().__init__(params, base, rho)
        self.rho_min, self.lr_max = rho_min, base.param_groups[0]["lr"]
        self.g_max: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def descend(self) -> None:
        """w = w − ρ_min g / ‖g‖, from w."""
        rho_min = self.rho_min * self.param_groups[0]["lr"] / self.lr_max
        for p in self.params:
            if p.grad is None:
                continue
            self.g_max[p] = p.grad.clone()
            p.copy_(self.saved[p])
            p.sub_(self.g[p] * (rho_min / (self.norm + 1e-12)))
        self.base.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        """Back to w, and the base optimizer's step with d = g + g_max − ‖g_max‖ / ‖g_min‖ g_min."""
        c = _total([*self.g_max.values()]) / _norm(self.params)
        for p in self.params:
            if p.grad is None:
                continue
            p.copy_(self.saved[p])
            p.grad = self.g[p] + self.g_max[p] - c * p.grad
        self.base.step()


class PlainMixed(PlainSAM):
    """A step in two passes whose direction is mixed of g and g_max: the relatives of SAM. Args: as `PlainSAM`."""

    def direction(self, g: Sequence[Tensor], g_max: Sequence[Tensor]) -> Iterable[Tensor]:
        """Return d, a tensor a parameter."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self) -> None:
        """Back to w, and the base optimizer's step with d."""
        params = [p for p in self.params if p.grad is not None]
        g_max: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
        for p, d in zip(params, self.direction([self.g[p] for p in params], g_max), strict=True):
            p.copy_(self.saved[p])
            p.grad = d
        self.base.step()


class PlainExtrapolated(PlainMixed):
    """BSAM of ĝ_min = g − r (g_max − g), r = ρ_min / ρ: 1 at first, and falls with the learning rate."""

    def __init__(self, params: Iterable[Tensor], base: torch.optim.Optimizer, rho: float = 0.05) -> None:
        super().__init__(params, base, rho)
        self.lr_max = base.param_groups[0]["lr"]

    def direction(self, g: Sequence[Tensor], g_max: Sequence[Tensor]) -> Iterable[Tensor]:
        """Return d = g + g_max − ‖g_max‖ / ‖ĝ_min‖ ĝ_min."""
        r = self.param_groups[0]["lr"] / self.lr_max
        g_min = [a - r * (b - a) for a, b in zip(g, g_max, strict=True)]
        c = _total(g_max) / _total(g_min)
        return (a + b - c * m for a, b, m in zip(g, g_max, g_min, strict=True))


class PlainGSAM(PlainMixed):
    """GSAM by loops (arXiv 2203.08065, algorithm 1), α = 0.4."""

    alpha = 0.4

    def direction(self, g: Sequence[Tensor], g_max: Sequence[Tensor]) -> Iterable[Tensor]:
        """Return d = g_max − α g⊥, g⊥ = g − ⟨g, g_max⟩ / ‖g_max‖² g_max."""
        along = sum((a * b).sum() for a, b in zip(g, g_max, strict=True)) / _total(g_max) ** 2
        return (b - self.alpha * (a - along * b) for a, b in zip(g, g_max, strict=True))


class PlainWSAM(PlainMixed):
    """WSAM by loops (arXiv 2305.15817), in its coupled form, γ = 0.9."""

    gamma = 0.9

    def direction(self, g: Sequence[Tensor], g_max: Sequence[Tensor]) -> Iterable[Tensor]:
        """Return d = (1 − 2γ)/(1 − γ) g + γ/(1 − γ) g_max."""
        of_g, of_g_max = (1 - 2 * self.gamma) / (1 - self.gamma), self.gamma / (1 - self.gamma)
        return (of_g * a + of_g_max * b for a, b in zip(g, g_max, strict=True))


class PlainLookSAM(PlainMixed):
    """LookSAM by loops (arXiv 2203.02714, algorithm 1), of whose steps it has every k-th alone. Args: as `PlainSAM`."""

    alpha = 0.7
    v: Sequence[Tensor] = ()

    def direction(self, g: Sequence[Tensor], g_max: Sequence[Tensor]) -> Iterable[Tensor]:
        """Return d = g_max; keeps v = g_max − ‖g_max‖ cos θ g / ‖g‖, θ the angle between g and g_max."""
        norm_max = _total(g_max)
        cosine = sum((a * b).sum() for a, b in zip(g, g_max, strict=True)) / (self.norm * norm_max)
        self.v = [b - norm_max * cosine * (a / self.norm) for a, b in zip(g, g_max, strict=True)]
        return g_max


class PlainLookSAMBetween(PlainLookSAM):
    """LookSAM by loops in the steps between, in which v stays: here it is all ones. Args: as `PlainSAM`."""

    calls = ("step",)

    def __init__(self, params: Iterable[Tensor], base: torch.optim.Optimizer, rho: float = 0.05) -> None:
        super().__init__(params, base, rho)
        self.v = [torch.ones_like(p, requires_grad=False) for p in self.params]

    @torch.no_grad()
    def step(self) -> None:
        """The base optimizer's step with d = g + α ‖g‖ / ‖v‖ v."""
        scale = self.alpha * _norm(self.params) / _total(self.v)
        for p, v in zip(self.params, self.v, strict=True):
            if p.grad is not None:
                p.grad = p.grad + scale * v
        self.base.step()


class PlainFriendlySAM(PlainSAM):
    """Friendly SAM by loops, as its authors' code has it (arXiv 2403.12350), σ = 1, λ = 0.9. Args: as `PlainSAM`."""

    sigma, lmbda = 1.0, 0.9

    def __init__(self, params: Iterable[Tensor], base: torch.optim.Optimizer, rho: float = 0.05) -> None:
        super().__init__(params, base, rho)
        self.m: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def ascend(self) -> None:
        """w = w + ρ q / ‖q‖, q = g − σ m; then m = λ m + (1 − λ) g. The first q and m are g."""
        for p in self.params:
            if p.grad is None:
                continue
            g = p.grad
            if p in self.m:
                p.grad = g - self.sigma * self.m[p]
                self.m[p] = self.lmbda * self.m[p] + (1 - self.lmbda) * g
            else:
                self.m[p] = g.clone()
        super().ascend()


def _norm(params: Iterable[Tensor]) -> Tensor:
    return _total([p.grad for p in params if p.grad is not None])


def _total(tensors: Sequence[Tensor]) -> Tensor:
    return torch.norm(torch.stack([t.norm(p=2) for t in tensors]), p=2)
