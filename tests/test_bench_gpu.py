"""The GPU benchmarks and their stages, without a GPU: the same code, timed by the host's clock on CPU tensors."""

import contextlib
import json
import re
import sys
import time
from functools import partial
from pathlib import Path

import processes
import pytest
import torch

import bsam_fused

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.cases import Case
from bench.compiled import CompiledBSAM
from bench.deadline import Deadline, OutOfTime
from bench.figures import at_least, at_most
from bench.gpu import __main__ as make_gpu
from bench.gpu import cases, measure, page, sanitize, stages, training
from bench.gpu.record import Record
from bench.gpu.stages import Outcome, Stage
from bench.operators import OPERATORS
from bsam_fused.report import clock
from bsam_fused.report.contestant import Contestant, coefficients
from bsam_fused.report.implementations import ALGORITHMS, BASES, RHO, implementations

# Few elements: the radius then moves each of them far enough for every phase to show in the result.
SHAPES = ((5, 3), (3,), (7,))
SGD = BASES["sgd"]


class HostClock(clock.HostClock):
    """As if it saw launches and little memory; and its copies are quick."""

    copied = 1 << 10

    def launches(self, work):
        work()
        return 2

    def peak_bytes(self, work):
        return work(), 4 * 25


class Wrong:
    """A BSAM that goes nowhere."""

    def __init__(self, params):
        self.params = params

    def ascend(self):
        pass

    descend = step = ascend


# ---- the implementations


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_all_take_the_same_steps(algorithm, base):
    calls = ALGORITHMS[algorithm].calls
    curvatures = coefficients(SHAPES, torch.float64)
    builds = {device: implementations(ALGORITHMS[algorithm], BASES[base], device) for device in ("cpu", "cuda")}
    loops = builds["cpu"].pop("loops")
    on_host = {name: builds["cuda"][name] for name in ("foreach",) if name in builds["cuda"]}
    loops, *others = (
        Contestant(build, calls, curvatures) for build in (loops, *builds["cpu"].values(), *on_host.values())
    )
    for _ in range(4):
        for contestant in (loops, *others):
            contestant.step(clock.seconds_of)
    for other in others:  # pytorch_optimizer's norm is float32
        torch.testing.assert_close(other.params, loops.params, rtol=1e-10, atol=1e-10)
    assert not torch.equal(loops.params[0], curvatures[0])


def test_the_compiled_one_takes_the_same_steps(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traced in one graph, not generated
    curvatures = coefficients(SHAPES, torch.float64)
    build = implementations(ALGORITHMS["bsam"], SGD, "cpu")["loops"]
    compiled = Contestant(lambda p: CompiledBSAM(p, rho=RHO, **SGD.options), ALGORITHMS["bsam"].calls, curvatures)
    loops = Contestant(build, ALGORITHMS["bsam"].calls, curvatures)
    for _ in range(3):
        compiled.step(clock.seconds_of)
        loops.step(clock.seconds_of)
    torch.testing.assert_close(compiled.params, loops.params, rtol=1e-12, atol=1e-12)


def test_targets_name_figures_that_there_are():
    shares = {
        "GPU time",
        "host time",
        "host time, triton",
        "wall time",
        "of copy bandwidth",
        "extra memory",
        "launches",
    }
    for name, case in cases.CASES.items():
        others = set(case.builds) - {cases.SUBJECT}
        ratios = {f"{what}, {other} / {cases.SUBJECT}" for what in ("GPU time", "wall time") for other in others}
        assert {*case.targets, *cases.H200_TARGETS.get(name, {})} <= shares | ratios
    assert set(cases.H200_TARGETS) <= set(cases.CASES)


# ---- the benchmarks, start to end


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "results" / "host.json")


def benchmarks(record, seconds=60.0):
    host = HostClock()
    return measure.Benchmarks(record, host, clock.copy_bandwidth(host), Deadline(seconds), subject="cpp")


def trial(*, targets=None, **others):
    builds = implementations(ALGORITHMS["bsam"], SGD, "cpu") | {"cuda": _cuda} | others
    return Case(ALGORITHMS["bsam"], SGD, SHAPES, builds, targets or {}, repeat=2)


def _cuda(params):
    return bsam_fused.BSAM(params, backend="cuda", rho=RHO, **SGD.options)


