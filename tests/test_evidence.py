"""The evidence: radii are chosen by validation alone, differences are paired, and the page is that of the rows."""

import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))

from PIL import Image

from bench.evidence import __main__ as evidence
from bench.evidence import criterion, page, pictures, protocol, questions, results
from bench.evidence import rows as stored
from bench.evidence.criterion import Case, Rises
from bench.evidence.questions import Comparison
from bench.evidence.results import Gain
from bench.evidence.rows import rows_of
from bsam_fused.report import benefit
from bsam_fused.report.training.methods import BASE, METHODS
from bsam_fused.report.training.runs import Row
from bsam_fused.report.training.tasks import TASKS

TASK = "digits, 40 % noise"
PLACE = {"backend": "cpp", "threads": 1, "cpu": "a CPU", "torch": "2", "commit": "0123456789ab", "date": "2026-11-26"}


def row(run, accuracy, loss=0.1):
    steps = 15 * run.epochs
    return Row(
        **vars(run),
        accuracy_percent=accuracy,
        training_loss=loss,
        chance_loss=math.log(10),
        quantized_percent={"8": accuracy, "4": accuracy - 1, "3": accuracy - 5, "2": 10.0}
        if run.split == "test"
        else {},
        sharpness=dict.fromkeys(questions.SHARPNESS, 100 - accuracy) if run.split == "test" else {},
        steps=steps,
        passes=int(METHODS[run.optimizer].passes * steps),
        seconds=1.0,
        command=run.repeated_by,
        **PLACE,
    )


BEST = {"SAM": 0.6, "BSAM": 0.125, "GSAM": 0.016, "AE-SAM": 8.0}
"""Of the others: the third that is tried. Two lie beyond the first four, GSAM's at the end of all."""


def validated(run):
    best = BEST.get(run.optimizer, protocol.ladder(TASK, run.optimizer)[4])
    return row(run, 50.0 - abs(math.log(run.rho / best)))


def made_up():
    """SAM is 10 points above the base, BSAM 20, at whatever length; each seed has a level of its own."""
    draw = random.Random(0)
    level = [draw.uniform(40, 60) for _ in range(10)]
    above = {BASE: 0.0, "SAM": 10.0, "BSAM": 20.0}
    rows = []
    while missing := set(protocol.tuning(TASK, rows)) - {it.run for it in rows}:
        rows += map(validated, missing)
    for run in protocol.tests(TASK, protocol.tuned(TASK, rows)):
        own = above.get(run.optimizer, 5.0) - abs(math.log((run.rho or 0.6) / 0.6)) * (run.optimizer == "SAM")
        rows.append(row(run, level[run.seed] + own + draw.gauss(0, 0.5)))
    return rows


@pytest.fixture(scope="module")
def rows():
    return made_up()


@pytest.fixture(scope="module")
def found(rows):
    return results.found(TASK, rows)


# ---- the protocol


def test_radii_are_chosen_by_the_mean_validation_accuracy_of_two_seeds(rows, found):
    """Of equal ones the smallest; the test split decides nothing."""
    chosen = protocol.tuned(TASK, rows)
    assert {name: chosen[name] for name in BEST} == BEST
    assert chosen["ASAM"] == 6.0
    assert chosen[BASE] is None
    first = [replace(it, accuracy_percent=99.0) if (it.rho, it.seed) == (0.25, 100) else it for it in rows]
    assert protocol.tuned(TASK, first)["SAM"] == 0.25
    tested = [replace(it, accuracy_percent=0.0) if it.split == "test" else it for it in rows]
    assert protocol.tuned(TASK, tested) == chosen
    assert [name for name in chosen if found.at_edge(name)] == ["GSAM"]


def test_radii_beyond_the_first_four_are_tried_where_the_best_is_the_last():
    """AE-SAM's 8 is one beyond, and the one after it is no better; GSAM's ladder ends at its best."""
    tried = {}
    for it in made_up():
        if it.split == "validation":
            tried.setdefault(it.optimizer, set()).add(it.rho)
    assert sorted(tried["SAM"]) == [0.1, 0.25, 0.6, 1.5]
    assert sorted(tried["AE-SAM"]) == [0.2, 0.5, 1.2, 3.0, 8.0, 20.0]
    assert sorted(tried["GSAM"]) == [0.016, 0.04, 0.1, 0.25, 0.6, 1.5]
    assert len(protocol.tuning(TASK)) == 18 * 4 * 2


def test_nothing_is_chosen_or_shown_of_a_part_of_the_rows(rows):
    for i in (0, 70):
        part = rows[:i] + rows[i + 1 :]
        with pytest.raises(LookupError, match="are missing"):
            protocol.tuned(TASK, part)
        assert results.found(TASK, part) is None
    assert results.found(TASK, rows[:-1]) is None


