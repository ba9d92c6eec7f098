"""A model's buffers in the extra passes of a sharpness-aware step: copied, and written back.

Which of them a pass has changed is not guessed: BatchNorm's own write moves no version counter. Memory is written
through tensors that share it and not their version counters, as a graph that is still to be used may have saved some.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bsam_fused import distributed
from bsam_fused.ops.copies import copy_all, places
from bsam_fused.ops.identity import same_items

Buffers = dict[str, Tensor | None]
"""A module's."""


class Snapshot:
    """The buffers of a model as they are now, persistent or not: objects, values and shapes.

    Left out are those that share storage with a parameter (to write them would write it), and such as have no memory of
    their own: uninitialised, meta and sparse ones, nested tensors, and tensor subclasses but DTensors, of which the
    shard counts. Of those that overlap each other or themselves, the storage is copied, once.

    Args:
        model: whose buffers to copy.
        before: an earlier one, not needed any more, whose memory is used where the same buffers are there.
        params: further tensors that are trained, whose storage is left alone, too.
    """

    _layout: _Layout

    def __init__(self, model: nn.Module, before: Snapshot | None = None, params: Iterable[Tensor] = ()) -> None:
        found = _find(model, params)
        fits = before is not None and before._layout.fits(found)
        self._layout = before._layout if before is not None and fits else _Layout(found)
        self._layout.read()

    @property
    def is_in_place(self) -> bool:
        """Whether every buffer is the object that it was, in the same memory."""
        here = self._layout
        return same_items(_objects(here.found.owners), here.objects) and not here.moved()

    def write_back(self) -> None:
        """Make every buffer the object that it was, with its memory, shape and value; can be called again."""
        self._put_back_objects(missing=True)
        here = self._layout
        moved = here.moved()
        if moved:
            here.make_room()
        here.write()
        if moved:  # resized, laid out anew, or given other memory
            for tensor, data in zip(here.tensors, here.data, strict=True):
                tensor.data = data

    def rewind(self) -> None:
        """Give every buffer that there still is its value, where its shape and dtype are what they were."""
        self._put_back_objects(missing=False)
        here = self._layout
        if not here.moved():
            here.write()
            return
        for unit, value in zip(here.units, here.values, strict=True):
            now, then = [here.tensors[i] for i in unit.members], [here.data[i] for i in unit.members]
            alone = unit.memory is then[0]
            if places(now) == places(then):
                if _has_memory(unit.memory):  # else freed meanwhile
                    copy_all([unit.memory], [value])
            elif alone and (now[0].shape, now[0].dtype) == (value.shape, value.dtype) and _has_memory(now[0]):
                copy_all([now[0].data], [value])

    def _put_back_objects(self, *, missing: bool) -> None:
        """Have modules hold the tensors that they held; under names that are gone only where ``missing``."""
        here = self._layout
        if same_items(_objects(here.found.owners), here.objects):
            return
        each = zip(here.found.modules, here.found.owners, here.named, here.passing, strict=True)
        for module, buffers, then, passing in each:
            if missing and isinstance(buffers, dict) and not then.keys() <= buffers.keys():
                late = {name: tensor for name, tensor in buffers.items() if name not in then}
                buffers.clear()
                buffers.update({**then, **late})
                module._non_persistent_buffers_set.update(passing)
            for name, tensor in then.items():
                if name in buffers and buffers[name] is not tensor:
                    buffers[name] = tensor


class _Found(NamedTuple):
    """What a walk through a model finds."""

    modules: list[nn.Module]
    """Those with buffers."""
    owners: list[Buffers]
    """Their buffers."""
    params: list[Tensor | None]
    """All parameters of the model, and what else is trained."""


class _Unit(NamedTuple):
    """Memory that is copied as one."""

    memory: Tensor
    members: list[int]
    """Which buffers lie in it."""


