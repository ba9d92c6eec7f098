"""SAM, GSAM, WSAM, Friendly SAM as the pytorch_optimizer package of the registry has them, with its default options.

For comparison; the package is an extra. Without it each raises ModuleNotFoundError.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class PackagedSAM:
    """pytorch_optimizer's SAM.

    Args:
        params: float parameters.
        base: the class of the base optimizer.
        rho: radius ρ ≥ 0.
        adaptive: ASAM with η = 0.
        **options: of the base optimizer.
    """

    optimizer: Any

    def __init__(
        self,
        params: list[Tensor],
        base: type[torch.optim.Optimizer],
        rho: float,
        adaptive: bool = False,
        **options: Any,
    ) -> None:
        from pytorch_optimizer.optimizer.sam import SAM

        self.optimizer = SAM(params, base, rho=rho, adaptive=adaptive, **options)

    def ascend(self) -> None:
        """w = w + ρ T² g / ‖T g‖."""
        self.optimizer.first_step(zero_grad=True)

    def step(self) -> None:
        """Back to w, and the base optimizer's step with d."""
        self.optimizer.second_step()


class PackagedGSAM(PackagedSAM):
    """pytorch_optimizer's GSAM, as its ``step(closure)`` calls its parts. Args: as `PackagedSAM`; α: alpha."""

    def __init__(
        self, params: list[Tensor], base: type[torch.optim.Optimizer], rho: float, alpha: float = 0.4, **options: Any
    ) -> None:
        from pytorch_optimizer.optimizer.sam import GSAM

        constant: Any = SimpleNamespace(step=lambda: rho)
        model: Any = None  # whose BatchNorm layers its step() would guard
        self.optimizer = GSAM(params, base(params, **options), model, constant, alpha)

    def ascend(self) -> None:
        """w = w + ρ g / ‖g‖."""
        self.optimizer.perturb_weights(self.optimizer.rho_t)
        self.optimizer.base_optimizer.zero_grad()

    def step(self) -> None:
        """Back to w, and the base optimizer's step with d."""
        self.optimizer.gradient_decompose(self.optimizer.alpha)
        self.optimizer.un_perturb()
        self.optimizer.base_optimizer.step()


class PackagedWSAM(PackagedSAM):
    """pytorch_optimizer's WSAM, in its coupled form. Args: as `PackagedSAM`; γ: gamma."""

    def __init__(
        self, params: list[Tensor], base: type[torch.optim.Optimizer], rho: float, gamma: float = 0.9, **options: Any
    ) -> None:
        from pytorch_optimizer.optimizer.sam import WSAM

        model: Any = None  # of which only clipping asks
        self.optimizer = WSAM(model, params, base, rho=rho, gamma=gamma, decouple=False, **options)


class PackagedFriendlySAM(PackagedSAM):
    """pytorch_optimizer's FriendlySAM, σ = 1, λ = 0.9. Args: as `PackagedSAM`."""

    def __init__(self, params: list[Tensor], base: type[torch.optim.Optimizer], rho: float, **options: Any) -> None:
        from pytorch_optimizer.optimizer.sam import FriendlySAM

        self.optimizer = FriendlySAM(params, base, rho=rho, **options)
