"""What is measured: shape sets of real models, algorithms over base optimizers, and the targets of each case."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from bench.compiled import CompiledBSAM
from bench.figures import Target, at_least, at_most
from bsam_fused.report import models
from bsam_fused.report.contestant import Shapes
from bsam_fused.report.implementations import (
    ALGORITHMS,
    BASES,
    PACKAGE,
    REFERENCE,
    RHO,
    Algorithm,
    Base,
    Build,
    implementations,
)


def distilbert(classes: int = 2) -> Shapes:
    """Return the shapes of DistilBERT's parameters with a classifier: 104 tensors, 66,955,010 elements."""
    norm = ((768,), (768,))
    embeddings = ((30522, 768), (512, 768), *norm)
    layer = (*_linear(768, 768) * 4, *norm, *_linear(3072, 768), *_linear(768, 3072), *norm)
    return (*embeddings, *layer * 6, *_linear(768, 768), *_linear(classes, 768))


def _linear(outputs: int, inputs: int) -> Shapes:
    return (outputs, inputs), (outputs,)


SHAPES: dict[str, Shapes] = {
    "resnet18": models.shapes("resnet18"),
    "tiny500": models.shapes("tiny500"),
    "resnet50": models.shapes("resnet50"),
    "wrn28_10": models.shapes("wrn28_10"),
    "pyramidnet110": models.shapes("pyramidnet110"),
    "distilbert": distilbert(),
    "vit_b_16": models.shapes("vit_b_16"),
    "gpt2": models.shapes("gpt2"),
}
LARGE = 50_000_000
"""Elements from which on no cache holds anything of a step."""


@dataclass(frozen=True)
class Case:
    """An algorithm over a base optimizer, on parameters of given shapes."""

    algorithm: Algorithm
    base: Base
    shapes: Shapes
    builds: Mapping[str, Build]
    """Implementation -> builds the optimizer."""
    targets: Mapping[str, Target] = field(default_factory=dict)
    """By figure; those without one are only told."""
    repeat: int = 20
    """Repetitions."""
    dtype: torch.dtype = torch.float32
    """The parameters'."""

    @property
    def elements(self) -> int:
        """N."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def moves(self) -> int:
        """Elements that a step must move, in N (docs/design.md)."""
        return self.algorithm.moves(self.base)

    @property
    def small(self) -> bool:
        """Whether tensors are so small that the time a tensor takes bounds a step, and not its bytes."""
        return self.elements < 1000 * len(self.shapes)


def case(shapes: str, algorithm: str, base: str, device_type: str, *, compiled: bool = False) -> Case:
    """Return a case without targets; ``compiled``: whether to compile the foreach version, too, which takes long."""
    builds = implementations(ALGORITHMS[algorithm], BASES[base], device_type)
    if compiled:
        builds = {"compiled": lambda params: CompiledBSAM(params, rho=RHO, **BASES[base].options), **builds}
    return Case(ALGORITHMS[algorithm], BASES[base], SHAPES[shapes], builds)


def cpu_case(shapes: str, algorithm: str, base: str) -> Case:
    """Return a case on a CPU, with the targets that hold for all of its kind.

    ``torch.compile`` takes minutes for many tensors: it is there for ResNet-18, BSAM with SGD.
    """
    compiled = (shapes, algorithm, base) == ("resnet18", "bsam", "sgd")
    found = case(shapes, algorithm, base, "cpu", compiled=compiled)
    repeat = 30 if found.small else 5 if found.elements > LARGE else 15
    return Case(found.algorithm, found.base, found.shapes, found.builds, _targets(found), repeat)


FORGETFUL = ("extrapolated", "gsam", "wsam", "norms")
"""Algorithms that are measured beside SAM, whose steps know nothing of each other."""
MEMBERS = (*FORGETFUL, "looksam", "looksam_between", "friendly")
"""All that are."""
OVER_SAM = "cpp / SAM's"
"""The figure of an algorithm's own time over that of SAM."""


def family(shapes: str, base: str, *, others: bool, members: Sequence[str] = MEMBERS) -> list[Case]:
    """Return SAM's case and its relatives', to be measured in turns, with the relatives' targets.

    Args:
        shapes: of `SHAPES`.
        base: of `BASES`.
        others: whether all who implement them are there, and not only cpp and what it is compared with.
        members: the relatives, of `MEMBERS`.
    """
    cases = [case(shapes, algorithm, base, "cpu") for algorithm in ("sam", *members)]
    sam = cases[0]
    repeat = 11 if others else 7
    return [
        replace(
            found,
            builds=found.builds if others else {name: found.builds[name] for name in (REFERENCE, "cpp")},
            targets={} if found is sam else _targets_beside(found, sam),
            repeat=repeat,
        )
        for found in cases
    ]


def _targets_beside(found: Case, sam: Case) -> dict[str, Target]:
    return {
        OVER_SAM: at_most(round(1.1 * found.moves / sam.moves, 2)),
        f"{PACKAGE} / cpp": at_least(2),
        "extra memory of cpp": at_most(found.algorithm.extra + 0.05),
    }


def _targets(found: Case) -> dict[str, Target]:
    bilateral = found.algorithm.name == "BSAM"
    if found.small:  # of which only the host's time counts: bench.scaling has its bars
        return {}
    package = {} if bilateral else {f"{PACKAGE} / cpp": at_least(2)}
    loops, foreach = (5, 2.5) if found.elements > LARGE else (2.4, 1.4)
    if not bilateral:
        loops, foreach = 1.8, 1.2
    return {
        "loops / cpp": at_least(loops),
        "foreach / cpp": at_least(foreach),
        "cpp / byte budget": at_most(1.15 if bilateral else 1.2),
        "extra memory of cpp": at_most(found.algorithm.extra + 0.05),
        **(package if found.elements < LARGE else {}),
    }
