"""What FlatParams written in Python share: parameters, gradients, what a phase does in which order.

The twin of csrc/flat_params.cpp; flat_buffers.py has the buffers. What runs over the elements is a backend's own:
torch_flat.py, torch_lists.py, triton_flat.py. What an update writes, and the note that it did, are prepared, and then
written in one go.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple, TypeGuard, TypeVar, cast

import torch
from torch import Tensor

from bsam_fused.ops import contract, rounding
from bsam_fused.ops.contract import (
    ASCENT,
    SLOTS,
    AdamScalars,
    Mixing,
    Radius,
    Rule,
    RuleNumber,
    SGDScalars,
)
from bsam_fused.ops.directions import Direction, Memory, Mix, Sums
from bsam_fused.ops.flat_buffers import DIRECTION, FlatBuffers, kind_of
from bsam_fused.ops.memory import Occupied, are_in_storage, can_be_written, is_in_storage
from bsam_fused.ops.one_go import in_one_go

Call = Callable[[], object]
Item = TypeVar("Item")
SMALL_BYTES = 4096  # up to here a gradient is copied rather than taken


class Update(NamedTuple):
    """What every update needs beside its param groups: see `contract.FlatParams.update_sgd`."""

    sums: Tensor
    from_saved: bool
    max_norm: float


class PythonFlatParams(FlatBuffers, ABC):
    """`contract.FlatParams`, but for what runs over the elements."""

    @torch.no_grad()
    def __init__(
        self, params: Sequence[Tensor], places: Sequence[tuple[int, int]], seed: int | None, exempt: bool
    ) -> None:
        super().__init__(params)
        self.places = list(places)
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        self.sums = torch.zeros(SLOTS, dtype=wide, device=self.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.step_count = torch.zeros((), dtype=torch.int64, device=self.device)
        # Of parameters that are rounded stochastically.
        self._keys = [rounding.tensor_key(seed, *place) for place in places] if self._rounds(seed) else []
        # What has gaps, or is lazily negated, is worked on in a packed copy.
        self._packed = {
            i: torch.empty_like(p, requires_grad=False)
            for i, p in enumerate(self.params)
            if p.stride() != self._strides[i] or p.is_neg()
        }
        self._own: dict[int, Tensor] = {}  # where g is kept if it had to be copied
        self._exempt = exempt  # nothing is perturbed here
        self._mixing = Mixing()  # how this step's direction is mixed
        self._summed = False  # and its sums are there
        self._now: dict[int, Tensor] = {}  # this pass's gradients, in the flat buffers' strides
        self._g: dict[int, Tensor] = {}  # what is kept: g, q, or g + g_max, likewise; or the history
        self._ascended: set[int] = set()  # who had a gradient in the first pass of this step
        self._perturbed: list[int] = []  # what is not w, but saved is
        self._shown: list[list[Tensor]] = []  # the perturbed weights, while the weights are w
        self._remembered: list[Call] = []  # what writes the history that `combine` has worked out
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
    def _run_mix(self, radii: Sequence[Radius]) -> None:
        """q = g − σ m, into g; Σ (T q)², Σ m², Σ q²."""

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

    @abstractmethod
    def _run_remember(self, sums: Tensor, max_norm: float) -> dict[int, Tensor]:
        """Return what the history becomes, of those `_remembering`, beside it."""

    # ---- parameters and gradients

    @property
    def extra_bytes(self) -> int:
        """Bytes held beside parameters and gradients."""
        is_history = self._mixing.rule is Rule.REUSED
        taken = [] if is_history else [g for i, g in self._g.items() if g is not self._own.get(i)]
        return sum(t.nbytes for t in (*self._buffers.values(), *self._packed.values(), *self._own.values(), *taken))

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
        kinds = list(map(kind_of, self.params))
        if kinds != self._kinds or list(map(Tensor.stride, self.params)) != self._layouts:
            contract.reject(self, next(i for i in range(len(self.params)) if self._changed(i)))
        now = {i: grad for i, grad in enumerate([p.grad for p in self.params]) if grad is not None}
        if not self._are_usual(now):
            now = {i: grad if self._are_usual({i: grad}) else self._copied(i, grad) for i, grad in now.items()}
        self._keep_until_read()
        of_this_step = self._members(now)
        self._check_weights(of_this_step)
        if not are_in_storage(list(now.values()), pick(self._numels, now)):
            contract.reject_memory(self, next(i for i, grad in now.items() if not is_in_storage(grad)))
        addresses = list(map(Tensor.data_ptr, self.params))
        if self._where.weights != addresses:
            self._where = self._occupied_by(addresses)
        now = self._copied_from(self._where, now)
        for i in self._packed.keys() & of_this_step:
            self._packed[i].copy_(self.params[i].detach())
        self._now = now

    def _check_weights(self, members: Sequence[int]) -> None:
        """Raise where one of these parameters lacks memory."""
        if not are_in_storage(pick(self.params, members), pick(self._extents, members)):
            contract.reject_memory(self, next(i for i in members if not is_in_storage(self.params[i])))

    def copy_shared(self, beside: Sequence[contract.FlatParams]) -> None:
        """Copy what was read in the memory of others."""
        for flat in cast(Sequence[PythonFlatParams], beside):
            self._now = self._copied_from(flat._where, self._now)

    def _copied_from(self, where: Occupied, grads: dict[int, Tensor]) -> dict[int, Tensor]:
        """Return gradients, or copies of those that lie there."""
        shares = where.shares(list(map(Tensor.data_ptr, grads.values())), pick(self._bytes, grads))
        if not any(shares):
            return grads
        return {i: self._copied(i, g) if shared else g for (i, g), shared in zip(grads.items(), shares, strict=True)}

    def _keep_until_read(self) -> None:
        """Have torch wait for this stream before it gives gradients' memory to the stream that they came from.

        They are let go of as soon as their launch is under way. Where backward ran on this stream, too, as is usual,
        torch does nothing.
        """
        if self.device.type == "cuda":
            here = torch.cuda.current_stream(self.device)
            for param in self.params:
                if param.grad is not None and not param.grad._is_zerotensor():  # which has no memory
                    param.grad.record_stream(here)

    def _changed(self, i: int) -> bool:
        return kind_of(self.params[i]) != self._kinds[i] or self.params[i].stride() != self._layouts[i]

    def _are_usual(self, grads: Mapping[int, Tensor]) -> bool:
        """Whether the memory of gradients is their elements, in the flat buffers' strides."""
        tensors = list(grads.values())
        return (
            list(map(kind_of, tensors)) == pick(self._kinds, grads)
            and list(map(Tensor.stride, tensors)) == pick(self._strides, grads)
            and not any(map(Tensor.is_neg, tensors))
            and not any(map(Tensor._is_zerotensor, tensors))
        )

    def _copied(self, i: int, grad: Tensor) -> Tensor:
        """Return a copy of a gradient whose memory is not its elements, or is somebody's that changes meanwhile."""
        if kind_of(grad) != self._kinds[i]:
            contract.reject(self, i)
        if not (grad._is_zerotensor() or is_in_storage(grad)):
            contract.reject_memory(self, i)
        return self._empty(i).copy_(grad.detach())

    def begin_plain(self, mixing: Mixing) -> None:
        """Begin a step of one pass."""
        self._mix_by(mixing)
        history = self._history() if mixing.rule is Rule.REUSED else []
        self._g = {i: history[i] for i in self._now} if history else {}
        self._ascended = set()
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

    def _kept(self, i: int) -> Tensor:
        """Return where a copy of the i-th gradient is kept, from step to step."""
        if i not in self._own:
            self._own[i] = self._empty(i)
        return self._own[i]

    def beginning(self, stateful: Sequence[bool]) -> list[int]:
        """Return whose state begins with this step."""
        return [i for i in self._members() if i not in self._begun and stateful[self.places[i][0]]]

    # ---- phases

    @torch.no_grad()
    def square_norm(self, slot: int, radii: Sequence[Radius]) -> None:
        """Σ (T g)²."""
        if self._exempt and slot == ASCENT:
            self.sums[slot] = 0
        else:
            self._run_square_norm(slot, radii)

    @torch.no_grad()
    def mix(self, radii: Sequence[Radius], mixing: Mixing) -> None:
        """q = g − σ m, which is kept, and is what `ascend` takes for the gradient of this pass."""
        self._mix_by(mixing)
        if self._exempt:
            self.sums.zero_()
            return
        self._g = {i: self._kept(i) for i in self._now}
        self._run_mix(radii)
        self._now = dict(self._g)

    @torch.no_grad()
    def direction_sums(self) -> None:
        """Σ y², Σ x², Σ x y of d = a x + b y."""
        self._run_direction_sums()
        self._summed = True

    @torch.no_grad()
    def ascend(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float, mixing: Mixing) -> None:
        """Save w, then w = w_max."""
        self._mix_by(mixing)
        self._ascended = set(self._now)
        if mixing.rule is not Rule.FRIENDLY:  # of an earlier `mix`, whose step never came
            self._g = {}
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

    def _members(self, now: Collection[int] | None = None) -> list[int]:
        """Return the parameters that had a gradient in some pass of this step; ``now``: in this one, as it is read."""
        now = self._now if now is None else now
        if len(now) == len(self.params):
            return list(now)
        return sorted({*self._ascended, *self._g, *now})

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
        self._check_weights(range(len(self.params)))
        directions = self._run_direction(sums, max_norm) if self._can_update(sums, max_norm) else None
        if directions is None or not self._holds(directions.values()):
            self._commit(*self._put_back(), partial(self.skipped.add_, 1), partial(self.step_count.add_, 1))
            return False
        self._remembered = self._writing_history(sums, max_norm)
        self._save([i for i in range(len(self.params)) if i not in set(self._perturbed)])
        in_one_go(*(self._put_back() if from_saved else []))
        for i, d in directions.items():
            self.params[i].grad = d
        return True

    def remembering(self) -> list[Call]:
        """Return what writes the history that `combine` has worked out."""
        return list(self._remembered)

    def _history(self) -> list[Tensor]:
        """Return what the steps before have remembered for this step's rule."""
        key = self._mixing.rule.history
        return self._list(key) if key else []

    def _writing_history(self, sums: Tensor, max_norm: float) -> list[Call]:
        """Return what writes the history, where this step does: it is worked out now."""
        if not self._remembering():
            return []
        history, new = self._history(), self._run_remember(sums, max_norm)
        return [partial(torch._foreach_copy_, [history[i] for i in new], list(new.values()))]

    def _remembering(self) -> list[int]:
        """Return whose history is written: Friendly SAM's of those that have a q."""
        if not self._mixing.rule.remembers:
            return []
        return list(self._g) if self._mixing.rule is Rule.FRIENDLY else self._members()

    def _memories(self, sums: Sums) -> Callable[[int], Memory]:
        """Return what gives a param group's coefficients of the history."""
        by = self._direction(math.inf)

        @cache
        def memory(group: int) -> Memory:
            numbers = self._numbers_of(group)
            return by.memory(sums, numbers.number, numbers.decay)

        return memory

    def _direction(self, max_norm: float) -> Direction:
        """Return how this step's direction comes about."""
        rule, numbers = self._mixing
        largest = numbers[0].largest if numbers else 0.0
        return Direction(rule, self._summed, max_norm, self.limit, largest)

    def _numbers_of(self, group: int) -> RuleNumber:
        """Return a param group's numbers of the rule."""
        return self._mixing.numbers[group] if self._mixing.numbers else RuleNumber()

    def _mixes(self, sums: Sums, max_norm: float, signs: Sequence[float] = ()) -> Callable[[int, bool], Mix]:
        """Return what gives the mix of a param group's tensors that have both gradients or not; ``signs``: of its d."""
        by = self._direction(max_norm)
        factor = by.factor(sums)

        @cache
        def mix(group: int, both: bool) -> Mix:
            signed = signs[group] * factor if signs else factor
            return by.of(sums, self._numbers_of(group).number, both).times(signed)

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
        if not self._mixing.rule.keeps:
            raise RuntimeError("merge() twice in a step, or in one that keeps no g; restore() gives it up")
        buffer = self._buffer(DIRECTION).zero_()
        for i, d in self._run_direction(sums, math.inf).items():
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
        notes = self._now, self._g, self._ascended, self._perturbed, self._remembered, self._shown
        return [*(note.clear for note in notes), how]

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


def pick(items: list[Item], members: Collection[int]) -> list[Item]:
    """Return the ``members`` of ``items``, in order."""
    return items if len(members) == len(items) else [items[i] for i in members]
