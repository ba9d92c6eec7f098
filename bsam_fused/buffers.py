"""A model's buffers in the extra passes of a sharpness-aware step: copied, and written back.

Which of them a pass has changed is not guessed: BatchNorm's own write moves no version counter. Memory is written
through tensors that share it and not their version counters, as a graph that is still to be used may have saved some.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bsam_fused import distributed
from bsam_fused.ops.copies import copy_all, places
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

    _layout: _Layout

    def __init__(self, model: nn.Module, before: Snapshot | None = None) -> None:
        owners = list(_all_buffers(model))
        fits = before is not None and before._layout.fits(owners)
        self._layout = before._layout if before is not None and fits else _Layout(owners, model)
        self._layout.read()

    def write_back(self) -> None:
        """Make every buffer the object that it was, with its memory, shape and value; can be called again."""
        self._put_back_objects()
        here = self._layout
        moved = here.moved()
        here.write()
        if moved:  # resized, or given other memory
            for tensor, data in zip(here.tensors, here.data, strict=True):
                tensor.data = data

    def rewind(self) -> None:
        """Give every buffer its value, where its shape and dtype still are what they were."""
        self._put_back_objects()
        here = self._layout
        if not here.moved():
            here.write()
            return
        for (memory, members), value in zip(here.units, here.values, strict=True):
            now, then = [here.tensors[i] for i in members], [here.data[i] for i in members]
            if places(now) == places(then):
                copy_all([memory], [value])
            elif (now[0].shape, now[0].dtype) == (value.shape, value.dtype):  # other memory of the same kind
                copy_all([now[0].data], [value])

    def _put_back_objects(self) -> None:
        here = self._layout
        if same_items(_objects(here.owners), here.objects):
            return
        for buffers, then in zip(here.owners, here.named, strict=True):
            for name, tensor in then.items():
                if buffers.get(name) is not tensor:
                    buffers[name] = tensor


class _Layout:
    """Where the buffers of a model lie, and memory for a copy of each.

    Args:
        owners: the buffers of each module that has some.
        model: whose they are.
    """

    def __init__(self, owners: list[Buffers], model: nn.Module) -> None:
        self.owners, self.objects = owners, _objects(owners)
        self.named: list[Buffers] = list(map(dict, owners))
        tensors = list({id(tensor): tensor for tensor in self.objects if tensor is not None}.values())
        self._unready = any(map(nn.parameter.is_lazy, tensors))  # whose memory is still to come
        parameters = {_storage(p) for p in map(distributed.local, model.parameters()) if _has_memory(p)}
        local = map(distributed.local, tensors)
        self.tensors: list[Tensor] = [t for t in local if _has_memory(t) and _storage(t) not in parameters]
        self.data = [tensor.data for tensor in self.tensors]
        self.units = _units(self.data)
        self.values = [torch.empty_like(memory) for memory, _ in self.units]
        kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for (memory, _), value in zip(self.units, self.values, strict=True):
            of_memory, of_values = kinds[memory.device, memory.dtype]
            of_memory.append(memory)
            of_values.append(value)
        self._lists = list(kinds.values())
        self._places = places(self.tensors)

    def fits(self, owners: list[Buffers]) -> bool:
        """Return whether these are the same buffers, in the same memory."""
        same = same_items(owners, self.owners) and same_items(_objects(owners), self.objects)
        return same and not self._unready and not self.moved()

    def moved(self) -> bool:
        """Return whether a buffer was resized, or given other memory."""
        return places(self.tensors) != self._places

    def read(self) -> None:
        """Copy the values of the buffers."""
        for memory, values in self._lists:
            copy_all(values, memory)

    def write(self) -> None:
        """Copy the values back, into the memory that the buffers had."""
        for memory, values in self._lists:
            copy_all(memory, values)


def _objects(owners: Iterable[Buffers]) -> list[Tensor | None]:
    return [tensor for buffers in owners for tensor in buffers.values()]


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