def test_seeds_that_choose_are_not_those_that_are_reported():
    for task in protocol.PLANS:
        assert {run.split for run in protocol.tuning(task)} == {"validation"}
        assert {run.split for run in protocol.reported(task)} == {"test"}
        assert not {run.seed for run in protocol.tuning(task)} & {run.seed for run in protocol.reported(task)}


def test_the_report_has_the_radii_that_were_chosen():
    chosen = protocol.tuned(benefit.TASK, rows_of(benefit.TASK))
    assert {name: [chosen[name]] for name in benefit.RADII} == benefit.RADII


@pytest.mark.parametrize("method", METHODS)
def test_equal_passes_are_equal(method):
    """To half an epoch of the method's own: what rounding to whole epochs leaves."""
    epochs = protocol.as_long_as_bsam(TASK, method)
    passes = METHODS[method].passes
    assert abs(epochs * passes - 3 * TASKS[TASK].epochs) <= passes / 2
    assert METHODS[method].passes != 3 or epochs == TASKS[TASK].epochs


def test_core_hours_are_those_of_the_passes():
    runs = [run for run in protocol.reported(TASK) if run.optimizer == "BSAM"]
    assert protocol.hours(runs) == pytest.approx(len(runs) * 3 * protocol.PLANS[TASK].seconds / 3600)


# ---- what the rows say


def test_gains_are_paired_by_seed(found):
    """SciPy's paired test decides alike. Levels of seeds lie 20 points apart: unpaired, nothing were decided."""
    for method, over in (("SAM", BASE), ("BSAM", "SAM"), ("GSAM", "ASAM")):
        mine, its = ([it.accuracy_percent for it in found.of(name)] for name in (method, over))
        gain, oracle = found.gain(method, over), stats.ttest_rel(mine, its)
        low, high = oracle.confidence_interval(0.95)
        assert (gain.value - gain.reach, gain.value + gain.reach) == pytest.approx((low, high))
        assert (gain.verdict == "open") == (oracle.pvalue > 0.05)
        assert gain.error == pytest.approx(stats.sem([a - b for a, b in zip(mine, its)]))
    assert found.gain("SAM", BASE).verdict == "more"
    assert found.gain(BASE, "SAM", "passes").verdict == "less"
    assert found.gain("GSAM", "ASAM").verdict == "open"


def gain(value, error=0.1):
    return Gain(value, error, 10)


@pytest.mark.parametrize(
    ("gains", "as_good", "answer"),
    [
        ([3, 0, 2], False, "yes"),
        ([3, 0, 0], False, "not decided"),
        ([3, 3, -3], False, "not decided"),
        ([-3, -2, 0], False, "no"),
        ([0, 0, 0], False, "not decided"),
        ([0, 2, -0.1], True, "yes"),
        ([0, 2, -0.7], True, "yes"),
        ([0, 2, -0.9], True, "no"),
    ],
)
def test_answers_follow_the_rule(gains, as_good, answer):
    it = Comparison("?", {str(i): gain(float(value)) for i, value in enumerate(gains)}, as_good)
    assert it.answer == answer
    unsure = Comparison("?", {"a": gain(-0.5, 1.0)}, as_good)
    assert unsure.answer == "not decided"


def test_questions_are_answered_of_the_right_rows(found):
    answers = {it.asked: it for it in questions.comparisons([found])}
    assert answers["Does SAM beat the base optimizer, at equal epochs?"].gains[TASK].value == pytest.approx(10, abs=0.6)
    assert answers["Does BSAM beat SAM, at equal passes?"].gains[TASK].value == pytest.approx(10, abs=0.6)
    assert answers["Does BSAM beat the base optimizer, at equal passes?"].gains[TASK].value == pytest.approx(
        20, abs=0.6
    )
    bits = answers["Does BSAM beat SAM when weights are rounded to 4 bits?"]
    assert bits.gains[TASK].value == pytest.approx(10, abs=0.6)
    assert len(questions.comparisons([])) == 0


def test_the_order_by_sharpness_is_spearmans(rows, found):
    """The flattest is made the best of all 19 methods; of each a network that ended in a ravine decides nothing."""
    ravines = random.Random(1)
    flat = {name: 100 - found.mean(name).value for name in found.tuned}
    sharp = [
        replace(
            it, sharpness={m: ravines.uniform(1e3, 1e5) if it.seed == 4 else flat[it.optimizer] for m in it.sharpness}
        )
        for it in rows
    ]
    orders = questions.orders(results.found(TASK, sharp))
    assert {(it.measure, round(it.correlation, 9), it.methods) for it in orders} == {
        (name, -1.0, 19) for name in questions.SHARPNESS
    }
    assert page._correlation(orders[0]) == "**-1.00**"


