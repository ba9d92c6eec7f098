"""SAM, BSAM, relatives as a careful engineer writes them for a GPU: `torch._foreach` and torch's fused optimizers.

For comparison. As `bsam_fused.report.foreach`, but norms stay on the device, so that nothing ever waits for it. w_min
is reached from w_max and not from the saved w, which saves a copy; SAM and BSAM make no temporaries. With SGD with
momentum SAM moves 15 N elements a step, BSAM 30 N. Unlike `bsam_fused`, they want a gradient for every parameter in
every pass and norms other than 0, and do not look for inf and NaN.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

NORM_EPS = 1e-12


def total_norm(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Return the L2 norm over all tensors, on their device."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


def take_gradients(params: Iterable[Tensor]) -> list[Tensor]:
    """Return every gradient, and leave ``.grad`` None."""
    gradients: list[Tensor] = []
    for p in params:
        gradients.append(p.grad)  # type: ignore[arg-type]
        p.grad = None
    return gradients


class DeviceForeachSAM:
    """SAM (arXiv 2010.01412), the update by the base optimizer; 15 N.

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
        g = take_gradients(self.params)
        torch._foreach_copy_(self.saved, self.params)
        torch._foreach_mul_(g, self.rho / (total_norm(g) + NORM_EPS))
        torch._foreach_add_(self.params, g)
        self.base.zero_grad()  # of those that are not perturbed

    @torch.no_grad()
    def step(self) -> None:
        """Back to w, and the base optimizer's step with the gradient at w_max."""
        torch._foreach_copy_(self.params, self.saved)
        self.base.step()


class DeviceForeachBSAM(DeviceForeachSAM):
    """BSAM (arXiv 2409.13173), the update by the base optimizer; 30 N.

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

    @torch.no_grad()
    def ascend(self) -> None:
        """w = w + ρ g / ‖g‖; keeps g / ‖g‖."""
        self.g = take_gradients(self.params)
        self.norm = total_norm(self.g) + NORM_EPS
        torch._foreach_copy_(self.saved, self.params)
        torch._foreach_div_(self.g, self.norm)
        torch._foreach_add_(self.params, self.g, alpha=self.rho)

    @torch.no_grad()
    def descend(self) -> None:
        """w = w − ρ_min g / ‖g‖, from w_max; g = g + g_max."""
        rho_min = self.rho_min * self.base.param_groups[0]["lr"] / self.lr_max
        g_max = take_gradients(self.params)
        self.norm_max = total_norm(g_max)
        torch._foreach_add_(self.params, self.g, alpha=-(self.rho + rho_min))
        torch._foreach_mul_(self.g, self.norm)
        torch._foreach_add_(self.g, g_max)

    @torch.no_grad()
    def step(self) -> None:
        """Back to w, and the base optimizer's step with d = g + g_max − ‖g_max‖ / ‖g_min‖ g_min."""
        g_min = take_gradients(self.params)
        torch._foreach_mul_(g_min, -self.norm_max / total_norm(g_min))
        torch._foreach_add_(self.g, g_min)
        for p, d in zip(self.params, self.g, strict=True):
            p.grad = d
        self.g = []
        super().step()


class DeviceForeachMixed(DeviceForeachSAM):
    """A step in two passes whose direction is mixed of g and g_max: the relatives of SAM. Args: as `DeviceForeachSAM`.

    A temporary of N is made for w_max, as g stays as it is.
    """

    def direction(self, g: list[Tensor], g_max: list[Tensor]) -> list[Tensor]:
        """Return d, in the memory of one of them."""
        raise NotImplementedError

    def _product(self, g: list[Tensor], g_max: list[Tensor], square: Tensor) -> Tensor:
        """Return ⟨g, g_max⟩ from ‖g + g_max‖, which takes few launches; ``square``: ‖g_max‖²."""
        return (total_norm(torch._foreach_add(g, g_max)).square() - self.norm.square() - square) / 2

    @torch.no_grad()
    def ascend(self) -> None:
        """w = w + ρ g / ‖g‖; keeps g."""
        self.g = take_gradients(self.params)
        self.norm = total_norm(self.g)
        torch._foreach_copy_(self.saved, self.params)
        torch._foreach_add_(self.params, torch._foreach_mul(self.g, self.rho / (self.norm + NORM_EPS)))

    @torch.no_grad()
    def step(self) -> None:
        """Back to w, and the base optimizer's step with d."""
        for p, d in zip(self.params, self.direction(self.g, take_gradients(self.params)), strict=True):
            p.grad = d
        self.g = []
        super().step()


