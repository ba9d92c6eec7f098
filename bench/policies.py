"""That a policy costs the sum of its steps: bench/results/policies.json, and its part of docs/performance.md.

python -m bench.policies [--page-only]

Nothing is handed over where steps of one and of all passes follow each other. A policy's steps and those of its two
kinds alone take turns in one run; passes are left out, so that only the optimizer's own time counts.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import mean, median
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import performance
from bench.cases import SHAPES
from bench.figures import Figure, at_most, judged, spread
from bench.on_cpu import THREADS
from bench.steps import no_collector
from bsam_fused.report.clock import seconds_of
from bsam_fused.report.contestant import Contestant, coefficients
from bsam_fused.report.implementations import ALGORITHMS, BASES, Algorithm, implementations
from bsam_fused.schedules import EveryKth, LargeGradients, RandomSteps

BACKENDS = ("cpp", "torch")
ON = "resnet18"
STEPS, SERIES, WARM_UP = 10, 4, 5
"""Steps of a series, whole periods of every k-th; series, whose medians count; steps before them."""
OVER_PARTS = "over the sum of its steps"
"""The figure of a series' time over that of as many steps of each kind alone, both without asking which comes."""
TARGETS = {OVER_PARTS: at_most(1.05)}

Policy = Callable[[Any], Any]
"""Makes what is stepped after an optimizer."""


def no_policy(optimizer: Any) -> Any:
    """Return what leaves it to the optimizer."""
    return SimpleNamespace(step=lambda: None)


class Kind(NamedTuple):
    """Steps of an optimizer, as a policy has them."""

    algorithm: Algorithm
    policy: Policy = no_policy


SAM, LOOKSAM = ALGORITHMS["sam"], ALGORITHMS["looksam"]._replace(options={"k": 5})
KINDS = {
    "SAM": Kind(SAM),
    "plain": Kind(SAM, partial(RandomSteps, probability=0.0)),
    "LookSAM, every k-th": Kind(ALGORITHMS["looksam"]),
    "LookSAM, between": Kind(ALGORITHMS["looksam_between"]),
}
"""Of each, all steps are alike."""
MIXED = {
    "EveryKth(k=2)": (Kind(SAM, partial(EveryKth, k=2)), ("plain", "SAM")),
    "EveryKth(k=5)": (Kind(SAM, partial(EveryKth, k=5)), ("plain", "SAM")),
    "RandomSteps(0.5)": (Kind(SAM, partial(RandomSteps, probability=0.5)), ("plain", "SAM")),
    "LargeGradients": (Kind(SAM, partial(LargeGradients, total_steps=WARM_UP + STEPS * SERIES)), ("plain", "SAM")),
    "LookSAM(k=5)": (Kind(LOOKSAM), ("LookSAM, between", "LookSAM, every k-th")),
}
"""And their parts: the kinds of steps of one pass, and of two."""


class Taken(NamedTuple):
    """Seconds of a step."""

    passes: int
    asking: float
    """Of these, how long it took to say how many passes there are."""
    own: float
    """The phases."""


class Steered(Contestant):
    """One that is asked, after the first pass, how many passes its step takes.

    Args:
        build: makes the optimizer of parameters.
        policy: makes its policy.
        batches: curvatures of losses, of which each step draws one: the same ones for all.
    """

    def __init__(self, build: Callable[[list[Tensor]], Any], policy: Policy, batches: Sequence[list[Tensor]]) -> None:
        super().__init__(build, (), batches[0])
        self.batches, self.policy, self.passes = batches, policy(self.optimizer), 0
        self._drawn = random.Random(0)

    def take(self) -> Taken:
        """Take a step."""
        self.curvatures = self._drawn.choice(self.batches)
        self._backward()
        asking = seconds_of(self._ask)
        own = 0.0
        if self.passes > 1:
            own += seconds_of(self.optimizer.ascend)
            self._backward()
        own += seconds_of(self._finish)
        for p in self.params:
            p.grad = None
        return Taken(self.passes, asking, own)

    def _ask(self) -> None:
        self.passes = self.optimizer.passes

    def _finish(self) -> None:
        self.optimizer.step()
        self.policy.step()


