"""Real training steps, timed: passes, the optimizer's phases, and the gaps between them. Needs torch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from bsam_fused.graphs import GraphedStep
from bsam_fused.ops.dispatch import BACKENDS
from bsam_fused.report import ctrl_c
from bsam_fused.report.clock import Clock, Laps
from bsam_fused.report.implementations import ALGORITHMS, Algorithm, Base, Build, implementations, reason
from bsam_fused.report.models import Workload

WARM_UP = 2
"""Steps of each implementation that are thrown away: memory is allocated, kernels are chosen."""


@dataclass
class Timed:
    """An implementation's steps over the network that all share, each a pass before every one of its calls."""

    algorithm: str
    """The base optimizer's name where it is alone."""
    implementation: str
    calls: tuple[str, ...]
    optimizer: Any
    whole: Callable[[], object] | None = None
    """The whole step in one call, where it is a captured CUDA graph."""
    laps: list[Laps] = field(default_factory=list)
    launches: int | None = None


class Training:
    """All implementations, their steps taken in turn on one network, so that noise hits all alike.

    They share its weights, which all of them move: times do not depend on values, and memory holds one network. Our
    backends also keep its buffers, such as BatchNorm's statistics, as the first pass left them; others do not.

    Args:
        workload: the network and its batch.
        algorithms: names, of `ALGORITHMS`.
        base: the base optimizer.
        clock: what measures.
        graph: whether to capture the steps of the last backend that is there in a CUDA graph, too.
    """

    def __init__(
        self, workload: Workload, algorithms: Sequence[str], base_name: str, base: Base, clock: Clock, *, graph: bool
    ) -> None:
        self.workload, self.clock = workload, clock
        self.params: list[Tensor] = [p for p in workload.model.parameters() if p.requires_grad]
        self.absent: dict[str, str] = {}
        """Implementation -> why it was not measured."""
        self.base = Timed(base_name, "alone", ("step",), base.build(self.params))
        self.timed = [self.base]
        for name in algorithms:
            algorithm = ALGORITHMS[name]
            builds = implementations(algorithm, base, clock.device.type, workload.model)
            for implementation, build in builds.items():
                self._add(algorithm, implementation, build)
            if graph:
                self._add_graph(algorithm)

    def _add(self, algorithm: Algorithm, implementation: str, build: Build, *, graph: bool = False) -> None:
        timed = None
        try:
            timed = Timed(algorithm.name, implementation, algorithm.calls, build(self.params))
            if graph:
                timed.whole = graphed(self.workload, timed.optimizer)
            for piece in self.pieces(timed):
                piece()
            self.timed.append(timed)
        except Exception as error:  # the others can be measured; the network's own error comes with the base
            self.absent[f"{algorithm.name}, {implementation}"] = reason(error)
            restore = getattr(timed and timed.optimizer, "restore", None)
            if restore is not None:
                restore()

    def _add_graph(self, algorithm: Algorithm) -> None:
        present = [it for it in self.timed if it.algorithm == algorithm.name and it.implementation in BACKENDS]
        for last in present[-1:]:
            self._add(algorithm, f"{last.implementation}, graph", lambda _, it=last: it.optimizer, graph=True)  # type: ignore[misc]

    def a_pass(self) -> None:
        """Run forward and backward on the batch, unless Ctrl-C came."""
        ctrl_c.look()
        self.workload.a_pass()

    def pieces(self, timed: Timed) -> list[Callable[[], object]]:
        """Return the pieces of a step: a pass, a call, a pass, a call, and at last clearing gradients."""
        if timed.whole is not None:
            return [timed.whole]
        both = [piece for call in timed.calls for piece in (self.a_pass, getattr(timed.optimizer, call))]
        return [*both, self.workload.model.zero_grad]

    def run(self, steps: int) -> Iterator[None]:
        """Take so many timed steps of each implementation, and those of the warm-up before. Yields after each round."""
        for step in range(-WARM_UP, steps):
            for timed in self.timed:
                laps = self.clock.laps(self.pieces(timed))
                if step >= 0:
                    timed.laps.append(laps)
            yield

    def count_launches(self) -> None:
        """Count what a step of each launches. After all timing: a profiler that was on may slow launches."""
        for timed in self.timed:
            timed.launches = self.clock.launches(lambda timed=timed: [piece() for piece in self.pieces(timed)])  # type: ignore[misc]


def graphed(workload: Workload, optimizer: Any) -> Callable[[], object]:
    """Return a whole step as one captured CUDA graph."""
    samples = (workload.inputs, workload.targets)
    step = GraphedStep(workload.model, workload.loss, optimizer, samples)
    return lambda: step(*samples)


def compiled(workload: Workload) -> Workload:
    """Return the workload with its network under torch.compile."""
    return workload._replace(model=cast(nn.Module, torch.compile(workload.model)))
