"""The stages of `make gpu`: their time, their ends, what stays of them when they are killed."""

import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import processes
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.gpu import __main__ as make_gpu
from bench.gpu import device, kernels, page, plan, smoke, stages, suite, tools
from bench.gpu import record as records
from bench.gpu.device import Device
from bench.gpu.record import SECTIONS, Record
from bench.gpu.stages import NOT_FOUND, Outcome, Stage
from bsam_fused.ops import dispatch, torch_flat
from bsam_fused.report.clock import HostClock

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _on_a_host(monkeypatch):
    here = Device("a host", {"compute_capability": "9.0"}, HostClock, ("cpu", "torch"))
    for module in (records, plan, smoke):
        monkeypatch.setattr(module, "current", lambda: here)
    monkeypatch.setattr(stages, "LEAST_SECONDS", 0.5)


def script(name, code="", **options):
    return Stage(name, [sys.executable, "-c", code], **{"limit": 30, **options})


def outcomes_of(planned, seconds, logs):
    noted = {}
    well = stages.run_all(planned, seconds, logs, lambda stage, outcome, took: noted.update({stage.name: outcome}))
    return well, noted


# ---- time


@pytest.mark.parametrize("call", plan.CALLS)
@pytest.mark.parametrize("smoke_is_right", [True, False])
def test_the_limits_of_a_call_add_up_to_less_than_its_time(call, smoke_is_right):
    """Whether the smoke fails or not, and with what comes after the last stage; the device machine ends at 600 s."""
    left_out = "only_after_failure_of" if smoke_is_right else "needs"
    every = plan.stages(Path("r.json"), Path("logs"))
    limits = {name: every[name].limit for name in plan.names(call) if getattr(every[name], left_out) != "smoke"}
    assert sum(limits.values()) + plan.CLOSING < plan.SECONDS < 600
    if smoke_is_right:
        told = ", ".join(f"{name} {limit:.0f}" for name, limit in limits.items())
        assert f"| {call[-1]} | {told} |" in (ROOT / "bench" / "gpu" / "README.md").read_text()


def test_a_stage_has_its_share_and_what_others_left(tmp_path):
    """The first may have all but what those after it are promised; the last still has that."""
    planned = [
        script("first", "import time; time.sleep(60)", limit=0.5),
        script("right", limit=2),
        script("left out", limit=100, only_after_failure_of="right"),
        script("last", limit=2),
    ]
    begin = time.monotonic()
    well, noted = outcomes_of(planned, 6, tmp_path)
    assert 1.9 < time.monotonic() - begin < 6
    assert not well
    assert noted["first"] == ("failed", "stopped: its time was up")
    assert noted["last"] == ("ok", "done")


def test_what_is_not_begun_is_no_failure(tmp_path):
    planned = [script("first", "import time; time.sleep(60)", judge=stages.as_far_as_it_came), script("second")]
    assert outcomes_of(planned, 0.7, tmp_path) == (
        True,
        {
            "first": Outcome("ok", "as far as the time went"),
            "second": Outcome("left out", "not begun: the time was up"),
        },
    )


def test_a_stage_knows_its_time(tmp_path):
    ask = Stage("asks", [sys.executable, "-c", "import sys; assert 5 < int(sys.argv[1]) <= 7", "{seconds}"], limit=10)
    assert stages.run(ask, 10, tmp_path) == ("ok", "done")


# ---- ends


