"""What every pass of a step begins from, and what a step leaves behind: as if there had been the first pass alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bsam_fused.buffers import Snapshot

States = list[tuple[torch.device, Tensor]]
"""Of random generators."""


class Passes:
    """The model's buffers and, on request, the random generators, from pass to pass of a step.

    Extra passes begin from what the first one began from, where that is known, and leave what it left.
    """

    def __init__(self) -> None:
        self._begun: Snapshot | None = None  # where the first pass began; and of an earlier step, for its memory
        self._first: Snapshot | None = None  # what it left; likewise
        self._draws: States = []  # of random generators, where the first pass began
        self._drawn: States = []  # and after it
        self._is_begun = self._is_kept = False  # whether that is of this step
        self._is_left = True  # everything is as the first pass left it
        self._aside: tuple[Snapshot | None, States] | None = None  # of a pass, while w is looked at within it
        self.is_open = False  # whoever accumulates has begun the first pass
        self.is_under_way = False  # a pass was begun, and no phase has ended it

    @property
    def snapshots(self) -> tuple[Snapshot | None, ...]:
        """What is copied to and from."""
        return self._begun, self._first

    def begin_first(self, model: nn.Module | None, params: Iterable[Tensor], same_randomness: bool) -> None:
        """Begin the first pass of a step.

        Args:
            model: whose buffers; None: none.
            params: what is trained.
            same_randomness: whether their devices' generators, and the CPU's, shall draw the same in all passes.
        """
        trained = list(params) if same_randomness else params
        self._draws = _generators(p.device for p in trained) if same_randomness else []
        self._begun = None if model is None else Snapshot(model, self._begun, trained)
        self._is_begun = self.is_under_way = True

    def begin_extra(self) -> None:
        """Begin a later pass, where the first one began."""
        begun = self._begun if self._is_begun else None
        if not (self._is_left or (begun is not None and begun.is_in_place)):
            self.leave()  # for what `rewind` does not write
        if begun is not None:
            begun.rewind()
        _set(self._draws)
        self._is_left, self.is_under_way = False, True

    def keep(self, model: nn.Module | None, params: Iterable[Tensor]) -> None:
        """End the first pass: note what it has left."""
        self._first = None if model is None else Snapshot(model, self._first, params)
        self._drawn = [(device, _state(device)) for device, _ in self._draws]
        self.finish()
        self._is_kept = self._is_left = True

    def finish(self) -> None:
        """End a pass: what it has written is still there."""
        self.is_open = self.is_under_way = self._is_left = False

    def leave(self) -> None:
        """End a later pass: everything is where the first one left it. Can be called again."""
        self.is_under_way = False
        if self._is_kept:
            self._write_first()
        self._is_left = True

    def _write_first(self) -> None:
        if self._first is not None:
            self._first.write_back()
        _set(self._drawn)

    def step_aside(self, model: nn.Module | None) -> None:
        """Within a pass, have everything as the first one left it, until `come_back`."""
        if self._is_kept:
            now = None if model is None else Snapshot(model)
            self._aside = now, [(device, _state(device)) for device, _ in self._drawn]
            self._write_first()

    def come_back(self) -> None:
        """Have everything as it was before `step_aside`. Can be called again."""
        if self._aside is not None:
            buffers, states = self._aside
            if buffers is not None:
                buffers.write_back()
            _set(states)
            self._aside = None

    def end(self) -> None:
        """`leave`, and forget the step. Can be called again."""
        self._aside = None
        self.leave()
        self._is_begun = self._is_kept = self.is_open = False
        self._draws, self._drawn = [], []


def _state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _generators(devices: Iterable[torch.device]) -> States:
    """Return the states of the default generators of ``devices``, and of the CPU."""
    return [(device, _state(device)) for device in {torch.device("cpu"), *devices} if device.type != "meta"]


def _set(states: States) -> None:
    for device, state in states:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
