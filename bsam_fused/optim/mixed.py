"""A direction of the user's own, mixed of g and g_max."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from bsam_fused.distributed import Sync
from bsam_fused.ops.contract import GIVEN_KEPT, GIVEN_LAST, MAX, PRODUCT, SCALE, SQUARE, Rule
from bsam_fused.ops.dispatch import Backend
from bsam_fused.optim.mixing import MixesGradients
from bsam_fused.optim.options import Rounding, common
from bsam_fused.optim.sam import Base


class PassSums(NamedTuple):
    """What a step's two gradients are, over all parameters, ranks and shards: float64 (), where the parameters are."""

    g: Tensor
    """Σ g², without the loss's scale."""
    g_max: Tensor
    """Σ g_max², likewise."""
    product: Tensor
    """Σ g g_max, likewise."""


Mix = Callable[[PassSums], tuple[Tensor | float, Tensor | float]]


class MixedSAM(MixesGradients):
    """SAM with a direction of your own: d = a g + b g_max, a and b made of the gradients' sums in torch operations.

    Two passes a step. It runs on every backend with its fused update, in captured steps, over shards and ranks, and
    nothing waits for the device. Where a or b is not finite the step is skipped.

    Args:
        params: as `SAM` has it.
        base_optimizer: as `SAM` has it.
        mix: ``mix(sums)`` returns a and b, floats or 0-dim tensors, of a `PassSums`; to be pickled with the optimizer a
            function of a module. Called once a step, and once only for all replays of a captured one.
        rho: as `SAM` has it.
        adaptive: as `SAM` has it.
        eta: as `SAM` has it.
        loss_budget: as `SAM` has it.
        norm_eps: as `SAM` has it.
        max_grad_norm: as `SAM` has it.
        rounding: as `SAM` has it.
        seed: as `SAM` has it.
        master_weights: as `SAM` has it.
        sync: as `SAM` has it: all passes are local, and d, with each rank's own coefficients, is reduced.
        same_randomness: as `SAM` has it.
        model: as `SAM` has it.
        backend: as `SAM` has it.
        **base_kwargs: options of the base optimizer's class.

    Raises:
        ValueError, TypeError, RuntimeError: as `SAM` has it.
    """

    _rule = Rule.GIVEN
    _own = ("mix",)

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Base = torch.optim.SGD,
        *,
        mix: Mix,
        rho: float = 0.05,
        adaptive: bool = False,
        eta: float = 0.0,
        loss_budget: float | None = None,
        norm_eps: float = 1e-12,
        max_grad_norm: float | None = None,
        rounding: Rounding = "stochastic",
        seed: int = 0,
        master_weights: bool = False,
        sync: Sync = "every",
        same_randomness: bool = False,
        model: nn.Module | None = None,
        backend: Backend = "auto",
        **base_kwargs: Any,
    ) -> None:
        if not callable(mix):
            raise TypeError(f"mix is a {type(mix).__name__}: pass a function of the sums that returns a and b")
        self.mix = mix
        options = {"rho": rho, "adaptive": adaptive, "eta": eta, "loss_budget": loss_budget}
        super().__init__(params, base_optimizer, options, base_kwargs, common(locals()))

    def _give(self, totals: Sequence[Tensor]) -> None:
        if not totals:
            return
        sums = totals[0]
        unscaled = torch.where(sums[SCALE] == 0, 1.0, sums[SCALE].square())
        a, b = _coefficients(self.mix(PassSums(*(sums[slot] / unscaled for slot in (SQUARE, MAX, PRODUCT)))))
        for total in totals:
            for slot, coefficient in ((GIVEN_KEPT, a), (GIVEN_LAST, b)):
                if isinstance(coefficient, Tensor):
                    total[slot].copy_(coefficient.detach())
                else:
                    total[slot].fill_(coefficient)


def _coefficients(given: Any) -> tuple[Tensor | float, Tensor | float]:
    """Return a and b, as ``mix`` gave them.

    Raises:
        TypeError: they are something else.
    """
    pair = tuple(given) if isinstance(given, Sequence) or (isinstance(given, Tensor) and given.dim()) else ()
    if len(pair) != 2 or not all(map(_is_number, pair)):
        raise TypeError(f"mix returned {given!r}: it must return a and b, two floats or real 0-dim tensors")
    return pair


def _is_number(value: Any) -> bool:
    return value.dim() == 0 and not value.is_complex() if isinstance(value, Tensor) else isinstance(value, Real)
