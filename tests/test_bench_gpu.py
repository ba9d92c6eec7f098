"""The GPU benchmarks without a GPU: the same code, timed by the host's clock on CPU tensors."""

import contextlib
import json
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import bsam_fused

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import steps
from bench.cases import Case
from bench.compiled import CompiledBSAM
from bench.deadline import Deadline, OutOfTime
from bench.figures import at_least, at_most
from bench.gpu import cases, device, measure, page, training
from bench.gpu import record as records
from bench.gpu.device import Device
from bench.gpu.record import Record
from bench.operators import OPERATORS
from bsam_fused.report import clock
from bsam_fused.report.contestant import Contestant, after_two_steps, coefficients
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


class Away(Wrong):
    """One that leaves."""

    def __init__(self, params):
        torch._foreach_add_([p.detach() for p in params], 0.1)


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


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_all_remember_the_same_for_the_steps_between(device_type):
    """LookSAM's v, which no step of every k-th itself depends on."""
    algorithm = ALGORITHMS["looksam"]
    builds = implementations(algorithm, SGD, device_type)
    found = {}
    for name in {"loops", "foreach", "torch", "cpp"} & set(builds):
        own = after_two_steps(builds[name], algorithm.calls, coefficients(SHAPES, torch.float64))
        state = getattr(own.optimizer, "state", None)
        found[name] = [state[p]["orthogonal_gradient"] for p in own.params] if state else [*own.optimizer.v]
    for others in found.values():
        torch.testing.assert_close(others, found["loops"], rtol=1e-9, atol=1e-12)
    assert min(v.norm() for v in found["loops"]) > 1e-3


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
        "GPU time / byte budget",
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
def record(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "current", lambda: Device("a host", {}, HostClock))
    return Record(tmp_path / "results" / "a-host-2026-11-26-080000.json")


def text_of(record):
    """The day's page."""
    return (record.path.parent / "a-host-2026-11-26.md").read_text()


def benchmarks(record, seconds=60.0, case=None):
    def count(name, who, seconds):
        return steps.launches(case, HostClock(), who) if case else {}

    return measure.Benchmarks(record, HostClock(), Deadline(seconds), subject="cpp", count=count)


def trial(*, targets=None, dtype=torch.float32, **others):
    builds = implementations(ALGORITHMS["bsam"], SGD, "cpu") | {"cuda": _cuda} | others
    return Case(ALGORITHMS["bsam"], SGD, SHAPES, builds, targets or {}, repeat=2, dtype=dtype)


def _cuda(params):
    return bsam_fused.BSAM(params, backend="cuda", rho=RHO, **SGD.options)


def test_a_case(record, capsys):
    case = trial(targets={"extra memory": at_most(2.05), "launches": at_least(7), "GPU time": at_least(0)})
    run = benchmarks(record, case=case)
    run.step("trial", case)
    assert run.well
    written = json.loads(record.path.read_text())
    found = written["steps"]["trial"]
    for when in ("before", "after"):
        assert found[when]["copy_gb_per_s"] > 0
        assert found[when]["clocks"]
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
    text = text_of(record)
    assert "| cuda | not available: RuntimeError: backend='cuda'" in text
    assert all(f"| {name} |" in text for name in [*by_name, *figures])
    assert "| 2 + 2 + 2 |" in text
    assert page.case("trial", found) in text
    assert "### trial" in capsys.readouterr().out


def test_16_bits_are_compared_and_budgeted_as_such(record):
    """Stochastic rounding beside the loops' to nearest is not taken for wrong; weights elsewhere are."""
    run = benchmarks(record)
    builds = implementations(ALGORITHMS["sam"], BASES["adamw"], "cpu")
    many = Case(ALGORITHMS["sam"], BASES["adamw"], ((50_000,),), builds, repeat=1, dtype=torch.bfloat16)
    run.step("trial", many)  # Adam's rule takes some of these weights to about 0
    found = json.loads(record.path.read_text())["steps"]["trial"]
    assert run.well
    assert found["dtype"] == "bfloat16"
    assert all("gpu_ms" in found["implementations"][name] for name in ("loops", "torch", "cpp"))
    assert steps.budget(trial(dtype=torch.bfloat16), 1.0) == steps.budget(trial(), 1.0) / 2
    run.step("wrong", trial(dtype=torch.bfloat16, foreach=Away))
    assert json.loads(record.path.read_text())["steps"]["wrong"]["implementations"]["foreach"]["wrong"]


def test_a_count_that_fails_costs_only_the_count(record, capsys):
    def broken(name, who, seconds):
        raise ValueError("no CUPTI")

    run = measure.Benchmarks(record, HostClock(), Deadline(60), subject="cpp", count=broken)
    run.step("trial", trial())
    assert run.well
    assert "launches of trial not counted: ValueError: no CUPTI" in capsys.readouterr().out
    assert "figures" in json.loads(record.path.read_text())["steps"]["trial"]


