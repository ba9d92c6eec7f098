"""SAM and BSAM as the papers write them: plain loops, a tensor at a time. What people run today.

For comparison only; nothing else in the package uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Closure = Callable[[], Tensor]


class PlainSAM:
    """SAM by loops (arXiv 2010.01412), the update by the base optimizer.

    Args:
        params: float parameters.
        base: the base optimizer over the same parameters.
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
        self.norm = torch.norm(torch.stack([g.norm(p=2) for g in scaled.values()]), p=2)
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
        norm_max = torch.norm(torch.stack([g.norm(p=2) for g in self.g_max.values()]), p=2)
        c = norm_max / _norm(self.params)
        for p in self.params:
            if p.grad is None:
                continue
            p.copy_(self.saved[p])
            p.grad = self.g[p] + self.g_max[p] - c * p.grad
        self.base.step()


def _norm(params: Iterable[Tensor]) -> Tensor:
    return torch.norm(torch.stack([p.grad.norm(p=2) for p in params if p.grad is not None]), p=2)
