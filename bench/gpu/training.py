"""Whole training steps of a network on a GPU, with and without a captured graph, added to a run's record.

python -m bench.gpu.training --record FILE.json NETWORK

One network a process: launches are counted last, as a profiler that was on once may slow launches from then on.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.figures import Figure, Target, at_most, judged, spread
from bench.gpu.cases import SUBJECT
from bench.gpu.device import condition, current
from bench.gpu.record import Record
from bsam_fused.report import rows, timing
from bsam_fused.report.clock import Clock
from bsam_fused.report.implementations import BASES, reason
from bsam_fused.report.models import workload

ALGORITHMS = ("sam", "bsam")
BATCH = {"resnet18": 128, "vit_b_16": 32}
"""Network -> examples a batch: such that two captured steps fit beside the eager ones, in memory and in time."""
STEPS = 10
TARGETS: Mapping[str, Target] = {
    f"{algorithm}, {SUBJECT}: optimizer over the passes": at_most(3) for algorithm in ("SAM", "BSAM")
}
"""In %."""


def measure(name: str, clock: Clock, batch_size: int, steps: int = STEPS, *, graph: bool) -> dict[str, Any]:
    """Return what steps of a built-in network take with every implementation, for JSON."""
    before = condition(clock)
    training = timing.Training(
        workload(name, batch_size, clock.device, torch.float32), ALGORITHMS, "sgd", BASES["sgd"], clock, graph=graph
    )
    for _ in training.run(steps):
        pass
    after = condition(clock)
    training.count_launches()
    found = rows.rows(training.timed)
    figures = [Figure(f"{row.name}: optimizer over the passes", row.optimizer_percent, "%") for row in found]
    return {
        "batch_size": batch_size,
        "base_pass_ms": rows.pass_ms(training.base),
        "rows": [
            {**asdict(row), "step": spread([laps.wall for laps in timed.laps])}
            for row, timed in zip(found, training.timed, strict=True)
        ],
        "absent": training.absent,
        "figures": judged(TARGETS, figures),
        "before": before,
        "after": after,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 where the network could not be measured, or only without graphs."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.training", description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, required=True, help="the JSON file to write, or to add to")
    parser.add_argument("network", choices=BATCH)
    options = parser.parse_args(arguments)
    record, device = Record(options.record), current()
    network, batch_size = device.network(options.network, BATCH[options.network])
    failed = False
    for graph in (True, False):
        try:
            found = measure(network, device.make_clock(), batch_size, graph=graph)
            failed |= any(name.endswith(", graph") for name in found["absent"])
        except Exception as error:
            failed, found = True, {"why": reason(error)}
        record.content["training"][options.network if graph else f"{options.network}, no graph"] = found
        record.save()
        if "why" not in found:
            break
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