def test_stages(tmp_path, capsys):
    path, logs = tmp_path / "out" / "a-host-2026-11-26-080000.json", tmp_path / "logs"
    read = f"import json, pathlib; path = pathlib.Path({str(path)!r}); it = json.loads(path.read_text())"
    planned = [
        script("fails", "import sys; print('why'); sys.exit(3)"),
        script("hangs", "import time; time.sleep(60)", limit=1),
        script("adds", f"{read}; it['operators']['x'] = {{'why': 'y'}}; path.write_text(json.dumps(it))"),
        Stage("missing", ["/no/such/command"], 30),
        script("elsewhere", folder=ROOT / "nowhere"),
        script("asks", "import os; assert os.environ['WHO'] == 'me'", environment={"WHO": "me"}),
    ]
    begin = time.monotonic()
    assert make_gpu.run(planned, path, logs, 95, commit="abc") == 1
    assert time.monotonic() - begin < 60
    content = json.loads(path.read_text())
    assert {name: (stage["how"], stage["said"]) for name, stage in content["stages"].items()} == {
        "fails": ("failed", "exit status 3"),
        "hangs": ("failed", "stopped: its time was up"),
        "adds": ("ok", "done"),
        "missing": ("failed", "exit status 127"),
        "elsewhere": ("left out", "there is no nowhere"),
        "asks": ("ok", "done"),
    }
    assert content["operators"] == {"x": {"why": "y"}}
    assert content["about"]["git_commit"]
    assert "| hangs | **failed** |" in (path.parent / "a-host-2026-11-26.md").read_text()
    printed = capsys.readouterr().out
    assert "\nwhy\n" in printed
    summary = printed[printed.index("make gpu:") :].splitlines()
    assert [line.split()[-1] for line in summary[1:4]] == ["3", "up", "done"]
    with tarfile.open(path.parent / "logs.tar.gz") as packed:
        assert "logs/fails.log" in packed.getnames()


@pytest.mark.parametrize("right", [True, False])
def test_after_a_failing_smoke_no_figures_but_memcheck_at_once(tmp_path, right):
    planned = [
        script("smoke", f"import sys; sys.exit({int(not right)})"),
        script("memcheck", only_after_failure_of="smoke"),
        script("figures", needs="smoke"),
        script("tests"),
    ]
    well, noted = outcomes_of(planned, 60, tmp_path)
    assert well is right
    assert list(noted) == ["smoke", "memcheck", "figures", "tests"]
    assert noted["memcheck"].how == ("left out" if right else "ok")
    assert noted["figures"].how == ("ok" if right else "left out")
    assert noted["tests"].how == "ok"
    names = plan.names("call1")
    every = plan.stages(Path("r.json"), Path("logs"))
    assert names[names.index("smoke") + 1] == "memcheck-smoke"
    assert all(
        every[name].needs == "smoke"
        for name in (
            "operators",
            "steps",
            "cases",
            "compiled",
            "kernels",
            "training-resnet18",
            "training-vit",
            "accuracy",
        )
    )


@pytest.mark.parametrize(
    ("status", "output", "how", "said"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", "ok", "ERROR SUMMARY: 0 errors"),
        (tools.ERRORS_FOUND, "========= RACECHECK SUMMARY: 2 hazards", "failed", "RACECHECK SUMMARY: 2 hazards"),
        (1, "Traceback", "failed", "exit status 1; no summary"),
        (tools.ERRORS_FOUND, "========= Error: Device not supported", "left out", "cannot run on this machine"),
        (NOT_FOUND, "", "left out", "not installed"),
        (None, "========= COMPUTE-SANITIZER", "ok", "nothing found until its time was up"),
        (None, "========= Invalid __global__ read of size 4 bytes", "failed", "Invalid __global__ read"),
    ],
)
def test_sanitizers_are_judged_by_what_they_find(status, output, how, said):
    outcome = tools.judge_sanitizer(status, output)
    assert outcome.how == how
    assert said in outcome.said


@pytest.mark.parametrize(
    ("status", "output", "how", "said"),
    [
        (NOT_FOUND, "CIFAR-10 is not at build/carry/cifar10_jpeg.npz", "left out", "not carried along"),
        (None, "", "failed", "no training ended"),
        (0, "", "failed", "no training ended"),
        (None, "SGD, seed 0: 90.00 %, 6 epochs of passes, 9.0 s", "ok", "as far as the time went"),
        (1, "SGD, seed 0: 90.00 %, 6 epochs of passes, 9.0 s", "failed", "exit status 1"),
    ],
)
def test_trainings_are_judged_by_whether_one_ended(status, output, how, said):
    outcome = tools.judge_accuracy(status, output)
    assert outcome.how == how
    assert said in outcome.said


