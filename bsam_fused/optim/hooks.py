"""What torch wraps every optimizer's ``step`` in: hooks, and a label for profilers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import optimizer as torchs


def hooked_where_watched(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return what torch makes of ``step``, but ``step`` itself as long as no hook and no profiler waits for it.

    The label alone takes as long as the fused steps of some hundred tensors: its code is in no cache after a backward.
    It is also left out where torch says of no profiler: under an ExecutionTraceObserver alone, or Kineto on demand.
    """
    hooked = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        return (hooked if _watched(self) else step)(self, *args, **kwargs)

    return wrapper


def _watched(optimizer: torch.optim.Optimizer) -> bool:
    return bool(
        torch.autograd._profiler_enabled()  # in this thread
        or torch.autograd.profiler._is_profiler_enabled  # in any
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torchs._global_optimizer_pre_hooks
        or torchs._global_optimizer_post_hooks
    )