def test_the_better_length_is_the_one_with_the_better_mean(rows, found):
    """SAM's longer runs are made 7 points worse, BSAM's are its own: it is as many epochs as before."""
    worse = [
        replace(it, accuracy_percent=it.accuracy_percent - 7) if (it.optimizer, it.epochs) == ("SAM", 60) else it
        for it in rows
    ]
    overfitted = results.found(TASK, worse)
    assert overfitted.epochs("SAM", "better") == 40
    assert overfitted.gain("BSAM", "SAM", "better") == found.gain("BSAM", "SAM", "epochs")
    better = [
        replace(it, accuracy_percent=it.accuracy_percent + 7) if (it.optimizer, it.epochs) == ("SAM", 60) else it
        for it in rows
    ]
    assert results.found(TASK, better).gain("BSAM", "SAM", "better").value == pytest.approx(
        found.gain("BSAM", "SAM", "passes").value - 7
    )


def test_prices_are_over_sam_the_best_first(found):
    prices = questions.prices(found)
    assert prices[0][0] == "BSAM"
    assert [gains[0].value for _, gains in prices] == sorted((gains[0].value for _, gains in prices), reverse=True)
    assert not {"SAM", BASE} & {name for name, *_ in prices}


# ---- whether a radius can be read off


HERE = ("a command", "a CPU", "2", None)


def case(task, curvature, gains, tuned):
    """L(w) = 1, and a rise of curvature ρ²."""
    rises = tuple(curvature * rho**2 for rho in criterion.LADDER)
    return Case(task, [Rises(task, 100, "at the end", 1.0, criterion.LADDER, rises, *HERE)], gains, tuned)


def test_a_criterion_is_judged_on_tasks_that_it_was_not_fitted_to():
    """The tuned ρ is where the loss, 1, rises by 0.36, in all tasks but the last, of which another would be right."""
    alike = [
        case(str(c), c, {0.6 / c**0.5: 5.0, 0.1 / c**0.5: 1.0, 3 / c**0.5: -9.0}, 0.6 / c**0.5) for c in (0.01, 1, 50)
    ]
    other = case("other", 1.0, {0.01: 4.0, 0.6: 1.0}, 0.01)
    assert other.reached("one ρ for all", 1.1) == pytest.approx(0.25)
    assert other.reached("one ρ for all", 1.3) == 0, "beyond all that were tested"
    for kind in ("share of the loss", "nats"):
        value = criterion.fitted(alike, kind)
        assert 0.1**2 < value < 3**2
        assert all(it.reached(kind, value) == 1.0 for it in alike)
        assert alike[1].radius(kind, 0.36) == pytest.approx(0.6)
        assert other.reached(kind, value) == pytest.approx(0.25)
        assert alike[0].reached(kind, 5e-3) == pytest.approx(0.2)
    one = "one ρ for all"
    assert alike[0].radius(one, 0.3) == 0.3
    assert min(it.reached(one, criterion.fitted(alike, one)) for it in alike) < 1


def test_a_criterion_holds_that_fails_on_one_task(monkeypatch):
    """Three tasks alike and one that is another: what is fitted to those fails on it, and is not fitted to it."""
    gains = {0.6: 5.0, 0.1: 1.0, 3.0: -9.0}
    told = [*(case(name, 1.0, gains, 0.6) for name in "abc"), case("other", 1.0, {0.01: 4.0, 0.6: 1.0}, 0.01)]
    monkeypatch.setattr(criterion, "cases", lambda found, rises, when: told)
    share, *_ = criterion.judge([], [])
    assert share.reached == {"a": 1.0, "b": 1.0, "c": 1.0, "other": pytest.approx(0.25)}
    assert share.holds
    assert not replace(share, reached={**share.reached, "a": 0.4}).holds
    assert "| share of the loss | at the beginning |" in page._judged([share])


def test_a_rise_in_nats_is_no_share():
    rises = tuple(rho**2 for rho in criterion.LADDER)
    half = Case("half", [Rises("half", 100, "at the end", 0.5, criterion.LADDER, rises, *HERE)], {1.0: 1.0}, 1.0)
    assert half.radius("share of the loss", 0.32) == pytest.approx(0.4)
    assert half.radius("nats", 0.16) == pytest.approx(0.4)


