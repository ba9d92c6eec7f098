"""What is measured on a GPU: every shape set, and the targets of `make gpu`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from bench.cases import SHAPES, Case, case
from bench.figures import Target, at_least, at_most
from bench.operators import OPERATORS
from bsam_fused.report.contestant import Shapes

SUBJECT = "cuda"
"""The implementation that the targets are about."""
NO_TARGETS: Mapping[str, Target] = MappingProxyType({})

_COMPILED = {"resnet18", "vit_b_16", "tiny500"}
"""Compiling one takes as long as measuring several."""


def _case(shapes: str, algorithm: str, base: str, targets: Mapping[str, Target] = NO_TARGETS) -> Case:
    found = case(shapes, algorithm, base, "cuda", compiled=shapes in _COMPILED and (algorithm, base) == ("bsam", "sgd"))
    bilateral = algorithm == "bsam"
    shared = {"launches": at_most(5 if bilateral else 4)}
    if not found.small:  # else sums and the like weigh as much as the parameters
        shared["extra memory"] = at_most(found.algorithm.extra + 0.05)
    return replace(found, targets={**shared, **targets}, repeat=10 if found.small else 20)


_RESNET18 = {
    "GPU time, foreach / cuda": at_least(1.6),
    "GPU time, compiled / cuda": at_least(1.0),
    "GPU time, triton / cuda": at_most(1.3),
    "host time, triton": at_most(400),
    "wall time, loops / cuda": at_least(20),
    "wall time, foreach / cuda": at_least(4),
    "wall time, compiled / cuda": at_least(1.5),
}
# What matters most first, lest the time be up; the last one compiles the longest.
_ORDER = ("resnet18", "vit_b_16", "distilbert", "gpt2", "resnet50", "wrn28_10", "pyramidnet110", "tiny500")
_CASES = [
    (shapes, algorithm, base)
    for algorithm, base in (("bsam", "sgd"), ("sam", "sgd"), ("bsam", "adamw"), ("sam", "adamw"))
    for shapes in _ORDER
]
_CASES.append(_CASES.pop(_CASES.index(("tiny500", "bsam", "sgd"))))
CASES = {
    f"{algorithm}-{base}-{shapes}": _case(
        shapes, algorithm, base, _RESNET18 if (shapes, algorithm, base) == ("resnet18", "bsam", "sgd") else NO_TARGETS
    )
    for shapes, algorithm, base in _CASES
}
"""In the order in which they run."""

H200_TARGETS: dict[str, dict[str, Target]] = {
    "bsam-sgd-resnet18": {"GPU time": at_most(250), "host time": at_most(60)},
    "bsam-sgd-distilbert": {"GPU time": at_most(1200)},
}
"""Absolute times, in µs: they hold on an H200 alone."""

OPERATORS_ON: dict[str, Shapes] = {
    "one tensor of 134 M": ((1 << 27,),),
    "GPT-2, 148 tensors of 124 M": SHAPES["gpt2"],
}
"""Parameters on which each operator is measured alone."""
OPERATOR_TARGETS = {
    backend: {operator: at_least(percent) for operator in OPERATORS}
    for backend, percent in {SUBJECT: 90, "triton": 88}.items()
}
"""Of each backend, in % of the copy bandwidth."""
