"""Where the weights are within a step, the order of its calls, and the way back to w."""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from bsam_fused import checks, distributed
from bsam_fused.ops.contract import Rule
from bsam_fused.optim import trainers
from bsam_fused.optim.passes import Passes
from bsam_fused.optim.persistence import Persistent


class Phase(enum.Enum):
    """Where the weights are."""

    REST = "at rest"
    ASCENDED = "ascended"
    DESCENDED = "descended"


class Phased(Persistent):
    """An optimizer whose step is a walk through phases, and that finds back from each of them, whatever interrupts.

    A phase is noted before its first write and left after its last one, so `restore` knows what there may be to do.
    """

    _calls: tuple[str, ...] = ("ascend", "step")
    """The phases' calls in order, one after each backward pass; the last is "step"."""
    _rule = Rule.LAST_ALONE
    """How the direction is mixed of the passes' gradients."""
    _NUMBERED: ClassVar[tuple[str, ...]] = ("first_step", "second_step", "third_step")
    """The names by which SAM users know them."""
    _PHASES: ClassVar[tuple[Phase, ...]] = (Phase.REST, Phase.ASCENDED, Phase.DESCENDED)

    active: bool
    decide: Callable[[Tensor], bool] | None = None
    """Asked after a step's first pass, with ‖g‖² (float64, 0-dim, on a device) of the gradient there, whether the step
    goes on to the others; else it is the base optimizer's. None: always. See `schedules.LargeGradients`."""
    model: nn.Module | None
    same_randomness: bool = False
    sync: distributed.Sync
    _phase = Phase.REST
    _looking_at_w = False
    _by_number = False  # whether the user calls the phases of this step by those names
    _decided: bool | None = None  # what `decide` has said of this step
    _unscaled_at: Phase | None = None  # where the weights were when a GradScaler unscaled gradients of this step
    _own_passes: Passes | None = None

    @property
    def _active(self) -> bool:
        return checks.flag("active", self.active)

    # ---- how many passes

    @property
    def passes(self) -> int:
        """How many forward and backward passes the coming step takes, or the one that is under way.

        One where ``active`` is False, and in steps between LookSAM's k-th. Asked before a step, or where its gradient
        decides (`decide`) after its first backward and before the next call. By hand:

            loss_fn(model(x), y).backward()
            if optimizer.passes > 1:
                optimizer.ascend()
                loss_fn(model(x), y).backward()
            optimizer.step()

        Raises:
            RuntimeError: the gradient of the first pass decides (`decide`), and there is none yet.
        """
        if self._at_rest:
            self._decided = None  # of another batch, perhaps
            if not self._perturbs:
                return 1
            if self.decide is not None and self._decided is None:
                raise RuntimeError(
                    "passes, where optimizer.decide goes by the first one's gradient: ask after its backward()"
                )
        return len(self._calls)

    @property
    def _may_perturb(self) -> bool:
        """Whether the coming step takes more than one pass, as far as that is known before its first."""
        return self._active

    @property
    def _perturbs(self) -> bool:
        """Whether it does, as is known after its first pass."""
        return self._may_perturb and (self.decide is None or self._decision())

    def _decision(self) -> bool:
        """Return what `decide` says of this step."""
        raise NotImplementedError

    # ---- the order of calls

    @property
    def _following(self) -> str:
        return self._calls[self._PHASES.index(self._phase)]

    def _expect(self, call: str) -> None:
        """Raise unless ``call`` is next."""
        trainers.refuse_wrapper(self, self._named(call))
        if self._looking_at_w:
            raise RuntimeError(f"{self._named(call)}() within unperturbed(): leave that context first")
        if call != self._following:
            self._out_of_order(f"{self._named(call)}()")
        if self.same_randomness and not self._passes.is_under_way:
            raise RuntimeError(
                f"{self._named(call)}() with same_randomness=True: every pass by hand, forward and backward, goes into "
                "`with optimizer.one_pass():`, or use step(closure)"
            )

    def _out_of_order(self, call: str) -> NoReturn:
        name = type(self).__name__
        mend = "" if self._phase is Phase.REST else ", or restore() to give up this step"
        alone = f". {trainers.ALONE}" if self._phase is Phase.REST and call == "step()" else ""
        raise RuntimeError(
            f"{name}.{call} out of order: the optimizer is {self._phase.value}; "
            f"next come backward() and {self._named(self._following)}(){mend}{alone}"
        )

    def _named(self, call: str) -> str:
        """Return the name by which the user calls the phase of ``call``."""
        return self._NUMBERED[self._calls.index(call)] if self._by_number else call

    def _call_by_number(self, index: int, zero_grad: bool) -> None:
        """Make the ``index``-th phase's call; ``zero_grad``: clear the gradients, which all but the last one take."""
        self._by_number = True
        try:
            getattr(self, self._calls[index])()
        finally:
            self._by_number = not self._at_rest
        if zero_grad and self._at_rest:
            self.zero_grad()

    def first_step(self, zero_grad: bool = False) -> None:
        """`ascend`, under the name SAM users know. The gradient is taken whatever ``zero_grad`` says."""
        self._call_by_number(0, zero_grad)

    def second_step(self, zero_grad: bool = False) -> None:
        """The second phase's call, under the name SAM users know.

        Where that is `step`, ``zero_grad`` clears the gradients afterwards; else they are taken whatever it says.
        """
        self._call_by_number(1, zero_grad)

    @property
    def _at_rest(self) -> bool:
        return self._phase is Phase.REST

    def _require_rest(self, call: str) -> None:
        if not self._at_rest:
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

    # ---- from phase to phase

    def _enter(self, phase: Phase) -> None:
        """Note a phase, before the weights move."""
        self._phase = phase
        self._forget_copies()

    def _come_to_rest(self) -> None:
        """End the step, whose weights are as they shall be; interrupted, it can be called again."""
        self._flats.end()
        if self._own_passes is not None:
            self._own_passes.end()
        self._forget_copies()
        self._looking_at_w = self._by_number = False
        self._decided = None
        self._unscaled_at = self._unscaled_at and Phase.REST  # what comes now is of another pass
        self._phase = Phase.REST

    @property
    def _passes(self) -> Passes:
        if self._own_passes is None:
            passes = Passes()
            weakref.finalize(self, passes.end)
            self._own_passes = passes
        return self._own_passes

    def _forget_copies(self) -> None:
        """Make the next forward read the weights, not what autocast cast or FSDP gathered of them before."""
        if self._flats.sharded and self.model is not None:
            distributed.reshard(self.model)
        torch.clear_autocast_cache()

    # ---- passes

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Have a pass by hand in a context, forward and backward of all its micro-batches.

        Passes after the first begin from the buffers of ``model`` that it began from, where shape and dtype still fit,
        and with ``same_randomness`` from the same random generators: without it, from what the first one left. With
        ``sync="last"`` DDP reduces no gradient in it that the optimizer wants as it is: in SAM's first pass, in all of
        BSAM's. `step` with a closure enters it itself; around the one pass of a plain step it does nothing.
        """
        passes = self._passes
        if not self._at_rest:
            passes.begin_extra()
        elif not self._may_perturb:
            yield
            return
        elif not passes.is_open:
            self._begin_first_pass()
        try:
            with self._unreduced():
                yield
        except BaseException:
            if self._at_rest:
                passes.end()
            raise

    no_sync = one_pass  # its old name

    def _begin_first_pass(self) -> None:
        """Begin the first pass; a trainer that accumulates does it, and calls the phases later."""
        if self._may_perturb and self._at_rest:
            self._passes.begin_first(self.model, self._parameters(), self.same_randomness)

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self._groups for p in group["params"])

    @property
    def _group(self) -> Any:
        """The ranks over which the direction is averaged, None where DDP averages every pass's gradients."""
        return distributed.averaging_group(self.sync, self.model)

    def _unreduced(self) -> AbstractContextManager[None]:
        mixes = self._rule.mixes or self._following != "step"
        if self.sync == "last" and mixes and self._group is not None:
            return self.model.no_sync()  # type: ignore[union-attr, operator, return-value]
        return nullcontext()

    # ---- giving up, and looking at w

    def restore(self) -> None:
        """Give up the step: the weights are w again, bit for bit, gradients None. At rest no weight changes.

        Where an interrupt came when the update had begun, it is finished instead: the weights are the next w, with
        their state.

        Raises:
            RuntimeError: a parameter has another shape than it had in this step, by name; nothing was written.
        """
        if not self._flats.finish():
            self._flats.restore()
            if self._phase is not Phase.REST:
                self._flats.clear_gradients()
        self._flats.retract()
        self._come_to_rest()
        self._complete()  # where a load was interrupted when its groups were there

    def train(self) -> None:
        """Have w be the weights to train, where the base optimizer has others to evaluate at, as Schedule-Free has."""
        self._go_to("train")

    def eval(self) -> None:
        """Have w be the weights to evaluate at, where the base optimizer has others than those that it trains."""
        self._go_to("eval")

    def _go_to(self, mode: str) -> None:
        switch = getattr(self.base_optimizer, mode, None)
        if switch is not None:
            with self.unperturbed():  # Hugging Face's Trainer calls train() before every pass
                switch()
            self._forget_copies()

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Look at w within a step: a context in which the weights are w, whatever the phase.

        What is written to the weights meanwhile is kept, as w. No phase may be called inside; `restore` may.
        """
        if self._phase is Phase.REST or self._looking_at_w:
            yield
            return
        self._looking_at_w = True
        try:
            self._show_w(True)
            yield
        finally:
            self._looking_at_w = False
            self._show_w(False)

    def _show_w(self, at_w: bool) -> None:
        for flat in self._flats:
            flat.show_w(at_w)
        if at_w:
            self._passes.step_aside(self.model)
        else:
            self._passes.come_back()
        self._forget_copies()
