"""WSAM: weighted SAM (arXiv 2305.15817)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from bsam_fused import checks
from bsam_fused.distributed import Sync
from bsam_fused.ops.contract import Rule
from bsam_fused.ops.dispatch import Backend
from bsam_fused.optim.mixing import MixesGradients
from bsam_fused.optim.options import Rounding, common
from bsam_fused.optim.sam import Base


class WSAM(MixesGradients):
    """Weighted sharpness-aware minimization: the sharpness L(w_max) − L(w) as a regularization term of its own weight.

    Of the loss L(w) + γ/(1 − γ) (L(w_max) − L(w)) the base optimizer's rule has
    d = (1 − 2γ)/(1 − γ) g + γ/(1 − γ) g_max, the paper's coupled form. Two passes a step. (The decoupled form, a second
    update by lr γ/(1 − γ) (g_max − g) beside the base optimizer's, would cost every update a pass of its own, and for
    SGD without momentum is the same; it is not offered.)

    Args:
        params: as `SAM` has it; groups may also set ``gamma``.
        base_optimizer: as `SAM` has it.
        rho: as `SAM` has it.
        gamma: γ in [0, 1): 0 is the base optimizer alone, ½ is `SAM`, more weighs the sharpness more.
        adaptive: as `SAM` has it.
        eta: as `SAM` has it.
        loss_budget: as `SAM` has it.
        norm_eps: as `SAM` has it.
        max_grad_norm: as `SAM` has it; not where ``gamma`` differs between groups.
        rounding: as `SAM` has it.
        seed: as `SAM` has it.
        master_weights: as `SAM` has it.
        sync: as `SAM` has it: all passes are local, and d, with each rank's own coefficients, is reduced.
        same_randomness: as `SAM` has it.
        model: as `SAM` has it.
        backend: as `SAM` has it.
        **base_kwargs: options of the base optimizer's class.

    Raises:
        ValueError, TypeError, RuntimeError: as `SAM` has it.
    """

    _rule = Rule.WEIGHTED
    _number_option = "gamma"

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        gamma: float = 0.9,
        adaptive: bool = False,
        eta: float = 0.0,
        loss_budget: float | None = None,
        norm_eps: float = 1e-12,
        max_grad_norm: float | None = None,
        rounding: Rounding = "stochastic",
        seed: int = 0,
        master_weights: bool = False,
        sync: Sync = "every",
        same_randomness: bool = False,
        model: nn.Module | None = None,
        backend: Backend = "auto",
        **base_kwargs: Any,
    ) -> None:
        options = {"rho": rho, "gamma": gamma, "adaptive": adaptive, "eta": eta, "loss_budget": loss_budget}
        super().__init__(params, base_optimizer, options, base_kwargs, common(locals()))

    def _number(self, group: dict[str, Any], index: int) -> float:
        return checks.below_one("gamma", group[self._key("gamma")], index)

    def _needs_sums(self, max_norm: float, scaled: bool = False) -> bool:
        """Whether d is clipped, or ‖T g‖ is not ‖g‖, by which it is seen that no element of d overflows."""
        return max_norm < math.inf or not self._norm_is_whole
