"""What optimizers share whose direction mixes the gradients of several passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, overload

from bsam_fused.ops.contract import Mixing, Rule, RuleNumber
from bsam_fused.optim.base import Closure, R, SharpnessAware


class MixesGradients(SharpnessAware):
    """A sharpness-aware optimizer with d = a x + b y, of what earlier passes kept, x, and the last gradient, y.

    A subclass names its `Rule`, and the number that a param group gives to it. Under ``sync="last"`` all passes are
    local, and d, with each rank's own a and b, is reduced.
    """

    _number_option: str | None = None
    """The param groups' option that is the rule's number."""

    def _number(self, group: dict[str, Any], index: int) -> float:
        """Return a param group's number of the rule."""
        return 0.0 if self._number_option is None else self._non_negative(group, self._number_option, index)

    def _numbers(self) -> list[float]:
        """Return every group's."""
        return [self._number(group, i) for i, group in enumerate(self._groups)]

    def _mixing(self) -> Mixing:
        return self._mixing_by(self._rule)

    def _mixing_by(self, rule: Rule) -> Mixing:
        return self._once(self._read_mixing, rule)

    def _read_mixing(self, rule: Rule) -> Mixing:
        numbers = self._numbers()
        largest = max(numbers)
        return Mixing(rule, [RuleNumber(number, largest) for number in numbers])

    def _check_clipping(self, mixing: Mixing, max_norm: float) -> None:
        if max_norm == math.inf or not mixing.rule.mixes:
            return
        numbers = {each.number for each in mixing.numbers}
        if len(numbers) > 1:
            raise ValueError(
                f"max_grad_norm={max_norm:g} where {self._number_option} differs between param groups "
                f"({', '.join(map(str, sorted(numbers)))}): the norm of a direction that is mixed otherwise in each is "
                "not measured; give all groups the same, or leave out max_grad_norm"
            )

    def _needs_sums(self, max_norm: float, scaled: bool = False) -> bool:
        return True

    def _check_options(self, group: dict[str, Any], index: int) -> None:
        super()._check_options(group, index)
        if self._number_option is not None:
            self._number(group, index)

    @overload
    def step(self, closure: None = None, *, ascent_closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], R], *, ascent_closure: None = None) -> R: ...

    def step(self, closure: Closure | None = None, *, ascent_closure: Closure | None = None) -> Any:
        """As `SharpnessAware.step`; the closure is called once a pass.

        Raises:
            TypeError: with ``ascent_closure``, which there is no use for.
        """
        if ascent_closure is not None:
            name = type(self).__name__
            raise TypeError(
                f"{name} takes no ascent_closure: its direction needs the gradient of one loss at w; use SAM"
            )
        return super().step(closure)
