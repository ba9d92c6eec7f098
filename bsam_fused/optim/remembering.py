"""What optimizers share that remember something of a step for the next ones."""

from __future__ import annotations

from typing import Any

from bsam_fused.optim.mixing import MixesGradients


class Remembers(MixesGradients):
    """A sharpness-aware optimizer with a history: one state buffer a parameter, written after the update, as it is.

    It lies in ``state[p]`` under the rule's `contract.Rule.history`; a checkpoint of the plain base begins it with 0.
    """

    @property
    def _group(self) -> Any:
        """No ranks over which directions are averaged: each would remember what its own batch had.

        Raises:
            ValueError: ``sync="last"``.
        """
        if self.sync == "last":
            raise ValueError(
                f'{type(self).__name__} with sync="last": every rank would remember the gradient of its own batch, and '
                'replicas would drift apart; use sync="every"'
            )
        return None

    def _ascend(self, loss: Any = None) -> None:
        _ = self._group
        super()._ascend(loss)

    def _plain_step(self, loss: Any = None) -> None:
        _ = self._group
        super()._plain_step(loss)
