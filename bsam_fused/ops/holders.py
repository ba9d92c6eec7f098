"""Who else holds a gradient, in C++ or in Python: csrc/holders.cpp's twin, for backends without the extension."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

Counts = tuple[int, int, int, int]


def held_elsewhere(grads: Mapping[int, Tensor], i: int) -> bool:
    """Return whether somebody can see the memory of ``grads[i]`` but its parameter's ``.grad`` and ``grads``.

    Memory that torch did not allocate for one process, as NumPy's, DLPack's or shared memory, is always somebody's. The
    caller must have no name for the tensor, which would count.
    """
    storage = grads[i].untyped_storage()
    foreign = not storage.resizable() or storage.is_shared()
    del storage  # it would count
    return foreign or weakref.getweakrefcount(grads[i]) > 0 or _counts(grads[i]) != _idle_counts()


def _counts(grad: Tensor) -> Counts:
    """Return the holders of the tensor and of its storage, in Python and in C++, our own included."""
    storage = grad.untyped_storage()
    storages = sys.getrefcount(storage) + weakref.getweakrefcount(storage), torch._C._storage_Use_Count(storage._cdata)
    return sys.getrefcount(grad), grad._use_count(), *storages  # type: ignore[attr-defined]


@functools.cache
def _idle_counts() -> Counts:
    """Return what `_counts` says where nobody else holds anything: torch's and Python's versions count differently."""
    param = torch.zeros(1, requires_grad=True, device="cpu")
    param.grad = torch.zeros_like(param)
    grads = {0: param.grad}
    return _counts(grads[0])
