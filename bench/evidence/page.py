"""docs/results.md, from the rows; its sentences are in results.md.jinja."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bench.evidence import criterion, protocol, questions
from bench.evidence.criterion import Judged, Rises
from bench.evidence.protocol import PLANS
from bench.evidence.questions import Comparison, Order
from bench.evidence.results import CONFIDENCE, Found, Gain, accuracy, mean
from bench.gpu.page import table
from bsam_fused.report.training import after
from bsam_fused.report.training.methods import BASE
from bsam_fused.report.training.runs import NEAR_CHANCE, Row
from bsam_fused.report.training.tasks import TASKS
from bsam_fused.sharpness.radius import SHARE


def page(
    found: Sequence[Found], unfinished: Mapping[str, int], judged: Sequence[Judged], rises: Sequence[Rises]
) -> str:
    """Return the whole page.

    Args:
        found: tasks whose rows are all there.
        unfinished: other tasks -> how many of their rows there are.
        judged: of radii that are read off the loss's rise.
        rises: these.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    return templates.get_template("results.md.jinja").render(
        unfinished=", ".join(f"{task} ({rows} rows)" for task, rows in unfinished.items()),
        answers=_answers(questions.comparisons(found)),
        prices=[(it.task, _prices(it)) for it in found if len(PLANS[it.task].longer) > len(protocol.EVERYWHERE)],
        orders=table(["", "methods", *questions.SHARPNESS], map(_orders, found)),
        judged=_judged(judged) if judged else "",
        share=f"{100 * SHARE:g} %",
        suggested=_suggested(found, rises),
        tasks=[_task(it) for it in found],
        made=_made(found) if found else "",
        tuning_seeds=" and ".join(map(str, protocol.TUNING_SEEDS)),
        margin=f"{questions.MARGIN:g}",
        near_chance=f"{100 * (1 - NEAR_CHANCE):.0f}",
        examples=after.EXAMPLES,
        labels=after.LABELS,
        sharpness_rho=f"{after.RHO:g}",
    )


def _answers(comparisons: Sequence[Comparison]) -> str:
    tasks = list(dict.fromkeys(chain.from_iterable(it.gains for it in comparisons)))
    rows = [
        [it.asked, f"**{it.answer}**", *(_decided(it.gains[task]) if task in it.gains else "" for task in tasks)]
        for it in comparisons
    ]
    return table(["", "", *tasks], rows)


def _decided(gain: Gain) -> str:
    return str(gain) if gain.verdict == "open" else f"**{gain}**"


def _prices(found: Found) -> str:
    rows = [[name, f"{found.passes(name):.3g}", *map(_decided, gains)] for name, gains in questions.prices(found)]
    return table(["", "passes a step", "equal epochs", "equal passes", "better length"], rows)


def _orders(found: Found) -> list[str]:
    orders = questions.orders(found)
    return [found.task, str(orders[0].methods), *map(_correlation, orders)]


def _correlation(order: Order) -> str:
    return f"**{order.correlation:+.2f}**" if order.p < 1 - CONFIDENCE else f"{order.correlation:+.2f}"


def _judged(judged: Sequence[Judged]) -> str:
    tasks = list(judged[0].reached)
    rows = [
        [
            it.kind,
            "" if it.kind == "one ρ for all" else it.when,
            f"{it.fitted:.2g}",
            *(f"{100 * it.reached[task]:.0f} %" for task in tasks),
            _yes(it.holds),
        ]
        for it in judged
    ]
    return table(["criterion", "read off a network of the base's", "fitted to all", *tasks, "holds"], rows)


def _suggested(found: Sequence[Found], rises: Sequence[Rises]) -> str:
    rows = []
    for each in found:
        tuned, measured = each.tuned["SAM"], criterion.of(each.task, "at the beginning", rises)
        assert tuned is not None
        if measured:
            suggested = criterion.radius(measured, "share of the loss", SHARE)
            rows.append([each.task, f"{suggested:.2g}", f"{tuned:g}", f"{suggested / tuned:.2g}"])
    return table(["", "ρ suggested", "ρ tuned for SAM", "suggested over tuned"], rows)


def _yes(holds: bool) -> str:
    return questions.YES if holds else questions.NO


def _task(found: Found) -> dict[str, str]:
    plan, task = PLANS[found.task], TASKS[found.task]
    bits = f"{', '.join(map(str, after.BITS))} bits"
    head = ["", "ρ", "equal epochs", "over the base", "equal passes", bits, "eigenvalue", "diverged"]
    ladder = [f"{rho:g}: {mean([accuracy(row) for row in rows])}" for rho, rows in found.of_sam().items()]
    return {
        "name": found.task,
        "about": f"{task.epochs} epochs, {plan.seeds} seeds; the base is {task.base.build.__name__}.",
        "table": table(head, [_row(found, name) for name in found.tuned]),
        "ladder": f"SAM at each of its radii: {', '.join(ladder)}. {_diverged_before(found)}",
    }


def _row(found: Found, name: str) -> list[str]:
    rows, rho = found.of(name), found.tuned[name]
    sharp = [row.sharpness["eigenvalue"] for row in rows if row.sharpness]
    return [
        TASKS[found.task].called(name),
        "" if rho is None else f"{rho:g}{'*' if found.at_edge(name) else ''}",
        str(found.mean(name)),
        "" if name == BASE else _decided(found.gain(name, BASE)),
        str(found.mean(name, "passes")) if found.has(name, "passes") else "",
        ", ".join(f"{mean([row.quantized_percent[str(bits)] for row in rows]).value:.1f}" for bits in after.BITS),
        f"{median(sharp):.1f}" if sharp else "",
        _diverged([*rows, *(found.of(name, "passes") if found.has(name, "passes") else [])]),
    ]


def _diverged_before(found: Found) -> str:
    """Return which runs diverged of those that chose the radii."""
    diverged = [row for row in found.tuning if row.diverged]
    which = dict.fromkeys(f"{row.optimizer} at {row.rho:g}" for row in diverged)
    said = f": {'; '.join(which)}" if which else ""
    return f"Of {len(found.tuning)} runs that chose the radii {len(diverged)} diverged{said}."


def _diverged(rows: Sequence[Row]) -> str:
    """Return how many runs diverged, those of equal epochs and of equal passes; nothing where none did."""
    runs = {row.run: row.diverged for row in rows}
    return f"{sum(runs.values())} of {len(runs)}" if any(runs.values()) else ""


def _made(found: Sequence[Found]) -> str:
    """Return where the rows were made, and of what."""
    rows = list(chain.from_iterable(chain.from_iterable(it.rows.values()) for it in found))

    def said(of: Callable[[Row], Any]) -> str:
        return ", ".join(sorted({str(of(row)) for row in rows}))

    hours = sum(row.seconds for row in rows) / 3600
    return (
        f"{len(rows):,} runs are reported, {hours:.1f} core-hours of training, beside those that chose the radii. "
        f"{said(lambda row: row.date[:10])}; {said(lambda row: row.cpu)}, a run a core; "
        f"torch {said(lambda row: row.torch)}; commit {said(lambda row: _short(row.commit))}."
    )


def _short(commit: str | None) -> str:
    """Return a commit, in short; that it was not the whole of what ran stays said."""
    return f"{commit[:10]}{commit[40:]}" if commit else "unknown"
