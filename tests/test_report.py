"""The report's figures are those of the runs, its page stands alone, and its check catches a wrong formula."""

import json
import re
from dataclasses import replace

import pytest
import torch
from rich.progress import Progress

import bsam_fused
from bsam_fused import cli
from bsam_fused.ops import dispatch
from bsam_fused.report import make, results, train, write

METHODS = ["SGD", "SAM", "SAM", "BSAM", "BSAM"]
pytestmark = pytest.mark.usefixtures("one_thread")  # as the command has it by default
FEW = 96  # images: three batches of 32
RECIPE = train.Recipe(epochs=1, batch_size=32)


@pytest.fixture(autouse=True)
def _little_data(monkeypatch):
    """Every digit still comes up, in one small piece of the real data."""
    digits = train.digits

    def few(dtype):
        return train.Digits(*(part[:FEW] for part in digits(dtype)))

    monkeypatch.setattr(train, "digits", few)


@pytest.fixture
def report():
    with Progress(disable=True) as progress:
        return make.measured(RECIPE, progress)


def otherwise(options):
    """The fused BSAM, with other options than the recipe's."""

    def build(params, recipe):
        return bsam_fused.BSAM(params, **{"rho": recipe.rho, "rho_min": recipe.rho_min, **recipe.base, **options})

    return replace(train.FUSED_BSAM, build=build)


def test_command_writes_page_and_figures(tmp_path, capsys):
    assert cli.main(["report", "--out", str(tmp_path / "new" / "folder"), "--epochs", "2"]) == 0
    written = tmp_path / "new" / "folder"
    assert sorted(path.name for path in written.iterdir()) == ["index.html", "report.json"]
    figures = json.loads((written / "report.json").read_text())
    assert figures["agree"] is True
    assert figures["steps"] == figures["recipe"]["epochs"] * (FEW // figures["recipe"]["batch_size"]) == 2
    assert figures["backend"] == dispatch.choose("auto", torch.device("cpu")).backend
    assert figures["machine"]["threads"] == 1
    assert {"bsam_fused", "python", "torch", "cpu", "git_commit"} <= set(figures["machine"])
    assert [row["method"] for row in figures["measurements"]] == METHODS
    assert {row["method"] for row in figures["comparisons"]} == {"SAM", "BSAM"}
    printed = capsys.readouterr().out
    for row in figures["measurements"]:
        assert f"{row['method']}, {row['kind']}" in printed
        assert len(row["epoch_losses"]) == 2
        assert row["overhead_percent"] == pytest.approx(100 * row["optimizer_ms"] / row["passes_ms"])


def test_page_needs_no_other_file(report):
    page = write.page(report)
    assert "http" not in page
    assert not re.search(r"\bsrc=|<link|<script|@import|url\((?!#)", page)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert page.count("<svg") == 3
    assert "prefers-color-scheme: dark" in page
    assert "losses agree" in page


def test_times_are_medians_of_the_steps_after_the_warm_up():
    data = train.digits(torch.float32)
    (run,) = train.prepare([train.SGD], RECIPE, torch.float32)
    run.losses, run.passes, run.own = [3.0, 2.0, 1.0, 2.0], [9.0, 9.0, 0.002, 0.004], [9.0, 9.0, 0.001, 0.001]
    measured = results.measure(run, data, replace(RECIPE, epochs=2))
    assert measured.passes_ms == pytest.approx(3)
    assert measured.optimizer_ms == pytest.approx(1)
    assert measured.step_ms == pytest.approx(4)
    assert measured.overhead_percent == pytest.approx(100 / 3)
    assert measured.epoch_losses == [2.5, 1.5]


def test_every_implementation_trains_alike_but_for_its_formulas():
    """All start at the same weights; with ρ = 0, SAM is SGD."""
    recipe = replace(RECIPE, rho=0.0)
    data = train.digits(torch.float64)
    runs = train.prepare([train.SGD, train.PLAIN_SAM, train.FUSED_SAM], recipe, torch.float64)
    assert list(train.train(runs, data, recipe)) == [0, 1, 2]
    for run in runs[1:]:
        assert run.losses == pytest.approx(runs[0].losses, rel=1e-12)
        assert len(run.passes) == len(run.own) == 3


@pytest.mark.parametrize(
    "wrong",
    [{"update_from": "w_min"}, {"rho_min_decay": "none"}, {"rho": 0.05 * 1.001}, {"norm_eps": 1e-3}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_formula_does_not_agree(wrong):
    recipe = replace(RECIPE, epochs=5)
    data = train.digits(torch.float64)
    runs = train.prepare([train.PLAIN_BSAM, otherwise(wrong)], recipe, torch.float64)
    for _ in train.train(runs, data, recipe):
        pass
    (comparison,) = results.compare(runs)
    assert not comparison.agree
    assert comparison.deviation > 10 * results.RTOL


def test_a_wrong_formula_fails_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(make, "COMPARED", (*make.COMPARED[:-1], otherwise({"update_from": "w_min"})))
    assert cli.main(["report", "--out", str(tmp_path), "--epochs", "3"]) == 1
    assert "DIFFER" in capsys.readouterr().out
    figures = json.loads((tmp_path / "report.json").read_text())
    assert [row["agree"] for row in figures["comparisons"]] == [True, False]
    assert "DIFFER" in (tmp_path / "index.html").read_text()


def test_nan_never_agrees():
    runs = train.prepare(make.COMPARED[:2], RECIPE, torch.float64)
    for run in runs:
        run.losses = [1.0, float("nan"), 1.0]
    assert not results.compare(runs)[0].agree


def test_interrupt_leaves_no_files(monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    assert cli.main(["report", "--out", str(tmp_path)]) == 130
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_report(report, monkeypatch, tmp_path):
    (tmp_path / "index.html").write_text("old")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        write.files(report, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    assert (tmp_path / "index.html").read_text() == "old"