class _Layout:
    """Where the buffers of a model lie, and memory for a copy of each."""

    def __init__(self, found: _Found) -> None:
        self.found, self.objects = found, _objects(found.owners)
        self.named: list[Buffers] = [dict(buffers.items()) for buffers in found.owners]
        self.passing = [module._non_persistent_buffers_set & named.keys() for module, named in self._pairs()]
        tensors = list({id(tensor): tensor for tensor in self.objects if tensor is not None}.values())
        self._unready = any(map(nn.parameter.is_lazy, tensors))  # whose memory is still to come
        self._params = [p for p in map(distributed.local, found.params) if p is not None and _has_memory(p)]
        trained = set(map(_storage, self._params))
        local = map(distributed.local, tensors)
        self.tensors: list[Tensor] = [t for t in local if _has_memory(t) and _storage(t) not in trained]
        self.data = [tensor.data for tensor in self.tensors]
        self.units = _units(self.data)
        self.values = [torch.empty_like(unit.memory) for unit in self.units]
        self._bytes = [unit.memory.untyped_storage().nbytes() for unit in self.units]
        kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for unit, value in zip(self.units, self.values, strict=True):
            of_memory, of_values = kinds[unit.memory.device, unit.memory.dtype]
            of_memory.append(unit.memory)
            of_values.append(value)
        self._lists = list(kinds.values())
        self._names = list(chain.from_iterable(self.named))
        self._places, self._params_at = places(self.tensors), places(self._params)

    def _pairs(self) -> Iterable[tuple[nn.Module, Buffers]]:
        return zip(self.found.modules, self.named, strict=True)

    def fits(self, found: _Found) -> bool:
        """Return whether there are the same buffers and parameters now, under the same names, in the same memory."""
        return (
            not self._unready
            and same_items(found.owners, self.found.owners)
            and same_items(_objects(found.owners), self.objects)
            and same_items(found.params, self.found.params)
            and list(chain.from_iterable(found.owners)) == self._names
            and not self.moved()
            and places(self._params) == self._params_at
        )

    def moved(self) -> bool:
        """Return whether a buffer was resized, laid out anew, or given other memory."""
        return places(self.tensors) != self._places

    def make_room(self) -> None:
        """Have as much memory as there was, where some was freed."""
        for unit, size in zip(self.units, self._bytes, strict=True):
            storage = unit.memory.untyped_storage()
            if storage.nbytes() < size:
                storage.resize_(size)

    def read(self) -> None:
        """Copy the values of the buffers."""
        for memory, values in self._lists:
            copy_all(values, memory)

    def write(self) -> None:
        """Copy the values back, into the memory that the buffers had."""
        for memory, values in self._lists:
            copy_all(memory, values)


def _find(model: nn.Module, params: Iterable[Tensor]) -> _Found:
    """Walk through all modules: `Module.modules` takes several times as long."""
    modules: list[nn.Module] = [model]
    seen = {id(model)}
    with_buffers: list[nn.Module] = []
    owners: list[Buffers] = []
    trained: list[Tensor | None] = []
    for module in modules:
        if buffers := module._buffers:
            with_buffers.append(module)
            owners.append(buffers)
        trained += module._parameters.values()
        if children := module._modules:
            for child in children.values():
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    modules.append(child)
    return _Found(with_buffers, owners, [*trained, *params])


def _objects(owners: Iterable[Buffers]) -> list[Tensor | None]:
    return [tensor for buffers in owners for tensor in buffers.values()]


def _has_memory(tensor: Tensor) -> bool:
    """Return whether a tensor's elements are in a storage of its own."""
    if type(tensor) not in {Tensor, nn.Parameter, nn.Buffer} or tensor.is_nested or tensor.layout != torch.strided:
        return False
    if tensor.is_meta or tensor._is_zerotensor():
        return False
    if not tensor.numel() or not _is_plain(tensor):
        return True
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = int(tensor.storage_offset() + last + 1) * tensor.element_size()
    return end <= tensor.untyped_storage().nbytes()  # else it was freed or shrunk


def _is_plain(tensor: Tensor) -> bool:
    """Return whether the elements are what is stored, each in bytes of its own."""
    return not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _units(data: Sequence[Tensor]) -> list[_Unit]:
    """Return what is to be copied: each tensor, or the storage in which several, or one of another kind, lie."""
    storages: dict[int, list[int]] = defaultdict(list)
    for i, tensor in enumerate(data):
        storages[_storage(tensor)].append(i)
    units: list[_Unit] = []
    for members in storages.values():
        first = data[members[0]]
        overlaps = any(stride == 0 and size > 1 for size, stride in zip(first.shape, first.stride(), strict=True))
        whole = overlaps or len(members) > 1 or not _is_plain(first)
        units.append(_Unit(_whole_storage(first) if whole else first, members))
    return units


def _whole_storage(tensor: Tensor) -> Tensor:
    """Return all bytes of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