NCU = """==PROF== Connected to process 7
"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"
"","","us","register/thread"
"0","void bsam::cuda::(anonymous namespace)::kernel<bsam::Ascend, float, 1>(bsam::Args)","12.5","40"
"1","void bsam::cuda::(anonymous namespace)::kernel<bsam::Ascend, BFloat16, 1>(bsam::Args)","7.0","44"
"""


def test_kernels_are_read_from_what_ncu_says():
    assert kernels.parse(NCU.splitlines()) == {
        "kernel<Ascend, float, 1>": {
            "gpu__time_duration.sum": "12.5 us",
            "launch__registers_per_thread": "40 register/thread",
        },
        "kernel<Ascend, BFloat16, 1>": {
            "gpu__time_duration.sum": "7.0 us",
            "launch__registers_per_thread": "44 register/thread",
        },
    }
    assert kernels.judge(NOT_FOUND, "").how == kernels.judge(kernels.REFUSED, "").how == "left out"
    assert kernels.judge(1, "").how == "failed"


@pytest.mark.parametrize(("refusal", "status"), [("==ERROR== ERR_NVGPUCTRPERM", kernels.REFUSED), ("odd", 1)])
def test_an_ncu_that_refuses(tmp_path, monkeypatch, refusal, status):
    ncu = tmp_path / "ncu"
    ncu.write_text(f"#!/bin/sh\necho '{refusal}'\nexit 1\n")
    ncu.chmod(0o755)
    monkeypatch.setattr(kernels, "find", lambda name: str(ncu))
    assert kernels.main([f"--record={tmp_path / 'a-host-2026-11-26-080000.json'}", f"--logs={tmp_path}"]) == status


# ---- what stays


def test_a_second_run_of_a_day_leaves_the_first_one(tmp_path, monkeypatch):
    """A file a run; the page has both, also of the one that was committed and of the one that was not."""
    results, out = tmp_path / "results", tmp_path / "out"
    monkeypatch.setattr(records, "RESULTS", results)
    for folder, at in ((results, "080000"), (out, "090000"), (out, "100000")):
        record = Record(folder / f"a-host-2026-11-26-{at}.json", commit=at)
        record.content["about"] |= {"git_commit": f"commit-{at}"}
        record.save()
    text = (out / "a-host-2026-11-26.md").read_text()
    assert [f"commit-{at}" in text for at in ("080000", "090000", "100000")] == [True] * 3
    assert len(list(out.glob("*.json"))) == 2
    assert set(record.content) == {"about", *SECTIONS}
    assert page.day_of(Path(f"{records.new_name()}.json")).startswith("a-host-20")


def write_for_ever(path, told):
    record = Record(path)
    for i in itertools.count():
        record.content["operators"][f"operator {i}"] = {"why": "x" * 100}
        record.save()
        told.send(i)


def test_a_record_is_whole_whenever_its_writer_is_killed(tmp_path):
    """SIGKILL at twelve moments of writing: what had been said to be kept is there, and nothing is cut off."""
    forks = multiprocessing.get_context("fork")
    for moment in range(12):
        path = tmp_path / str(moment) / "a-host-2026-11-26-080000.json"
        heard, told = forks.Pipe(duplex=False)
        writer = forks.Process(target=write_for_ever, args=(path, told), daemon=True)
        writer.start()
        said = [heard.recv() for _ in range(20)]
        time.sleep(moment / 2000)
        writer.kill()
        writer.join()
        while heard.poll():
            said.append(heard.recv())
        assert len(json.loads(path.read_text())["operators"]) > said[-1]
        assert "| operator 19 |" in (path.parent / "a-host-2026-11-26.md").read_text()


def test_what_comes_back_fits_a_lent_machine():
    """At most eight files, also where each is being written anew; names of letters, digits, '.', '_' and '-'."""
    name = records.new_name()
    files = [f"{name}.json", f"{page.day_of(Path(name + '.json'))}.md", f"{name}-logs.tar.gz"]
    assert 2 * len(files) <= 8
    assert all(re.fullmatch(r"[\w.-]+", file) for file in files)


# ---- the tests' stage

