"""The benchmarks' implementations agree, so that they compare like with like; and the commands work."""

import json
import math
import os
import sys
from pathlib import Path

import processes
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import on_cpu, one_operator
from bench.cases import SHAPES, Case, cpu_case
from bench.test_steps import CASES
from bsam_fused.report.clock import HostClock
from bsam_fused.report.implementations import ALGORITHMS, BASES, PACKAGE, implementations

ROOT = Path(__file__).parents[1]
FEW = ((5, 3), (3,), (7,))


def test_shapes_are_those_of_the_models():
    """Tensors and elements as torchvision, transformers and the papers count them."""
    assert {name: (len(shapes), sum(map(math.prod, shapes))) for name, shapes in SHAPES.items()} == {
        "resnet18": (62, 11_173_962),
        "resnet50": (161, 25_557_032),
        "wrn28_10": (80, 36_479_194),
        "pyramidnet110": (439, 28_485_477),
        "distilbert": (104, 66_955_010),
        "vit_b_16": (152, 86_567_656),
        "gpt2": (148, 124_439_808),
        "tiny500": (500, 32_000),
    }


@pytest.mark.parametrize(
    ("algorithm", "base", "moves"),
    [
        *(("bsam", "sgd", 17), ("bsam", "adamw", 19), ("sam", "sgd", 11), ("sam", "adamw", 13)),
        *(("extrapolated", "sgd", 13), ("gsam", "sgd", 13), ("wsam", "sgd", 12), ("norms", "sgd", 6)),
        *(("looksam", "sgd", 15), ("looksam_between", "sgd", 8), ("friendly", "sgd", 16)),
    ],
)
def test_byte_budgets_are_the_designs(algorithm, base, moves):
    assert cpu_case("resnet18", algorithm, base).moves == moves


def test_every_target_names_a_figure():
    for names in CASES:
        case = cpu_case(*names)
        others = {f"{name} / cpp" for name in case.builds}
        assert set(case.targets) <= others | {"cpp / byte budget", "extra memory of cpp"}


@pytest.fixture(scope="module")
def side():
    builds = implementations(ALGORITHMS["sam"], BASES["adamw"], "cpu")
    return on_cpu.measure(
        Case(ALGORITHMS["sam"], BASES["adamw"], FEW, builds, cpu_case("resnet18", "sam", "adamw").targets, repeat=3)
    )


def test_a_case(side):
    report = on_cpu.report(side)
    assert set(report["rows"]) == {"loops", "foreach", PACKAGE, "torch", "cpp"}
    assert report["rows"]["loops"]["loops_ratio"] == 1
    cpp = report["rows"]["cpp"]
    assert cpp["mbytes_to_move"] == pytest.approx(13 * 25 * 4 / 1e6)
    seconds = cpp["mbytes_to_move"] / 1e3 / report["copy_gb_per_s"]
    assert cpp["copy_percent"] == pytest.approx(100 * seconds / (cpp["step_ms"]["median"] / 1e3))
    assert set(cpp["phases_ms"]) == {"ascend", "step"}
    assert cpp["host_us"] > 0
    figures = {figure["name"]: figure for figure in report["figures"]}
    assert figures["cpp, a tensor"]["value"] == pytest.approx(1e3 * cpp["step_ms"]["median"] / len(FEW))
    assert figures[f"{PACKAGE} / cpp"]["target"].startswith(">= 2.00")
    assert "loops / cpp" in on_cpu.told(side)


def test_the_copy_that_counts_finds_the_caches_written_back(monkeypatch):
    """The copies after a repetition take 5, 3 and 1 seconds: ever fewer writes of others are left to write back."""

    class SlowAtFirst:
        bytes = 7

        def __init__(self, clock):
            self.took = []

        def seconds(self):
            self.took.append((5.0, 3.0, 1.0)[len(self.took) % 3])
            return self.took[-1]

    monkeypatch.setattr(on_cpu, "Copy", SlowAtFirst)
    builds = implementations(ALGORITHMS["sam"], BASES["sgd"], "cpu")
    few = {name: builds[name] for name in ("loops", "cpp")}
    for shapes in (FEW, ((1 << 12,),)):  # also without copies between the repetitions
        side = on_cpu.measure(Case(ALGORITHMS["sam"], BASES["sgd"], shapes, few, repeat=2))
        assert side.bytes_a_second == 7


def test_operators_move_what_the_design_says():
    class Clock(HostClock):
        copied = 1 << 10

        def busy(self, work):
            work()
            return 1e-6

    for found in one_operator.on_cpu(FEW, Clock()).values():
        rates = {name: it["gb_per_s"] for name, it in found.items()}
        moves = {"square_norm": 1, "ascend": 4, "descend": 5, "direction_sums": 2, "update_sgd": 6, "update_adam": 8}
        moves |= {"restore": 2, "combine": 5, "mix": 3, "update_sgd that remembers": 8}
        assert rates == pytest.approx({name: 1e-9 * n * 25 * 4 / 1e-6 for name, n in moves.items()})
        assert found["ascend"]["copy_percent"] == pytest.approx(100 * 4 * 25 / (2 * 1024))


def test_the_pytest_benchmark_command(tmp_path):
    """Rounds are those that were measured in turns, and the JSON has the rest of the row."""
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "pytest", "-q", "bench", "-k", "tiny500-sam-sgd or (ascend and tiny500)"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_XDIST_WORKER": ""}  # else there are no benchmarks
    done = processes.run([*command, "-p", "no:cacheprovider", f"--benchmark-json={out}"], cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {each["name"]: each for each in json.loads(out.read_text())["benchmarks"]}
    assert len(found) == 5 + 2
    cpp = found["test_step[tiny500-sam-sgd-cpp]"]
    assert cpp["group"] == "tiny500-sam-sgd"
    assert cpp["stats"]["rounds"] == cpu_case("tiny500", "sam", "sgd").repeat
    assert cpp["stats"]["median"] == pytest.approx(cpp["extra_info"]["step_ms"]["median"] / 1e3)
    loops = found["test_step[tiny500-sam-sgd-loops]"]["stats"]["median"]
    assert cpp["extra_info"]["loops_ratio"] == pytest.approx(loops / cpp["stats"]["median"])
