"""The performance page says what the committed figures say; fits, the guard and comparisons judge rightly."""

import json
import random
import re
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import processes
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import compare, freeing, guard, members, performance, policies, scaling
from bench.cases import MEMBERS, OVER_SAM, SHAPES
from bench.cases import family as family_of
from bench.figures import Figure
from bench.performance_page import page
from bsam_fused.report.implementations import ALGORITHMS, PACKAGE

# ---- the page


@pytest.fixture(scope="module")
def figures():
    return json.loads(performance.RESULTS.read_text())


def test_the_page_is_that_of_the_committed_figures():
    assert performance.PAGE.read_text() == performance.written_page(), "run: python -m bench.performance --page-only"


def test_the_page_hides_nothing(figures):
    text = page(figures, None, None)
    assert "Not measured here: any GPU" in text
    missed = [it for case in figures["steps"] for it in case["figures"] if it["target"].endswith("missed")]
    missed += [it for it in figures["scaling"]["figures"] if it["target"].endswith("missed")]
    said = text[text.index("## Bars") :].split("##")[1]
    assert said.count("\n| ") - 2 == len(missed)
    for case in figures["steps"]:
        for row in case["rows"].values():
            assert f"| {row['loops_ratio']:.2f} |" in text


@pytest.mark.parametrize(("cores", "busy"), [(0.1, False), (0.5, True)])
def test_the_page_says_where_the_machine_was_busy(figures, cores, busy):
    text = page({**figures, "about": {**figures["about"], "busy_cores": cores}}, None, None)
    assert ("The machine was busy" in text) is busy
    assert f"{cores} cores" in text


@pytest.mark.parametrize(("slowest", "shared"), [(20.0, False), (10.0, True)])
def test_the_page_says_where_others_took_bandwidth(figures, slowest, shared):
    rates = [slowest, *[24.0] * (len(figures["steps"]) - 1)]
    steps = [{**case, "copy_gb_per_s": rate} for case, rate in zip(figures["steps"], rates, strict=True)]
    text = page({**figures, "steps": steps}, None, None)
    assert f"{slowest} to 24.0 GB/s" in text
    assert ("took memory bandwidth" in text) is shared


def test_busy_cores_are_those_of_others():
    with processes.started([sys.executable, "-c", "while True: pass"]):
        assert performance._busy_cores() > 0.4


def test_every_case_is_measured_or_said_not_to_be(figures):
    measured = [(it["shapes"], it["algorithm"], it["base"]) for it in figures["steps"]]
    names = [name for name in SHAPES if any(name == it[0] for it in measured)]
    assert sorted(measured) == sorted((name, *rest) for name in names for rest in performance.CASES)
    missing = set(SHAPES) - set(names)
    said = re.search(r"Not measured yet: the shapes of ([^.]*)\.", page(figures, None, None))
    assert (set(said[1].split(", ")) if said else set()) == missing
    for case in figures["steps"]:
        assert {"loops", "foreach", "torch", "cpp"} <= set(case["rows"])
        assert ("pytorch_optimizer" in case["rows"]) is (case["algorithm"] == "sam")


def test_verdicts_are_those_of_the_rows(figures):
    """Ratios anew from the times; whether a bar is met from the ratio."""
    for case in figures["steps"]:
        times = {name: row["step_ms"]["median"] for name, row in case["rows"].items()}
        for it in case["figures"]:
            other, _, subject = it["name"].partition(" / ")
            if other in times and subject in times:
                assert it["value"] == pytest.approx(times[other] / times[subject])
            if it["target"]:
                relation, bound, verdict = it["target"].split()
                met = (
                    round(it["value"], 2) >= float(bound) if relation == ">=" else round(it["value"], 2) <= float(bound)
                )
                assert verdict == ("met" if met else "missed")


# ---- SAM's relatives


@pytest.fixture(scope="module")
def family():
    """All of them on few elements."""
    few = [replace(case, shapes=((5, 3), (3,), (7,)), repeat=2) for case in family_of("resnet18", "sgd", others=True)]
    found = {"shapes": "few", "base": "sgd", **members.report(few)}
    return {"about": performance.about(), "families": [found]}


BOUNDS = ("1.30", "1.30", "1.20", "0.60", "1.50", "0.80", "1.60")
"""Of `MEMBERS`, in their order."""


