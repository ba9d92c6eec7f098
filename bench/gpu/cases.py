"""What is measured on a GPU: algorithms over base optimizers, cases, and their targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import bsam_fused
from bench.cases import RHO, SGD, Algorithm, Case, Shapes, distilbert, gpt2, resnet18, vit_b16
from bench.figures import Target, at_least, at_most
from bench.gpu.compiled import CompiledBSAM
from bench.gpu.foreach import DeviceForeachBSAM, DeviceForeachSAM
from bench.operators import OPERATORS
from bsam_fused.report.loops import PlainBSAM, PlainSAM

Build = Callable[[list[Tensor]], Any]

ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 1e-2}
SUBJECT = "cuda"
"""The implementation that the targets are about."""
NO_TARGETS: Mapping[str, Target] = MappingProxyType({})


@dataclass(frozen=True)
class OverBase(Algorithm):
    """An algorithm over a base optimizer."""

    base: Build
    """The base optimizer alone: the memory that it holds is not the algorithm's."""


@dataclass(frozen=True)
class GPUCase(Case):
    """An algorithm over a base optimizer, on parameters of given shapes."""

    algorithm: OverBase


def _over(
    base: type, options: dict[str, Any], moves: int, loops: type[PlainSAM], foreach: type, fused: type, **more: Build
) -> OverBase:
    """Return an algorithm; the three types, and ``more``, implement it."""

    def around(kind: type, **how: bool) -> Build:
        return lambda params: kind(params, base(params, **how, **options), rho=RHO)

    def on(backend: str) -> Build:
        return lambda params: fused(params, base, rho=RHO, backend=backend, **options)

    implementations = {"loops": around(loops, foreach=False), "foreach": around(foreach, fused=True), **more}
    implementations |= {backend: on(backend) for backend in ("torch", "triton", SUBJECT)}
    return OverBase(loops.calls, moves, implementations, lambda params: base(params, fused=True, **options))


_SAM = (PlainSAM, DeviceForeachSAM, bsam_fused.SAM)
_BSAM = (PlainBSAM, DeviceForeachBSAM, bsam_fused.BSAM)
SAM_SGD = _over(torch.optim.SGD, SGD, 11, *_SAM)
BSAM_SGD = _over(torch.optim.SGD, SGD, 17, *_BSAM)
BSAM_ADAMW = _over(torch.optim.AdamW, ADAMW, 19, *_BSAM)
# Not for every case: compiling one takes as long as measuring several.
BSAM_SGD_COMPILED = _over(
    torch.optim.SGD, SGD, 17, *_BSAM, compiled=lambda params: CompiledBSAM(params, rho=RHO, **SGD)
)


def _case(
    algorithm: OverBase, shapes: Shapes, targets: Mapping[str, Target] = NO_TARGETS, *, small: bool = False
) -> GPUCase:
    bilateral = "descend" in algorithm.calls
    shared = {"launches": at_most(5 if bilateral else 4)}
    if not small:  # else sums and the like weigh as much as the parameters
        shared["extra memory"] = at_most(2.05 if bilateral else 1.05)
    return GPUCase(algorithm, shapes, repeat=10 if small else 20, targets={**shared, **targets}, small=small)


_TINY: Shapes = ((64,),) * 500
CASES = {
    "bsam-sgd-resnet18": _case(
        BSAM_SGD_COMPILED,
        resnet18(),
        {
            "GPU time, foreach / cuda": at_least(1.6),
            "GPU time, compiled / cuda": at_least(1.0),
            "wall time, loops / cuda": at_least(20),
            "wall time, foreach / cuda": at_least(4),
            "wall time, compiled / cuda": at_least(1.5),
        },
    ),
    "bsam-sgd-distilbert": _case(BSAM_SGD, distilbert()),
    "bsam-sgd-vit-b16": _case(BSAM_SGD_COMPILED, vit_b16()),
    "sam-sgd-resnet18": _case(SAM_SGD, resnet18()),
    "sam-sgd-distilbert": _case(SAM_SGD, distilbert()),
    "sam-sgd-vit-b16": _case(SAM_SGD, vit_b16()),
    "sam-sgd-500x64": _case(SAM_SGD, _TINY, small=True),
    "bsam-adamw-resnet18": _case(BSAM_ADAMW, resnet18()),
    "bsam-adamw-distilbert": _case(BSAM_ADAMW, distilbert()),
    "bsam-adamw-vit-b16": _case(BSAM_ADAMW, vit_b16()),
    "bsam-adamw-500x64": _case(BSAM_ADAMW, _TINY, small=True),
    "bsam-sgd-500x64": _case(BSAM_SGD_COMPILED, _TINY, small=True),
}
"""In the order in which they run: the last one compiles the longest."""

H200_TARGETS: dict[str, dict[str, Target]] = {
    "bsam-sgd-resnet18": {"GPU time": at_most(250), "host time": at_most(60)},
    "bsam-sgd-distilbert": {"GPU time": at_most(1200)},
}
"""Absolute times, in µs: they hold on an H200 alone."""

OPERATORS_ON: dict[str, Shapes] = {"one tensor of 134 M": ((1 << 27,),), "GPT-2, 148 tensors of 124 M": gpt2()}
"""Parameters on which each operator is measured alone."""
OPERATOR_TARGETS = {operator: at_least(90) for operator in OPERATORS}
"""In % of the copy bandwidth."""
