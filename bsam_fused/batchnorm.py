"""Running statistics in the extra passes of a sharpness-aware step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin


class RunningStats:
    """The running statistics of a model, which can be frozen: batches are still normalised by their own.

    Those of BatchNorm, SyncBatchNorm and InstanceNorm, also of lazy layers, which may meet their first input meanwhile.
    Whoever freezes a layer is noted before it is frozen, so that `thaw` is right whatever interrupted either; it is
    frozen as long as somebody wants it.

    Args:
        model: whose normalisation layers to freeze.
    """

    _layers: Sequence[nn.Module] = ()

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            m for m in model.modules() if isinstance(m, _NormBase) and m._buffers.get("running_mean") is not None
        ]
        self._who = object()

    def __del__(self) -> None:
        self.thaw()

    def freeze(self) -> None:
        """Keep the statistics where they are."""
        for layer in self._layers:
            _wanted_frozen.setdefault(layer, set()).add(self._who)
            if not _is_frozen(layer):
                layer.__class__ = _frozen(type(layer))  # type: ignore[arg-type]  # mypy thinks classes unhashable

    def thaw(self) -> None:
        """Let them move again; can be called again."""
        for layer in self._layers:
            wanted = _wanted_frozen.get(layer, set())
            wanted.discard(self._who)
            if not wanted and _is_frozen(layer):
                layer.__class__ = type(layer).thawed  # type: ignore[attr-defined]
        self._layers = ()  # all are


_wanted_frozen: WeakKeyDictionary[nn.Module, set[object]] = WeakKeyDictionary()


def _is_frozen(layer: nn.Module) -> bool:
    return hasattr(type(layer), "thawed")


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
    stats = RunningStats(model)
    try:
        stats.freeze()
        yield
    finally:
        stats.thaw()


@cache
def _frozen(kind: Any) -> type[_NormBase]:
    """Return ``kind``, such as nn.BatchNorm2d, without running statistics in training mode.

    A class rather than a flag in each layer: a copy of the layer made meanwhile would keep the flag for good.
    """

    class Frozen(kind):
        thawed = kind

        def __reduce_ex__(self, protocol: Any) -> Any:
            _, (_, *args), *state = super().__reduce_ex__(protocol)
            return (kind.__new__, (kind, *args), *state)

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
