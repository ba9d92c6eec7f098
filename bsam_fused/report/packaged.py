"""SAM as the pytorch_optimizer package from the registry has it. For comparison; the package is an extra."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PackagedSAM:
    """pytorch_optimizer's SAM, its options as they are by default.

    Args:
        params: float parameters.
        base: the class of the base optimizer.
        rho: radius ρ ≥ 0.
        adaptive: ASAM with η = 0.
        **options: of the base optimizer.

    Raises:
        ModuleNotFoundError: pytorch_optimizer is not installed.
    """

    def __init__(
        self, params: list[Tensor], base: type[torch.optim.Optimizer], rho: float, adaptive: bool, **options: Any
    ) -> None:
        from pytorch_optimizer.optimizer.sam import SAM

        self.optimizer = SAM(params, base, rho=rho, adaptive=adaptive, **options)

    def ascend(self) -> None:
        """w = w + ρ T² g / ‖T g‖."""
        self.optimizer.first_step(zero_grad=True)

    def step(self) -> None:
        """Back to w, and the base optimizer's step with the gradient at w_max."""
        self.optimizer.second_step()
