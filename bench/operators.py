"""Each operator of a FlatParams alone, brought to its place in a step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from bsam_fused.ops import dispatch
from bsam_fused.ops.contract import (
    ASCENT,
    MAX,
    MIN,
    AdamScalars,
    FlatParams,
    Mixing,
    Radius,
    Rule,
    RuleNumber,
    SGDScalars,
)
from bsam_fused.report.contestant import Shapes

RADII = [Radius(0.05)]
BILATERAL = Mixing(Rule.BILATERAL, [RuleNumber()])
FRIENDLY = Mixing(Rule.FRIENDLY, [RuleNumber(1.0, 1.0, 0.9)])
SGD = [SGDScalars(1e-3, 0.9, 0.0, 5e-4, False, False)]
ADAM = [AdamScalars(1e-3, 0.9, 0.999, 1e-8, 0.0, False, False)]
SEED = 0
"""Of stochastic rounding."""
_REMEMBERING = "update_sgd that remembers"
_UP_TO_REMEMBERING = ("pass", "mix", "ascend along q", "pass", "square_norm of g_max")
_UP_TO_UPDATE = ("pass", "square_norm", "ascend", "pass", "descend", "pass", "square_norm of g_min")


class Operator(NamedTuple):
    """An operator's place, and what bounds it."""

    before: tuple[str, ...]
    """The part of a BSAM step that comes before it, or of Friendly SAM's."""
    moves: int
    """Elements that it must move, in N parameters (docs/design.md)."""


OPERATORS = {
    "square_norm": Operator(("pass",), 1),
    "ascend": Operator(("pass", "square_norm"), 4),
    "descend": Operator(("pass", "square_norm", "ascend", "pass"), 5),
    "direction_sums": Operator(("pass", "square_norm", "ascend", "pass", "descend", "pass"), 2),
    "update_sgd": Operator(_UP_TO_UPDATE, 6),
    "update_adam": Operator(_UP_TO_UPDATE, 8),
    "restore": Operator(("pass", "square_norm", "ascend"), 2),
    "combine": Operator(_UP_TO_UPDATE, 5),
    "mix": Operator((*_UP_TO_REMEMBERING, _REMEMBERING, "pass"), 3),
    _REMEMBERING: Operator(_UP_TO_REMEMBERING, 8),
}
"""`combine` reads g + g_max, g_min and saved, and writes d and w. Where only g is kept, operators move as much.
`mix` finds an m. Friendly SAM's update reads no kept g for d, but q for m, which it reads and writes."""


class OperatorRun:
    """A FlatParams that can be brought to any point of a step.

    Args:
        backend: the name of the one to run.
        shapes: of the parameters.
        device: where they are.
        dtype: theirs; 16 bits are rounded stochastically.

    Raises:
        RuntimeError: the backend cannot be had there, with the reason.
    """

    def __init__(self, backend: str, shapes: Shapes, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        build = dispatch.choose(backend, device).build
        self.params = [torch.rand(shape, dtype=dtype, device=device).requires_grad_() for shape in shapes]
        self.flat: FlatParams = build(self.params, [(0, i) for i in range(len(self.params))], SEED, False)

    def run(self, name: str) -> None:
        """Run an operator, or make and read the gradients of a pass."""
        flat, sums = self.flat, self.flat.sums
        calls = {
            "pass": self._backward,
            "square_norm": lambda: flat.square_norm(ASCENT, RADII),
            "square_norm of g_min": lambda: flat.square_norm(MIN, RADII),
            "ascend": lambda: flat.ascend(sums, RADII, 1e-12, BILATERAL),
            "mix": lambda: flat.mix(RADII, FRIENDLY),
            "ascend along q": lambda: flat.ascend(sums, RADII, 1e-12, FRIENDLY),
            "square_norm of g_max": lambda: flat.square_norm(MAX, RADII),
            "descend": lambda: flat.descend(sums, RADII, 1e-12),
            "direction_sums": flat.direction_sums,
            "update_sgd": lambda: flat.update_sgd(sums, SGD, True, math.inf),
            _REMEMBERING: lambda: flat.update_sgd(sums, SGD, True, math.inf),
            "update_adam": lambda: flat.update_adam(sums, ADAM, True, math.inf),
            "combine": lambda: flat.combine(sums, True, math.inf),
            "restore": flat.restore,
        }
        calls[name]()

    def come_to(self, operator: str) -> None:
        """Run what comes before an operator, from the start of a step."""
        self.flat.restore()
        for name in OPERATORS[operator].before:
            self.run(name)

    def _backward(self) -> None:
        for p in self.params:
            p.grad = p.detach().clone()
        self.flat.read_gradients()
