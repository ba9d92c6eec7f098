"""A model's buffers in the extra passes of a sharpness-aware step: copied, and written back.

Which of them a pass has changed is not guessed: BatchNorm's own write moves no version counter. Memory is written
through tensors that share it and not their version counters, as a graph that is still to be used may have saved some.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from operator import eq
from typing import Any

import torch
from torch import Tensor, nn

from bsam_fused import distributed
from bsam_fused.ops.copies import copy_all
from bsam_fused.ops.identity import same_items

Buffers = dict[str, Tensor | None]
"""A module's."""
Unit = tuple[Tensor, list[int]]
"""Memory that is copied as one, and which buffers lie in it."""


class Snapshot:
    """The buffers of a model as they are now, persistent or not: objects, values and shapes.

    Left out are those that share storage with a parameter (to write them would write it), and uninitialised, meta and
    sparse ones. Of those that overlap each other or themselves, the storage is copied, once; of DTensors, the shard.

    Args:
        model: whose buffers to copy.
        before: an earlier one, not needed any more, whose memory is used where the same buffers are there.
    """

    def __init__(self, model: nn.Module, before: Snapshot | None = None) -> None:
        self._owners = list(_all_buffers(model))
        self._objects = self._objects_now()
        if before is None or not before._is_laid_out_for(self._owners, self._objects):
            self._lay_out(model)
        else:
            self._named, self._unready, self._tensors = before._named, before._unready, before._tensors
            self._units, self._values, self._lists = before._units, before._values, before._lists
            self._data, self._places = before._data, before._places
        for memory, values in self._lists:
            copy_all(values, memory)

    def _objects_now(self) -> list[Tensor | None]:
        return [tensor for buffers in self._owners for tensor in buffers.values()]

    def _is_laid_out_for(self, owners: list[Buffers], objects: list[Tensor | None]) -> bool:
        same = same_items(owners, self._owners) and same_items(objects, self._objects)
        return same and not self._unready and self._places_now() == self._places

    def _lay_out(self, model: nn.Module) -> None:
        """Find the memory of the buffers, and make room for copies of it."""
        self._named = list(map(dict, self._owners))
        tensors = list({id(tensor): tensor for tensor in self._objects if tensor is not None}.values())
        self._unready = any(map(nn.parameter.is_lazy, tensors))  # whose memory is still to come
        parameters = {_storage(p) for p in map(distributed.local, model.parameters()) if _has_memory(p)}
        local = map(distributed.local, tensors)
        self._tensors = [t for t in local if _has_memory(t) and _storage(t) not in parameters]
        self._data = [tensor.data for tensor in self._tensors]
        self._units = _units(self._data)
        kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        self._values = [torch.empty_like(memory) for memory, _ in self._units]
        for (memory, _), value in zip(self._units, self._values, strict=True):
            of_memory, of_values = kinds[memory.device, memory.dtype]
            of_memory.append(memory)
            of_values.append(value)
        self._lists = list(kinds.values())
        self._places = self._places_now()

    def _places_now(self) -> tuple[list[int], list[torch.Size]]:
        return list(map(Tensor.data_ptr, self._tensors)), [tensor.shape for tensor in self._tensors]

    @property
    def is_in_place(self) -> bool:
        """Whether every buffer is the object that it was, in the same memory."""
        return same_items(self._objects_now(), self._objects) and self._places_now() == self._places

    def write_back(self) -> None:
        """Make every buffer the object that it was, with its memory, shape and value; can be called again."""
        self._put_back_objects()
        moved = self._places_now() != self._places
        for memory, values in self._lists:
            copy_all(memory, values)
        if moved:  # resized, or given other memory
            for tensor, data in zip(self._tensors, self._data, strict=True):
                tensor.data = data

    def rewind(self) -> None:
        """Give every buffer its value, where its shape and dtype still are what they were."""
        self._put_back_objects()
        addresses, shapes = self._places_now()
        in_place = list(map(eq, zip(addresses, shapes, strict=True), zip(*self._places, strict=True)))
        if all(in_place):
            for memory, values in self._lists:
                copy_all(memory, values)
            return
        for (memory, members), value in zip(self._units, self._values, strict=True):
            now = self._tensors[members[0]].data
            if all(in_place[i] for i in members):
                copy_all([memory], [value])
            elif (now.shape, now.dtype) == (value.shape, value.dtype):  # other memory of the same kind
                copy_all([now], [value])

    def _put_back_objects(self) -> None:
        if same_items(self._objects_now(), self._objects):
            return
        for buffers, then in zip(self._owners, self._named, strict=True):
            for name, tensor in then.items():
                if buffers.get(name) is not tensor:
                    buffers[name] = tensor


def _all_buffers(model: nn.Module) -> Iterable[Buffers]:
    """Yield the buffers of each module that has some: `Module.modules` takes several times as long."""
    modules: list[nn.Module] = [model]
    seen = {id(model)}
    for module in modules:
        if module._buffers:
            yield module._buffers
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                modules.append(child)


def _has_memory(tensor: Tensor) -> bool:
    lazy = nn.parameter.is_lazy(tensor)
    return not lazy and tensor.layout == torch.strided and tensor.device.type != "meta"


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _units(data: Sequence[Tensor]) -> list[Unit]:
    """Return what is to be copied: each tensor, or the storage in which several, or an expanded one, lie."""
    storages: dict[int, list[int]] = defaultdict(list)
    for i, tensor in enumerate(data):
        storages[_storage(tensor)].append(i)
    units: list[Unit] = []
    for members in storages.values():
        first = data[members[0]]
        overlaps = any(stride == 0 and size > 1 for size, stride in zip(first.shape, first.stride(), strict=True))
        units.append((_whole_storage(first) if overlaps or len(members) > 1 else first, members))
    return units


def _whole_storage(tensor: Tensor) -> Tensor:
    """Return all bytes of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
