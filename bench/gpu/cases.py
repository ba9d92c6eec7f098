"""What is measured on a GPU, and the bars: `make gpu`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from bench.cases import MEMBERS, SHAPES, Case, case
from bench.figures import Target, at_least, at_most
from bench.operators import OPERATORS
from bsam_fused.report.contestant import Shapes
from bsam_fused.report.implementations import ALGORITHMS, PACKAGE

SUBJECT = "cuda"
"""The implementation that the bars are about."""
NO_TARGETS: Mapping[str, Target] = MappingProxyType({})
SHORT = {torch.float32: "", torch.bfloat16: "-bfloat16"}
"""How names of cases end. 16 bits are rounded stochastically, as by default."""

OF_BSAM_OVER_SGD_ON_RESNET18 = {
    "GPU time / byte budget": at_most(1.25),
    "host time": at_most(60),
    "GPU time, foreach / cuda": at_least(1.6),
    "wall time, foreach / cuda": at_least(4),
    "wall time, loops / cuda": at_least(20),
    "GPU time, triton / cuda": at_most(1.3),
    "host time, triton": at_most(400),
}
OF_COMPILED = {"GPU time, compiled / cuda": at_least(1.0), "wall time, compiled / cuda": at_least(1.5)}
H200_TARGETS: Mapping[str, Mapping[str, Target]] = {
    "bsam-sgd-resnet18": {"GPU time": at_most(250)},
    "bsam-sgd-distilbert": {"GPU time": at_most(1200)},
}
"""Absolute times, in µs: they hold on an H200 alone."""


def _case(shapes: str, algorithm: str, base: str, dtype: torch.dtype, *, compiled: bool = False) -> Case:
    found = replace(case(shapes, algorithm, base, "cuda", compiled=compiled), dtype=dtype)
    targets = {}
    if not found.algorithm.exempts:  # two FlatParams, and their sums
        targets["launches"] = at_most(5 if algorithm == "bsam" else 4)
    if not found.small:  # else sums and the like weigh as much as the parameters
        targets["extra memory"] = at_most(found.algorithm.extra + 0.05)
    if (shapes, algorithm, base, dtype) == ("resnet18", "bsam", "sgd", torch.float32):
        targets |= OF_COMPILED if compiled else OF_BSAM_OVER_SGD_ON_RESNET18
    return replace(found, targets=targets, repeat=10 if found.small else 20)


def _only(found: Case, *names: str) -> Case:
    return replace(found, builds={name: found.builds[name] for name in names})


def _named(shapes: str, algorithm: str, base: str, dtype: torch.dtype = torch.float32) -> dict[str, Case]:
    return {f"{algorithm}-{base}-{shapes}{SHORT[dtype]}": _case(shapes, algorithm, base, dtype)}


FIRST = _named("resnet18", "bsam", "sgd") | _named("gpt2", "bsam", "sgd") | _named("resnet18", "sam", "sgd")
"""Of the first call: the bars, and what is most used."""
_ORDER = ("resnet18", "vit_b_16", "distilbert", "gpt2", "resnet50", "wrn28_10", "pyramidnet110", "tiny500")


def _on_all_shapes(algorithm: str, base: str) -> dict[str, Case]:
    return {
        name: each
        for shapes in _ORDER
        for dtype in ((torch.bfloat16, torch.float32) if shapes in {"resnet18", "gpt2"} else (torch.float32,))
        for name, each in _named(shapes, algorithm, base, dtype).items()
        if name not in FIRST
    }


def _member(algorithm: str) -> dict[str, Case]:
    package = {f"wall time, {PACKAGE} / {SUBJECT}": at_least(2)} if ALGORITHMS[algorithm].packaged else {}
    ((name, each),) = _named("resnet18", algorithm, "sgd").items()
    return {name: replace(each, targets={**each.targets, **package})}


OTHERS = {
    **_on_all_shapes("bsam", "sgd"),
    **{name: each for algorithm in MEMBERS for name, each in _member(algorithm).items()},
    **_on_all_shapes("bsam", "adamw"),
    **_on_all_shapes("sam", "sgd"),
    **_on_all_shapes("sam", "adamw"),
}
"""In the order in which they run: what matters most first, lest the time be up."""
COMPILED = {
    f"bsam-sgd-{shapes}-compiled": _only(
        _case(shapes, "bsam", "sgd", torch.float32, compiled=True), "loops", "compiled", SUBJECT
    )
    for shapes in ("resnet18", "vit_b_16", "tiny500")
}
"""Apart, and last: compiling takes longer than measuring, the last one longest."""
CASES: dict[str, Case] = FIRST | OTHERS | COMPILED

OPERATORS_ON: dict[str, Shapes] = {
    "one tensor of 134 M": ((1 << 27,),),
    "GPT-2, 148 tensors of 124 M": SHAPES["gpt2"],
}
"""Parameters on which each operator is measured alone."""
OPERATOR_TARGETS: dict[tuple[str, str], dict[str, Target]] = {
    key: {operator: at_least(percent) for operator in OPERATORS}
    for key, percent in {
        (SUBJECT, "float32"): 90,
        (SUBJECT, "bfloat16"): 80,
        ("triton", "float32"): 88,
    }.items()
}
"""Of a backend in a dtype, in % of the copy bandwidth."""