class DeviceForeachExtrapolated(DeviceForeachMixed):
    """BSAM of ĝ_min = g − r (g_max − g), r = ρ_min / ρ: 1 at first, and falls with the learning rate; 28 N."""

    def __init__(self, params: Iterable[Tensor], base: torch.optim.Optimizer, rho: float = 0.05) -> None:
        super().__init__(params, base, rho)
        self.lr_max = base.param_groups[0]["lr"]

    def direction(self, g: list[Tensor], g_max: list[Tensor]) -> list[Tensor]:
        """Return d = g + g_max − ‖g_max‖ / ‖ĝ_min‖ ĝ_min."""
        g_min = torch._foreach_lerp(g, g_max, -self.base.param_groups[0]["lr"] / self.lr_max)
        torch._foreach_mul_(g_min, -total_norm(g_max) / total_norm(g_min))
        torch._foreach_add_(g, g_max)
        torch._foreach_add_(g, g_min)
        return g


class DeviceForeachGSAM(DeviceForeachMixed):
    """GSAM (arXiv 2203.08065), α = 0.4; 25 N."""

    alpha = 0.4

    def direction(self, g: list[Tensor], g_max: list[Tensor]) -> list[Tensor]:
        """Return d = −α g + (1 + α ⟨g, g_max⟩ / ‖g_max‖²) g_max."""
        square = total_norm(g_max).square()
        torch._foreach_mul_(g_max, 1 + self.alpha * self._product(g, g_max, square) / square)
        torch._foreach_add_(g_max, g, alpha=-self.alpha)
        return g_max


class DeviceForeachWSAM(DeviceForeachMixed):
    """WSAM (arXiv 2305.15817), in its coupled form, γ = 0.9; 18 N."""

    gamma = 0.9

    def direction(self, g: list[Tensor], g_max: list[Tensor]) -> list[Tensor]:
        """Return d = g + γ/(1 − γ) (g_max − g)."""
        torch._foreach_lerp_(g, g_max, self.gamma / (1 - self.gamma))
        return g


class DeviceForeachLookSAM(DeviceForeachMixed):
    """LookSAM (arXiv 2203.02714), of whose steps it has every k-th alone; 26 N."""

    v: list[Tensor]
    norm_v: Tensor

    def direction(self, g: list[Tensor], g_max: list[Tensor]) -> list[Tensor]:
        """Return d = g_max; keeps v = g_max − ⟨g, g_max⟩ / ‖g‖² g, in the memory of g, and ‖v‖ for later steps."""
        product = self._product(g, g_max, total_norm(g_max).square())
        torch._foreach_mul_(g, -product / self.norm.square())
        torch._foreach_add_(g, g_max)
        self.v, self.norm_v = g, total_norm(g)
        return g_max


class DeviceForeachLookSAMBetween:
    """LookSAM in the steps between, in which v stays, α = 0.7: here it is all ones; 11 N. Args: as `DeviceForeachSAM`.

    A temporary of N is made for what is added to g.
    """

    alpha = 0.7

    def __init__(self, params: Iterable[Tensor], base: torch.optim.Optimizer, rho: float = 0.05) -> None:
        self.params, self.base = list(params), base
        self.v = [torch.ones_like(p, requires_grad=False) for p in self.params]
        self.norm_v = total_norm(self.v)

    @torch.no_grad()
    def step(self) -> None:
        """The base optimizer's step with d = g + α ‖g‖ / ‖v‖ v, in the memory of g."""
        g: list[Tensor] = [p.grad for p in self.params]  # type: ignore[misc]
        torch._foreach_add_(g, torch._foreach_mul(self.v, self.alpha * total_norm(g) / self.norm_v))
        self.base.step()


class DeviceForeachFriendlySAM(DeviceForeachSAM):
    """Friendly SAM as its authors' code has it (arXiv 2403.12350), σ = 1, λ = 0.9; 21 N."""

    lmbda = 0.9

    def __init__(self, params: Iterable[Tensor], base: torch.optim.Optimizer, rho: float = 0.05) -> None:
        super().__init__(params, base, rho)
        self.m: list[Tensor] = []

    @torch.no_grad()
    def ascend(self) -> None:
        """w = w + ρ q / ‖q‖, q = g − m; m = λ m + (1 − λ) g = m + (1 − λ) q. The first q and m are g."""
        g: list[Tensor] = [p.grad for p in self.params]  # type: ignore[misc]
        if self.m:
            torch._foreach_sub_(g, self.m)
            torch._foreach_add_(self.m, g, alpha=1 - self.lmbda)
        else:
            self.m = [each.clone() for each in g]
        del g  # the gradients are freed as SAM's
        super().ascend()
