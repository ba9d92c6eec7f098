"""The base optimizer's state as views of the flat buffers, under torch's keys: brought in, shown, taken back.

The state is the user's to edit. What changed is noticed by identity, once a step; then all of it is brought into new
buffers, so that tensors that somebody took out, exchanged or kept are read before anything is written, and stay theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsam_fused.ops import contract, identity
from bsam_fused.ops.contract import MASTER_WEIGHT, FlatParams
from bsam_fused.optim.fused import FusedRule

State = MutableMapping[Any, dict[str, Any]]
Views = dict[str, Tensor]


class Kept(NamedTuple):
    """What the base optimizer keeps of each parameter, as its rule and the param groups have it."""

    rule: FusedRule | None
    """None: that of a base optimizer that is not fused, whose state is its own."""
    stateful: list[bool]
    """Whether the rule keeps state, one a param group."""
    masters: bool
    """Whether 16-bit parameters have master weights."""
    history: str | None
    """The key of what steps remember."""

    @property
    def rule_keys(self) -> tuple[str, ...]:
        """The keys of the rule's state."""
        return self.rule.keys if self.rule else ()

    def keys(self, flat: FlatParams, i: int) -> tuple[str, ...]:
        """Return the keys of the i-th parameter's state."""
        group, _ = flat.places[i]
        return (self.rule_keys if self.stateful[group] else ()) + self._ours(flat)

    def apart(self, flat: FlatParams, i: int) -> list[list[str]]:
        """Return the same, the base's, the master weight and the history apart."""
        keys, ours = self.keys(flat, i), self._ours(flat)
        parts = [[key for key in keys if key not in ours], *([key] for key in ours)]
        return [part for part in parts if part]

    def begins(self, flat: FlatParams) -> list[int]:
        """Return the parameters that take part in this step, and whose state begins with it."""
        return flat.beginning([True] * len(self.stateful) if self._ours(flat) else self.stateful)

    def _ours(self, flat: FlatParams) -> tuple[str, ...]:
        """Return the keys of what is no base optimizer's."""
        master = (MASTER_WEIGHT,) if self.masters and flat.dtype.itemsize == 2 else ()
        return (*master, self.history) if self.history else master


class Shown(NamedTuple):
    """State that is shown, as zeros, before its first update: the base's, or the history."""

    i: int
    """Of which parameter."""
    views: Views
    before: dict[str, Any]
    """What was in its entry."""
    stays: bool = False
    """Whether it stays, as zeros, as long as the base's stays beside which it was shown."""


