"""GSAM: surrogate gap guided SAM (arXiv 2203.08065)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from bsam_fused.distributed import Sync
from bsam_fused.ops.contract import Rule
from bsam_fused.ops.dispatch import Backend
from bsam_fused.optim.mixing import MixesGradients
from bsam_fused.optim.options import Rounding, common
from bsam_fused.optim.sam import Base


class GSAM(MixesGradients):
    """Surrogate gap guided sharpness-aware minimization: SAM's step, which also lowers L(w_max) − L(w).

    The base optimizer's rule with d = g_max − α g⊥, g⊥ the part of g that is orthogonal to g_max:
    g⊥ = g − (⟨g, g_max⟩ / ‖g_max‖²) g_max, 0 where g_max = 0 (algorithm 1). Two passes a step. Products are over all
    parameters; no constant is added to a norm, as the authors' PyTorch code does (which breaks below 1e-6). The paper
    has ρ follow the learning rate: `schedules.ProportionalRadius`.

    Args:
        params: as `SAM` has it; groups may also set ``alpha``.
        base_optimizer: as `SAM` has it.
        rho: as `SAM` has it.
        alpha: α ≥ 0: how much of g⊥ is taken off; 0: `SAM`. The paper's are 0.005 to 0.01 for ResNets, 0.4 to 1 for
            vision transformers (table 4).
        adaptive: as `SAM` has it.
        eta: as `SAM` has it.
        loss_budget: as `SAM` has it.
        norm_eps: as `SAM` has it.
        max_grad_norm: as `SAM` has it; not where ``alpha`` differs between groups.
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

    _rule = Rule.SURROGATE_GAP
    _number_option = "alpha"

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        alpha: float = 0.4,
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
        options = {"rho": rho, "alpha": alpha, "adaptive": adaptive, "eta": eta, "loss_budget": loss_budget}
        super().__init__(params, base_optimizer, options, base_kwargs, common(locals()))
