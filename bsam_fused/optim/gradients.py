"""The gradients of a pass: read of all that takes part, summed, and asked whether the step goes on to other passes."""

from __future__ import annotations

from bsam_fused.ops import contract, dispatch
from bsam_fused.ops.contract import MAX, Mixing, Radius
from bsam_fused.optim import fused, scaling
from bsam_fused.optim.phases import Phase, Phased

NO_GRADIENT = (
    "no parameter has a gradient. A pass is a forward and a loss.backward() on this optimizer's parameters, in the "
    "closure or before each call by hand, with no zero_grad() after it"
)


class ReadsGradients(Phased):
    """An optimizer that reads the gradients of every pass before it writes anything."""

    backend: dispatch.Backend
    _mixed = Mixing()  # how this step's direction is
    _norm_is_whole = True  # ‖T g‖ of this step's ascent is ‖g‖: T = 1, and no group is left out
    _lacking = False  # a pass of this step that was read had no gradient at all

    def _read_gradients(self) -> None:
        """Read the gradients of this pass, of all that is in the param groups now."""
        at_rest = self._phase is Phase.REST
        if not at_rest:
            for flat in self._flats.thaw(self._groups, self.backend):
                flat.join(self._mixed, self._phase is Phase.DESCENDED)
        elif not self._flats.fit(self._groups, self._exempt()):
            self._build()
        try:
            self._flats.read_gradients(first=at_rest)
        except contract.LayoutChangedError:  # the model was moved, cast or re-strided since the last step
            if not at_rest:
                raise
            self._build()
            self._flats.read_gradients(first=True)
        self._lacking = self._has_no_gradient() or (self._lacking and self.sync == "last" and not at_rest)

    def _has_no_gradient(self) -> bool:
        for group in self._groups:
            for param in group["params"]:
                if param.grad is not None:  # nearly always the first one's
                    return False
        return True

    def _require_gradients(self, call: str) -> None:
        """Raise where a pass had no gradient; after the ranks have told each other, so that all of them do.

        Raises:
            RuntimeError: one parameter requires a gradient, but none has one.
        """
        heard = call == "step" or self.sync == "every"
        if self._lacking and heard and any(p.requires_grad for p in self._parameters()):
            raise RuntimeError(f"{self._named(call)}(): {NO_GRADIENT}")

    def _build(self) -> None:
        """Build FlatParams of the parameters as they are; only when all are built do they count."""
        flats = self._flats.anew()
        flats.build(self._groups, self._exempt(), self.backend)
        self._flats = flats

    def _decision(self) -> bool:
        """Whether the gradient of the first pass has the step go on to the others; kept until the step ends.

        Raises:
            ValueError: ranks have gradients of their own, ``sync="last"``, and would not decide alike.
            TypeError: `decide` is no function.
        """
        if self._decided is not None:
            return self._decided
        if self.sync == "last":
            raise ValueError(
                'decide with sync="last": every rank would decide by the gradient of its own batch; use sync="every"'
            )
        if not callable(self.decide):
            raise TypeError(f"decide is a {type(self.decide).__name__}: set a function of ‖g‖², or None")
        self._notice()
        self._read_gradients()
        if self._lacking:
            return True
        self._flats.slots = ()  # the norms of the step before are over
        for flat in self._flats:
            flat.square_norm(MAX, self._plain_radii())
        self._decided = bool(self.decide(self._flats.totals()[0][MAX]))
        return self._decided

    def _refuse_decided(self) -> None:
        """Raise RuntimeError for a GradScaler in a step whose passes the gradient of the first one decides."""
        if self.decide is not None and self._may_perturb:
            scaling.refuse_scaled("decide", "what passes there are is decided by the norm of the first one's gradients")

    def _needs_sums(self, max_norm: float, scaled: bool = False) -> bool:
        """Whether an update needs more of the gradients than the norm of the last one; ``scaled``: the loss was."""
        return False

    def _sum_last_gradients(self, max_norm: float, scaled: bool = False) -> None:
        for flat in self._flats:
            if self._needs_sums(max_norm, scaled):
                flat.direction_sums()
            else:
                flat.square_norm(self._rule.last_slot, self._plain_radii())

    def _plain_radii(self) -> list[Radius]:
        return [Radius(0.0)] * len(self._groups)

    def _fused_rule(self) -> fused.FusedRule | None:
        return fused.rule_for(self.base_optimizer, wanted="master_weights=True" if self._flats.masters else "")

    def _clear_gradients(self) -> None:
        if self._flats.fit(self._groups, self._exempt()):
            self._flats.clear_gradients()
        else:
            self.zero_grad()
