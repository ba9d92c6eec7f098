"""SAM, BSAM, relatives as a careful engineer writes them in plain torch: `torch._foreach` and torch's fused SGD.

For comparison. Weights are saved in buffers that stay, g is taken from ``.grad`` and not copied, sums go into it
in place, and norms are Python floats (free on a CPU), so that scaled additions need no temporaries. With SGD with
momentum a step moves 13 N elements (SAM), 16 N (WSAM), 21 N (GSAM, and BSAM in two passes), 26 N (BSAM); of LookSAM
every k-th 19 N, those between 9 N, as ‖v‖ is kept; 19 N (Friendly SAM).
Unlike `bsam_fused`, it wants a gradient for every parameter in every pass, and does not look for inf and NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


class ForeachSAM:
    """SAM (arXiv 2010.01412), the update by the base optimizer.

    Args:
        params: float parameters of one device and dtype, those that are perturbed.
        base: the base optimizer over the same parameters, and perhaps more.
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


class ForeachKeeping(ForeachSAM):
    """What keeps g beyond the first pass. Args: as `ForeachSAM`."""

    def __init__(self, params: Iterable[Tensor], base: torch.optim.Optimizer, rho: float = 0.05) -> None:
        super().__init__(params, base, rho)
        self.lr_max = base.param_groups[0]["lr"]
        self.g: list[Tensor] = []
        self.norm = 0.0

    @torch.no_grad()
    def ascend(self) -> None:
        """w = w + ρ g / ‖g‖; keeps g."""
        self.g = _gradients(self.params)
        self.norm = _norm(self.g)
        self._ascend(self.norm)


class ForeachBSAM(ForeachKeeping):
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
        self.rho_min, self.norm_max = rho_min, 0.0

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


class ForeachMixed(ForeachKeeping):
    """A step in two passes whose direction is mixed of g and g_max: the relatives of SAM. Args: as `ForeachSAM`."""

    def direction(self, g: list[Tensor], g_max: list[Tensor]) -> list[Tensor]:
        """Return d, in the memory of one of them."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self) -> None:
        """Back to w, and the base optimizer's step with d."""
        for p, d in zip(self.params, self.direction(self.g, _gradients(self.params)), strict=True):
            p.grad = d
        self.g = []
        super().step()


class ForeachExtrapolated(ForeachMixed):
    """BSAM of ĝ_min = g − r (g_max − g), r = ρ_min / ρ: 1 at first, and falls with the learning rate."""

    def direction(self, g: list[Tensor], g_max: list[Tensor]) -> list[Tensor]:
        """Return d = g + g_max − c ĝ_min = (1 − c (1 + r)) g + (1 + c r) g_max, c = ‖g_max‖ / ‖ĝ_min‖."""
        r = self.base.param_groups[0]["lr"] / self.lr_max
        square = _norm(g_max) ** 2
        of_min = ((1 + r) * self.norm) ** 2 - 2 * r * (1 + r) * _product(g, g_max) + r**2 * square
        c = math.sqrt(square / of_min) if of_min > 0 else 0.0
        return _mixed(1 - c * (1 + r), g, 1 + c * r, g_max)


class ForeachGSAM(ForeachMixed):
    """GSAM (arXiv 2203.08065), α = 0.4."""

    alpha = 0.4

    def direction(self, g: list[Tensor], g_max: list[Tensor]) -> list[Tensor]:
        """Return d = −α g + (1 + α ⟨g, g_max⟩ / ‖g_max‖²) g_max."""
        square = _norm(g_max) ** 2
        along = _product(g, g_max) / square if square else 0.0
        return _mixed(-self.alpha, g, 1 + self.alpha * along, g_max)


class ForeachWSAM(ForeachMixed):
    """WSAM (arXiv 2305.15817), in its coupled form, γ = 0.9."""

    gamma = 0.9

    def direction(self, g: list[Tensor], g_max: list[Tensor]) -> list[Tensor]:
        """Return d = g + γ/(1 − γ) (g_max − g)."""
        torch._foreach_lerp_(g, g_max, self.gamma / (1 - self.gamma))
        return g


class ForeachLookSAM(ForeachMixed):
    """LookSAM (arXiv 2203.02714), of whose steps it has every k-th alone; v is a buffer that stays."""

    def __init__(self, params: Iterable[Tensor], base: torch.optim.Optimizer, rho: float = 0.05) -> None:
        super().__init__(params, base, rho)
        self.v = [torch.empty_like(p, requires_grad=False) for p in self.params]
        self.norm_v = 0.0

    def direction(self, g: list[Tensor], g_max: list[Tensor]) -> list[Tensor]:
        """Return d = g_max; keeps v = g_max − ⟨g, g_max⟩ / ‖g‖² g, and ‖v‖ for later steps."""
        along = _product(g, g_max) / self.norm**2 if self.norm else 0.0
        for v, a, b in zip(self.v, g, g_max, strict=True):  # lists have no addition into other memory
            torch.add(b, a, alpha=-along, out=v)
        self.norm_v = _norm(self.v)
        return g_max


class ForeachLookSAMBetween:
    """LookSAM in the steps between, in which v stays, α = 0.7: here it is all ones. Args: as `ForeachSAM`."""

    alpha = 0.7

    def __init__(self, params: Iterable[Tensor], base: torch.optim.Optimizer, rho: float = 0.05) -> None:
        self.params, self.base = list(params), base
        self.v = [torch.ones_like(p, requires_grad=False) for p in self.params]
        self.norm_v = _norm(self.v)

    @torch.no_grad()
    def step(self) -> None:
        """The base optimizer's step with d = g + α ‖g‖ / ‖v‖ v, in the memory of g."""
        g = _gradients(self.params)
        torch._foreach_add_(g, self.v, alpha=self.alpha * _norm(g) / self.norm_v)
        self.base.step()


class ForeachFriendlySAM(ForeachSAM):
    """Friendly SAM as its authors' code has it (arXiv 2403.12350), σ = 1, λ = 0.9; q lies in the memory of g."""

    lmbda = 0.9

    def __init__(self, params: Iterable[Tensor], base: torch.optim.Optimizer, rho: float = 0.05) -> None:
        super().__init__(params, base, rho)
        self.m: list[Tensor] = []

    @torch.no_grad()
    def ascend(self) -> None:
        """w = w + ρ q / ‖q‖, q = g − m; m = λ m + (1 − λ) g = m + (1 − λ) q. The first q and m are g."""
        g = _gradients(self.params)
        if self.m:
            torch._foreach_sub_(g, self.m)
            torch._foreach_add_(self.m, g, alpha=1 - self.lmbda)
        else:
            self.m = [each.clone() for each in g]
        super().ascend()


def _mixed(a: float, g: list[Tensor], b: float, g_max: list[Tensor]) -> list[Tensor]:
    """Return a g + b g_max, in the memory of g_max."""
    torch._foreach_mul_(g_max, b)
    torch._foreach_add_(g_max, g, alpha=a)
    return g_max


def _product(g: list[Tensor], g_max: list[Tensor]) -> float:
    products = [torch.dot(a.flatten(), b.flatten()) for a, b in zip(g, g_max, strict=True)]
    return torch.stack(products).sum().item()


def _gradients(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def _norm(tensors: list[Tensor]) -> float:
    return torch.stack(torch._foreach_norm(tensors)).norm().item()