def test_clocks_are_of_a_busy_device(tmp_path, monkeypatch):
    """nvidia-smi's answer, taken while work runs; without it, why there is none."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nsleep 0.2\necho '1980 MHz, 2619 MHz, 1980 MHz, 40, 300.00 W, 0x0000000000000000'\n")
    smi.chmod(0o755)
    worked = []

    class Busy(HostClock):
        def busy(self, work):
            worked.append(work)
            return super().busy(work)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    clocks = device.condition(Busy())["clocks"]
    assert clocks["clocks.sm"] == "1980 MHz"
    assert len(worked) > 2 * clock.COPIES
    monkeypatch.setenv("PATH", "")
    assert device.condition(HostClock())["clocks"] == {"why": "nvidia-smi is not there"}


def test_other_weights_are_not_timed_but_told(record):
    run = benchmarks(record)
    run.step("trial", trial(foreach=Wrong))
    found = json.loads(record.path.read_text())["steps"]["trial"]
    assert not run.well
    assert found["implementations"]["foreach"]["wrong"]
    assert "other weights than loops" in found["implementations"]["foreach"]["why"]
    assert "**wrong**: other weights" in text_of(record)
    assert "gpu_ms" in found["implementations"]["cpp"]


def test_one_that_takes_too_long_is_left_out(record, monkeypatch):
    monkeypatch.setattr(measure, "LEAST_SECONDS", 0.0)
    run = benchmarks(record, seconds=2.0)
    run.step("trial", trial(foreach=lambda params: time.sleep(10)))
    found = json.loads(record.path.read_text())["steps"]["trial"]["implementations"]
    assert run.well
    assert found["foreach"]["why"].startswith("OutOfTime: took more than")
    assert "gpu_ms" in found["cpp"]


def test_without_the_subject_a_case_is_a_failure(record):
    def broken(params):
        raise RuntimeError("no kernels\nand a long story")

    run = benchmarks(record)
    run.step("trial", trial(cpp=broken))
    assert not run.well
    written = json.loads(record.path.read_text())["steps"]["trial"]
    assert written["figures"] == []
    assert written["implementations"]["cpp"]["why"] == "RuntimeError: no kernels"


def test_a_case_that_cannot_run_does_not_stop_the_next(record):
    run = benchmarks(record)
    run.step("broken", trial(loops=lambda params: 1 / 0))
    run.step("trial", trial())
    found = json.loads(record.path.read_text())["steps"]
    assert not run.well
    assert found["broken"]["why"].startswith("RuntimeError: loops did not run")
    assert "figures" in found["trial"]
    assert "Not measured: RuntimeError: loops did not run" in text_of(record)


def test_what_there_is_no_time_for_says_so(record):
    run = benchmarks(record, seconds=1.0)
    run.step("trial", trial())
    run.operators("small", SHAPES, "cpp")
    written = json.loads(record.path.read_text())
    assert run.well  # that is no failure
    assert (
        written["steps"]["trial"]
        == written["operators"]["cpp, float32, small"]
        == {"why": "not begun: the time was up"}
    )


def test_operators(record):
    run = benchmarks(record)
    run.operators("small", SHAPES, "cpp")
    run.operators("small", SHAPES, "cuda")
    run.operators("small", SHAPES, "cpp", torch.bfloat16)
    assert run.well
    found = json.loads(record.path.read_text())["operators"]
    assert set(found["cpp, float32, small"]["operators"]) == set(OPERATORS)
    assert "cuda" in found["cuda, float32, small"]["why"]
    text = text_of(record)
    assert all(f"| cpp, float32, small | {name} |" in text for name in OPERATORS)
    assert "| cuda, float32, small | not available:" in text


def test_training_steps(record, monkeypatch):
    monkeypatch.setattr(training, "ALGORITHMS", ("bsam",))
    found = training.measure("digits", HostClock(), batch_size=4, steps=2, graph=False)
    assert [row["implementation"] for row in found["rows"]] == ["alone", "loops", "foreach", "torch", "cpp"]
    record.content["training"] = {"digits": found, "vit": {"why": "out of memory"}}
    record.save()
    text = text_of(record)
    assert "### Training steps of digits" in text
    assert "| BSAM, cpp |" in text
    assert "Not measured: out of memory" in text


def test_command(record, monkeypatch, capsys):
    monkeypatch.setattr(measure, "current", lambda: Device("a host", {}, HostClock))
    monkeypatch.setattr(measure, "SETS", {"both": {"a": trial(), "b": trial()}})
    monkeypatch.setattr(measure, "OPERATORS_ON", {"small": SHAPES})
    monkeypatch.setattr(measure.Benchmarks.__init__, "__defaults__", ("cpp", lambda *_: {}))
    asked = [
        "--record",
        str(record.path),
        "--operators",
        "cpp:float32",
        "--operators",
        "cpp:bfloat16",
        "--cases",
        "both",
    ]
    assert measure.main(asked) == 0
    written = json.loads(record.path.read_text())
    assert set(written["steps"]) == {"a", "b"}
    assert set(written["operators"]) == {"cpp, float32, small", "cpp, bfloat16, small"}
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