def test_bars_of_relatives_are_what_they_move(family):
    """1.1 times N over SAM's N, and twice as fast as the package; the time is that of SAM of the same run."""
    (group,) = family["families"]
    assert [it["name"] for it in group["members"]] == [ALGORITHMS[name].name for name in ("sam", *MEMBERS)]
    sam, *relatives = group["members"]
    assert not any(it["target"] for it in sam["figures"])
    for member, bound in zip(relatives, BOUNDS, strict=True):
        assert not member["absent"]
        figures = {it["name"]: it for it in member["figures"]}
        over_sam = member["step_ms"]["cpp"]["median"] / sam["step_ms"]["cpp"]["median"]
        assert figures[OVER_SAM]["value"] == pytest.approx(over_sam)
        assert figures[OVER_SAM]["target"].startswith(f"<= {bound} ")
    packaged = {it["name"] for it in relatives if f"{PACKAGE} / cpp" in str(it["figures"])}
    assert packaged == {"GSAM", "WSAM", "Friendly SAM"}


def test_the_page_has_the_relatives_and_their_bars(figures, family):
    assert "Not measured yet**: `python -m bench.members`" in page(figures, None, None)
    text = page(figures, family, None)
    section = text[text.index("## SAM's relatives") :].split("\n## ")[0]
    for member in family["families"][0]["members"]:
        (row,) = [line for line in section.splitlines() if line.startswith(f"| {member['name']} |")]
        for it in member["figures"]:
            assert f"| {it['value']:.2f} {it['unit']}".rstrip() in row
    judged = {
        of: int(re.search(r"Of (\d+) bars", page(figures, it, None))[1]) for of, it in (("none", None), ("all", family))
    }
    assert judged["all"] - judged["none"] == 7 + 7 + 3


# ---- policies


@pytest.fixture(scope="module")
def in_turns():
    """One series of each policy, on few elements."""
    run = policies.run(((5, 3), (3,), (7,)), "sgd", "cpp", series=1)
    return {"about": performance.about(), "runs": [{"shapes": "few", "base": "sgd", "backend": "cpp", **run}]}


def test_policies_take_the_passes_that_they_say(in_turns):
    """In the ten steps after the warm-up, whole periods of both ks; of the random ones 0.5 are neither all nor none."""
    (run,) = in_turns["runs"]
    assert set(run["kinds"]) == set(policies.KINDS)
    passes = {policy["name"]: policy["passes"] for policy in run["policies"]}
    assert passes["EveryKth(k=2)"] == 1.5
    assert passes["EveryKth(k=5)"] == passes["LookSAM(k=5)"] == 1.2
    assert 1 < passes["RandomSteps(0.5)"] < 2
    assert 1 < passes["LargeGradients"] < 2


@pytest.mark.parametrize(("slower", "verdict"), [(1.0, "met"), (1.5, "missed")])
def test_a_policy_is_held_to_the_sum_of_its_steps(slower, verdict):
    """Two series whose machine is of two speeds: each has the ratio of its own time."""
    speeds = [speed for speed in (1.0, 3.0) for _ in range(policies.STEPS)]
    plain, both = ([policies.Taken(1 + i, 0.0, speed * (2 + 3 * i)) for speed in speeds] for i in range(2))
    mixed = [
        policies.Taken(1 + i % 2, speed * 0.7, speed * slower * (2 + 3 * (i % 2))) for i, speed in enumerate(speeds)
    ]
    found = policies._policy("mixed", mixed, [plain, both])
    over, asked = found["figures"]
    assert over["value"] == pytest.approx(slower)
    assert over["target"].endswith(verdict)
    assert asked["value"] == pytest.approx(slower + 0.7 / 3.5)
    assert found["passes"] == 1.5


def test_the_page_has_the_policies_and_their_bars(figures, in_turns):
    assert "Not measured yet**: `python -m bench.policies`" in page(figures, None, None)
    text = page(figures, None, in_turns)
    section = text[text.index("## Which steps take") :].split("\n## ")[0]
    (run,) = in_turns["runs"]
    for policy in run["policies"]:
        (row,) = [line for line in section.splitlines() if line.startswith(f"| {policy['name']} |")]
        assert all(f" | {it['value']:.2f} |" in row for it in policy["figures"])
    judged = [int(re.search(r"Of (\d+) bars", page(figures, None, it))[1]) for it in (None, in_turns)]
    assert judged[1] - judged[0] == len(policies.MIXED)


# ---- how cost grows


def test_fits_find_what_was_put_in():
    assert scaling.fit_power({n: 0.01 * n**1.2 for n in scaling.ELEMENTS}) == pytest.approx(1.2)
    assert scaling.fit_power({10: 1.0}) is None


