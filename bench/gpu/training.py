"""Whole training steps on a GPU: passes and the optimizer between them.

python -m bench.gpu.training --record FILE.json [--seconds N]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.deadline import Deadline, OutOfTime
from bench.figures import Figure, Target, at_most, judged
from bench.gpu.cases import SUBJECT
from bench.gpu.record import Record
from bsam_fused.report import models, rows, timing
from bsam_fused.report.clock import Clock, CudaClock
from bsam_fused.report.implementations import BASES, reason

NETWORKS = ("resnet18", "vit_b_16")
ALGORITHMS = ("sam", "bsam")
BATCH = 128
STEPS = 10
TARGETS: Mapping[str, Target] = {
    f"{algorithm}, {SUBJECT}: optimizer over the passes": at_most(3) for algorithm in ("SAM", "BSAM")
}
"""In %."""


def measure(name: str, clock: Clock, batch_size: int = BATCH, steps: int = STEPS) -> dict[str, Any]:
    """Return what steps of a built-in network take with every implementation, for JSON."""
    workload = models.workload(name, batch_size, clock.device, torch.float32)
    training = timing.Training(workload, ALGORITHMS, "sgd", BASES["sgd"], clock, graph=False)
    for _ in training.run(steps):
        pass
    training.count_launches()
    found = rows.rows(training.timed)
    figures = [Figure(f"{row.name}: optimizer over the passes", row.optimizer_percent, "%") for row in found]
    return {
        "batch_size": batch_size,
        "base_pass_ms": rows.pass_ms(training.base),
        "rows": [asdict(row) for row in found],
        "absent": training.absent,
        "figures": judged(TARGETS, figures),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 where a network could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.training", description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, required=True, help="the JSON file to write, or to add to")
    parser.add_argument("--seconds", type=float, default=80, help="for all of it; default: %(default)s")
    options = parser.parse_args(arguments)
    record, deadline, clock = Record(options.record), Deadline(options.seconds), CudaClock()
    for name in NETWORKS:
        try:
            with deadline.half():
                found = measure(name, clock)
        except (Exception, OutOfTime) as error:
            found = {"why": reason(error)}
        record.content["training"][name] = found
        record.save()
    return 1 if any("why" in found for found in record.content["training"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