class StateViews:
    """The state of one base optimizer in the flat buffers of some FlatParams."""

    def __init__(self) -> None:
        self._kept: Kept | None = None  # what is in the flat buffers, if anything
        self._state: State = {}
        self._seen: identity.Seen | None = None
        self._unproven: list[tuple[FlatParams, State, list[Shown]]] = []  # before the first update

    def prepare(self, flats: Sequence[FlatParams], state: State, kept: Kept) -> None:
        """Have in the flat buffers what the coming update needs: what is in ``state``, and what begins with this step.

        Raises:
            ValueError: a state has another shape than its parameter, by name; then nothing was changed.
        """
        self.have(flats, state, kept)
        for flat in flats:
            members = kept.begins(flat)
            if members:
                self._begin(flat, members, state, kept)

    def have(self, flats: Sequence[FlatParams], state: State, kept: Kept) -> None:
        """Have in the flat buffers what is in ``state``. Raises as `prepare` does."""
        if self._kept != kept or not self.shows(state):
            self._bring_in(flats, state, kept)

    def _bring_in(self, flats: Iterable[FlatParams], state: State, kept: Kept) -> None:
        """Copy ``state`` into new flat buffers, and show it as views of them."""
        self.retract()
        self._kept = None  # until all of it is there
        held = [(flat, _held(flat, state, kept)) for flat in flats]
        for flat, entries in held:
            _copy(flat, entries, kept)
        self._seen = identity.seen(state)
        self._kept, self._state = kept, state

    def show_history(self, flats: Sequence[FlatParams]) -> None:
        """Show the history that begins with this step, now that a base has made its own; interrupted, again.

        Not before: torch's optimizers begin the state of a parameter that has none at all. What is in ``state`` is then
        seen anew: the base's own changes are no edits.
        """
        kept, state = self._kept, self._state
        assert kept is not None  # who calls has them
        assert kept.history is not None
        for flat in flats:
            members, views = kept.begins(flat), flat.state(kept.history)
            for i in members:
                state.setdefault(flat.params[i], {})[kept.history] = views[i]
            flat.begin_state(members)
        self._seen = identity.seen(state)

    def _begin(self, flat: FlatParams, members: Sequence[int], state: State, kept: Kept) -> None:
        """Show the state that begins with this step, as zeros; all that must be allocated is, before any update."""
        views = {key: flat.state(key) for key in {key: None for i in members for key in kept.keys(flat, i)}}
        shown = []
        for i in members:
            entry = state.get(flat.params[i]) or {}
            for keys in kept.apart(flat, i):
                before = {key: entry[key] for key in keys if key in entry}
                shown.append(Shown(i, {key: views[key][i] for key in keys}, before))
        self._unproven.append((flat, state, shown))
        for i, entry, *_ in shown:
            state.setdefault(flat.params[i], {}).update(entry)
        flat.begin_state(members)
        self._seen = identity.seen(state)

    def keep_history(self) -> None:
        """Go on showing a history of zeros, but of a skipped step: torch's optimizers take it for a state of theirs."""
        history = self._kept and self._kept.history
        self._unproven = [
            (flat, state, [each._replace(stays=history in each.views) for each in shown])
            for flat, state, shown in self._unproven
        ]

    @torch.no_grad()
    def retract(self) -> None:
        """Take back state whose first update was skipped, or never came: there is none then. Waits for a GPU.

        Until then SGD's rule for a first step would be lost to whoever takes the state on.
        """
        if not self._unproven:
            return
        noticed = self._seen is None or not self._seen.same(self._state)
        for flat, state, shown in self._unproven:
            steps = torch.stack(flat.state("step")).tolist()
            gone: set[int] = set()
            for i, views, before, stays in shown:
                nothing = steps[i] == 0 and not any(bool(view.any()) for view in views.values())
                if nothing and (i in gone or not stays):
                    _take_back(state, flat.params[i], views, before)
                    flat.retract_state(i)
                    gone.add(i)
        self._seen = None if noticed else identity.seen(self._state)
        self._unproven = []

    def settle(self) -> None:
        """`retract` where that waits for nobody."""
        if self._unproven and all(flat.device.type == "cpu" for flat, *_ in self._unproven):
            self.retract()

    def hand_over(self) -> bool:
        """Leave the state to the base optimizer; it is brought in again when needed. Returns whether any was here."""
        if self._kept is None:
            return False
        self.retract()
        if self._kept.rule is not None:
            self._state.update(with_steps_on_host(dict(self._state)))
        self._kept, self._seen, self._state = None, None, {}
        return True

    # ---- for steps that are replayed

    @property
    def kept(self) -> Kept | None:
        """What is in the flat buffers, if anything; another object whenever these are other ones."""
        return self._kept

    @property
    def seen(self) -> identity.Seen | None:
        """What ``state`` was made of; another object whenever it was changed from here."""
        return self._seen

    def shows(self, state: State) -> bool:
        """Return whether ``state`` is what it was made from here, and nobody has changed it."""
        return self._seen is not None and self._state is state and self._seen.same(state)

    def keys(self, flat: FlatParams) -> list[str]:
        """Return the keys of all the state that ``flat`` has now; "step" is in every update."""
        assert self._kept  # after an update
        return list({"step": None} | {key: None for i in self.begun(flat) for key in self._kept.keys(flat, i)})

    def begun(self, flat: FlatParams) -> list[int]:
        """Return the parameters whose state is shown."""
        assert self._kept  # after an update
        wanted = [self._kept.keys(flat, i) for i in range(len(flat.params))]
        return [i for i, keys in enumerate(wanted) if keys and self._state.get(flat.params[i], {}).keys() >= {*keys}]

    def begin_again(self, flat: FlatParams, members: Sequence[int]) -> None:
        """Show the state of ``members`` where it was taken back."""
        begun = {*self.begun(flat)}
        missing = [i for i in members if i not in begun]
        if missing:
            assert self._kept  # after an update
            self._begin(flat, missing, self._state, self._kept)


