"""Training runs: the task is what it is said to be, rows can be made again, and a kill loses but the run under way."""

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import processes
import pytest
import torch

from bsam_fused.report.models import Refused
from bsam_fused.report.training import __main__ as command
from bsam_fused.report.training import after, runner
from bsam_fused.report.training.methods import METHODS, Base
from bsam_fused.report.training.runs import Run, plan, train
from bsam_fused.report.training.tasks import TASKS

NOISY = "digits, 40 % noise"
SGD = Run(NOISY, "base", None, seed=1, epochs=1, split="validation")
BSAM = replace(SGD, optimizer="BSAM", rho=0.3)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
pytestmark = pytest.mark.usefixtures("one_thread")  # as workers have


def test_labels_are_wrong_for_training_alone():
    """Of 400 labels replaced a tenth is right by chance; a seed decides which, and no test image is trained on."""
    true, noisy, other = TASKS["digits"].data(1), TASKS[NOISY].data(1), TASKS[NOISY].data(2)
    assert [len(part.y) for part in noisy] == [1000, 348, 449]
    assert all(torch.equal(mine.x, its.x) for mine, its in zip(noisy, true))
    assert 320 < (noisy.training.y != true.training.y).sum() < 400
    assert 95 < (noisy.validation.y != true.validation.y).sum() < 155
    assert torch.equal(noisy.test.y, true.test.y)
    assert torch.equal(noisy.test.x, other.test.x)
    assert not torch.equal(noisy.training.x, other.training.x)
    assert torch.equal(noisy.training.y, TASKS[NOISY].data(1).training.y)
    images = torch.cat([part.x for part in noisy]).flatten(1)
    assert len(images.unique(dim=0)) == 1797


def test_a_plan_has_every_seed_and_radius_once():
    found = plan([NOISY], {"base": [None], "SAM": [0.1, 0.2]}, range(2))
    assert [(run.seed, run.optimizer, run.rho) for run in found] == [
        (seed, *it) for seed in (0, 1) for it in [("base", None), ("SAM", 0.1), ("SAM", 0.2)]
    ]
    assert {run.epochs for run in found} == {40}
    assert plan([NOISY], {"base": [None]}, [1, 1]) == plan([NOISY], {"base": [None]}, [1])


def test_optimizers_differ_in_nothing_but_their_steps():
    """With ρ = 0 SAM is SGD: labels, weights, batches, learning rates and BatchNorm's statistics are the same."""
    sgd, sam = train(SGD), train(replace(SGD, optimizer="SAM", rho=0.0))
    assert sam.training_loss == pytest.approx(sgd.training_loss, rel=1e-4)
    assert sam.accuracy_percent == pytest.approx(sgd.accuracy_percent, abs=1)
    assert (sgd.steps, sgd.passes, sam.passes) == (15, 15, 30)
    assert train(BSAM).training_loss != pytest.approx(sgd.training_loss, rel=1e-3)


def test_rows_are_written_as_they_come_and_only_those_missing_are_made(tmp_path, capsys):
    """In a process of its own, each is what it is here, to the last bit; a run that fails says why."""
    path = tmp_path / "rows.jsonl"
    with pytest.raises(RuntimeError, match=r"--task nowhere(.|\n)*KeyError: 'nowhere'"):
        list(runner.run([SGD, replace(SGD, task="nowhere")], path, workers=1))
    (sgd,) = runner.written(path)
    assert sgd.run == SGD
    path.write_text(path.read_text() + '{"task": "noisy_dig')  # a kill came while it was written
    (bsam,) = runner.run([SGD, BSAM], path, workers=2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [asdict(sgd), asdict(bsam)]
    here = train(BSAM)
    assert (bsam.training_loss, bsam.accuracy_percent) == (here.training_loss, here.accuracy_percent)
    assert (bsam.threads, bsam.passes, bsam.torch) == (1, 45, torch.__version__)
    assert "--optimizer BSAM --seed 1 --epochs 1 --split validation --rho 0.3 --out " in bsam.command
    path.write_text(path.read_text().rstrip())  # whole, but for its last line's end
    assert not list(runner.run([SGD, BSAM], path))
    assert (
        command.main(
            ["--optimizer", "base", "--seed", "1", "1", "--epochs", "1", "--split", "validation", "--out", str(path)]
        )
        == 0
    )
    assert capsys.readouterr().out == f"1 rows are there already: {path}\n"
    assert path.read_text().splitlines(keepends=True) == [json.dumps(asdict(row)) + "\n" for row in (sgd, bsam)]
    path.write_text(path.read_text() + "a note")
    with pytest.raises(Refused, match="line 3 "):
        runner.written(path)


def test_two_processes_do_not_write_to_one_file(tmp_path):
    """Each would make all rows; the lock goes with the process, however that ends."""
    path = tmp_path / "rows.jsonl"
    hold = f"import fcntl; f = open({str(path)!r}, 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held'); input()"
    with processes.started([sys.executable, "-uc", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(Refused, match=f"--out {path}: another process"):
            list(runner.run([SGD], path, workers=1))
        other.kill()
        other.wait()
        assert [row.run for row in runner.run([SGD], path, workers=1)] == [SGD]


def test_a_worker_ends_with_whoever_asked():
    """A killed runner cannot end it."""
    command = [sys.executable, "-m", "bsam_fused.report.training.worker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": ENVIRONMENT}
    with processes.started(command, **pipes) as worker:
        long = replace(SGD, epochs=100_000)
        for run in (SGD, long):
            worker.stdin.write(json.dumps(asdict(run)).encode() + b"\n")
        worker.stdin.flush()
        assert json.loads(worker.stdout.readline())["optimizer"] == "base"
        worker.stdin.close()
        assert worker.wait(10) == 0


@pytest.mark.parametrize("content", ["a thesis", "a thesis\n", '{"a": 1}\n', '{"task": 1}', "[1]\n2", "\n"])
def test_others_files_stay_as_they_are(tmp_path, capsys, content):
    path = tmp_path / "thesis.txt"
    path.write_text(content)
    assert command.main(["--out", str(path)]) == 1
    assert f"--out {path}: line 1 " in capsys.readouterr().err
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (["--workers", "0"], "1 or more"),
        (["--epochs", "-1"], "1 or more"),
        (["--epochs", "abc"], "1 or more"),
        (["--rho", "-0.1"], "0 or more"),
        (["--rho", "nan"], "0 or more"),
    ],
)
def test_wrong_usage_is_told(capsys, argument, said):
    with pytest.raises(SystemExit, match="2"):
        command.main(argument)
    assert f"argument {argument[0]}: must be {said}" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "run", None)
    assert command.main(["--out", str(tmp_path)]) == 1
    assert f"--out {tmp_path}: " in capsys.readouterr().err


