"""BSAM: Bilateral SAM (arXiv 2409.13173). Not Bayesian SAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from bsam_fused import checks
from bsam_fused.distributed import Sync
from bsam_fused.ops.contract import MAX, MIN, Radius
from bsam_fused.ops.dispatch import Backend
from bsam_fused.optim.base import Closure, R, SharpnessAware
from bsam_fused.optim.options import Rounding, common
from bsam_fused.optim.phases import Phase
from bsam_fused.optim.sam import Base
from bsam_fused.schedules import GIVEN_LR, LARGEST_LR, decayed_radius, largest_lr, note_lr, scheduled_lr

Decay = Literal["lr", "none"]
UpdateFrom = Literal["w", "w_min"]


class BSAM(SharpnessAware):
    """Bilateral sharpness-aware minimization: flat towards both the worst and the best neighbour.

    From the base optimizer's rule with d = g + g_max − c g_min, c = ‖g_max‖ / ‖g_min‖ (0 where ‖g_min‖ = 0),
    g_max at w_max = w + ρ T² g / (n + norm_eps), g_min at w_min = w − ρ_min T² g / (n + norm_eps), n = ‖T g‖.
    Three passes a step.

    Args:
        params: as `SAM` has it; groups may also set every option below but ``update_from``.
        base_optimizer: as `SAM` has it.
        rho: radius ρ ≥ 0 towards w_max.
        rho_min: radius ρ_min ≥ 0 towards w_min; None: ρ.
        rho_min_decay: "lr": ρ_min follows the learning rate (`decayed_radius`, `largest_lr`), and is never more than
            this; "none": it stays.
        rho_min_end: ρ_end ≥ 0, where the decay ends.
        rho_min_lr_end: lr_end ≥ 0, the learning rate at which it does.
        update_from: "w", as the paper has it; "w_min" reproduces the authors' released code, whose restore has no
            effect, so that every update starts from w_min.
        adaptive: as `SAM` has it.
        eta: as `SAM` has it.
        norm_eps: as `SAM` has it.
        max_grad_norm: as `SAM` has it. (Clipping g_min between the phases changes nothing: it is rescaled to ‖g_max‖.)
        rounding: as `SAM` has it.
        seed: as `SAM` has it.
        master_weights: as `SAM` has it; not with ``update_from="w_min"``.
        sync: as `SAM` has it: all passes are local, and d, with each rank's own c, is reduced; not with
            ``update_from="w_min"``.
        same_randomness: as `SAM` has it.
        model: as `SAM` has it.
        backend: as `SAM` has it.
        **base_kwargs: options of the base optimizer's class.

    Raises:
        ValueError, TypeError, RuntimeError: as `SAM` has it.
    """

    _calls = ("ascend", "descend", "step")
    _last_slot = MIN
    _keeps_g = True

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        rho_min: float | None = None,
        rho_min_decay: Decay = "lr",
        rho_min_end: float = 0.0,
        rho_min_lr_end: float = 0.0,
        update_from: UpdateFrom = "w",
        adaptive: bool = False,
        eta: float = 0.0,
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
        checks.choice("update_from", update_from, UpdateFrom)
        if master_weights and update_from == "w_min":
            raise ValueError('master_weights=True with update_from="w_min": master weights are of w; use "w"')
        if sync == "last" and update_from == "w_min":
            raise ValueError('sync="last" with update_from="w_min": every rank has another w_min; use "w"')
        self._from_saved = update_from == "w"
        options = {
            "rho": rho,
            "rho_min": rho_min,
            "rho_min_decay": rho_min_decay,
            "rho_min_end": rho_min_end,
            "rho_min_lr_end": rho_min_lr_end,
            "adaptive": adaptive,
            "eta": eta,
        }
        super().__init__(params, base_optimizer, options, base_kwargs, common(locals()))

    def descend(self) -> None:
        """After backward at w_max: the weights become w_min = w − ρ_min T² g / (‖T g‖ + norm_eps).

        Gradients become None. BSAM, arXiv 2409.13173.

        Raises:
            RuntimeError: out of order, or a gradient that cannot be used, by name.
            ValueError: a radius is negative or not finite.
        """
        self._descend()
        self._passes.leave()

    def _descend(self, loss: Any = None) -> None:
        self._expect("descend")
        self._notice()
        radii, norm_eps = self._radii("rho_min", -1.0), self._norm_eps
        self._read_gradients()
        totals = self._flats.totals()
        self._require_gradients("descend")
        self._enter(Phase.DESCENDED)
        for flat, sums in zip(self._flats, totals, strict=True):
            flat.descend(sums, radii, norm_eps)
        self._flats.poison(MAX, loss)
        self._note_rates()
        self._passes.finish()

    def _plain_step(self, loss: Any = None) -> None:
        super()._plain_step(loss)
        self._note_rates()  # a late phase may come after the learning rate's peak

    def _note_rates(self) -> None:
        for group in self._groups:
            if group["rho_min_decay"] == "lr" and group.get("lr") is not None:
                note_lr(group)

    def _all_radii(self) -> list[list[Radius]]:
        self._note_rates()  # of a step that is replayed
        return [*super()._all_radii(), self._radii("rho_min", -1.0)]

    def _radius(self, group: dict[str, Any], option: str, index: int) -> float:
        radius = super()._radius(group, option, index)
        if option != "rho_min" or self._decay(group, index) == "none" or group.get("lr") is None:
            return radius
        return decayed_radius(
            radius,
            scheduled_lr(group),
            largest_lr(group),
            rho_min_end=self._non_negative(group, "rho_min_end", index),
            lr_end=self._non_negative(group, "rho_min_lr_end", index),
        )

    def _decay(self, group: dict[str, Any], index: int) -> str:
        return checks.choice("rho_min_decay", group["rho_min_decay"], Decay, index)

    @overload
    def step(self, closure: None = None, *, ascent_closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], R], *, ascent_closure: None = None) -> R: ...

    def step(self, closure: Closure | None = None, *, ascent_closure: Closure | None = None) -> Any:
        """As `SharpnessAware.step`; the closure is called three times.

        Raises:
            TypeError: with ``ascent_closure``, which BSAM has no use for.
        """
        if ascent_closure is not None:
            raise TypeError("BSAM takes no ascent_closure: its direction needs the gradient of one loss at w; use SAM")
        return super().step(closure)

    def _check_options(self, group: dict[str, Any], index: int) -> None:
        super()._check_options(group, index)
        if group["rho_min"] is None:
            group["rho_min"] = group[self._key("rho")]
        for option in ("rho_min", "rho_min_end", "rho_min_lr_end"):
            self._non_negative(group, option, index)
        self._decay(group, index)
        if group.get("lr") is None:
            return
        group.setdefault(GIVEN_LR, float(group["lr"]))
        group.setdefault(LARGEST_LR, 0.0)

    def _rename(self, group: dict[str, Any]) -> None:
        of_0_1 = "rho_min_decay" in group and "bsam_fused_format" not in group
        if of_0_1 and "lr_max" in group and "lr_max" not in self.base_optimizer.defaults:
            group[GIVEN_LR] = group.pop("lr_max")

    @property
    def _kept_options(self) -> set[str]:
        return super()._kept_options | {GIVEN_LR, LARGEST_LR}

    def first_step(self, zero_grad: bool = False) -> None:
        """`ascend`, under the name SAM users know. The gradient is taken whatever ``zero_grad`` says."""
        self._call_by_number(0)

    def second_step(self, zero_grad: bool = False) -> None:
        """`descend`, under the name SAM users know. The gradient is taken whatever ``zero_grad`` says."""
        self._call_by_number(1)

    def third_step(self, zero_grad: bool = False) -> None:
        """`step`, under the name SAM users know; ``zero_grad``: clear the gradients afterwards."""
        self._call_by_number(2)
        if zero_grad:
            self.zero_grad()
