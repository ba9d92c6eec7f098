"""BatchNorm in the extra passes of a sharpness-aware step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """Keep BatchNorm's running statistics where they are; batches are still normalised by their own.

    A layer in training mode without ``track_running_stats`` does just that: it neither reads nor writes the
    statistics, so an inf activation cannot reach them, and its momentum is never touched. Layers in evaluation
    mode are left alone. Nests; modes come back on any exit.

    Args:
        model: whose BatchNorm layers (SyncBatchNorm too) to freeze.
    """
    frozen = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for module in frozen:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in frozen:
            module.track_running_stats = True
