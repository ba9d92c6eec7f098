"""LookSAM: SAM's gradient looked up every k-th step, and reused between (arXiv 2203.02714)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from bsam_fused import checks
from bsam_fused.distributed import Sync
from bsam_fused.ops.contract import Mixing, Rule
from bsam_fused.ops.dispatch import Backend
from bsam_fused.optim.options import Rounding, common
from bsam_fused.optim.phases import Phase
from bsam_fused.optim.remembering import Remembers
from bsam_fused.optim.sam import Base

LOOKS = "looks"
"""Where groups count the steps, so that a resume goes on with the same ones."""


class LookSAM(Remembers):
    """Sharpness-aware minimization at little more than one pass a step: two in every k-th, one in those between.

    Every k-th step is `SAM`'s, and remembers the part of g_max that is orthogonal to g, which changes slowly:
    v = g_max − (⟨g, g_max⟩ / ‖g‖²) g, in ``state[p]["orthogonal_gradient"]``. Those between have
    d = g + α (‖g‖ / ‖v‖) v, g where v = 0 (algorithm 1). Norms and products are over all parameters, and no constant is
    added to them. Closures are called once in the steps between; `passes` says which comes. A skipped step counts as
    one, and leaves v as it was. Where the loss has next to no curvature across g, v is rounding noise, and α of it is
    added all the same, as the paper has it.

    Args:
        params: as `SAM` has it; groups may also set ``alpha``.
        base_optimizer: as `SAM` has it.
        rho: as `SAM` has it.
        k: every how many steps there are two passes, ≥ 1; 1: `SAM`. Not counted are steps while ``active`` is False or
            that `decide` leaves the base optimizer, and at a learning rate of 0 those between.
        alpha: α ≥ 0: how long the reused part is beside g; 0: the base optimizer between.
        adaptive: as `SAM` has it.
        eta: as `SAM` has it.
        loss_budget: as `SAM` has it.
        norm_eps: as `SAM` has it.
        max_grad_norm: as `SAM` has it; not where ``alpha`` differs between groups.
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
    """

    _rule = Rule.ORTHOGONAL
    _number_option = "alpha"
    _own = ("k",)
    _counting: int | None = None  # what is counted once the step whose gradients were read is made

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        k: int = 5,
        alpha: float = 0.7,
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
        self.k = checks.integer("k", k, 1)
        radius = {"rho": rho, "adaptive": adaptive, "eta": eta, "loss_budget": loss_budget}
        super().__init__(params, base_optimizer, {**radius, "alpha": alpha, LOOKS: 0}, base_kwargs, common(locals()))

    @property
    def _steps(self) -> int:
        self._notice()  # groups that were loaded into the base optimizer lack it
        return max(checks.integer(LOOKS, group[LOOKS], 0) for group in self._groups)

    @property
    def _looks(self) -> bool:
        return self._steps % checks.integer("k", self.k, 1) == 0

    @property
    def _may_perturb(self) -> bool:
        return self._active and self._looks

    def _plain_mixing(self) -> Mixing:
        return self._mixing_by(Rule.REUSED) if self._active and not self._looks else super()._plain_mixing()

    def _have_history(self, mixing: Mixing) -> None:
        super()._have_history(mixing)
        idle = self._phase is Phase.REST and (self._lacking or self._moves_nothing())
        self._counting = self._steps + 1 if mixing.rule.history and not idle else None

    def _come_to_rest(self) -> None:
        """Count the step if it was made; interrupted, this can be called again."""
        if self._counting is not None and self._flats.made:
            self._note_steps(self._counting)
        self._counting = None
        super()._come_to_rest()

    def _count(self, steps: int) -> None:
        self._note_steps(self._steps + steps)

    def _note_steps(self, steps: int) -> None:
        for group in self._groups:
            group[LOOKS] = steps

    def _check_options(self, group: dict[str, Any], index: int) -> None:
        super()._check_options(group, index)
        checks.integer(LOOKS, group[LOOKS], 0)
