"""Friendly SAM: the perturbation without the part of the gradient that all batches have (arXiv 2403.12350)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from bsam_fused import checks
from bsam_fused.distributed import Sync
from bsam_fused.ops.contract import FlatParams, Mixing, Radius, Rule, RuleNumber
from bsam_fused.ops.dispatch import Backend
from bsam_fused.optim import scaling
from bsam_fused.optim.options import Rounding, common
from bsam_fused.optim.remembering import Remembers
from bsam_fused.optim.sam import Base


class FriendlySAM(Remembers):
    """Friendly sharpness-aware minimization: `SAM`, perturbed along what this batch's gradient has of its own.

    w_max = w + ρ T² q / (‖T q‖ + norm_eps), q = g − σ m, m the mean of the gradients of the steps before, which falls
    off as λ^t; d = g_max. Two passes a step. The authors' code (https://github.com/nblt/F-SAM) is followed: q has the m
    of before this step, then m = λ m + (1 − λ) g, and the first m is g. (With the m of after it, as the formula is
    written elsewhere, q is λ q at σ = 1, and so the same perturbation.) m is in ``state[p]["gradient_average"]``; the
    first one is that of all parameters: for one that takes part later m begins as (1 − λ) g.
    ``norms[0]``, `metrics`' ``norm_g``, is ‖T q‖.

    Args:
        params: as `SAM` has it; groups may also set ``sigma`` and ``lmbda``. Of one with ``perturb=False`` m stays 0.
        base_optimizer: as `SAM` has it.
        rho: as `SAM` has it.
        sigma: σ ≥ 0: how much of m is taken off; 0: `SAM`.
        lmbda: λ in [0, 1): how slowly m follows the gradients; the authors' runs have 0.6 to 0.95.
        adaptive: as `SAM` has it.
        eta: as `SAM` has it.
        loss_budget: as `SAM` has it.
        norm_eps: as `SAM` has it.
        max_grad_norm: as `SAM` has it.
        rounding: as `SAM` has it.
        seed: as `SAM` has it.
        master_weights: as `SAM` has it.
        sync: as `SAM` has it; but not "last": every rank would remember what its own batch had.
        same_randomness: as `SAM` has it.
        model: as `SAM` has it.
        backend: as `SAM` has it.
        **base_kwargs: options of the base optimizer's class.

    Raises:
        ValueError, TypeError, RuntimeError: as `SAM` has it.
        RuntimeError: with a GradScaler, whose scale would be mixed into m.
    """

    _rule = Rule.FRIENDLY
    _number_option = "sigma"

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        sigma: float = 1.0,
        lmbda: float = 0.9,
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
        radius = {"rho": rho, "adaptive": adaptive, "eta": eta, "loss_budget": loss_budget}
        options = {**radius, "sigma": sigma, "lmbda": lmbda}
        super().__init__(params, base_optimizer, options, base_kwargs, common(locals()))

    def _mixing(self) -> Mixing:
        sigmas = self._numbers()
        largest, decays = max(sigmas), [self._decay(group, i) for i, group in enumerate(self._groups)]
        numbers = [RuleNumber(sigma, largest, decay) for sigma, decay in zip(sigmas, decays, strict=True)]
        return Mixing(self._rule, numbers)

    def _decay(self, group: dict[str, Any], index: int) -> float:
        return checks.below_one("lmbda", group[self._key("lmbda")], index)

    def _needs_sums(self, max_norm: float, scaled: bool = False) -> bool:
        return False

    def _sum_ascent(self, flat: FlatParams, radii: Sequence[Radius]) -> None:
        flat.mix(radii, self._mixed)

    def _refuse_scaler(self) -> None:
        super()._refuse_scaler()
        scaling.refuse_scaled("FriendlySAM", "it remembers the mean of gradients")

    def _check_options(self, group: dict[str, Any], index: int) -> None:
        super()._check_options(group, index)
        self._decay(group, index)