def test_a_case(record, capsys):
    run = benchmarks(record)
    case = trial(targets={"extra memory": at_most(2.05), "launches": at_least(7), "GPU time": at_least(0)})
    run.step("trial", case)
    run.count("trial", case)
    assert run.complete
    written = json.loads(record.path.read_text())
    assert written["copy_gb_per_s"] > 0
    found = written["steps"]["trial"]
    by_name = found["implementations"]
    assert set(by_name["cpp"]["gpu_ms"]) == {"all", "ascend", "descend", "step"}
    assert by_name["foreach"]["launches"] == {"ascend": 2, "descend": 2, "step": 2}
    assert by_name["loops"]["extra_memory_n"] == 0
    assert "cuda" in by_name["cuda"]["why"]
    figures = {figure["name"]: figure for figure in found["figures"]}
    assert figures["launches"]["value"] == 6
    assert figures["launches"]["target"] == ">= 7.00  missed"
    assert figures["GPU time, loops / cpp"]["value"] > 0
    assert page.targets_met(written) == (2, ["trial: launches 6.00 , >= 7.00"])
    text = record.path.with_suffix(".md").read_text()
    assert "| cuda | not available: RuntimeError: backend='cuda'" in text
    assert all(f"| {name} |" in text for name in [*by_name, *figures])
    assert "| 2 + 2 + 2 |" in text
    assert page.case("trial", found) in text
    assert "### trial" in capsys.readouterr().out


def test_a_profiler_that_fails_costs_only_the_count(record, monkeypatch, capsys):
    def broken(clock, work):
        raise RuntimeError("no CUPTI")

    monkeypatch.setattr(HostClock, "launches", broken)
    run = benchmarks(record)
    run.step("trial", trial())
    run.count("trial", trial())
    assert run.complete
    assert "launches of trial not counted: RuntimeError: no CUPTI" in capsys.readouterr().out
    assert "figures" in json.loads(record.path.read_text())["steps"]["trial"]
    run.step("broken", trial(loops=lambda params: 1 / 0))
    run.count("broken", trial())


def test_other_weights_are_not_timed_but_told(record):
    run = benchmarks(record)
    run.step("trial", trial(foreach=Wrong))
    found = json.loads(record.path.read_text())["steps"]["trial"]
    assert not run.complete
    assert found["implementations"]["foreach"]["wrong"]
    assert "other weights than loops" in found["implementations"]["foreach"]["why"]
    assert "**wrong**: other weights" in record.path.with_suffix(".md").read_text()
    assert "gpu_ms" in found["implementations"]["cpp"]


def test_one_that_takes_too_long_is_left_out(record, monkeypatch):
    monkeypatch.setattr(measure, "LEAST_SECONDS", 0.0)
    run = benchmarks(record, seconds=2.0)
    run.step("trial", trial(foreach=lambda params: time.sleep(10)))
    found = json.loads(record.path.read_text())["steps"]["trial"]["implementations"]
    assert run.complete
    assert found["foreach"] == {"why": "OutOfTime: took more than 1 s", "wrong": False}
    assert "gpu_ms" in found["cpp"]


def test_without_the_subject_a_case_is_not_complete(record):
    def broken(params):
        raise RuntimeError("no kernels\nand a long story")

    run = benchmarks(record)
    run.step("trial", trial(cpp=broken))
    assert not run.complete
    written = json.loads(record.path.read_text())["steps"]["trial"]
    assert written["figures"] == []
    assert written["implementations"]["cpp"]["why"] == "RuntimeError: no kernels"


def test_a_case_that_cannot_run_does_not_stop_the_next(record):
    run = benchmarks(record)
    run.step("broken", trial(loops=lambda params: 1 / 0))
    run.step("trial", trial())
    found = json.loads(record.path.read_text())["steps"]
    assert not run.complete
    assert found["broken"]["why"].startswith("RuntimeError: loops did not run")
    assert "figures" in found["trial"]
    assert "Not measured: RuntimeError: loops did not run" in record.path.with_suffix(".md").read_text()


def test_what_there_is_no_time_for_says_so(record):
    run = benchmarks(record, seconds=1.0)
    run.step("trial", trial())
    run.operators("small", SHAPES, "cpp")
    written = json.loads(record.path.read_text())
    assert not run.complete
    assert written["steps"]["trial"] == written["operators"]["cpp, small"] == {"why": "the time was up"}


