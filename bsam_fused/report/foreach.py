"""SAM and BSAM as a careful engineer writes them in plain torch: `torch._foreach` and torch's fused SGD.

For comparison. Weights are saved in buffers that stay, g is taken from ``.grad`` and not copied, sums go into it
in place, and norms are Python floats (free on a CPU), so that scaled additions need no temporaries. BSAM moves 26 N
elements a step, SAM 13 N, both with SGD with momentum. Unlike `bsam_fused`, it wants a gradient for every parameter
in every pass, and does not look for inf and NaN.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class ForeachSAM:
    """SAM (arXiv 2010.01412), the update by the base optimizer.

    Args:
        params: float parameters of one device and dtype.
        base: the base optimizer over the same parameters.
        rho: radius ρ ≥ 0.
    """

    def __init__(self, params: Iterable[Tensor], base: torch.optim.Optimizer, rho: float = 0.05) -> None:
        self.params, self.base, self.rho = list(params), base, rho
        self.saved = [torch.empty_like(p) for p in self.params]

    @torch.no_grad()
    def ascend(self) -> None:
        """w = w + ρ g / ‖g‖."""
        self._ascend(_norm(_gradients(self.params)))

    def _ascend(self, norm: float) -> None:
        torch._foreach_copy_(self.saved, self.params)
        torch._foreach_add_(self.params, _gradients(self.params), alpha=self.rho / (norm + 1e-12))
        self.base.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        """Back to w, and the base optimizer's step with the gradient at w_max."""
        torch._foreach_copy_(self.params, self.saved)
        self.base.step()


class ForeachBSAM(ForeachSAM):
    """BSAM (arXiv 2409.13173), the update by the base optimizer.

    Args:
        params: float parameters of one device and dtype.
        base: the base optimizer over the same parameters.
        rho: radius ρ ≥ 0 towards w_max.
        rho_min: radius ρ_min ≥ 0 towards w_min at the learning rate that ``base`` has now; falls with it.
    """

    def __init__(
        self, params: Iterable[Tensor], base: torch.optim.Optimizer, rho: float = 0.05, rho_min: float = 0.05
    ) -> None:
        super().__init__(params, base, rho)
        self.rho_min, self.lr_max = rho_min, base.param_groups[0]["lr"]
        self.g: list[Tensor] = []
        self.norm = self.norm_max = 0.0

    @torch.no_grad()
    def ascend(self) -> None:
        """w = w + ρ g / ‖g‖; keeps g."""
        self.g = _gradients(self.params)
        self.norm = _norm(self.g)
        self._ascend(self.norm)

    @torch.no_grad()
    def descend(self) -> None:
        """w = w − ρ_min g / ‖g‖, from w; g = g + g_max."""
        rho_min = self.rho_min * self.base.param_groups[0]["lr"] / self.lr_max
        g_max = _gradients(self.params)
        self.norm_max = _norm(g_max)
        torch._foreach_copy_(self.params, self.saved)
        torch._foreach_add_(self.params, self.g, alpha=-rho_min / (self.norm + 1e-12))
        torch._foreach_add_(self.g, g_max)
        self.base.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        """Back to w, and the base optimizer's step with d = g + g_max − ‖g_max‖ / ‖g_min‖ g_min."""
        g_min = _gradients(self.params)
        norm_min = _norm(g_min)
        torch._foreach_add_(self.g, g_min, alpha=-self.norm_max / norm_min if norm_min else 0.0)
        for p, d in zip(self.params, self.g, strict=True):
            p.grad = d
        self.g = []
        super().step()


def _gradients(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def _norm(tensors: list[Tensor]) -> float:
    return torch.stack(torch._foreach_norm(tensors)).norm().item()
