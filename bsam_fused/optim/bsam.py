"""BSAM: Bilateral SAM (arXiv 2409.13173). Not Bayesian SAM."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from bsam_fused import callers, checks
from bsam_fused.distributed import Sync
from bsam_fused.ops.contract import MAX, Mixing, Radius, Rule
from bsam_fused.ops.dispatch import Backend
from bsam_fused.optim.mixing import MixesGradients
from bsam_fused.optim.options import Rounding, common
from bsam_fused.optim.phases import Phase
from bsam_fused.optim.sam import Base
from bsam_fused.schedules.radii import GIVEN_LR, LARGEST_LR, decayed_radius, largest_lr, note_lr, scheduled_lr

Decay = Literal["lr", "none"]
UpdateFrom = Literal["w", "w_min"]
Descent = Literal["exact", "extrapolate"]

FAR = 4.0  # times ρ: beyond, a linear extrapolation of the gradient says little


class BSAM(MixesGradients):
    """Bilateral sharpness-aware minimization: flat towards both the worst and the best neighbour.

    From the base optimizer's rule with d = g + g_max − c g_min, c = ‖g_max‖ / ‖g_min‖ (0 where ‖g_min‖ = 0),
    g_max at w_max = w + ρ T² g / (n + norm_eps), g_min at w_min = w − ρ_min T² g / (n + norm_eps), n = ‖T g‖.
    Three passes a step; with ``descent="extrapolate"`` two, and d of ĝ_min = g − r (g_max − g), r = ρ_min / ρ.

    Args:
        params: as `SAM` has it; groups may also set every option below but ``update_from``.
        base_optimizer: as `SAM` has it.
        rho: radius ρ ≥ 0 towards w_max.
        rho_min: radius ρ_min ≥ 0 towards w_min; None: ρ.
        rho_min_decay: "lr": ρ_min follows the learning rate (`decayed_radius`, `largest_lr`), and is never more than
            this; "none": it stays.
        rho_min_end: ρ_end ≥ 0, where the decay ends.
        rho_min_lr_end: lr_end ≥ 0, the learning rate at which it does.
        descent: "exact": g_min is the gradient at w_min. "extrapolate": it is ĝ_min, which to first order is the same.
            Where the loss is quadratic it is exactly that, if r is the same in all groups with ρ > 0 (what stays at w
            then has it, too); else only as far as the Hessian does not couple groups of different r, and a warning
            says so.
        update_from: "w", as the paper has it; "w_min" reproduces the authors' released code, whose restore has no
            effect, so that every update starts from w_min.
        adaptive: as `SAM` has it.
        eta: as `SAM` has it.
        loss_budget: as `SAM` has it; ρ_min is cut in the same ratio as ρ.
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
        ValueError: ``descent="extrapolate"`` with ρ = 0 < ρ_min, or with ``update_from="w_min"``.
    """

    _calls: tuple[str, ...] = ("ascend", "descend", "step")
    _rule = Rule.BILATERAL
    _own = ("_calls", "_rule", "_from_saved", "_warned")
    _warned = False

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
        descent: Descent = "exact",
        update_from: UpdateFrom = "w",
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
        checks.choice("update_from", update_from, UpdateFrom)
        if master_weights and update_from == "w_min":
            raise ValueError('master_weights=True with update_from="w_min": master weights are of w; use "w"')
        if sync == "last" and update_from == "w_min":
            raise ValueError('sync="last" with update_from="w_min": every rank has another w_min; use "w"')
        if checks.choice("descent", descent, Descent) == "extrapolate":
            if update_from == "w_min":
                raise ValueError('descent="extrapolate" with update_from="w_min": no step goes to w_min; use "w"')
            self._calls, self._rule = ("ascend", "step"), Rule.EXTRAPOLATED
        self._from_saved = update_from == "w"
        options = {
            "rho": rho,
            "rho_min": rho_min,
            "rho_min_decay": rho_min_decay,
            "rho_min_end": rho_min_end,
            "rho_min_lr_end": rho_min_lr_end,
            "adaptive": adaptive,
            "eta": eta,
            "loss_budget": loss_budget,
        }
        super().__init__(params, base_optimizer, options, base_kwargs, common(locals()))

    @property
    def descent(self) -> Descent:
        """Whether g_min is that of a third pass, or extrapolated."""
        return "extrapolate" if self._rule is Rule.EXTRAPOLATED else "exact"

    def descend(self) -> None:
        """After backward at w_max: the weights become w_min = w − ρ_min T² g / (‖T g‖ + norm_eps).

        Gradients become None. BSAM, arXiv 2409.13173.

        Raises:
            RuntimeError: out of order, ``descent="extrapolate"``, or a gradient that cannot be used, by name.
            ValueError: a radius is negative or not finite.
        """
        self._require_descent("descend")
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

    def _require_descent(self, call: str) -> None:
        if self._rule is Rule.EXTRAPOLATED:
            last = "second_step()" if call == "third_step" else "step()"
            raise RuntimeError(
                f'{call}() with descent="extrapolate", which has two passes: after the second backward() comes {last}'
            )

    def _number(self, group: dict[str, Any], index: int) -> float:
        """Return r = ρ_min / ρ, as they are in effect."""
        if self._rule is not Rule.EXTRAPOLATED:
            return 0.0
        rho, rho_min = (self._radius(group, option, index) for option in ("rho", "rho_min"))
        if not rho and rho_min:
            raise ValueError(
                f'rho=0 with rho_min={rho_min:g} in group {index}, and descent="extrapolate", which goes on from w_max '
                "through w: give it a rho > 0, or rho_min=0"
            )
        return rho_min / rho if rho else 0.0

    def _numbers(self) -> list[float]:
        """Return every group's r; a group that stays at w, whose gradients move with the others, has theirs."""
        if self._rule is not Rule.EXTRAPOLATED:
            return [0.0] * len(self._groups)
        numbers = super()._numbers()
        rho, exempt = self._key("rho"), self._exempt()
        moves = [bool(group[rho]) and not out for group, out in zip(self._groups, exempt, strict=True)]
        ratios = [r for r, moved in zip(numbers, moves, strict=True) if moved]
        self._warned = self._warned or _warn_of(ratios)
        if not ratios or _differ(ratios):
            return numbers
        return [r if moved else ratios[0] for r, moved in zip(numbers, moves, strict=True)]

    def _needs_sums(self, max_norm: float, scaled: bool = False) -> bool:
        """Whether d is clipped, or may overflow as the loss is unscaled, which ‖g‖ + ‖g_max‖ would say."""
        return self._rule is Rule.EXTRAPOLATED or max_norm < math.inf or (scaled and not self._norm_is_whole)

    def _check_clipping(self, mixing: Mixing, max_norm: float) -> None:
        """Any direction of BSAM can be clipped: what differs between groups is in the sums."""

    def _step(self, loss: Any = None) -> None:
        super()._step(loss)
        if self._rule is Rule.EXTRAPOLATED:
            self._note_rates()

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

    def _check_options(self, group: dict[str, Any], index: int) -> None:
        super()._check_options(group, index)
        self._give_rho_min(group)
        for option in ("rho_min", "rho_min_end", "rho_min_lr_end"):
            self._non_negative(group, option, index)
        self._decay(group, index)
        if group.get("lr") is not None:
            group.setdefault(GIVEN_LR, float(group["lr"]))
            group.setdefault(LARGEST_LR, 0.0)
        self._number(group, index)

    def _fill(self, group: dict[str, Any], options: dict[str, Any]) -> None:
        super()._fill(group, options)
        self._give_rho_min(group)

    def _give_rho_min(self, group: dict[str, Any]) -> None:
        if group["rho_min"] is None:
            group["rho_min"] = group[self._key("rho")]

    def _rename(self, group: dict[str, Any]) -> None:
        of_0_1 = "rho_min_decay" in group and "bsam_fused_format" not in group
        if of_0_1 and "lr_max" in group and "lr_max" not in self.base_optimizer.defaults:
            group[GIVEN_LR] = group.pop("lr_max")

    @property
    def _kept_options(self) -> set[str]:
        return super()._kept_options | {GIVEN_LR, LARGEST_LR}

    def third_step(self, zero_grad: bool = False) -> None:
        """`step`, under the name SAM users know; ``zero_grad``: clear the gradients afterwards."""
        self._require_descent("third_step")
        self._call_by_number(2, zero_grad)


def _differ(ratios: list[float]) -> bool:
    return max(ratios) - min(ratios) > 1e-6 * max(ratios)


def _warn_of(ratios: list[float]) -> bool:
    """Warn where ĝ_min may be far from g_min, by the ρ_min / ρ of what moves; return whether that was so."""
    far = max(ratios, default=0.0) > FAR
    if not (far or (ratios and _differ(ratios))):
        return False
    shown = ", ".join(f"{r:g}" for r in sorted({*ratios}))
    if far:
        callers.warn(
            f'descent="extrapolate" with rho_min / rho = {shown}: the gradient is known at w and w_max, and taken to '
            f"change in a straight line {FAR:g} times as far behind w; give rho_min at most {FAR:g} rho"
        )
    else:
        callers.warn(
            f'descent="extrapolate" with different rho_min / rho in the groups ({shown}): the extrapolation is then '
            'as if the Hessian did not couple these groups; give all of them one ratio, or use descent="exact"'
        )
    return True
