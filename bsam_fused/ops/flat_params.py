"""What FlatParams written in Python share: parameters, gradients, flat buffers, what a phase does in which order.

The twin of csrc/flat_params.cpp. What runs over the elements is a backend's own: torch_flat.py, torch_lists.py,
triton_flat.py. What an update writes, and the note that it did, are prepared, and then written in one go.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import accumulate
from operator import attrgetter
from typing import NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor

from bsam_fused.ops import contract, rounding
from bsam_fused.ops.contract import ASCENT, SCALE, SLOTS, AdamScalars, Mixing, Radius, SGDScalars
from bsam_fused.ops.directions import Direction, Mix, Sums
from bsam_fused.ops.memory import Memory, can_be_written
from bsam_fused.ops.one_go import in_one_go

Call = Callable[[], object]
Item = TypeVar("Item")
DIRECTION = "direction"  # the flat buffer in which `merge` leaves d
ALIGNMENT = 64  # bytes: every tensor starts on a cache line of the flat buffers
SMALL_BYTES = 4096  # up to here a gradient is copied rather than taken

_kind = attrgetter("shape", "dtype", "device", "layout")


class Update(NamedTuple):
    """What every update needs beside its param groups: see `contract.FlatParams.update_sgd`."""

    sums: Tensor
    from_saved: bool
    max_norm: float


class PythonFlatParams(ABC):
    """`contract.FlatParams`, but for what runs over the elements."""

    @torch.no_grad()
    def __init__(
        self, params: Sequence[Tensor], places: Sequence[tuple[int, int]], seed: int | None, exempt: bool
    ) -> None:
        self.params, self.places = list(params), list(places)
        self.device, self.dtype = self.params[0].device, self.params[0].dtype
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        self.sums = torch.zeros(SLOTS, dtype=wide, device=self.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.step_count = torch.zeros((), dtype=torch.int64, device=self.device)
        # Of parameters that are rounded stochastically.
        self._keys = [rounding.tensor_key(seed, *place) for place in places] if self._rounds(seed) else []
        self._steps = torch.zeros(len(self.params), dtype=torch.float32, device=self.device)
        self._kinds = list(map(_kind, self.params))
        self._layouts = list(map(Tensor.stride, self.params))
        self._numels = [p.numel() for p in self.params]
        # An element's place in the flat buffers: its parameter's strides, or dense ones where they have gaps.
        self._strides = [torch.empty_like(p, device="meta").stride() for p in self.params]
        self._bytes = [numel * self.dtype.itemsize for numel in self._numels]
        self._memory = Memory([], [], [])
        # What has gaps, or is lazily negated, is worked on in a packed copy.
        self._packed = {
            i: torch.empty_like(p, requires_grad=False)
            for i, p in enumerate(self.params)
            if p.stride() != self._strides[i] or p.is_neg()
        }
        pad = ALIGNMENT // self.params[0].element_size()
        self._offsets = [0]
        for numel in self._numels:
            self._offsets.append(self._offsets[-1] + -(-numel // pad) * pad)
        self._buffers: dict[str, Tensor] = {}  # "saved", and the base optimizer's state
        self._lists: dict[str, list[Tensor]] = {}  # of their views
        self._begun: set[int] = set()  # whose state has begun
        self._own: dict[int, Tensor] = {}  # where g is kept if it had to be copied
        self._exempt = exempt  # nothing is perturbed here
        self._mixing = Mixing()  # how this step's direction is mixed
        self._summed = False  # and its sums are there
        self._now: dict[int, Tensor] = {}  # this pass's gradients, in the flat buffers' strides
        self._g: dict[int, Tensor] = {}  # what is kept: g, or g + g_max, likewise
        self._ascended: set[int] = set()  # who had a gradient in the first pass of this step
        self._perturbed: list[int] = []  # what is not w, but saved is
        self._shown: list[list[Tensor]] = []  # the perturbed weights, while the weights are w
        self._done: list[bool] = []  # not empty: an update was made of the gradients read last
        self.limit = torch.finfo(torch.promote_types(self.dtype, torch.float32)).max
        self._refuse_capture()

    def _rounds(self, seed: int | None) -> TypeGuard[int]:
        return seed is not None and self.dtype.itemsize == 2

    # ---- what a backend does in a phase, over the elements of all parameters

    @abstractmethod
    def _run_square_norm(self, slot: int, radii: Sequence[Radius]) -> None:
        """Σ (T g)²."""

    @abstractmethod
    def _run_direction_sums(self) -> None:
        """Σ y², Σ x², Σ x y of d = a x + b y; of g_max and ĝ_min, where that is extrapolated."""

    @abstractmethod
    def _take(self) -> None:
        """Take the gradients of this pass into g, where g is not there yet: at the latest as a phase runs."""

    @abstractmethod
    def _run_ascend(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float) -> None:
        """Save w, then w = w_max; note what is perturbed."""

    @abstractmethod
    def _run_descend(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float) -> None:
        """From the saved w, w = w_min of the perturbed; g = g + g_max of the ascended; Σ g_max²."""

    @abstractmethod
    def _run_sgd(self, update: Update, groups: Sequence[SGDScalars], members: list[int]) -> None:
        """`_commit` SGD's rule, which counts the members' steps, or the skipped one."""

    @abstractmethod
    def _run_adam(self, update: Update, groups: Sequence[AdamScalars], members: list[int]) -> None:
        """Adam's rule, likewise."""

    @abstractmethod
    def _run_direction(self, sums: Tensor, max_norm: float) -> dict[int, Tensor]:
        """Return d of every member, but where it is its gradient as it is: strided like the flat buffers, nobody's."""

    # ---- parameters and gradients

    @property
    def extra_bytes(self) -> int:
        """Bytes held beside parameters and gradients."""
        g = [g for i, g in self._g.items() if g is not self._own.get(i)]
        return sum(t.nbytes for t in (*self._buffers.values(), *self._packed.values(), *self._own.values(), *g))

    @property
    def updated(self) -> bool:
        """Whether an update was made of the gradients read last."""
        return bool(self._done)

    def _weights(self, i: int) -> Tensor:
        """Return the i-th parameter's elements, in the flat buffers' strides."""
        return self._packed.get(i, self.params[i])

    def read_gradients(self) -> None:
        """Note the gradients of this pass."""
        self._now, self._done = {}, []
        kinds = list(map(_kind, self.params))
        if kinds != self._kinds or list(map(Tensor.stride, self.params)) != self._layouts:
            contract.reject(self, next(i for i in range(len(self.params)) if self._changed(i)))
        now = {i: grad for i, grad in enumerate([p.grad for p in self.params]) if grad is not None}
        if not self._are_usual(now):
            now = {i: grad if self._are_usual({i: grad}) else self._copied(i, grad) for i, grad in now.items()}
        self._keep_until_read()
        addresses, weights = list(map(Tensor.data_ptr, now.values())), list(map(Tensor.data_ptr, self.params))
        if not (all(addresses) and all(weights)):
            for i, address in zip(now, addresses, strict=True):
                if self._numels[i] and not (address and weights[i]):
                    contract.reject(self, i)
        if self._memory.weights != weights:
            self._memory = self._occupied(weights)
        if any(shares := self._memory.shares(addresses, pick(self._bytes, now))):
            now = {i: self._copied(i, g) if shared else g for (i, g), shared in zip(now.items(), shares, strict=True)}
        for i in self._packed.keys() & now.keys():
            self._packed[i].copy_(self.params[i].detach())
        self._now = now

    def _keep_until_read(self) -> None:
        """Have torch wait for this stream before it gives gradients' memory to the stream that they came from.

        They are let go of as soon as their launch is under way. Where backward ran on this stream, too, as is usual,
        torch does nothing.
        """
        if self.device.type == "cuda":
            here = torch.cuda.current_stream(self.device)
            for param in self.params:
                if param.grad is not None:
                    param.grad.record_stream(here)

    def _changed(self, i: int) -> bool:
        return _kind(self.params[i]) != self._kinds[i] or self.params[i].stride() != self._layouts[i]

    def _are_usual(self, grads: Mapping[int, Tensor]) -> bool:
        """Whether the memory of gradients is their elements, in the flat buffers' strides."""
        tensors = list(grads.values())
        return (
            list(map(_kind, tensors)) == pick(self._kinds, grads)
            and list(map(Tensor.stride, tensors)) == pick(self._strides, grads)
            and not any(map(Tensor.is_neg, tensors))
            and not any(map(Tensor._is_zerotensor, tensors))
        )

    def _copied(self, i: int, grad: Tensor) -> Tensor:
        """Return a copy of a gradient whose memory is not its elements, or is somebody's that changes meanwhile."""
        if _kind(grad) != self._kinds[i]:
            contract.reject(self, i)
        return self._empty(i).copy_(grad.detach())

    def _occupied(self, weights: Sequence[int]) -> Memory:
        """Return where parameters, at these addresses, and flat buffers lie: what lies there, too, is written to."""
        last = [
            sum((size - 1) * stride for size, stride in zip(kind[0], strides, strict=True))
            for kind, strides in zip(self._kinds, self._layouts, strict=True)
        ]
        spans = [
            (address, address + (1 + place) * self.dtype.itemsize)
            for address, place, numel in zip(weights, last, self._numels, strict=True)
            if numel
        ]
        spans += [(buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes) for buffer in self._buffers.values()]
        begins = sorted(spans)
        return Memory(list(weights), [begin for begin, _ in begins], [0, *accumulate((end for _, end in begins), max)])

    def begin_plain(self) -> None:
        """Begin a step with d = g."""
        self._mix_by(Mixing())
        self._g, self._ascended = {}, set()
        self.sums.zero_()

    def join(self, mixing: Mixing, descended: bool) -> None:
        """Take part from this pass on."""
        self._mix_by(mixing)

    def _mix_by(self, mixing: Mixing) -> None:
        self._mixing, self._summed = mixing, False

    def clear_gradients(self) -> None:
        """Set every .grad to None."""
        for param in self.params:
            param.grad = None

    def _written(self, members: Iterable[int]) -> list[Call]:
        """Return what makes the parameters what was written."""
        return (
            [partial(self.params[i].copy_, self._packed[i]) for i in members if i in self._packed]
            if self._packed
            else []
        )

    def _end_pass(self) -> None:
        for i in self._now:
            self.params[i].grad = None
        self._now = {}

    def _empty(self, i: int) -> Tensor:
        return torch.empty_strided(self.params[i].shape, self._strides[i], dtype=self.dtype, device=self.device)

    def _kept(self, i: int) -> Tensor:
        """Return where a copy of the i-th gradient is kept, from step to step."""
        if i not in self._own:
            self._own[i] = self._empty(i)
        return self._own[i]

    # ---- flat buffers

    def _refuse_capture(self) -> None:
        """What a graph's capture makes is made anew by every replay."""
        if is_capturing(self.device):
            raise RuntimeError("the first step cannot be captured in a CUDA graph: take one before, then capture")

    def _buffer(self, key: str) -> Tensor:
        if key not in self._buffers:
            self._refuse_capture()
            dtype = torch.float32 if key == contract.MASTER_WEIGHT else self.dtype
            self._buffers[key] = torch.zeros(self._offsets[-1], dtype=dtype, device=self.device)
            self._memory = Memory([], [], [])
        return self._buffers[key]

    def _view(self, key: str, i: int) -> Tensor:
        return self._buffer(key).as_strided(self._kinds[i][0], self._strides[i], self._offsets[i])

    def _list(self, key: str) -> list[Tensor]:
        """Return views of a flat buffer that nobody else has."""
        if key not in self._lists:
            self._lists[key] = self.state(key)
        return self._lists[key]

    def state(self, key: str) -> list[Tensor]:
        """Views of the flat buffer ``key``."""
        if key == "step":
            return list(self._steps.unbind())
        return [self._view(key, i) for i in range(len(self.params))]

    @torch.no_grad()
    def clear_state(self, i: int) -> None:
        """Zero the i-th parameter's state."""
        self._begun.discard(i)
        self._steps[i].zero_()
        for key in self._buffers:
            if key not in {"saved", DIRECTION}:
                self._view(key, i).zero_()

    def drop_state(self) -> None:
        """Begin with new buffers of state."""
        self._begun = set()
        self._steps = torch.zeros_like(self._steps)
        self._lists = {}
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if key in {"saved", DIRECTION}}

    def beginning(self, stateful: Sequence[bool]) -> list[int]:
        """Return whose state begins with this step."""
        return [i for i in self._members() if i not in self._begun and stateful[self.places[i][0]]]

    def begin_state(self, members: Sequence[int]) -> None:
        """Note whose state has begun."""
        self._begun.update(members)

    # ---- phases

    @torch.no_grad()
    def square_norm(self, slot: int, radii: Sequence[Radius]) -> None:
        """Σ (T g)²."""
        if self._exempt and slot == ASCENT:
            self.sums[slot] = 0
        else:
            self._run_square_norm(slot, radii)

    @torch.no_grad()
    def direction_sums(self) -> None:
        """Σ y², Σ x², Σ x y of d = a x + b y."""
        self._run_direction_sums()
        self._summed = True

    @torch.no_grad()
    def ascend(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float, mixing: Mixing) -> None:
        """Save w, then w = w_max."""
        self._mix_by(mixing)
        self._g, self._ascended = {}, set(self._now)
        if mixing.rule.keeps:
            self._take()
        if not self._exempt:
            self._run_ascend(sums, radii, norm_eps)
        in_one_go(*self._written(self._perturbed))
        self._end_pass()

    @torch.no_grad()
    def descend(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float) -> None:
        """From the saved w, w = w_min; g = g + g_max."""
        self._take()
        self._run_descend(sums, radii, norm_eps)
        in_one_go(*self._written(self._perturbed))
        self._end_pass()

    def _members(self) -> list[int]:
        """Return the parameters that had a gradient in some pass of this step."""
        if len(self._now) == len(self.params):
            return list(self._now)
        return sorted({*self._ascended, *self._g, *self._now})

    def _commit(self, *writes: Call) -> None:
        """Make the writes of an update, note that it was made and forget the step: all of it, or nothing."""
        in_one_go(*writes, partial(self._done.append, True), *self._forgetting())

    @torch.no_grad()
    def update_sgd(self, sums: Tensor, groups: Sequence[SGDScalars], from_saved: bool, max_norm: float) -> None:
        """torch.optim.SGD's rule."""
        self._run_sgd(Update(sums, from_saved, max_norm), groups, self._members())

    @torch.no_grad()
    def update_adam(self, sums: Tensor, groups: Sequence[AdamScalars], from_saved: bool, max_norm: float) -> None:
        """torch.optim.Adam's and AdamW's rule."""
        self._run_adam(Update(sums, from_saved, max_norm), groups, self._members())

    @torch.no_grad()
    def combine(self, sums: Tensor, from_saved: bool, max_norm: float) -> bool:
        """Put d into .grad, w into the weights."""
        directions = self._run_direction(sums, max_norm) if self._can_update(sums, max_norm) else None
        if directions is None or not self._holds(directions.values()):
            self._commit(*self._put_back(), partial(self.skipped.add_, 1), partial(self.step_count.add_, 1))
            return False
        self._save([i for i in range(len(self.params)) if i not in set(self._perturbed)])
        in_one_go(*(self._put_back() if from_saved else []))
        for i, d in directions.items():
            self.params[i].grad = d
        return True

    def _direction(self, max_norm: float) -> Direction:
        """Return how this step's direction comes about."""
        rule, numbers = self._mixing
        largest = numbers[0].largest if numbers else 0.0
        return Direction(rule, self._summed, max_norm, self.limit, largest)

    def _number(self, group: int) -> float:
        """Return a param group's number of the rule."""
        return self._mixing.numbers[group].number if self._mixing.numbers else 0.0

    def _mixes(self, sums: Sums, max_norm: float, signs: Sequence[float] = ()) -> Callable[[int, bool], Mix]:
        """Return what gives the mix of a param group's tensors that have both gradients or not; ``signs``: of its d."""
        by = self._direction(max_norm)
        factor = by.factor(sums)

        @cache
        def mix(group: int, both: bool) -> Mix:
            signed = signs[group] * factor if signs else factor
            return by.of(sums, self._number(group), both).times(signed)

        return mix

    def _has_both(self, i: int) -> bool:
        """Return whether a parameter has a gradient of the first pass and one of the last."""
        return i in self._ascended and i in self._now

    def _can_update(self, sums: Tensor, max_norm: float) -> bool:
        """Return whether an update can be made. Waits for the sums."""
        return bool(self._direction(max_norm).can_update(sums.tolist()))

    def _holds(self, directions: Iterable[Tensor]) -> bool:
        """Return whether directions are finite in 16 bits, which hold less than what d was computed with."""
        return self.dtype.itemsize > 2 or all(bool(d.isfinite().all()) for d in directions)

    def _save(self, members: Sequence[int]) -> None:
        """w -> saved, and only then is it noted: what was saved half way must not be restored from."""
        if members:
            torch._foreach_copy_(pick(self._list("saved"), members), pick(self.params, members))
        self._perturbed = [*self._perturbed, *members]

    @torch.no_grad()
    def merge(self, sums: Tensor, share: float) -> Tensor:
        """Put share · d into a flat buffer, of which .grad are views."""
        scaled = sums.clone()  # as the loss still is
        scaled[SCALE] = 0
        buffer = self._buffer(DIRECTION).zero_()
        for i, d in self._run_direction(scaled, math.inf).items():
            self.params[i].grad = self._view(DIRECTION, i).copy_(d).mul_(share)
        self._mix_by(Mixing())
        self._g = {}
        return buffer

    def write_options(self, tables: Sequence[Sequence[Sequence[float]]]) -> None:
        """Refuse: options are arguments of what runs over the elements."""
        raise RuntimeError(
            "this backend's launches carry their options: a captured step would replay those it began with"
        )

    # ---- giving up, and looking at w

    def _put_back(self) -> list[Call]:
        """Return what writes the saved w into the weights, whatever became of their strides, dtype and device.

        Raises:
            RuntimeError: one has another shape.
        """
        if self._shown or not self._perturbed:
            return []
        self._check_shapes()
        weights, saved = pick(self.params, self._perturbed), pick(self._list("saved"), self._perturbed)
        return [partial(torch._foreach_copy_, weights, saved)]

    def _check_shapes(self) -> None:
        for i in self._perturbed:
            if self.params[i].shape != self._kinds[i][0] or not can_be_written(self.params[i]):
                contract.reject_shape(self, i)

    def _forgetting(self) -> list[Call]:
        how = partial(self.__dict__.update, _mixing=Mixing(), _summed=False)
        return [self._now.clear, self._g.clear, self._ascended.clear, self._perturbed.clear, self._shown.clear, how]

    @torch.no_grad()
    def restore(self) -> None:
        """Saved w back into the weights, but where the step was made."""
        in_one_go(*([] if self.updated else self._put_back()), *self._forgetting())

    def release(self) -> None:
        """Forget the step."""
        in_one_go(*self._forgetting())

    @torch.no_grad()
    def show_w(self, at_w: bool) -> None:
        """Exchange perturbed weights and saved w, if that is not so already."""
        if at_w == bool(self._shown) or not self._perturbed:
            return
        weights = pick(self.params, self._perturbed)
        if at_w:
            perturbed = [w.detach().clone() for w in weights]
            in_one_go(*self._put_back(), partial(self._shown.append, perturbed))
        else:
            self._check_shapes()
            (perturbed,) = self._shown
            w_is_saved = partial(torch._foreach_copy_, pick(self._list("saved"), self._perturbed), weights)
            in_one_go(w_is_saved, self._shown.clear, partial(torch._foreach_copy_, weights, perturbed))


def is_capturing(device: torch.device) -> bool:
    """Return whether work on ``device``, which need not be the current one, goes into a graph instead of running."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def pick(items: list[Item], members: Collection[int]) -> list[Item]:
    """Return the ``members`` of ``items``, in order."""
    return items if len(members) == len(items) else [items[i] for i in members]
