"""What every sharpness-aware optimizer shares: phases, faults, param groups, state. No algorithm.

A step is a walk through phases: at rest the weights are w; ``ascend`` and its like move them; ``step`` brings
them to the next w. A phase reads all gradients before it writes anything, so an error leaves the phase as it was.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from numbers import Real
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bsam_fused import distributed
from bsam_fused.batchnorm import frozen_running_stats
from bsam_fused.ops import contract, dispatch
from bsam_fused.ops.contract import ASCENT, NORMS, Radius
from bsam_fused.optim import fused, groups, hooks, scaling, trainers
from bsam_fused.optim.flats import Flats
from bsam_fused.optim.persistence import Persistent
from bsam_fused.optim.sharpness import Sharpness

Closure = Callable[[], Any]


class Phase(enum.Enum):
    """Where the weights are."""

    REST = "at rest"
    ASCENDED = "ascended"
    DESCENDED = "descended"


class SharpnessAware(Persistent):
    """A base optimizer that steps from w with a direction found at perturbed weights.

    Subclasses name their calls, and add the ones of their own.
    """

    _calls: ClassVar[tuple[str, ...]]
    """The phases' calls in order, one after each backward pass; the last is "step"."""
    _last_slot: ClassVar[int]
    """Where the sums keep the last pass's gradient: MAX, or MIN."""
    _keeps_g: ClassVar[bool]
    """Whether the direction needs g, the gradient at w."""
    _PHASES: ClassVar[tuple[Phase, ...]] = (Phase.REST, Phase.ASCENDED, Phase.DESCENDED)

    _phase = Phase.REST
    _from_saved = True
    _scaler_seen: bool | None = None  # in the last step; None: there was none
    _watch: RemovableHandle | None = None
    _looking_at_w = False

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer,
        options: dict[str, Any],
        base_kwargs: dict[str, Any],
        *,
        norm_eps: float,
        max_grad_norm: float | None,
        rounding: str,
        seed: int,
        master_weights: bool,
        sync: str,
        model: nn.Module | None,
        backend: str,
    ) -> None:
        self._flats = Flats(groups.check_rounding(rounding, seed), master_weights, sync == "last")
        self._batchnorm = ExitStack()
        self.norm_eps = groups.check_non_negative("norm_eps", norm_eps)
        groups.check_max_norm(max_grad_norm)
        self.max_grad_norm = max_grad_norm
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}: pass the nn.Module whose BatchNorm to guard")
        self.model = model
        self.sync = sync
        _ = self._group  # raises where there must be one
        self.backend = backend
        self.active = True
        self.sharpness: Sharpness | None = None
        if isinstance(base_optimizer, SharpnessAware) or (
            isinstance(base_optimizer, type) and issubclass(base_optimizer, SharpnessAware)
        ):
            raise TypeError(
                "base_optimizer is sharpness-aware itself: pass the optimizer that makes the update, such as SGD"
            )
        self.base_optimizer = groups.build_base(params, base_optimizer, base_kwargs, options)
        ours = {self._key(option): value for option, value in options.items()}
        super().__init__(self.base_optimizer.param_groups, {**self.base_optimizer.defaults, **ours})
        self.base_optimizer.param_groups = self.param_groups
        self._fused_rule()  # raises where master weights need one
        self.state = self.base_optimizer.state
        _ = self.backends  # raises now, and not in the first step, where one asked for is missing

    def _key(self, option: str) -> str:
        """Return where param groups keep ``option``: elsewhere if the base has one of that name (Adadelta's rho)."""
        return f"sharpness_{option}" if option in self.base_optimizer.defaults else option

    profile_hook_step = staticmethod(hooks.hooked_where_watched)

    # ---- what runs where

    @property
    def backends(self) -> dict[str, str]:
        """Which backend runs for the parameters on each device, and why.

        Raises:
            RuntimeError: the one asked for cannot be had, with the reason.
        """
        devices = {p.device for group in self.param_groups for p in group["params"]}
        choices = {device: dispatch.choose(self.backend, device) for device in sorted(devices, key=str)}
        return {str(device): f"{choice.backend} ({choice.why})" for device, choice in choices.items()}

    @property
    def norms(self) -> Tensor:
        """‖T g‖, ‖g_max‖, ‖g_min‖ of the latest passes: float64 (3,), on the first parameter's device.

        Of the gradients as they came: times the scale of a GradScaler; with ``sync="last"`` this rank's own.
        """
        if not len(self._flats):
            return torch.zeros(NORMS, dtype=torch.float64)
        return self._flats.squared_norms.sqrt()

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped for an inf or NaN in some pass; reading it waits for a GPU."""
        return self._flats.skipped

    # ---- phases

    @property
    def _following(self) -> str:
        return self._calls[self._PHASES.index(self._phase)]

    def _expect(self, call: str) -> None:
        """Raise unless ``call`` is next."""
        trainers.refuse_wrapper(self, call)
        if self._looking_at_w:
            raise RuntimeError(f"{call}() within unperturbed(): leave that context first")
        if call != self._following:
            self._out_of_order(f"{call}()")

    def _out_of_order(self, call: str) -> NoReturn:
        name = type(self).__name__
        mend = "" if self._phase is Phase.REST else ", or restore() to give up this step"
        alone = f". {trainers.ALONE}" if self._phase is Phase.REST and call == "step()" else ""
        raise RuntimeError(
            f"{name}.{call} out of order: the optimizer is {self._phase.value}; "
            f"next come backward() and {self._following}(){mend}{alone}"
        )

    def _require_rest(self, call: str) -> None:
        if self._phase is not Phase.REST:
            raise RuntimeError(
                f"{call} while the weights are perturbed ({self._phase.value}): finish the step, or give it up "
                "with restore()"
            )

    def _require_w(self, call: str) -> None:
        if self._phase is not Phase.REST and not self._looking_at_w:
            raise RuntimeError(
                f"{call} while the weights are perturbed ({self._phase.value}): finish the step, give it up with "
                "restore(), or use `with optimizer.unperturbed():`"
            )

    def _entered(self, phase: Phase) -> None:
        """Note a new phase; autocast must not go on with weights it cast in the last one."""
        self._phase = phase
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        self._forget_copies()

    def _forget_copies(self) -> None:
        """Make the next forward read the weights, not what autocast cast or FSDP gathered of them before."""
        if self._flats.sharded and self.model is not None:
            distributed.reshard(self.model)
        torch.clear_autocast_cache()

    def _radii(self, option: str, sign: float) -> list[Radius]:
        """Return a radius a group: ``option``, with ``sign`` the other way under maximize."""
        return [
            Radius(
                (-sign if group.get("maximize") else sign) * self._radius(group, option, i),
                bool(group[self._key("adaptive")]),
                self._non_negative(group, "eta", i),
            )
            for i, group in enumerate(self.param_groups)
        ]

    def _radius(self, group: dict[str, Any], option: str, index: int) -> float:
        return self._non_negative(group, option, index)

    def _non_negative(self, group: dict[str, Any], option: str, index: int) -> float:
        return groups.check_non_negative(option, group[self._key(option)], index)

    def _plain_radii(self) -> list[Radius]:
        return [Radius(0.0)] * len(self.param_groups)

    def _read_gradients(self) -> None:
        added = self._flats.gather(self.param_groups, self.backend, at_rest=self._phase is Phase.REST)
        for flat in added:  # nothing to perturb: they only learn which kind of step this is
            flat.ascend(flat.sums, self._plain_radii(), self.norm_eps, self._keeps_g)
        self._flats.read_gradients(first=self._phase is Phase.REST)

    def ascend(self) -> None:
        """After backward at w: w becomes w_max = w + ρ T² g / (‖T g‖ + norm_eps). Gradients become None.

        Where a gradient is not finite, the weights stay and the step will be skipped. SAM arXiv 2010.01412,
        ASAM 2102.11600.

        Raises:
            RuntimeError: out of order, ``active`` is False, or a gradient that cannot be used, by name.
            ValueError: a radius is negative or not finite.
        """
        watched = None
        if not self._keeps_g and self._scaler_seen is not False:
            watched = next((p for p in self._parameters() if p.grad is not None and p.requires_grad), None)
        self._ascend()
        # Whoever calls GradScaler.unscale_ lets it look at the last gradients before step() is heard of.
        if watched is not None:
            self._watch = watched.register_post_accumulate_grad_hook(lambda p: self._tell_scaler([p]))

    def _ascend(self, loss: Any = None) -> None:
        self._expect("ascend")
        if not self.active:
            raise RuntimeError("ascend() while active is False: step() is then the base optimizer's step")
        radii = self._radii("rho", +1.0)
        try:
            self._read_gradients()
        except contract.LayoutChangedError:  # model.to(memory_format=...) since the last step
            self._flats.forget()
            self._read_gradients()
        for flat in self._flats:
            flat.square_norm(ASCENT, radii)
        self._flats.poison(ASCENT, loss)
        totals = self._flats.totals()
        self._entered(Phase.ASCENDED)
        for flat, sums in zip(self._flats, totals, strict=True):
            flat.ascend(sums, radii, self.norm_eps, self._keeps_g)
        if self.model is not None:
            self._batchnorm.enter_context(frozen_running_stats(self.model))

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling and skipping to `step`; it asks before it looks at the gradients."""
        if self._phase is Phase.REST:
            return not self._is_plain()
        if self._following == "step" and self._group is not None:
            self._tell_scaler_of_all_ranks()
        elif self._following == "step":
            self._tell_scaler(self._parameters())
        return True

    def _tell_scaler(self, params: Iterable[Tensor]) -> None:
        """Make a gradient of the last pass NaN where an earlier one was not finite."""
        scaling.mark(params, self._flats.failed(self._last_slot))

    def _tell_scaler_of_all_ranks(self) -> None:
        """Likewise where a gradient of any pass was not finite on any rank: scalers must go on alike."""
        self._read_gradients()
        self._sum_last_gradients(math.inf)
        scaling.mark(self._parameters(), self._flats.failed_anywhere(self._group, self._last_slot + 1))

    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """Finish a step by hand, or run a whole one with ``closure``.

        Args:
            closure: does forward and backward and returns the loss; called once a pass, with gradients
                cleared before each. None: this is the last call of a step by hand, after its last backward;
                at rest it is the base optimizer's step where ``active`` is False or every lr is 0.

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
        rates = [group.get("lr") for group in self.param_groups]  # some bases have none
        return not self.active or all(lr is not None and float(lr) == 0 for lr in rates)

    def _plain_step(self) -> None:
        max_norm = groups.check_max_norm(self.max_grad_norm)
        if max_norm < math.inf:
            nn.utils.clip_grad_norm_(self._parameters(), max_norm)
        self._base_step()

    def _base_step(self) -> None:
        self._flats.hand_over()
        self.base_optimizer.step()
        self._forget_copies()

    def _run(self, closures: Sequence[Closure]) -> Any:
        """Run a whole step, one closure a pass."""
        with scaling.told(self) as scaled:
            scaling.refuse_closure(scaled)
            if self._phase is not Phase.REST:
                self._out_of_order("step(closure)")
        trainers.refuse_lightning(closures[0])
        self.sharpness = None
        self._clear_gradients()
        if not self.active:
            loss = _evaluate(closures[-1])
            self._plain_step()
            return loss
        losses = []
        try:
            for call, closure in zip(self._calls, closures, strict=True):
                with self.no_sync():
                    losses.append(_evaluate(closure))
                getattr(self, f"_{call}")(losses[-1])
        except BaseException:
            self.restore()
            raise
        if all(isinstance(loss, Tensor | Real) for loss in losses) and len(set(map(id, closures))) == 1:
            self.sharpness = Sharpness(*(loss.detach() if isinstance(loss, Tensor) else loss for loss in losses))
        return losses[0]

    def _step(self, loss: Any = None) -> None:
        """Update from w, or skip where a sum is not finite."""
        with scaling.told(self) as scaled:
            self._expect("step")
            if self._keeps_g:
                scaling.refuse_unscaled(scaled, type(self).__name__)
            rule = self._fused_rule()
            scalars = [rule.scalars(group) for group in self.param_groups] if rule else []
            max_norm = groups.check_max_norm(self.max_grad_norm)
            self._read_gradients()
            self._sum_last_gradients(max_norm if self._group is None else math.inf)
            self._flats.poison(self._last_slot, loss)
            self._flats.note(self._last_slot, scaled)
            if self._group is None:
                totals = self._flats.totals()
            else:
                totals = self._flats.averaged(self._group, mixed=self._keeps_g)
            if rule:
                self._flats.update(rule, self.state, scalars, totals, self._from_saved, max_norm)
            else:
                self._general_update(totals, max_norm)
        self._scaler_seen = scaled.found_inf is not None
        self._batchnorm.close()
        self._entered(Phase.REST)

    def _fused_rule(self) -> fused.FusedRule | None:
        return fused.rule_for(self.base_optimizer, wanted="master_weights=True" if self._flats.masters else "")

    def _sum_last_gradients(self, max_norm: float) -> None:
        for flat in self._flats:
            if self._keeps_g and max_norm < math.inf:
                flat.direction_sums()
            else:
                flat.square_norm(self._last_slot, self._plain_radii())

    def _general_update(self, totals: Sequence[Tensor], max_norm: float) -> None:
        """Leave the update to the base optimizer: d in .grad, the weights at w, then its own step()."""
        pairs = zip(self._flats, totals, strict=True)
        combined = [flat.combine(sums, self._from_saved, max_norm) for flat, sums in pairs]
        if all(combined):
            try:
                self._base_step()
            except BaseException:
                self.restore()
                raise
            for flat in self._flats:
                flat.release()

    # ---- captured steps

    def _all_radii(self) -> list[list[Radius]]:
        """Return the radii of every phase that moves the weights, in order."""
        return [self._radii("rho", +1.0)]

    def write_options(self) -> None:
        """Write the param groups' options to the device, where a step captured in a CUDA graph reads them.

        Eager phases do it themselves, a capture never: call it before one, and before a replay where options changed.

        Raises:
            RuntimeError: the backend does not read its options from the device.
            ValueError: the base optimizer is not fused, or a radius is negative or not finite.
        """
        rule = fused.rule_for(self.base_optimizer, wanted="a captured step")
        assert rule  # a missing one raised
        radii = [*self._all_radii(), []][:2]
        self._flats.write_options([*radii, [rule.scalars(group) for group in self.param_groups]])

    # ---- several ranks

    @property
    def _group(self) -> Any:
        """The ranks over which the direction is averaged, None where DDP averages every pass's gradients."""
        return distributed.averaging_group(self.sync, self.model)

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context for the coming pass, forward and backward; `step` with a closure enters it itself.

        With ``sync="last"`` DDP reduces no gradient in it that the optimizer wants as it is: in SAM's first pass, in
        all of BSAM's. Else it does nothing, so that a loop by hand can have every pass in it.
        """
        mixes = self._keeps_g or self._following != "step"
        if self.sync == "last" and self.active and mixes:
            return self.model.no_sync()  # type: ignore[union-attr, operator, return-value]
        return nullcontext()

    # ---- giving up, and looking at w

    def restore(self) -> None:
        """Give up the step: the weights are w again, bit for bit, gradients None. At rest, nothing."""
        if self._looking_at_w:
            raise RuntimeError("restore() within unperturbed(): leave that context first")
        if self._phase is Phase.REST:
            return
        for flat in self._flats:
            flat.restore()
        self._batchnorm.close()
        self._clear_gradients()
        self._entered(Phase.REST)

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Look at w within a step: a context in which the weights are w, whatever the phase.

        What is written to the weights meanwhile is kept, as w. No phase may be called inside.
        """
        if self._phase is Phase.REST or self._looking_at_w:
            yield
            return
        self._looking_at_w = True
        try:
            self._show_w(True)
            yield
        finally:
            self._show_w(False)
            self._looking_at_w = False

    def _show_w(self, at_w: bool) -> None:
        for flat in self._flats:
            flat.show_w(at_w)
        self._forget_copies()

    def _clear_gradients(self) -> None:
        if len(self._flats):
            self._flats.clear_gradients()
        else:
            self.zero_grad()

    # ---- param groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as torch.optim has it, with options of its own.

        Raises:
            RuntimeError: within a step.
            TypeError, ValueError: a parameter or an option that cannot be used; nothing was added.
        """
        self._require_rest("add_param_group()")
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        try:
            others = [p for group in self.param_groups[:-1] for p in group["params"]]
            groups.check_parameters(self.param_groups[-1], index, others)
            self._check_options(self.param_groups[-1], index)
        except Exception:
            self.param_groups.pop()
            raise
        self._flats.forget()

    def _check_options(self, group: dict[str, Any], index: int) -> None:
        for option in ("rho", "eta"):
            self._non_negative(group, option, index)


def _evaluate(closure: Closure) -> Any:
    with torch.enable_grad():
        return closure()