def test_an_interrupt_has_a_status_and_no_traceback(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupted)
    assert command.main(["--out", str(tmp_path / "rows.jsonl")]) == 130
    assert capsys.readouterr().err.endswith(": interrupted\n")


# ---- methods, and what is measured of what they trained


@pytest.mark.parametrize("name", [name for name in METHODS if name != "base"])
def test_every_method_takes_the_passes_it_is_planned_with(name):
    """Of 15 steps a quarter is 4. AE-SAM's depend on the gradients, so that it is between one pass and two."""
    row = train(replace(SGD, optimizer=name, rho=0.1, epochs=1))
    if name == "AE-SAM":
        assert 1 < row.passes / row.steps < 2
    else:
        assert row.passes == pytest.approx(METHODS[name].passes * row.steps, abs=1)


def test_the_loss_in_a_row_is_cross_entropy_whatever_is_climbed():
    """With ρ = 0 BiSAM is SGD, and BiSAM's own loss, some ½ lower, is in no row."""
    rows = [train(replace(SGD, optimizer=name, rho=rho)) for name, rho in (("base", None), ("BiSAM", 0.0))]
    assert rows[0].training_loss == pytest.approx(rows[1].training_loss, rel=1e-4)


def test_bsam_without_c_steps_along_what_is_left_of_its_formula():
    """d = g + g_max − ĝ_min, ĝ_min = g − r (g_max − g), r = lr / lr_0 = ½: written out on a network of one layer."""
    network, base, rho = torch.nn.Linear(3, 2, bias=False).double(), Base(torch.optim.SGD, {"lr": 0.4}), 0.3
    optimizer = METHODS["BSAM extrapolated, c = 1"].build(network, base, rho)
    optimizer.param_groups[0]["lr"] = 0.2
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(2, (8,))
    w = network.weight.detach().clone()

    def gradient(at):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(torch.nn.functional.cross_entropy(x @ at.T, y), at)[0]

    g = gradient(w)
    g_max = gradient(w + rho * g / g.norm())
    g_min = g - 0.5 * (g_max - g)

    def closure():
        loss = torch.nn.functional.cross_entropy(network(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(network.weight.detach(), w - 0.2 * (g + g_max - g_min), rtol=1e-12, atol=1e-12)


def test_normalization_layers_alone_are_perturbed():
    network = TASKS[NOISY].network()
    optimizer = METHODS["SAM, norm layers"].build(network, TASKS[NOISY].base, 0.5)
    norms, rest = optimizer.param_groups
    shapes = {tuple(p.shape) for p in norms["params"]}
    assert (shapes, len(norms["params"])) == ({(16,), (32,), (128,)}, 6)
    assert (norms.get("perturb", True), rest["perturb"]) == (True, False)
    assert len(norms["params"]) + len(rest["params"]) == len(list(network.parameters()))


def test_weights_are_rounded_to_so_many_bits_and_put_back():
    """2 bits leave −s, 0 and s; at 8 every weight is within half of max |W| / 127. Biases stay."""
    layer = torch.nn.Linear(40, 30)
    before = copy.deepcopy(layer.state_dict())
    with after._rounded(layer, 2):
        s = before["weight"].abs().max()
        assert torch.equal(layer.weight.unique(), torch.stack([-s, s * 0, s]))
        assert torch.equal(layer.bias, before["bias"])
    with after._rounded(layer, 8):
        assert len(layer.weight.unique()) > 200
        assert ((layer.weight - before["weight"]).abs() <= s / 254 + 1e-7).all()
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_a_row_of_the_test_split_has_what_was_measured():
    """Of a network at its beginning nothing is at chance but the loss, and it says so."""
    row = train(replace(SGD, rho=None, split="test", epochs=2))
    assert set(row.quantized_percent) == {"8", "4", "3", "2"}
    assert row.quantized_percent["8"] == pytest.approx(row.accuracy_percent, abs=3)
    assert row.sharpness["BilS"] == pytest.approx(row.sharpness["MaxS"] + row.sharpness["MinS"])
    assert row.sharpness["eigenvalue"] > 0
    assert row.chance_loss == pytest.approx(math.log(10), rel=1e-2)
    assert not row.diverged
    assert replace(row, training_loss=math.nan).diverged
    assert replace(row, training_loss=2.29).diverged
    assert not train(SGD).quantized_percent