FILE = """
import os, time, pytest
def test_passes(): pass
def test_fails(): assert 0
def test_skips(): pytest.skip("no")
def test_crashes(): os.abort()
def test_after(): pass
def test_hangs(): time.sleep(60)
"""


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(suite, "A_TEST", 2)
    file = tmp_path / "test_it.py"

    def run(text=FILE, seconds=60.0):
        file.write_text(text)
        return suite.run_file(
            str(file), ["-c", "/dev/null", f"--rootdir={tmp_path}"], tmp_path / "logs", time.monotonic() + seconds
        )

    return run


def test_a_crash_and_a_hang_cost_one_test_each(run_file):
    found = run_file()
    assert (found["passed"], found["failed"], found["skipped"], found["said"]) == (2, 3, 1, "done")
    assert [name.partition("::test_")[2] for name in found["names"]] == ["fails", "crashes", "hangs"]


def test_counts_survive_the_end_of_the_time(run_file, monkeypatch):
    """What it interrupts has not failed; what the process died of before has."""

    def stopped(command, **_):
        (outcomes,) = (word.partition("=")[2] for word in command if word.startswith("--outcomes="))
        tests = [["a", "begun"], ["b", "passed"], ["c", "begun"]]
        Path(outcomes).write_text("".join(json.dumps(test) + "\n" for test in tests))
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(subprocess, "run", stopped)
    found = run_file()
    assert (found["passed"], found["names"], found["said"]) == (1, ["a"], "stopped: the time was up")
    assert run_file(seconds=0.0)["said"] == "not begun: the time was up"


def test_a_file_whose_process_always_dies_is_given_up(run_file):
    found = run_file("import os\n" + "\n".join(f"def test_{i}(): os.abort()" for i in range(suite.DEATHS + 1)))
    assert (found["passed"], found["failed"]) == (0, suite.DEATHS)
    assert found["said"] == f"exit status -6: given up, its process died {suite.DEATHS} times"


def test_a_file_that_needs_what_is_not_there_is_left_out(run_file):
    assert run_file("import no_such_thing")["said"] == "left out: No module named 'no_such_thing'"


def test_files_that_tell_most_come_first():
    found = suite.files()
    assert found[0] == "tests/test_cuda.py"
    assert {"tests/test_against_reference.py", "tests/test_graphs.py", "tests/test_faults.py"} <= set(found)


# ---- the smoke


def test_the_smoke_is_right_about_a_backend_that_is(capsys):
    assert smoke.main(["--backend", "cpp", "--dtypes", "float32,bfloat16", "--eager"]) == 0
    assert "73 of 73 right" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["direction_sums", "update_sgd", "restore", "mix", "_run_remember"])
def test_the_smoke_finds_an_operator_that_does_nothing(method, monkeypatch):
    class Broken(torch_flat.TorchFlatParams):
        pass

    monkeypatch.setattr(Broken, method, lambda self, *_: {})  # nothing to be written
    monkeypatch.setitem(dispatch._FACTORIES, "cpp", Broken)
    assert smoke.main(["--backend", "cpp", "--dtypes", "float32", "--eager"]) == 1


# ---- where there is none


def test_torch_alone_is_needed():
    """The machine with the GPU has what it has: nothing is installed there."""
    extras = ("matplotlib", "jinja2", "rich", "sklearn", "scipy", "pytorch_optimizer", "pytest")
    hidden = "; ".join(f"sys.modules[{name!r}] = None" for name in extras)
    modules = ("measure", "training", "smoke", "page", "plan", "kernels", "compare", "environment", "launches")
    code = f"import sys; {hidden}; import {', '.join(f'bench.gpu.{module}' for module in modules)}"
    processes.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_stage_of_another_name_is_told_with_those_that_there_are():
    assert plan.names("smoke,call4,smoke")[:2] == ["smoke", "environment"]
    with pytest.raises(ValueError, match=r"--stages smok: must be one of call1, .*smoke"):
        plan.names("call1,smok")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(device.REHEARSAL, raising=False)
    assert make_gpu.main(["--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "sees no NVIDIA GPU" in line
    assert not (tmp_path / "out").exists()
