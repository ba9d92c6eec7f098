"""Running statistics in the extra passes of a sharpness-aware step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin


@contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """Keep running statistics where they are; batches are still normalised by their own.

    For BatchNorm, SyncBatchNorm and InstanceNorm, also lazy ones, which may meet their first input inside. The
    statistics are not passed to the normalisation at all, so an inf activation cannot reach them, and no momentum is
    touched. Layers in evaluation mode go on using them. Nests, in any order; any exit restores. Copies, pickles
    and state dicts made inside are those of an ordinary model.

    Args:
        model: whose normalisation layers to freeze.
    """
    layers = [m for m in model.modules() if isinstance(m, _NormBase) and m._buffers.get("running_mean") is not None]
    frozen = []
    try:
        for layer in layers:
            layer.__class__ = _frozen(type(layer))  # type: ignore[arg-type]  # mypy thinks classes unhashable
            frozen.append(layer)
        yield
    finally:
        for layer in frozen:
            layer.__class__ = type(layer).__bases__[0]


@cache
def _frozen(kind: Any) -> type[_NormBase]:
    """Return ``kind``, such as nn.BatchNorm2d, without running statistics in training mode.

    A class rather than a flag in each layer: a copy of the layer made meanwhile would keep the flag for good.
    """

    class Frozen(kind):
        def __reduce_ex__(self, protocol: Any) -> Any:
            _, (cls, *args), *state = super().__reduce_ex__(protocol)
            thawed = kind if cls is type(self) else cls  # nested, kind has said it already
            return (thawed.__new__, (thawed, *args), *state)

        if issubclass(kind, LazyModuleMixin):  # its first pass makes the statistics, and this class of it
            cls_to_become = _frozen(kind.cls_to_become)
        else:

            @property
            def track_running_stats(self) -> bool:  # what BatchNorm goes by
                return not self.training and self.__dict__["track_running_stats"]

            @track_running_stats.setter
            def track_running_stats(self, track: bool) -> None:
                self.__dict__["track_running_stats"] = track

            @property
            def running_mean(self) -> Tensor | None:  # what InstanceNorm goes by
                return None if self.training else self._buffers["running_mean"]

            @property
            def running_var(self) -> Tensor | None:
                return None if self.training else self._buffers["running_var"]

    Frozen.__name__, Frozen.__qualname__ = kind.__name__, kind.__qualname__
    return Frozen
