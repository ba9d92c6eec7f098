"""Figures of timed steps are honest: they add up, noise is told and hides what it covers, and no number is cut."""

import io
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from bsam_fused.report import figures, said, terminal
from bsam_fused.report.clock import Laps
from bsam_fused.report.rows import rows
from bsam_fused.report.timing import Timed


def timed(name, calls, pieces, gaps=0.001):
    return Timed(name, "pytorch_optimizer", calls, None, laps=[Laps(list(it), sum(it) + gaps) for it in pieces])


def measured(noise=0.01, steps=20):
    """Rows of SGD, SAM and BSAM whose every piece varies by so much, relative."""

    generator = random.Random(0)

    def vary(pieces):
        return [[piece * (1 + noise * generator.uniform(-1, 1)) for piece in pieces] for _ in range(steps)]

    sgd = timed("sgd", ("step",), vary([0.008, 0.001, 0.0001]))
    sam = timed("SAM", ("ascend", "step"), vary([0.008, 0.0007, 0.008, 0.0007, 0.0001]))
    bsam = timed("BSAM", ("ascend", "descend", "step"), vary([0.008, 0.0007, 0.008, 0.0007, 0.008, 0.0007, 0.0001]))
    return rows([sgd, sam, bsam])


def content(rows):
    """As much of a report as is shown of timed steps."""
    return SimpleNamespace(rows=rows, base="sgd", base_pass_ms=8.0)


def test_by_hand():
    """Of eight steps the middle four count: of 2, 3, 4 and 5 ms in a pass, not those of 900."""
    base = timed("sgd", ("step",), [[0.008, 0.001, 0.0]] * 8)
    a_pass = [0.001, 0.9, 0.004, 0.002, 0.9, 0.0015, 0.003, 0.005]
    row = rows([base, timed("SAM", ("ascend", "step"), [[it, 0.001, it, 0.002, 0.0005] for it in a_pass])])[1]
    assert (row.passes, row.steps) == (2, 8)
    assert row.passes_ms == pytest.approx(2 * (2 + 3 + 4 + 5) / 4)
    assert row.phases_ms == pytest.approx({"ascend": 1, "step": 2, "zero_grad": 0.5})
    assert row.step_ms == pytest.approx(7 + 3.5 + 1)
    assert row.gaps_ms == pytest.approx(1)
    assert row.overhead_percent == pytest.approx(100 * (11.5 / 16 - 1))
    assert row.optimizer_percent == pytest.approx(100 * 3.5 / 16)
    assert not row.overhead_is_seen, "less than nothing, by noise"
    assert row.optimizer_is_seen


def test_spreads_are_those_of_the_quartiles():
    """Of 1 to 5 ms in the passes they are 2 and 4; the optimizer takes the same in every step."""
    base = timed("sgd", ("step",), [[0.008, 0.001, 0.0]] * 5)
    row = rows(
        [base, timed("SAM", ("ascend", "step"), [[it / 2e3, 0.001, it / 2e3, 0.001, 0.0] for it in range(1, 6)])]
    )[1]
    assert row.passes_spread_ms == pytest.approx(2)
    assert row.step_spread_ms == pytest.approx(2)
    assert row.optimizer_spread_ms == pytest.approx(0)
    assert row.passes_vary_percent == pytest.approx(100 * 2 / 3)
    assert row.overhead_noise_percent == pytest.approx(100 * 2 / 16)


def test_one_step_says_nothing_of_noise():
    assert not any(row.overhead_is_seen or row.optimizer_is_seen for row in measured(steps=1))


def test_columns_add_up():
    """As they are printed, to the last digit, and as they are kept."""
    for row in (found := measured(0.3)):
        assert row.passes_ms + row.optimizer_ms + row.gaps_ms == pytest.approx(row.step_ms, rel=1e-12)
        assert sum(row.phases_ms.values()) == pytest.approx(row.optimizer_ms, rel=1e-12)
    each_cut_off = replace(found[0], passes_ms=1.0004, optimizer_ms=0.0004, gaps_ms=0.0004, step_ms=1.0012)
    for passes, optimizer, gaps, step in said.times(content([*found[1:], each_cut_off])).values():
        assert round(1000 * (float(passes) + float(optimizer) + float(gaps))) == round(1000 * float(step))


@pytest.mark.parametrize(
    ("overhead", "noise", "shown"), [(-28, 30, False), (-28, 5, True), (3280, 4000, False), (9, 8, True)]
)
def test_an_overhead_is_printed_where_noise_is_smaller(overhead, noise, shown):
    row = replace(
        measured()[1],
        overhead_percent=overhead,
        overhead_noise_percent=noise,
        optimizer_percent=abs(overhead),
        optimizer_noise_percent=noise,
    )
    assert said.overhead(row) == (f"{overhead:+.1f} %" if shown else "within noise")
    assert said.own_overhead(row) == (f"+{abs(overhead):.1f} %" if shown else "within noise")
    assert (f"{abs(overhead):.1f} %" in " ".join(said.cost(content([row])))) is shown


def test_rough_times_are_told_of():
    assert not said.banner(content(measured(0.02)))
    assert re.search(r"varied by [2-9]\d %.* may have been running", said.banner(content(measured(0.8))))
    assert not said.banner(content(measured(0.8, steps=3))), "quartiles of three"


def test_a_captured_step_has_no_work_of_its_own_to_tell():
    """Its phases are not told from its passes: nothing is said of noise, and the row in pieces is the one to show."""
    of_sgd = timed("sgd", ("step",), [[0.008, 0.001, 0.0]] * 5)
    in_pieces = timed("SAM", ("ascend", "step"), [[0.008, 0.001, 0.008, 0.001, 0.0]] * 5)
    whole = Timed("SAM", "cuda, graph", ("ascend", "step"), None, lambda: None, [Laps([0.017], 0.017)] * 5)
    *_, pieces, graph = rows([of_sgd, in_pieces, whole])
    assert said.own_overhead(graph) == said.own_work(graph) == "in one piece"
    assert said.chosen(content([pieces, graph])) == [pieces]


@pytest.mark.parametrize("width", [200, 80, 60, 40])
def test_no_number_is_cut_in_a_terminal(width):
    """A pipe has 80 columns. Each row's time and overhead is there, in a line of its own where columns have no room."""
    report = content(measured())
    console = Console(width=width, record=True, file=io.StringIO())
    terminal.table(report, console)
    text = console.export_text()
    assert "…" not in text
    assert ("gaps" in text) is (width != 80 and width != 60)
    assert max(map(len, text.splitlines())) <= width
    for row in report.rows:
        *_, step = said.times(report)[row.name]
        for figure in (row.name, step, said.own_overhead(row)):
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", text), figure


@pytest.mark.parametrize(("low", "high"), [(0.021, 0.09), (0.3, 0.8), (5e3, 7e7)])
def test_an_axis_has_figures_that_can_be_read(low, high):
    """matplotlib's own leave a range of less than a decade with none, or write 2 × 10⁻²."""
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], [low, high])
    axes.set(yscale="log", ylim=(low, high))
    figures._ticks(axes.yaxis)
    figure.canvas.draw()
    labels = [
        label.get_text() for value, label in zip(axes.get_yticks(), axes.get_yticklabels()) if low <= value <= high
    ]
    assert len(labels) >= 2
    assert all(re.fullmatch(r"[\d.]+(e[+-]\d+)?", label) for label in labels)
