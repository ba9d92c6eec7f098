"""Training runs: the task is what it is said to be, rows can be made again, and a kill loses but the run under way."""

import json
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
from bsam_fused.report.training import runner
from bsam_fused.report.training.runs import Run, plan, train
from bsam_fused.report.training.tasks import digits, noisy_digits

SGD = Run("noisy_digits", "SGD", None, seed=1, epochs=1)
BSAM = replace(SGD, optimizer="BSAM", rho=0.3)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
pytestmark = pytest.mark.usefixtures("one_thread")  # as workers have


def test_labels_are_wrong_for_training_alone():
    """Of 400 labels replaced a tenth is right by chance; a seed decides which, and no test image is trained on."""
    true, noisy = digits(torch.float32, test_images=797), noisy_digits(1)
    assert (len(noisy.y), len(noisy.y_test)) == (1000, 797)
    assert 330 < (noisy.y != true.y).sum() < 390
    assert torch.equal(noisy.y_test, true.y_test)
    assert torch.equal(noisy.x, true.x)
    assert not torch.equal(noisy.y, noisy_digits(2).y)
    assert torch.equal(noisy.y, noisy_digits(1).y)
    images = torch.cat([noisy.x, noisy.x_test]).flatten(1)
    assert len(images.unique(dim=0)) == 1797


def test_a_plan_has_every_seed_and_radius_once():
    found = plan(["noisy_digits"], {"SGD": [None], "SAM": [0.1, 0.2]}, range(2))
    assert [(run.seed, run.optimizer, run.rho) for run in found] == [
        (seed, *it) for seed in (0, 1) for it in [("SGD", None), ("SAM", 0.1), ("SAM", 0.2)]
    ]
    assert {run.epochs for run in found} == {40}
    assert plan(["noisy_digits"], {"SGD": [None]}, [1, 1]) == plan(["noisy_digits"], {"SGD": [None]}, [1])


def test_optimizers_differ_in_nothing_but_their_steps():
    """With ρ = 0 SAM is SGD: labels, weights, batches, learning rates and BatchNorm's statistics are the same."""
    sgd, sam = train(SGD), train(replace(SGD, optimizer="SAM", rho=0.0))
    assert sam.training_loss == pytest.approx(sgd.training_loss, rel=1e-4)
    assert sam.test_accuracy_percent == pytest.approx(sgd.test_accuracy_percent, abs=1)
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
    assert (bsam.training_loss, bsam.test_accuracy_percent) == (here.training_loss, here.test_accuracy_percent)
    assert (bsam.threads, bsam.passes, bsam.torch) == (1, 45, torch.__version__)
    assert "--optimizer BSAM --seed 1 --epochs 1 --rho 0.3 --out " in bsam.command
    path.write_text(path.read_text().rstrip())  # whole, but for its last line's end
    assert not list(runner.run([SGD, BSAM], path))
    assert command.main(["--optimizer", "SGD", "--seed", "1", "1", "--epochs", "1", "--out", str(path)]) == 0
    assert capsys.readouterr().out == f"1 rows are there already: {path}\n"
    assert path.read_text().splitlines(keepends=True) == [json.dumps(asdict(row)) + "\n" for row in (sgd, bsam)]
    path.write_text(path.read_text() + "a note")
    with pytest.raises(Refused, match="line 3 "):
        runner.written(path)


def test_a_worker_ends_with_whoever_asked():
    """A killed runner cannot end it."""
    command = [sys.executable, "-m", "bsam_fused.report.training.worker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": ENVIRONMENT}
    with processes.started(command, **pipes) as worker:
        long = replace(SGD, epochs=100_000)
        for run in (SGD, long):
            worker.stdin.write(json.dumps(asdict(run)).encode() + b"\n")
        worker.stdin.flush()
        assert json.loads(worker.stdout.readline())["optimizer"] == "SGD"
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