def test_what_is_suggested_stands_beside_what_was_tuned(found):
    """Rises of ρ² reach 4 % of a loss of 1 at 0.2, and of 4 at 0.4: √0.08 in the geometric mean; 0.6 was tuned."""
    quadratic = tuple(rho**2 for rho in criterion.LADDER)
    rises = [
        *(
            Rises(TASK, seed, "at the beginning", loss, criterion.LADDER, quadratic, *HERE)
            for seed, loss in enumerate((1.0, 4.0))
        ),
        Rises(TASK, 0, "at the end", 100.0, criterion.LADDER, quadratic, *HERE),
    ]
    assert f"| {TASK} | 0.28 | 0.6 | 0.47 |" in page._suggested([found], rises)
    assert TASK not in page._suggested([found], rises[2:])


def test_only_tasks_with_a_gain_beyond_twice_its_error_tell(rows, found):
    rises = [Rises(TASK, 100, "at the end", 1.0, criterion.LADDER, tuple(rho**2 for rho in criterion.LADDER), *HERE)]
    (told,) = criterion.cases([found], rises, "at the end")
    assert (told.task, told.tuned, len(told.gains)) == (TASK, 0.6, 4)
    assert told.gains[0.6] == pytest.approx(found.gain("SAM", BASE).value)
    assert not criterion.cases([found], rises, "at the beginning")
    flat = results.found(
        TASK, [replace(it, accuracy_percent=50.0 + it.seed % 3) if it.split == "test" else it for it in rows]
    )
    assert not criterion.cases([flat], rises, "at the end")
    assert not criterion.judge([found], rises)


# ---- the page


def test_the_page_is_that_of_the_rows():
    assert evidence.PAGE.read_text() == evidence.written_page()[1], "run: python -m bench.evidence --page"


def test_the_pictures_are_those_of_the_page():
    """Each carries the digest of the page that it was drawn with, and is on it."""
    text = evidence.PAGE.read_text()
    for path in evidence.PAGE.parent.glob("results_*.png"):
        assert Image.open(path).text["Description"] == pictures.digest(text), path
        assert f"({path.name})" in text


@pytest.mark.parametrize("name", ["docs/which.md", "README.md"])
def test_what_others_quote_is_on_the_page(name):
    """Every mean with its error: figures of older rows would stay behind."""
    quoted = re.findall(r"\d+\.\d ± \d+\.\d", (evidence.PAGE.parents[1] / name).read_text())
    assert not [figure for figure in quoted if figure not in evidence.PAGE.read_text()]
    assert quoted or name == "README.md"


def test_rows_are_of_commits_and_made_once():
    for task in protocol.PLANS:
        rows = rows_of(task)
        assert len({it.run for it in rows}) == len(rows)
        assert all(it.commit and len(it.commit) == 40 for it in rows), "of a tree that nobody has"
        assert all(it.command == it.run.repeated_by for it in rows)


def test_a_page_shows_divergence_and_what_is_not_finished(rows, found, tmp_path):
    diverged = [replace(it, training_loss=2.3) if (it.optimizer, it.seed) == ("GSAM", 3) else it for it in rows]
    text = page.page([results.found(TASK, diverged)], {"digits": 7}, [], [])
    assert "digits (7 rows)" in text
    (gsam,) = (line for line in text.splitlines() if line.startswith("| GSAM | 0.016* |"))
    assert gsam.endswith("| 2 of 20 |")
    assert "Can ρ be read off?" not in text
    pictures.write([found], text, tmp_path)
    assert sorted(it.name for it in tmp_path.iterdir()) == ["results_gains.png", "results_prices.png"]


def test_the_plan_counts_what_is_missing(rows, capsys, monkeypatch):
    for there, expected in (([], (524, 524)), (rows, (len(rows), 0)), (rows[:-1], (len(rows), 1))):
        monkeypatch.setattr(evidence, "rows_of", lambda task, there=there: there)
        assert evidence.main(["--plan", "--task", TASK]) == 0
        printed = capsys.readouterr().out
        assert all(str(count) in printed for count in expected), (printed, expected)


def test_a_task_that_cannot_be_had_is_left_out_and_said(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("BSAM_FUSED_CIFAR10", str(tmp_path / "nowhere"))
    monkeypatch.setattr(evidence, "rows_of", lambda task: [])
    trained = []
    monkeypatch.setattr(evidence, "train", lambda task, workers: trained.append(task))
    monkeypatch.setattr(evidence, "write_page", lambda: None)
    assert evidence.main(["--task", "CIFAR-10", "digits"]) == 1
    assert trained == ["digits"]
    assert re.search(r"CIFAR-10 was left out: .*nowhere.*BSAM_FUSED_CIFAR10", capsys.readouterr().err)


def test_a_file_of_something_else_is_refused_in_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(stored, "FOLDER", tmp_path)
    stored.file_of(TASK).write_text("a thesis")
    assert evidence.main(["--plan", "--task", TASK]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "line 1 is not of a training run" in line
