"""Whether lists and states are still made of the same objects: what others change is noticed by identity.

csrc/identity.cpp does it in a few nanoseconds an object; what is here does without the extension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any, Protocol

from torch import Tensor

from bsam_fused.ops import native_flat


class Seen(Protocol):
    """What a state was made of: its keys, its entries, their values, and where tensors among these lie."""

    def same(self, state: Mapping[Any, Any]) -> bool:
        """Return whether ``state`` is made of the same now."""


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


class _Seen:
    def __init__(self, state: Mapping[Any, Any]) -> None:
        self._objects = _objects(state)
        self._addresses = _addresses(self._objects)

    def same(self, state: Mapping[Any, Any]) -> bool:
        objects = _objects(state)
        return _same(objects, self._objects) and _addresses(objects) == self._addresses


def _objects(state: Mapping[Any, Any]) -> list[Any]:
    objects: list[Any] = []
    for key, entry in state.items():
        objects += key, entry
        if isinstance(entry, Mapping):
            objects += entry
            objects += entry.values()
    return objects


def _addresses(objects: Sequence[Any]) -> list[int]:
    return [x.data_ptr() for x in objects if type(x) is Tensor]


_native, _ = native_flat.load()

seen: Callable[[Mapping[Any, Any]], Seen] = _Seen if _native is None else _native.Seen
"""Returns what a state, a dict of dicts, is made of now."""

same_items: Callable[[list[Any], list[Any]], bool] = _same if _native is None else _native.same_items
"""Returns whether two lists have the same objects in the same places."""