def _held(flat: FlatParams, state: State, kept: Kept) -> dict[int, tuple[dict[str, Any], Views]]:
    """Return the entries that there are, and their tensors: of the rule's keys all or none, as torch begins then.

    Raises:
        ValueError: another shape than the parameter's.
    """
    held = {}
    for i, param in enumerate(flat.params):
        entry = state.get(param) or {}
        there = [key for key in kept.keys(flat, i) if entry.get(key) is not None]
        if not set(kept.rule_keys) <= set(there):
            there = [key for key in there if key not in kept.rule_keys]
        tensors = {key: _tensor(entry[key]) for key in there}
        for key, tensor in tensors.items():
            if key == MASTER_WEIGHT and tensor.dtype.itemsize == 2:
                raise ValueError(
                    f"{contract.describe(param, flat.places[i])} has a master weight of {tensor.dtype}, as torch's own "
                    "load_state_dict casts it: load through the sharpness-aware optimizer, not its base_optimizer"
                )
            if tensor.shape != (() if key == "step" else param.shape):
                name = contract.describe(param, flat.places[i])
                raise ValueError(f"{name} has state {key} of shape {tuple(tensor.shape)}: load a matching state dict")
        if tensors:
            held[i] = (entry, tensors)
    return held


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")


@torch.no_grad()
def _copy(flat: FlatParams, held: dict[int, tuple[dict[str, Any], Views]], kept: Kept) -> None:
    """Copy what is held into new buffers; when all of it is there, show it."""
    flat.drop_state()
    views = {key: flat.state(key) for key in {key: None for _, tensors in held.values() for key in tensors}}
    steps = flat.state("step")
    for i, (_, tensors) in held.items():
        for key, tensor in tensors.items():
            views[key][i].copy_(tensor.detach())
        if "step" not in tensors and not tensors.keys().isdisjoint(kept.rule_keys):
            steps[i].fill_(1.0)  # ours alone: SGD's rule for a first step is over
    for i, (entry, tensors) in held.items():
        entry.update({key: views[key][i] for key in tensors})
    flat.begin_state([i for i, (_, tensors) in held.items() if tensors.keys() >= set(kept.keys(flat, i))])


def _take_back(state: State, param: Tensor, views: Views, before: dict[str, Any]) -> None:
    entry = state.get(param)
    if entry is None or any(entry.get(key) is not view for key, view in views.items()):
        return  # somebody has put something else there
    for key in views:
        del entry[key]
    entry.update(before)
    if not entry:
        del state[param]


def with_steps_on_host(state: dict[Any, Any]) -> dict[Any, Any]:
    """Return a state in which "step" is on the CPU, where torch's Adam keeps it and reads it. Waits for a GPU."""
    on_device = {key: entry["step"] for key, entry in _entries(state) if _on_device(entry.get("step"))}
    if not on_device:
        return state
    home = next(iter(on_device.values())).device
    steps = torch.stack([step.to(home) for step in on_device.values()]).cpu()
    return {**state, **{key: {**state[key], "step": step} for key, step in zip(on_device, steps, strict=True)}}


def without_masters(state: dict[Any, Any]) -> tuple[dict[Any, Any], dict[Any, Tensor]]:
    """Return a saved state and its master weights apart: torch would cast them to their parameter's dtype."""
    masters = {key: entry[MASTER_WEIGHT] for key, entry in _entries(state) if MASTER_WEIGHT in entry}
    rest = {key: {k: v for k, v in state[key].items() if k != MASTER_WEIGHT} for key in masters}
    return {**state, **rest}, masters


def _entries(state: dict[Any, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the entries of parameters: a base may keep something else under a string."""
    return ((key, entry) for key, entry in state.items() if isinstance(entry, dict))


def _on_device(step: Any) -> bool:
    return isinstance(step, Tensor) and not step.is_cpu and not step.is_meta
