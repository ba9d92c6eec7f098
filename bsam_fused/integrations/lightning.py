"""Lightning: accumulated micro-batches, clipping and 16-bit precision under automatic optimization."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor


class SharpnessAwareMixin:
    """Makes a LightningModule's automatic optimization run all passes of a sharpness-aware step.

    To be listed before LightningModule: ``class Net(SharpnessAwareMixin, LightningModule)``. Then

    - ``accumulate_grad_batches=k``: each pass is over all k micro-batches. The first takes the gradients that Lightning
      accumulated, the others replay ``training_step`` and its backward: k passes' work a pass, nothing more.
    - ``gradient_clip_val`` becomes the optimizer's ``max_grad_norm``.
    - ``precision="16-mixed"``, whose scaler calls ``step()`` without a closure, works too.
    - ``self.log`` counts in the first pass only, at w; so do the outputs that callbacks see.

    A module that overrides ``on_train_batch_start`` calls ``super()``'s. Metric objects that ``training_step`` updates
    are updated in every pass. ``optimizer.sharpness`` is of the last micro-batch, in Lightning's units: divided by k.

    Raises:
        RuntimeError: from ``optimizer_step``: micro-batches of this step were not seen.
        ValueError: from ``configure_gradient_clipping``: clipping by value.
    """

    runs_all_passes: ClassVar[bool] = True
    """What the optimizer asks before it takes a step of Lightning's that accumulates or clips."""

    if TYPE_CHECKING:

        @property
        def trainer(self) -> Any:
            """Lightning's, which is a property of LightningModule."""

        @trainer.setter
        def trainer(self, trainer: Any) -> None: ...

    _micro_batches: tuple[tuple[Any, ...], ...] = ()
    _replaying = False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Keep the batch until its step is done.

        Args:
            batch: on its device.
            batch_idx: its number in the epoch.
        """
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._micro_batches = ()
            for optimizer in self.trainer.optimizers:
                getattr(optimizer, "_begin_first_pass", nullcontext)()
        takes = len(inspect.signature(self.training_step).parameters)  # type: ignore[attr-defined]
        self._micro_batches += ((batch, batch_idx)[:takes],)
        return super().on_train_batch_start(batch, batch_idx)  # type: ignore[misc]

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Tensor | None] | None = None
    ) -> None:
        """Run a step, all its passes over all its micro-batches.

        Args:
            epoch: its number.
            batch_idx: the number of the last micro-batch.
            optimizer: Lightning's wrapper of the optimizer.
            optimizer_closure: Lightning's forward and backward of the last micro-batch.

        Raises:
            RuntimeError: micro-batches of this step were not seen.
        """
        wanted = batch_idx % self.trainer.accumulate_grad_batches + 1
        if len(self._micro_batches) != wanted:
            raise RuntimeError(
                f"{len(self._micro_batches)} of {wanted} micro-batches seen: on_train_batch_start of "
                f"{type(self).__name__} must call super().on_train_batch_start(batch, batch_idx)"
            )
        inner = optimizer.optimizer
        accumulated = [(p, p.grad) for group in inner.param_groups for p in group["params"]] if wanted > 1 else []

        def run_pass() -> Tensor | None:
            if self._replaying:
                return self._replay(inner)
            for param, grad in accumulated:  # the optimizer clears gradients before each pass
                param.grad = grad
            accumulated.clear()  # whoever else holds a gradient makes the optimizer copy it
            loss = optimizer_closure()  # type: ignore[misc]
            self._replaying = True
            return loss

        try:
            inner._passes.is_open = inner._may_perturb  # its first pass was begun with its first micro-batch
            if inner._may_perturb and getattr(self.trainer.precision_plugin, "scaler", None) is not None:
                inner._refuse_decided()
                for call in inner._calls[:-1]:
                    run_pass()
                    getattr(inner, call)()
            optimizer.step(closure=run_pass)
        except BaseException:
            inner.restore()
            raise
        finally:
            self._replaying = False
            self._micro_batches = ()

    def _replay(self, optimizer: Any) -> Tensor | None:
        """Do forward and backward of all micro-batches again; of data-parallel ones, the last alone communicates."""
        strategy, loss = self.trainer.strategy, None
        quiet = getattr(strategy, "block_backward_sync", nullcontext)
        with optimizer.one_pass():
            for i, args in enumerate(self._micro_batches, 1):
                with quiet() if i < len(self._micro_batches) else nullcontext():
                    output = strategy.training_step(*args)
                    loss = output["loss"] if isinstance(output, Mapping) else output
                    if loss is not None:
                        loss = loss / self.trainer.accumulate_grad_batches
                        strategy.backward(loss, optimizer)
        return None if loss is None else loss.detach()

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log as Lightning does, in the first pass of a step only."""
        if not self._replaying:
            super().log(*args, **kwargs)  # type: ignore[misc]

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Leave clipping to the optimizer, which clips the direction and not the gradient of one pass.

        Args:
            optimizer: the optimizer.
            gradient_clip_val: the trainer's; None or 0 leaves ``optimizer.max_grad_norm`` as it is.
            gradient_clip_algorithm: "norm", or None, which means it.

        Raises:
            ValueError: another algorithm.
        """
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm not in {None, "norm"}:
            raise ValueError(
                f'gradient_clip_algorithm={gradient_clip_algorithm!r}: the direction is clipped by its norm; use "norm"'
            )
        optimizer.max_grad_norm = gradient_clip_val
