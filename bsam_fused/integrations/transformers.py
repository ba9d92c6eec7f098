"""Hugging Face's Trainer: every pass over all micro-batches of a step, and clipping of the direction."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn


class SharpnessAwareMixin:
    """Makes a Trainer run all passes of a sharpness-aware step.

    To be listed before Trainer, or a subclass of it: ``class Sharp(SharpnessAwareMixin, Trainer)``; the optimizer comes
    as ``Sharp(..., optimizers=(optimizer, None))``, or by its class, as ``optimizer_cls_and_kwargs=``. Then

    - ``gradient_accumulation_steps=k``: once the Trainer has accumulated the first pass, the others replay all k
      micro-batches, with the same number of items to average over; the Trainer itself makes the last call.
    - ``max_grad_norm`` (the Trainer's default is 1) becomes the optimizer's; 0 leaves the optimizer's own.
    - The logged ``grad_norm`` is ‖T g‖ at w.
    - Mixed precision, schedulers, evaluation and checkpoints are the Trainer's. Its logged loss is the one at w.
    """

    accelerator: Any
    args: Any
    optimizer: Any
    _micro_batches: list[Any]

    def create_accelerator_and_postprocess(self) -> None:
        """Set up the accelerator, and keep its hands off gradients: it would clip and unscale the last pass's."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        clip = self.accelerator.clip_grad_norm_

        def norm(parameters: Iterable[Tensor], *args: Any, **kwargs: Any) -> Tensor:
            return clip(parameters, math.inf) if self._sharpness_aware._at_rest else self._norm()

        self.accelerator.clip_grad_norm_ = norm

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch the micro-batches of a step, as the Trainer does, and keep them."""
        fetched = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self._micro_batches = fetched[0]
        self._sharpness_aware._begin_first_pass()
        return fetched

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Do forward and backward of a micro-batch; after the last, the passes that remain.

        Args:
            model: as the Trainer wrapped it.
            inputs: the micro-batch.
            *args: the Trainer's.
            **kwargs: the Trainer's.

        Returns:
            The loss of the micro-batch at w.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if self.accelerator.sync_gradients:
            optimizer = self._sharpness_aware
            optimizer.max_grad_norm = self.args.max_grad_norm or optimizer.max_grad_norm
            try:
                for call in optimizer._calls[:-1] if optimizer._perturbs else ():
                    getattr(optimizer, call)()
                    with optimizer.one_pass():
                        for i, batch in enumerate(self._micro_batches, 1):
                            with self.accelerator.no_sync(model) if i < len(self._micro_batches) else nullcontext():
                                super().training_step(model, batch, *args, **kwargs)  # type: ignore[misc]
            except BaseException:
                optimizer.restore()
                raise
        return loss

    @property
    def _sharpness_aware(self) -> Any:
        """The optimizer, out of Accelerate's wrapper."""
        optimizer = self.optimizer
        while not hasattr(optimizer, "_calls"):
            optimizer = optimizer.optimizer
        return optimizer

    def _norm(self) -> Tensor:
        """Return ‖T g‖ of this step, unscaled."""
        scaler = self.accelerator.scaler
        norm = self._sharpness_aware.norms[0]
        return norm if scaler is None else norm / scaler.get_scale()
