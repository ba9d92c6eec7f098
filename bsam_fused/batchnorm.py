"""Running statistics in extra passes by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from bsam_fused.buffers import Snapshot


@contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """Have an extra pass that leaves the buffers of a model as they were, running statistics among them.

    They move inside, in training mode, and are put back on any exit: objects, shapes and values, as the optimizers do
    it with ``model=``. Nests, in any order.

    Args:
        model: whose buffers to put back.
    """
    buffers = Snapshot(model)
    try:
        yield
    finally:
        buffers.write_back()
