"""What trainers and wrappers do to an optimizer: understood where it can be, else an error that says what to write."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from bsam_fused import distributed

RECIPES = "docs/recipes.md"
ALONE = (
    "A trainer that calls step() alone, as Lightning under 16-bit precision, Hugging Face's Trainer, Accelerate, "
    "timm's scaler and fastai's Learner do, needs a mixin of bsam_fused.integrations, or all passes by hand "
    f"(Lightning: manual optimization): {RECIPES}"
)
"""What to add where step() comes first."""


def without_empty(closure: Any) -> Any:
    """Return None, once its hooks were called, for the closure that Lightning's wrapper puts where there is none.

    Args:
        closure: what ``step`` was given; Lightning's precision plugins bind the wrapper's to theirs.
    """
    bound = closure.args if isinstance(closure, partial) else ()
    return closure() if bound and getattr(bound[-1], "__name__", None) == "do_nothing_closure" else closure


def refuse_lightning(closure: Any) -> None:
    """Raise RuntimeError where Lightning accumulates or clips, and the closure knows only of the last micro-batch.

    Args:
        closure: what ``step`` was given; the LightningModule is bound to it.
    """
    module = closure.args[0] if isinstance(closure, partial) and closure.args else None
    trainer = getattr(module, "_trainer", None)
    if trainer is None or getattr(module, "runs_all_passes", False):
        return
    for setting, off in (("accumulate_grad_batches", 1), ("gradient_clip_val", None)):
        value = getattr(trainer, setting, off)
        if value and value != off:
            raise RuntimeError(
                f"Trainer({setting}={value}) with a module that runs one micro-batch a pass, and clips each pass: list "
                f"bsam_fused.integrations.lightning.SharpnessAwareMixin before LightningModule ({RECIPES})"
            )


def _under_way(call: Callable[..., Any]) -> bool:
    """Return whether ``call``, of whatever object, has led here."""
    return any(frame.f_code is call.__code__ for frame, _ in traceback.walk_stack(None))


def refuse_accelerate() -> None:
    """Raise RuntimeError where Accelerate's wrapper, which accumulates, calls ``step`` with a closure.

    It leaves out all micro-batches but the last, whose closure has that one alone. The wrapper is known by its call
    that is under way: what Accelerate has for all to see, its settings, outlives its loops.
    """
    module = sys.modules.get("accelerate.optimizer")
    steps = 1 if module is None else module.GradientState().num_steps
    if steps == 1:
        return
    if _under_way(module.AcceleratedOptimizer.step):  # type: ignore[union-attr]
        raise RuntimeError(
            f"step(closure) under Accelerator(gradient_accumulation_steps={steps}): only the last micro-batch would "
            f"count, by 1/{steps} of its loss. Call the phases by hand ({RECIPES}, Accelerate), or have all "
            "micro-batches in one closure, without gradient_accumulation_steps"
        )


def refuse_wrapper(optimizer: Any, call: str) -> None:
    """Raise RuntimeError for a phase of Lightning's wrapper, which would keep to itself where the weights are."""
    if "base_optimizer" not in vars(optimizer):
        raise RuntimeError(
            f"{call}() of {type(optimizer).__name__}, a wrapper: call the optimizer's own, "
            f"self.optimizers(use_pl_optimizer=False), and step() of the wrapper ({RECIPES})"
        )


def refuse_zero(base: type) -> None:
    """Raise TypeError for a ZeroRedundancyOptimizer: ``base``, or one that builds the optimizer of its rank's part."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return
    kind = module.ZeroRedundancyOptimizer
    if issubclass(base, kind) or _under_way(kind._init_local_optimizer):
        raise TypeError(
            "a ZeroRedundancyOptimizer, as base_optimizer or around a sharpness-aware optimizer: "
            f"{distributed.OWN_NORM}, which shards the optimizer's state as well"
        )
