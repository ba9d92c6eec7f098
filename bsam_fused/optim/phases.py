"""Where the weights are within a step, the order of its calls, and the way back to w."""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bsam_fused import distributed
from bsam_fused.batchnorm import RunningStats
from bsam_fused.optim import trainers
from bsam_fused.optim.persistence import Persistent


class Phase(enum.Enum):
    """Where the weights are."""

    REST = "at rest"
    ASCENDED = "ascended"
    DESCENDED = "descended"


class Marks:
    """What a step leaves on others' objects until it is over, or its optimizer is gone: hooks and frozen layers."""

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []
        self._stats: list[RunningStats] = []

    def hook(self, param: Tensor, call: Callable[[Tensor], None]) -> None:
        """Have ``call`` called when the gradient of ``param`` has come."""
        # In one go: the handle is kept before anything can interrupt.
        self._hooks.extend(map(param.register_post_accumulate_grad_hook, [call]))  # type: ignore[attr-defined]

    def freeze(self, model: nn.Module) -> None:
        """Keep the running statistics of ``model`` where they are."""
        self._stats.append(RunningStats(model))
        self._stats[-1].freeze()

    def remove(self) -> None:
        """Take all of it away; interrupted, it can be called again."""
        for hook in self._hooks:
            hook.remove()
        for stats in self._stats:
            stats.thaw()
        self._hooks.clear()
        self._stats.clear()


class Phased(Persistent):
    """An optimizer whose step is a walk through phases, and that finds back from each of them, whatever interrupts.

    A phase is noted before its first write and left after its last one, so `restore` knows what there may be to do.
    """

    _calls: ClassVar[tuple[str, ...]]
    """The phases' calls in order, one after each backward pass; the last is "step"."""
    _NUMBERED: ClassVar[tuple[str, ...]] = ("first_step", "second_step", "third_step")
    """The names by which SAM users know them."""
    _PHASES: ClassVar[tuple[Phase, ...]] = (Phase.REST, Phase.ASCENDED, Phase.DESCENDED)

    model: nn.Module | None
    _phase = Phase.REST
    _looking_at_w = False
    _by_number = False  # whether the user calls the phases of this step by those names
    _marks: Marks | None = None

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

    def _call_by_number(self, index: int) -> None:
        self._by_number = True
        try:
            getattr(self, self._calls[index])()
        finally:
            self._by_number = not self._at_rest

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
        if self._marks is not None:
            self._marks.remove()
        self._forget_copies()
        self._looking_at_w = self._by_number = False
        self._phase = Phase.REST

    def _freeze_running_stats(self) -> None:
        """Keep the model's running statistics where they are until the step is over."""
        if self.model is not None:
            self._mark().freeze(self.model)

    def _mark(self) -> Marks:
        if self._marks is None:
            marks = Marks()
            weakref.finalize(self, marks.remove)
            self._marks = marks
        return self._marks

    def _forget_copies(self) -> None:
        """Make the next forward read the weights, not what autocast cast or FSDP gathered of them before."""
        if self._flats.sharded and self.model is not None:
            distributed.reshard(self.model)
        torch.clear_autocast_cache()

    def _watch_gradient(self, param: Tensor) -> None:
        """Have a GradScaler told of earlier passes when the gradient of ``param`` comes.

        Whoever calls GradScaler.unscale_ lets it look at the last gradients before step() is heard of.
        """
        optimizer = weakref.ref(self)

        def tell(param: Tensor) -> None:
            alive = optimizer()
            if alive is not None and alive._phase is not Phase.REST:
                alive._tell_scaler([param])
                alive._unseen = True

        self._mark().hook(param, tell)

    def _tell_scaler(self, params: Any) -> None:
        """Make a gradient of the last pass NaN where an earlier one was not finite."""
        raise NotImplementedError

    # ---- giving up, and looking at w

    def restore(self) -> None:
        """Give up the step: the weights are w again, bit for bit, gradients None. At rest, nothing.

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
        self._forget_copies()