def test_operators(record):
    run = benchmarks(record)
    run.operators("small", SHAPES, "cpp")
    run.operators("small", SHAPES, "cuda")
    assert run.complete
    found = json.loads(record.path.read_text())["operators"]
    assert set(found["cpp, small"]["operators"]) == set(OPERATORS)
    assert "cuda" in found["cuda, small"]["why"]
    text = record.path.with_suffix(".md").read_text()
    assert all(f"| cpp, small | {name} |" in text for name in OPERATORS)
    assert "| cuda, small | not available:" in text


def test_training_steps(record, monkeypatch):
    monkeypatch.setattr(training, "ALGORITHMS", ("bsam",))
    found = training.measure("digits", HostClock(), batch_size=4, steps=2)
    assert [row["implementation"] for row in found["rows"]] == ["alone", "loops", "foreach", "torch", "cpp"]
    record.content["training"] = {"digits": found, "vit": {"why": "out of memory"}}
    record.save()
    text = record.path.with_suffix(".md").read_text()
    assert "### Training steps of digits" in text
    assert "| BSAM, cpp |" in text
    assert "Not measured: out of memory" in text


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "CudaClock", HostClock)
    monkeypatch.setattr(measure, "CASES", {"a": trial(), "b": trial()})
    monkeypatch.setattr(measure, "OPERATORS_ON", {"small": SHAPES})
    path = tmp_path / "host.json"
    assert measure.main(["--record", str(path), "--only", "a", "--only", "operators"]) == 1  # there is no cuda here
    written = json.loads(path.read_text())
    assert set(written["steps"]) == {"a"}
    assert set(written["operators"]) == {"cuda, small", "triton, small"}
    assert measure.main(["--record", str(path), "--only", "b"]) == 1
    assert set(json.loads(path.read_text())["steps"]) == {"a", "b"}
    assert "### b" in capsys.readouterr().out


def test_a_deadline_interrupts_even_what_catches_exceptions():
    def compile_stubbornly():
        while True:
            with contextlib.suppress(Exception):
                time.sleep(5)

    deadline = Deadline(0.2)
    with pytest.raises(OutOfTime, match="took more than"), deadline.half():
        compile_stubbornly()
    with deadline.half():
        assert deadline.left <= 0.2
    time.sleep(0.3)
    assert deadline.left == 0


# ---- the stages


@pytest.fixture
def _no_out(monkeypatch):
    monkeypatch.delenv("OUT", raising=False)


def script(name, code, log, **options):
    return Stage(name, [sys.executable, "-c", code], log=log, **{"limit": 30, **options})


@pytest.mark.usefixtures("_no_out")
def test_stages_that_there_is_no_time_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_gpu, "SECONDS", 1.0)
    assert make_gpu.run([script("late", "", tmp_path / "log")], tmp_path / "host.json") == 1
    assert json.loads((tmp_path / "host.json").read_text())["stages"]["late"]["said"] == "not begun: the time was up"
    assert "FAILED  late" in capsys.readouterr().out


@pytest.mark.usefixtures("_no_out")
def test_stages(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "LEAST_SECONDS", 0.5)
    path, log = tmp_path / "host.json", tmp_path / "logs" / "log"
    note = f"from bench.gpu.record import Record; from pathlib import Path; r = Record(Path({str(path)!r}))"
    plan = [
        script("fails", "import sys; print('why'); sys.exit(3)", log),
        script("hangs", "import time; time.sleep(60)", log, limit=1),
        script("adds", f"{note}; r.content['copy_gb_per_s'] = 4321.0; r.save()", log),
        Stage("missing", ["/no/such/command"], 30, log),
        script("asks", "import os; assert os.environ['WHO'] == 'me'", log, environment={"WHO": "me"}),
    ]
    begin = time.monotonic()
    assert make_gpu.run(plan, path, commit="abc") == 1
    assert time.monotonic() - begin < 20
    content = json.loads(path.read_text())
    assert {name: (stage["ok"], stage["said"]) for name, stage in content["stages"].items()} == {
        "fails": (False, "exit status 3"),
        "hangs": (False, "stopped after 1 s"),
        "adds": (True, "done"),
        "missing": (False, "exit status 127"),
        "asks": (True, "done"),
    }
    assert content["copy_gb_per_s"] == 4321
    assert content["about"]["git_commit"]
    assert "| hangs | **failed** |" in path.with_suffix(".md").read_text()
    printed = capsys.readouterr().out
    assert "\nwhy\n" in printed
    summary = printed[printed.index("make gpu:") :].splitlines()
    assert [line.split()[1] for line in summary[1:6]] == ["fails", "hangs", "adds", "missing", "asks"]
    assert summary[6] == "targets: 0 met, 0 missed"


