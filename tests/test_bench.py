"""The benchmark's implementations agree, so that it compares like with like; and its command works."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import step_time
from bench.cases import BSAM, CASES, SAM
from bench.contestant import Contestant, coefficients


@pytest.mark.parametrize("algorithm", [SAM, BSAM], ids=["SAM", "BSAM"])
@pytest.mark.parametrize("name", ["loops", "foreach"])
def test_others_take_the_same_steps(algorithm, name):
    # Few elements: the radius then moves each of them far enough for every phase to show in the result.
    curvatures = coefficients(((5, 3), (3,), (1,)), torch.float64)
    other, fused = (Contestant(algorithm.implementations[who], algorithm.calls, curvatures) for who in (name, "fused"))
    for _ in range(4):
        other.step()
        fused.step()
    torch.testing.assert_close(other.params, fused.params, rtol=1e-12, atol=1e-12)
    assert not torch.equal(fused.params[0], curvatures[0])


def test_shapes():
    assert (len(CASES["bsam-resnet18"].shapes), CASES["bsam-resnet18"].elements) == (62, 11_173_962)
    assert (len(CASES["bsam-distilbert"].shapes), CASES["bsam-distilbert"].elements) == (104, 66_955_010)
    assert (len(CASES["bsam-500x64"].shapes), CASES["bsam-500x64"].elements) == (500, 32_000)


@pytest.fixture
def _same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_same_threads_afterwards")
def test_command(tmp_path, capsys):
    out = tmp_path / "results" / "tiny.json"
    step_time.main(["--case", "tiny", "--repeat", "1", "--out", str(out)])
    written = json.loads(out.read_text())
    assert written["threads"] == 2
    assert written["torch"] == torch.__version__
    (case,) = written["cases"]
    assert case["case"] == "tiny"
    assert case["repetitions"] == 1
    assert set(case["step_ms"]) == {"loops", "foreach", "fused"}
    assert set(case["phase_ms"]["fused"]) == {"ascend", "descend", "step"}
    printed = capsys.readouterr().out
    assert all(figure["name"] in printed for figure in case["figures"])
