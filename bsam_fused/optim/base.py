"""What every sharpness-aware optimizer shares: options, ascend, plain steps, the update. No algorithm.

A step is a walk through phases: at rest the weights are w; ``ascend`` and its like move them; ``step`` brings
them to the next w. A phase reads all gradients before it writes anything, so an error leaves the phase as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from bsam_fused import callers, checks, distributed
from bsam_fused.ops import dispatch
from bsam_fused.ops.contract import ASCENT, MAX, FlatParams, Mixing, Radius
from bsam_fused.optim import fused, groups, hooks, metrics, scaling, shown, trainers
from bsam_fused.optim.flats import Flats
from bsam_fused.optim.gradients import NO_GRADIENT, ReadsGradients
from bsam_fused.optim.options import clipping_norm
from bsam_fused.optim.options_read import OptionsRead
from bsam_fused.optim.phases import Phase
from bsam_fused.optim.sharpness import Sharpness

Closure = Callable[[], Any]
R = TypeVar("R")


class SharpnessAware(ReadsGradients):
    """A base optimizer that steps from w with a direction found at perturbed weights.

    Subclasses name their calls, and add the ones of their own.
    """

    _from_saved = True

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer,
        options: dict[str, Any],
        base_kwargs: dict[str, Any],
        common: dict[str, Any],
    ) -> None:
        seed = common["seed"] if common["rounding"] == "stochastic" else None
        self._flats = Flats(seed, common["master_weights"], common["sync"] == "last")
        self.norm_eps: float = common["norm_eps"]
        self.max_grad_norm: float | None = common["max_grad_norm"]
        self.model = common["model"]
        self.sync = common["sync"]
        self.same_randomness = common["same_randomness"]
        _ = self._group  # raises where there must be one
        self.backend: dispatch.Backend = common["backend"]
        self.active = True
        self.sharpness: Sharpness | None = None
        options = {**options, "perturb": True}
        if isinstance(base_optimizer, SharpnessAware) or (
            isinstance(base_optimizer, type) and issubclass(base_optimizer, SharpnessAware)
        ):
            raise TypeError(
                "base_optimizer is sharpness-aware itself: pass the optimizer that makes the update, such as SGD"
            )
        base = self.base_optimizer = groups.build_base(type(self), params, base_optimizer, base_kwargs, options)
        if self.model is not None:
            groups.check_model(self.model, self._parameters())
            distributed.refuse_fsdp1(self.model)
        ours = {self._key(option): value for option, value in options.items()}
        self._known, self._completed, self._read = [], [], OptionsRead()
        owned = base.param_groups, base.state
        try:
            super().__init__(base.param_groups, {**base.defaults, **ours, **groups.SAVED})
        finally:  # torch begins with none of either
            base.param_groups, base.state = owned
        self._notice()
        self._fused_rule()  # raises where master weights need one
        for choice in self._choices().values():  # raises now, and not in the first step, where one asked for is missing
            if choice.slower:
                callers.warn(choice.slower)

    profile_hook_step = staticmethod(hooks.hooked_where_watched)  # type: ignore[assignment]

    # ---- what runs where

    @property
    def backends(self) -> dict[str, str]:
        """Which backend runs for the parameters on each device, and why; on meta, none.

        Raises:
            RuntimeError: the one asked for cannot be had, with the reason.
        """
        return {str(device): f"{choice.backend} ({choice.why})" for device, choice in self._choices().items()}

    def _choices(self) -> dict[torch.device, dispatch.Choice]:
        devices = {p.device for p in self._parameters() if not p.is_meta}
        return {device: dispatch.choose(self.backend, device) for device in sorted(devices, key=str)}

    def __repr__(self) -> str:
        """As torch's, with the base optimizer's class and the backends."""
        return shown.shown(self, super().__repr__())

    # ---- what happened

    @property
    def norms(self) -> Tensor:
        """‖T g‖, ‖g_max‖, ‖g_min‖ of the latest passes: float64 (3,), on the first parameter's device.

        Of the gradients as they came: times the scale of a GradScaler; with ``sync="last"`` this rank's own.
        """
        return self._flats.squared_norms.sqrt()

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped for an inf or NaN in some pass; reading it waits for a GPU."""
        return self._flats.hear_of_all()

    def metrics(self) -> dict[str, float]:
        """Return the numbers of the latest step, for any logger; waits for a GPU once, and for no other rank.

        At any time: what there is not (yet) is left out.

        Returns:
            ``norm_g``, ‖T g‖, ``norm_g_max`` and BSAM's ``norm_g_min`` of the step's passes, as `norms` has them
            (of a plain step ‖g‖ alone, where the base is fused; of a skipped one those of passes after an inf or NaN
            may be NaN, too); ``rho``, and BSAM's ``rho_min`` as it is in effect;
            ``lr``; of several param groups ``rho/0``, ``rho/1``, and so on; ``skipped_steps``; and after a step with a
            closure ``loss``, ``loss_max``, ``max_sharpness`` and what else `Sharpness` has.
        """
        return metrics.read(self)

    # ---- the direction

    def _mixing(self) -> Mixing:
        """Return how the direction of a step that begins is mixed."""
        return Mixing()

    def _plain_mixing(self) -> Mixing:
        """Return how the direction of a step of one pass is mixed."""
        return Mixing()

    def _check_clipping(self, mixing: Mixing, max_norm: float) -> None:
        """Raise ValueError where the direction, so mixed, cannot be clipped."""

    def _give(self, totals: Sequence[Tensor]) -> None:
        """Have the coefficients of a user's own rule join the sums."""

    # ---- phases

    @property
    def _norm_eps(self) -> float:
        return checks.non_negative("norm_eps", self.norm_eps)

    def ascend(self) -> None:
        """After backward at w: w becomes w_max = w + ρ T² g / (‖T g‖ + norm_eps). Gradients become None.

        Where a gradient is not finite, the weights stay and the step will be skipped. SAM arXiv 2010.01412,
        ASAM 2102.11600.

        Raises:
            RuntimeError: out of order, ``active`` is False, or a gradient that cannot be used, by name.
            ValueError: a radius is negative or not finite.
        """
        self._ascend()

    def _ascend(self, loss: Any = None) -> None:
        self._expect("ascend")
        if not self._perturbs:
            ascend, step = self._named("ascend"), self._named("step")
            if not self._active:
                raise RuntimeError(f"{ascend}() while active is False: {step}() is then the base optimizer's step")
            raise RuntimeError(f"{ascend}() in a step of one pass, as optimizer.passes says: {step}() comes next")
        self._notice()
        radii, norm_eps = self._radii("rho", +1.0), self._norm_eps
        self._mixed = self._mixing()
        self._check_clipping(self._mixed, clipping_norm(self.max_grad_norm))
        self.sharpness, self._flats.slots = None, ()
        self._read_gradients()
        self._norm_is_whole = not (self._flats.some_exempt or any(radius.adaptive for radius in radii))
        self._have_history(self._mixed)
        for flat in self._flats:
            self._sum_ascent(flat, radii)
        self._flats.poison(ASCENT, loss)
        totals = self._flats.totals()
        self._require_gradients("ascend")
        self._passes.keep(self.model, self._parameters())
        try:
            self._enter(Phase.ASCENDED)
            self._flats.slots = (ASCENT,)
            for flat, sums in zip(self._flats, totals, strict=True):
                flat.ascend(sums, radii, norm_eps, self._mixed)
        except BaseException:
            self.restore()
            raise

    def _sum_ascent(self, flat: FlatParams, radii: Sequence[Radius]) -> None:
        """Have a FlatParams sum the squares of T times what the weights are moved along."""
        flat.square_norm(ASCENT, radii)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling and skipping to `step`; it asks before it looks at the gradients."""
        if self._phase is Phase.REST:
            return not self._is_plain() or self._fused_rule() is not None
        if self._following == "step" and self._group is not None:
            self._tell_scaler_of_all_ranks()
        elif self._following == "step":
            self._tell_scaler(self._parameters())
        return True

    def _hear_of_unscaling(self) -> None:
        self._refuse_decided()
        self._unscaled_at = self._phase
        if not self._at_rest and self._following == "step" and self._group is None:
            self._tell_scaler(self._parameters())

    def _tell_scaler(self, params: Iterable[Tensor]) -> None:
        """Make a gradient of the last pass NaN where an earlier one was not finite."""
        kept = self._needs_sums(math.inf) and self._flats.some_exempt  # whose g is in no other sum
        if kept:
            self._read_gradients()
            self._sum_last_gradients(math.inf)
        scaling.mark(params, self._flats.failed(self._rule.last_slot, kept=kept))

    def _tell_scaler_of_all_ranks(self) -> None:
        """Likewise where a gradient of any pass was not finite on any rank: scalers must go on alike."""
        self._read_gradients()
        self._sum_last_gradients(math.inf)
        kept = self._needs_sums(math.inf)
        failed = self._flats.failed_anywhere(self._group, self._rule.last_slot + 1, kept=kept)
        scaling.mark(self._parameters(), failed)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], R]) -> R: ...

    def step(self, closure: Closure | None = None) -> Any:
        """Finish a step by hand, or run a whole one with ``closure``.

        Args:
            closure: does forward and backward and returns the loss; called once a pass, with gradients
                cleared before each. None: this is the last call of a step by hand, after its last backward;
                at rest it is the base optimizer's step, with d = g, where ``active`` is False or every lr is 0.

        Returns:
            The loss at w as the closure returned it; None without one.

        Raises:
            RuntimeError: out of order, or a gradient that cannot be used, by name. Whatever a closure raises
                passes through, with the weights back at w.
        """
        closure = trainers.without_empty(closure)
        if closure is not None:
            return self._run([closure] * len(self._calls))
        if self._phase is Phase.REST and not self._looking_at_w and self._is_plain():
            return self._plain_step()
        return self._step()

    def _is_plain(self) -> bool:
        return self._moves_nothing() or not self._perturbs

    def _moves_nothing(self) -> bool:
        rates = [group.get("lr") for group in self._groups]  # some bases have none
        return all(lr is not None and float(lr) == 0 for lr in rates)

    def _plain_step(self, loss: Any = None) -> None:
        """Make a step of one pass from w, the base optimizer's, or skip it where ‖g‖ is not finite."""
        self._notice()
        self.sharpness, self._flats.slots = None, ()
        max_norm = clipping_norm(self.max_grad_norm)
        rule, mixing = self._fused_rule(), self._plain_mixing()
        # torch.distributed.checkpoint has a step that moves nothing show what state there is.
        shown = self._mixing() if self._rule.history and self._moves_nothing() else mixing
        if rule is None and max_norm == math.inf and shown.rule.history is None:
            self._flats.hand_over()
            self.base_optimizer.step()
            self._come_to_rest()
            self._flats.end_step((), made=True)
            return
        try:
            scaled = self._told()
            scalars = self._once(self._scalars, rule)
            self._check_clipping(mixing, max_norm)
            self._read_gradients()
            self._have_history(shown)
            for flat in self._flats:
                flat.begin_plain(mixing)
                if mixing.rule.mixes:
                    flat.direction_sums()
                else:
                    flat.square_norm(MAX, self._plain_radii())
            self._flats.poison(MAX, loss)
            self._flats.note(MAX, scaled)
            made, totals = None, self._flats.totals()
            if rule:
                self._flats.update(rule, self.state, scalars, totals, True, max_norm)
            else:
                made = self._flats.general_update(self.state, totals, True, max_norm, self.base_optimizer.step)
            if self._moves_nothing():  # so does torch.distributed.checkpoint, whenever it finds no state
                self._flats.draw_again()
                self._flats.keep_history()
        except BaseException:
            scaling.forget(self)
            self.restore()
            raise
        self._come_to_rest()
        self._flats.end_step((MAX,), made)

    def _run(self, closures: Sequence[Closure]) -> Any:
        """Run a whole step, one closure a pass."""
        try:
            _require_functions(closures)
            scaling.refuse_closure(scaling.told(self))
            if self._phase is not Phase.REST:
                self._out_of_order("step(closure)")
            self._notice()
            may_perturb = self._may_perturb
        except Exception:
            scaling.forget(self)
            raise
        trainers.refuse_lightning(closures[0])
        trainers.refuse_accelerate()
        self.sharpness = None
        self._decided = None  # by gradients that count no more
        self._clear_gradients()
        if not may_perturb:
            loss = _evaluate(closures[-1])
            self._lacking = self._has_no_gradient()
            if loss is not None and self._lacking:
                self._read_gradients()  # may say why
                self._require_gradients("step")
            self._plain_step(loss)
            return loss
        losses, values = [], []
        try:
            for call, closure in zip(self._calls, closures, strict=True):
                with self.one_pass():
                    losses.append(_evaluate(closure))
                values.append(_value(losses[-1]))
                if self._at_rest and not self._perturbs:
                    self._plain_step(losses[0])
                    return losses[0]
                getattr(self, f"_{call}")(losses[-1])
        except BaseException as error:
            self.restore()
            # A closure that returns nothing and does nothing gives up its batch.
            given_up = losses[:1] == [None] and (len(losses) == 1 or self.sync == "last")
            if given_up and NO_GRADIENT in str(error):
                return None
            raise
        if all(isinstance(value, Tensor | Real) for value in values) and len(set(map(id, closures))) == 1:
            self.sharpness = Sharpness(*values)
        return losses[0]

    def _step(self, loss: Any = None) -> None:
        """Update from w, or skip where a sum is not finite."""
        try:
            scaled = self._told()
            self._expect("step")
            scaling.refuse_unscaled(
                scaled, type(self).__name__, mixes=self._rule.mixes, too_early=self._unscaled_at is Phase.REST
            )
            self._notice()
            if scaled.found_inf is not None:
                self._refuse_scaler()
            rule = self._fused_rule()
            scalars = self._once(self._scalars, rule)
            max_norm, ranks = clipping_norm(self.max_grad_norm), self._group
            self._check_clipping(self._mixed, max_norm)
            self._read_gradients()
            self._have_history(self._mixed)
            may_overflow = scaled.scale is not None or ranks is not None  # where d is unscaled, or stored
            self._sum_last_gradients(max_norm if ranks is None else math.inf, may_overflow)
            self._flats.poison(self._rule.last_slot, loss)
            self._flats.note(self._rule.last_slot, scaled)
            if ranks is None:
                totals = self._flats.totals()
                self._give(totals)
            else:
                totals = self._flats.averaged(ranks, self._mixed, self._needs_sums(math.inf, True), self._give)
            self._require_gradients("step")
            if rule:
                self._flats.update(rule, self.state, scalars, totals, self._from_saved, max_norm)
                made = None
            else:
                made = self._general_update(totals, max_norm)
        except BaseException:
            scaling.forget(self)
            raise
        self._come_to_rest()
        self._unscaled_at = None
        self._flats.end_step(self._rule.slots, made)

    def _scalars(self, rule: fused.FusedRule | None) -> list[Any]:
        """Return what the rule reads of each param group."""
        return [rule.scalars(group) for group in self._groups] if rule else []

    def _told(self) -> scaling.Scaled:
        """Return what a GradScaler says, if there is one that is of use here."""
        scaled = scaling.told(self)
        if scaled.found_inf is not None:
            self._refuse_decided()
        return scaled

    def _refuse_scaler(self) -> None:
        """Raise RuntimeError where the scale of the loss would have to be known before the last pass."""
        if min(self._budget(group, i) for i, group in enumerate(self._groups)) < math.inf:
            scaling.refuse_scaled("loss_budget", "the radius is cut by the norm of the first pass's gradients")

    def _have_history(self, mixing: Mixing) -> None:
        """Have the history that a step needs where its phases find it."""
        if mixing.rule.history is not None:
            self._flats.have_history(mixing.rule.history, self._fused_rule(), self._groups, self.state)

    def _general_update(self, totals: Sequence[Tensor], max_norm: float) -> bool:
        try:
            base_step = self.base_optimizer.step
            return self._flats.general_update(self.state, totals, self._from_saved, max_norm, base_step)
        except BaseException:
            self.restore()
            raise

    # ---- captured steps

    def _count(self, steps: int) -> None:
        """Count steps that were replayed, or that shall not count (< 0)."""

    def _all_radii(self) -> list[list[Radius]]:
        """Return the radii that there are, in the order of the phases that go by them."""
        return [self._radii("rho", +1.0)]

    def write_options(self) -> None:
        """Write the param groups' options to the device, where a step captured in a CUDA graph reads them.

        Eager phases do it themselves, a capture never: call it before one, and before a replay where options changed.

        Raises:
            RuntimeError: the backend does not read its options from the device.
            ValueError: the base optimizer is not fused, a radius is negative or not finite, or the direction cannot be
                clipped.
        """
        rule = fused.rule_for(self.base_optimizer, wanted="a captured step")
        assert rule  # a missing one raised
        radii = [*self._all_radii()[: len(self._calls) - 1], []][:2]
        scalars = self._once(self._scalars, rule)
        mixing = self._mixing()
        self._check_clipping(mixing, clipping_norm(self.max_grad_norm))
        self._flats.write_options([*radii, scalars, mixing.numbers])


def _require_functions(closures: Sequence[Any]) -> None:
    wrong = next((closure for closure in closures if not callable(closure)), None)
    if wrong is not None:
        raise TypeError(
            f"step() was given a {type(wrong).__name__}: pass a function that does forward and backward and returns "
            "the loss, which is called once a pass; or call backward() and the phases by hand, and step() with nothing"
        )


def _evaluate(closure: Closure) -> Any:
    with torch.enable_grad():
        return closure()


def _value(loss: Any) -> Any:
    """Return a loss as it is now: closures may return the same memory in every pass."""
    return loss.detach().clone() if isinstance(loss, Tensor) else loss
