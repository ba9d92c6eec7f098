"""All calls of `make gpu` as a session with a GPU makes them, with the CUDA kernels on this CPU: `make gpu-rehearsal`.

The command line, the stages' processes, what they measure with, record, page and archive are the real ones: the first
call on a GPU shall not fail for a trifle.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import host_cuda
import processes
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.gpu import plan
from bench.gpu.device import REHEARSAL
from bench.gpu.rehearsal import NAME
from bench.gpu.tools import CARRIED

ROOT = Path(__file__).parents[1]
LEFT_OUT = {"memcheck-smoke", "memcheck", "racecheck", "kernels", "accuracy"}
"""As the smoke does not fail, and CI's machine has none of their tools, and no CIFAR-10."""
COMMIT = "0123abc"

pytestmark = pytest.mark.rehearsal


@pytest.fixture(scope="module", autouse=True)
def _ready():
    """The kernels are built once, and a tree to compare with is carried along."""
    host_cuda.module()
    python = f"PYTHON_THERE={sys.executable}"
    processes.run(["make", "gpu-carry", "BEFORE=HEAD", python], cwd=ROOT, check=True)
    assert (CARRIED / "include" / "Python.h").exists()
    assert (CARRIED / "before" / "setup.py").exists()


def make_gpu(call, out, seconds=plan.SECONDS):
    """The command of bench/gpu/README.md, as it is there; what is measured is so little that none needs its time."""
    command = f"make gpu PYTHON={sys.executable} STAGES={call} SECONDS={seconds} OUT={out} COMMIT={COMMIT}"
    environment = {**os.environ, REHEARSAL: "1", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return processes.started(["bash", "-c", command], env=environment, cwd=ROOT, **pipes)


def only(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


def check(call, out, printed, status):
    """What a call left, and said."""
    assert status == 0, f"{call}: {printed}"
    run = only(out, "*.json")
    content = json.loads(run.read_text())
    stages = content["stages"]
    assert list(stages) == list(plan.CALLS[call])
    assert {name for name, it in stages.items() if it["how"] != "ok"} <= LEFT_OUT, printed
    assert content["about"]["device"] == NAME
    assert content["about"]["git_commit"]
    page = only(out, "*.md").read_text()
    assert all(f"| {name} | ok |" in page for name in set(stages) - LEFT_OUT)
    with tarfile.open(only(out, "*.tar.gz")) as packed:
        logs = {Path(name).name for name in packed.getnames()}
    assert {f"{name}.log" for name in set(stages) - LEFT_OUT} <= logs
    assert sorted(path.suffix for path in out.iterdir()) == [".gz", ".json", ".md"]
    return content


def figures_of(content):
    for section in ("operators", "steps", "training", "compared"):
        yield from content[section].items()


def test_the_calls(tmp_path):
    """Two at a time, as there are two cores."""
    contents = {}
    for calls in (("call1", "call4"), ("call2", "call3"), ("call5",)):
        with contextlib.ExitStack() as stack:
            running = {call: stack.enter_context(make_gpu(call, tmp_path / call)) for call in calls}
            for call, process in running.items():
                printed, _ = process.communicate(timeout=plan.SECONDS)
                contents[call] = check(call, tmp_path / call, printed, process.returncode)
    for content in contents.values():
        for name, found in figures_of(content):
            assert {"before", "after"} <= set(found), name
            assert all({"copy_gb_per_s", "clocks"} <= set(found[when]) for when in ("before", "after"))
    first, second, third, last, _ = (contents[call] for call in plan.CALLS)
    assert {"cuda, float32", "cuda, bfloat16", "triton, float32"} <= {
        name.rpartition(", ")[0] for name in first["operators"] if "one tensor" in name
    }
    assert {name.partition("-")[0] for name in first["steps"]} == {"bsam"}
    (step,) = first["steps"].values()
    assert step["implementations"]["cuda"]["launches"] == {"ascend": 1, "descend": 1, "step": 1}  # by a child
    assert {"p25", "median", "p75"} == set(step["implementations"]["loops"]["gpu_ms"]["all"])
    assert sum(it["passed"] for it in first["tests"]["tests"].values()) > 0
    assert {"graphs", "tests-triton"} == set(second["tests"])
    assert {found["dtype"] for found in third["steps"].values()} == {"bfloat16", "float32"}
    assert any(row["implementation"] == "cuda, graph" for row in third["training"]["resnet18"]["rows"])
    assert last["compared"]["bsam-sgd-resnet18"]["before_commit"]


def test_a_call_that_is_killed_leaves_what_it_found(tmp_path):
    """SIGKILL once there is a figure; then the next call of the day adds to it."""
    with make_gpu("operators", tmp_path) as call:
        end = time.monotonic() + 60
        while not any(json.loads(path.read_text())["operators"] for path in tmp_path.glob("*.json")):
            assert time.monotonic() < end, call.communicate()[0]
            time.sleep(0.1)
        os.killpg(call.pid, signal.SIGKILL)
    killed = only(tmp_path, "*.json")
    found = json.loads(killed.read_text())
    assert found["operators"]
    before = killed.read_text()
    with make_gpu("environment", tmp_path) as call:
        printed, _ = call.communicate(timeout=60)
        assert call.returncode == 0, printed
    assert killed.read_text() == before
    page = only(tmp_path, "*.md").read_text()
    assert page.count(f"| device | {NAME} |") == 2
    assert all(f"| {name} | square_norm |" in page for name in found["operators"])


def test_a_short_call_begins_what_it_can(tmp_path):
    """What there is no time for is said, and is no failure."""
    with make_gpu("environment,cases", tmp_path, seconds=plan.CLOSING + 1) as call:
        printed, _ = call.communicate(timeout=60)
    assert call.returncode == 0, printed
    stages = json.loads(only(tmp_path, "*.json").read_text())["stages"]
    assert {it["said"] for it in stages.values()} == {"not begun: the time was up"}
