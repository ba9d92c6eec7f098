"""What a report says, in words: the same on a page and in a terminal."""

from __future__ import annotations

from bsam_fused.report.benefit import Benefit, Outcome
from bsam_fused.report.implementations import REFERENCE, WORDS
from bsam_fused.report.learning import Learning
from bsam_fused.report.results import Report
from bsam_fused.report.rows import ROUGH_PERCENT, Row, vary_percent

NOISE = "within noise"
WHOLE = "in one piece"
"""Of a captured step's own work: it cannot be told from the passes."""
NEXT = "What now: bsam-fused report --model mymodule:build measures your own network; docs/report.md says more."


# ---- figures


def chosen(report: Report) -> list[Row]:
    """Return, of each algorithm, the row that users get: of those in pieces the last one, the backend that matters."""
    return list({row.algorithm: row for row in report.rows if row.passes > 1 and row.phases_ms}.values())


def overhead(row: Row) -> str:
    """Return the step's overhead in percent, or that noise is larger."""
    return f"{row.overhead_percent:+.1f} %" if row.overhead_is_seen else NOISE


def own_overhead(row: Row) -> str:
    """Return the optimizer's overhead in percent, or why there is none to tell."""
    if not row.phases_ms:
        return WHOLE
    return f"+{row.optimizer_percent:.1f} %" if row.optimizer_is_seen else NOISE


def own_work(row: Row) -> str:
    """Return the optimizer's time and overhead, or why there is none to tell."""
    return f"{row.optimizer_ms:.3g} ms ({own_overhead(row)})" if row.optimizer_is_seen else own_overhead(row)


def times(report: Report) -> dict[str, tuple[str, str, str, str]]:
    """Return row -> the step's passes, optimizer, gaps and sum in ms, which add up as they are printed."""
    digits = 3 if all(row.step_ms < 100 for row in report.rows) else 2
    found = {}
    for row in report.rows:
        parts = [round(part, digits) for part in (row.passes_ms, row.optimizer_ms, row.gaps_ms)]
        passes, optimizer, gaps, step = (f"{value:.{digits}f}" for value in (*parts, sum(parts)))
        found[row.name] = passes, optimizer, gaps, step
    return found


def spread(row: Row) -> str:
    """Return the step's spread in percent of it."""
    return f"{100 * row.step_spread_ms / row.step_ms:.0f} %"


def accuracy(outcome: Outcome) -> str:
    """Return the mean and, of several runs, the spread."""
    several = f" ± {outcome.spread_percent:.1f}" if outcome.accuracies_percent[1:] else ""
    return f"{outcome.accuracy_percent:.1f}{several} %"


# ---- sentences


def banner(report: Report) -> str:
    """Return the warning that times are rough; "" where they are not."""
    varied = vary_percent(report.rows)
    if varied <= ROUGH_PERCENT:
        return ""
    return (
        f"Passes of one kind varied by {varied:.0f} % (the distance between their quartiles): take the times below as "
        f"rough; something else may have been running."
    )


def task(benefit: Benefit) -> str:
    """Return what was learned, and how."""
    return (
        f"{benefit.training_images:,} images of handwritten digits, {benefit.replaced_percent:.0f} % of their labels "
        f"replaced by random ones, trained on for {benefit.epochs} epochs; then {benefit.test_images} other images, "
        "with true labels, are to be named. A network that learns the wrong labels by heart names these badly."
    )


def outcome(found: Outcome) -> str:
    """Return what an optimizer's runs gave."""
    runs = len(found.accuracies_percent)
    radius = "" if found.rho is None else f" (radius ρ = {found.rho:g})"
    return (
        f"{found.optimizer}{radius}: {accuracy(found)} of the test images named rightly, "
        f"{runs} run{'s' if runs > 1 else ''} of {found.seconds:.1f} s on one core"
    )


def cost(report: Report) -> list[str]:
    """Return what matters: what a pass takes, and what the optimizer adds to 1, 2, 3 of them."""
    if not report.rows:
        return ["No step was timed before the interruption."]
    lines = [f"One pass, forward and backward, with {report.base} alone takes {report.base_pass_ms:.3g} ms."]
    for row in chosen(report):
        lines.append(
            f"{row.name}: {row.passes} such passes a step take {row.passes * report.base_pass_ms:.3g} ms; "
            f"its own work: {own_work(row)}; {loops(report, row)}"
        )
    return lines


def loops(report: Report, row: Row) -> str:
    """Return what the papers' loops of the same algorithm cost, in words."""
    found = [it for it in report.rows if (it.algorithm, it.implementation) == (row.algorithm, REFERENCE)]
    return f"the papers' loops: {own_work(found[0])}" if found else "the papers' loops were not measured"


def who(report: Report) -> dict[str, str]:
    """Return what the implementations in the table are."""
    names = dict.fromkeys(row.implementation.partition(",")[0] for row in report.rows)
    return {name: WORDS[name] for name in names}


def lines(report: Report) -> str:
    """Return which algorithm's lines are drawn how: nothing where there is but one."""
    algorithms = list(dict.fromkeys(point.algorithm for point in report.points))
    return f"Full lines: {algorithms[-1]}; dotted: {', '.join(algorithms[:-1])}." if algorithms[1:] else ""


def verdict(learning: Learning) -> str:
    """Return one sentence: whether fused and plain training gave the same losses, and how far they are apart."""
    deviations = ", ".join(f"{found.method} {found.deviation:.1e}" for found in learning.comparisons)
    agree = "agree" if learning.agree else "DIFFER"
    return (
        f"Fused and plain losses {agree} over {learning.steps} float64 steps: "
        f"largest relative difference {deviations}; allowed {learning.rtol:.0e}."
    )