def test_scaling_in_small(monkeypatch):
    """Bars are where they are meant to be: from so many tensors on, against each of torch's."""
    monkeypatch.setattr(scaling, "HOST_STEPS", 2)
    found = scaling.measure((4, 12, 61), (100, 10**15))
    assert set(found["by_tensors_ms"]) == {4, 12, 61}
    assert found["left_out_elements"] == [10**15]
    judged = [it["name"].split(", one")[0] for it in found["figures"] if "<= 1.00" in it["target"]]
    assert judged == [
        f"{n} tensors: BSAM / torch's fused {base}" for n, base in [(12, "AdamW"), (61, "AdamW"), (61, "SGD")]
    ]
    for it in found["figures"]:
        count, _, name = it["name"].partition(" tensors: BSAM / ")
        ms = found["by_tensors_ms"][int(count)]
        assert it["value"] == pytest.approx(ms[scaling.OWN]["median"] / ms[name]["median"])
    assert "61 tensors of 64" in scaling.told(found)


def test_freeing_in_small():
    """Each way in processes of its own, which say how glibc is set."""
    found = freeing.measure(elements=1000, rounds=1)
    assert [*found["ways"]] == ["glibc's defaults", "memory kept"]
    for each in found["ways"].values():
        assert all(0 < ms["p25"] <= ms["median"] <= ms["p75"] for ms in each.values())
    assert "memory kept" in freeing.told(found)


# ---- the guard


def tries(*values):
    """Figures of one try after the other: (cpp / byte budget, foreach / cpp)."""
    left = iter(values)
    return lambda: [Figure(name, value) for name, value in zip(guard.TARGETS, next(left))]


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ([(1.25, 1.0)], 0),
        ([(1.26, 1.5), (1.0, 0.9)], 0),  # each was met once
        ([(1.26, 1.5), (1.3, 1.6)], 1),
        ([(1.0, 0.98), (1.0, 0.9)], 1),
    ],
)
def test_the_guard(values, status, capsys):
    assert guard.guard(tries(*values), len(values)) == status
    assert ("missed in 2 tries" in capsys.readouterr().err) is bool(status)


# ---- comparisons of commits


def ratios(factor, spread, n=60):
    generator = random.Random(0)
    return [factor * (1 + spread * generator.gauss(0, 1)) for _ in range(n)]


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (ratios(1.1, 0.05), "slower"),
        (ratios(0.9, 0.05), "faster"),
        (ratios(1.0, 0.02), "same"),
        (ratios(1.0, 0.3), "cannot tell"),
        (ratios(1.5, 0.01, n=5), "cannot tell"),  # five pairs alone may all fall on one side: 2 / 2^5 > 1 %
    ],
)
def test_verdicts(found, verdict):
    assert compare.interval(found).verdict() == verdict


def test_intervals_hold_the_median_as_often_as_they_say():
    """Over 2,000 series of noise around 1, about 1 % of the intervals leave 1 out, and no more than a little more."""
    generator = random.Random(1)
    outside = 0
    for _ in range(2000):
        found = compare.interval([generator.lognormvariate(0, 0.1) for _ in range(30)])
        outside += not found.low <= 1 <= found.high
        assert found.low <= found.median <= found.high
    assert outside / 2000 < 0.015


def test_the_interval_is_that_of_the_tables():
    """The sign test's tables: for 30 values the 8th from either end, at 99 % and more."""
    assert compare.interval(range(1, 31)) == (15.5, 8, 23)


def test_ratios_are_of_b_over_a():
    class Told:
        def __init__(self, seconds):
            self.ask = lambda question: seconds

    assert compare.compare(Told(2.0), Told(3.0), "bsam-sgd-tiny500", 20) == (1.5, 1.5, 1.5)


def test_workers_take_the_steps_of_their_checkout():
    """Two processes of this checkout, as two commits would be: the same rows, answered in turns."""
    with closing(compare.Worker(performance.ROOT)) as a, closing(compare.Worker(performance.ROOT)) as b:
        found = compare.compare(a, b, "sam-adamw-tiny500", 8)
    assert 0.1 < found.median < 10


def test_a_commit_that_is_not_there_leaves_no_worktree():
    before = subprocess.check_output(["git", "worktree", "list"], cwd=performance.ROOT)
    with pytest.raises(subprocess.CalledProcessError), compare.built("no-such-commit"):
        pass
    assert subprocess.check_output(["git", "worktree", "list"], cwd=performance.ROOT) == before
