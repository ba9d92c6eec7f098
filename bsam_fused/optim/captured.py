"""What a captured step reads and writes of its optimizer: kept alive, and before a replay known to be there still."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bsam_fused.ops.contract import FlatParams
from bsam_fused.ops.identity import same_items
from bsam_fused.optim.state import State, StateViews


class Captured:
    """FlatParams and the flat buffers of state, as a step that was just captured has used them.

    Args:
        flats: all FlatParams.
        views: the state in them.
    """

    def __init__(self, flats: Sequence[FlatParams], views: StateViews) -> None:
        self._flats, self._views = list(flats), views
        self._kept, self._seen = views.kept, views.seen
        self._counted = [views.begun(flat) for flat in flats]
        self._alive: list[list[Tensor]] = [flat.state(key) for flat in flats for key in views.keys(flat)]

    def is_of(self, flats: Sequence[FlatParams], state: State) -> bool:
        """Return whether an eager step of ``flats`` would read and write the same memory, and ``state`` shows it."""
        views = self._views
        return same_items(list(flats), self._flats) and views.kept is self._kept and views.shows(state)

    def begin(self) -> None:
        """Show the state that the next replay writes, where it was taken back as nothing had been written yet."""
        if self._views.seen is not self._seen:
            for flat, counted in zip(self._flats, self._counted, strict=True):
                self._views.begin_again(flat, counted)
            self._seen = self._views.seen