def test_stages_have_no_more_than_the_time_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "LEAST_SECONDS", 0.5)
    noted = []
    plan = [
        script("first", "import time; time.sleep(60)", tmp_path / "log"),
        script("second", "", tmp_path / "log"),
    ]
    assert not stages.run_all(plan, 1.0, lambda stage, outcome, seconds: noted.append((stage.name, outcome)))
    assert noted == [
        ("first", Outcome(False, "stopped after 1 s")),
        ("second", Outcome(False, "not begun: the time was up")),
    ]


def test_results_are_copied_where_they_come_back_from(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    Record(tmp_path / "results" / "host.json").save()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["host.json", "host.md"]
    assert all(re.fullmatch(r"[\w.-]+", stage.log.name) for stage in stages.plan(Path("host.json"), tmp_path))
    assert len({stage.log for stage in stages.plan(Path("host.json"), tmp_path)}) + 2 <= 8


def test_torch_alone_is_needed():
    """The machine with the GPU has what it has: nothing is installed there."""
    extras = ("matplotlib", "jinja2", "rich", "sklearn", "scipy", "pytorch_optimizer", "pytest")
    hidden = "; ".join(f"sys.modules[{name!r}] = None" for name in extras)
    code = f"import sys; {hidden}; import bench.gpu.measure, bench.gpu.training, bench.gpu.sanitize, bench.gpu.page"
    processes.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_the_plan_ends_within_eight_minutes():
    assert make_gpu.SECONDS < 8 * 60
    assert [stage.name for stage in stages.plan(Path("r.json"), Path("logs"))] == [
        *("build", "backend", "tests", "benchmarks", "training"),
        *("memcheck", "racecheck", "initcheck"),
    ]


SUITE = '<testsuites><testsuite tests="{}" failures="{}" errors="{}" skipped="{}"></testsuite></testsuites>'


@pytest.mark.parametrize(
    ("counts", "status", "outcome"),
    [
        ((5, 0, 0, 1), 0, Outcome(True, "4 passed, 0 failed, 1 skipped")),
        ((5, 1, 1, 0), 1, Outcome(False, "3 passed, 2 failed, 0 skipped")),
        ((5, 0, 0, 5), 0, Outcome(False, "0 passed, 0 failed, 5 skipped")),
        (None, 4, Outcome(False, "exit status 4, no report")),
    ],
)
def test_tests_are_judged_by_their_report(tmp_path, counts, status, outcome):
    junit = tmp_path / "tests.xml"
    if counts:
        junit.write_text(SUITE.format(*counts))
    assert stages.judge_tests(junit, status, "") == outcome
    assert not junit.exists()


@pytest.mark.parametrize(
    ("status", "output", "ok", "said"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", True, "ERROR SUMMARY: 0 errors"),
        (stages.ERRORS_FOUND, "========= RACECHECK SUMMARY: 2 hazards", False, "RACECHECK SUMMARY: 2 hazards"),
        (1, "Traceback", False, "exit status 1; no summary"),
        (stages.ERRORS_FOUND, "========= Error: Device not supported", True, "cannot run on this machine"),
        (stages.NOT_FOUND, "", True, "not installed"),
    ],
)
def test_sanitizers_are_judged_by_what_they_find(status, output, ok, said):
    outcome = stages.judge_sanitizer(status, output)
    assert outcome.ok == ok
    assert said in outcome.said


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_what_the_sanitizer_watches_runs(backend, capsys):
    sanitize.main(backend, "cpu")
    assert "all weights finite" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_one_line_says_so(capsys):
    results = Path(__file__).parents[1] / "bench" / "results"
    before = sorted(results.iterdir())
    assert make_gpu.main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "sees no NVIDIA GPU" in line
    assert sorted(results.iterdir()) == before