def measure() -> Iterator[dict[str, Any]]:
    """Measure all; yield what there is so far, for JSON, whenever there is more."""
    found: dict[str, Any] = {"about": performance.about(), "runs": []}
    for base in BASES:
        for backend in BACKENDS:
            found["runs"].append({"shapes": ON, "base": base, "backend": backend, **run(SHAPES[ON], base, backend)})
            print(f"{base}, {backend}\n{told(found['runs'][-1])}", flush=True)
            performance.note_busy_cores(found["about"])
            yield found


def run(shapes: Sequence[tuple[int, ...]], base: str, backend: str, series: int = SERIES) -> dict[str, Any]:
    """Measure all kinds and policies in turns; return what was found out, for JSON."""
    curvatures = coefficients(shapes)
    batches = (curvatures, [2 * t for t in curvatures])  # of which LargeGradients finds one large
    kinds = {**KINDS, **{name: kind for name, (kind, _) in MIXED.items()}}
    with no_collector():
        steered = {name: _steered(kind, base, backend, batches) for name, kind in kinds.items()}
        taken: dict[str, list[Taken]] = {name: [] for name in steered}
        for step in range(-WARM_UP, STEPS * series):
            for name, each in steered.items():
                it = each.take()
                if step >= 0:
                    taken[name].append(it)
    return {
        "kinds": {name: spread([it.own for it in taken[name]]) for name in KINDS},
        "policies": [_policy(name, taken[name], [taken[part] for part in parts]) for name, (_, parts) in MIXED.items()],
    }


def _steered(kind: Kind, base: str, backend: str, batches: Sequence[list[Tensor]]) -> Steered:
    return Steered(implementations(kind.algorithm, BASES[base], "cpu")[backend], kind.policy, batches)


def _policy(name: str, taken: Sequence[Taken], parts: Sequence[Sequence[Taken]]) -> dict[str, Any]:
    """Return a policy's row: of each series its time over what its parts took meanwhile, and of these the median."""
    ratios, with_asking = [], []
    for begin in range(0, len(taken), STEPS):
        own, *alone = (each[begin : begin + STEPS] for each in (taken, *parts))
        seconds = [mean(it.own for it in each) for each in alone]
        expected = sum(seconds[it.passes - 1] for it in own)
        ratios.append(sum(it.own for it in own) / expected)
        with_asking.append(sum(it.own + it.asking for it in own) / expected)
    figures = [Figure(OVER_PARTS, median(ratios)), Figure("with asking", median(with_asking))]
    return {
        "name": name,
        "steps": len(taken),
        "passes": mean(it.passes for it in taken),
        "mean_ms": 1e3 * mean(it.own for it in taken),
        "asking_ms": spread([it.asking for it in taken]),
        "figures": judged(TARGETS, figures),
    }


def told(found: Mapping[str, Any]) -> str:
    """Return the figures and their verdicts as text."""
    kinds = [f"  {name:<24}{ms['median']:>8.2f} ms" for name, ms in found["kinds"].items()]
    policies = [
        f"  {policy['name']:<24}{policy['passes']:>5.2f} passes  {it['name']:<28}{it['value']:>5.2f}  {it['target']}"
        for policy in found["policies"]
        for it in policy["figures"]
    ]
    return "\n".join(line.rstrip() for line in [*kinds, *policies])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.policies", description=__doc__.splitlines()[0])
    parser.add_argument("--page-only", action="store_true", help="write the page of the figures that there are")
    if not parser.parse_args(arguments).page_only:
        torch.set_num_threads(THREADS)
        for found in measure():
            performance.write(performance.POLICY_RESULTS, found)
    performance.PAGE.write_text(performance.written_page())


if __name__ == "__main__":
    main()
