"""Steps skipped one after the other, as the host hears of them."""

from __future__ import annotations

from bsam_fused.callers import warn

MANY = 20
"""So many in a row are told: a GradScaler, which begins with a scale of 2¹⁶, has found its own after fewer."""


class Skips:
    """How many steps were skipped in a row, of which the host hears by their counts, told once a run.

    On a CPU it hears of every step; on a GPU of those between two readings, which are a run where all were skipped.

    Args:
        steps: so far, skipped or not.
        skipped: of these.
    """

    def __init__(self, steps: int, skipped: int) -> None:
        self.steps, self.skipped = steps, skipped
        self._in_a_row, self._told = 0, False

    def hear(self, steps: int, skipped: int) -> None:
        """Hear of all ``steps`` so far, of which ``skipped`` were skipped; warn where too many were in a row."""
        more, more_skipped = steps - self.steps, skipped - self.skipped
        self.steps, self.skipped = steps, skipped
        if more_skipped < more:
            self._in_a_row, self._told = 0, False
            return
        self._in_a_row += more_skipped
        if self._in_a_row >= MANY and not self._told:
            self._told = True
            warn(
                f"{self._in_a_row} steps in a row were skipped ({skipped} in all) for an inf or NaN, so nothing is "
                "trained: look for NaN in the data and the weights, at lr and rho, which may be too large, and under a "
                "GradScaler at its scale"
            )
