"""SAM's relatives beside SAM itself, in one run: bench/results/members.json, and their part of docs/performance.md.

python -m bench.members [--page-only]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bench import performance, steps
from bench.cases import FORGETFUL, MEMBERS, OVER_SAM, Case, family
from bench.deadline import Deadline
from bench.figures import Figure, judged, spread
from bench.on_cpu import READY_SECONDS, SUBJECT, THREADS
from bsam_fused.report.clock import HostClock
from bsam_fused.report.implementations import BASES

CASES = (
    *(("resnet18", base, True, MEMBERS) for base in BASES),
    *((shapes, "sgd", False, FORGETFUL) for shapes in ("resnet50", "wrn28_10", "distilbert")),
)
"""Shapes, the base optimizer, whether all implementations are there, else cpp and what it must agree with, and whose.

All of it takes some three and a half minutes.
"""


def measure() -> Iterator[dict[str, Any]]:
    """Measure all; yield what there is so far, for JSON, whenever there is more."""
    found: dict[str, Any] = {"about": performance.about(), "families": []}
    for shapes, base, others, relatives in CASES:
        cases = family(shapes, base, others=others, members=relatives)
        found["families"].append({"shapes": shapes, "base": base, **report(cases)})
        print(f"{base}-{shapes}\n{told(found['families'][-1])}", flush=True)
        performance.note_busy_cores(found["about"])
        yield found


def report(cases: Sequence[Case]) -> dict[str, Any]:
    """Measure SAM, which comes first, and its relatives in turns; return everything found out, for JSON."""
    found = steps.measure_all(cases, HostClock(), Deadline(READY_SECONDS))
    sam = found[0][SUBJECT]
    if isinstance(sam, steps.Absent):
        raise RuntimeError(f"SAM's {SUBJECT} was not measured, nothing to compare with: {sam.why}")
    return {
        "tensors": len(cases[0].shapes),
        "elements": cases[0].elements,
        "repetitions": cases[0].repeat,
        "members": [_member(case, own, sam.median()) for case, own in zip(cases, found, strict=True)],
    }


def _member(case: Case, found: steps.Found, sam_seconds: float) -> dict[str, Any]:
    measured = steps.measured_of(found)
    figures = []
    if SUBJECT in measured:
        own = measured[SUBJECT]
        figures = [
            Figure(OVER_SAM, own.median() / sam_seconds),
            *steps.ratios(found, SUBJECT),
            Figure(f"extra memory of {SUBJECT}", own.extra, "N"),
        ]
    return {
        "name": case.algorithm.name,
        "moves": case.moves,
        "step_ms": {name: spread(each.seconds()) for name, each in measured.items()},
        "absent": {name: each.why for name, each in found.items() if isinstance(each, steps.Absent)},
        "figures": judged(case.targets, figures),
    }


def told(found: dict[str, Any]) -> str:
    """Return the figures and their verdicts as text."""
    return "\n".join(
        f"  {member['name']:<28}{it['name']:<28}{it['value']:>7.2f} {it['unit']:<3}{it['target']}".rstrip()
        for member in found["members"]
        for it in member["figures"]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.members", description=__doc__.splitlines()[0])
    parser.add_argument("--page-only", action="store_true", help="write the page of the figures that there are")
    if not parser.parse_args(arguments).page_only:
        torch.set_num_threads(THREADS)
        for found in measure():
            performance.write(performance.FAMILY_RESULTS, found)
    performance.PAGE.write_text(performance.written_page())


if __name__ == "__main__":
    main()
