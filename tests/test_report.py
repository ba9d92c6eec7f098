"""The report's figures are those of the runs, its page stands alone, and its check catches a wrong formula."""

import gc
import json
import math
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import bsam_fused
from bench import picture
from bsam_fused import cli
from bsam_fused.ops import native_flat
from bsam_fused.report import learning, make, models, sweep, timing, write
from bsam_fused.report.clock import HostClock
from bsam_fused.report.contestant import Contestant, after_two_steps, coefficients
from bsam_fused.report.implementations import ALGORITHMS, BASES, implementations
from bsam_fused.report.training import runner, tasks
from bsam_fused.report.training.runs import train
from bsam_fused.report.training.tasks import Digits

pytestmark = pytest.mark.usefixtures("one_thread")  # as the command has it by default
FEW = 96  # images: three batches of 32
RECIPE = learning.Recipe(epochs=1, batch_size=32)
ALONE = ["loops", "foreach", "pytorch_optimizer", "torch", "cpp"]


@pytest.fixture(autouse=True)
def _little_work(monkeypatch):
    """Every digit still comes up, in one small piece of the real data; and little else is measured."""
    digits = tasks.digits
    monkeypatch.setattr(tasks, "digits", lambda *how, **more: Digits(*(part[:FEW] for part in digits(*how, **more))))
    monkeypatch.setattr(runner, "run", lambda wanted: map(train, wanted))
    monkeypatch.setattr(sweep, "SECONDS", 0.0)
    monkeypatch.setattr(HostClock, "copied", 1 << 16)


def report(tmp_path, *arguments, status=0):
    """Run the command; return what it wrote as JSON."""
    assert (
        cli.main(
            ["report", "--out", str(tmp_path / "out"), "--steps", "2", "--epochs", "2", "--seeds", "2", *arguments]
        )
        == status
    )
    return json.loads((tmp_path / "out" / "report.json").read_text())


# ---- whole reports


def test_command_writes_page_and_figures(tmp_path, capsys):
    found = report(tmp_path)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.html", "report.json"]
    assert found["agree"] is True
    assert found["partial"] is False
    assert found["learning"]["steps"] == 2 * (FEW // found["learning"]["recipe"]["batch_size"]) == 2
    assert found["machine"]["threads"] == 1
    assert {"bsam_fused", "python", "torch", "cpu", "git_commit"} <= set(found["machine"])
    outcomes = {outcome["optimizer"]: outcome for outcome in found["benefit"]["outcomes"]}
    assert {name: outcome["rho"] for name, outcome in outcomes.items()} == {"SGD": None, "SAM": 0.6, "BSAM": 0.3}
    for name, outcome in outcomes.items():
        trained = name.replace("SGD", "base")
        each = [row["accuracy_percent"] for row in found["benefit"]["rows"] if row["optimizer"] == trained]
        assert outcome["accuracies_percent"] == each
        assert outcome["accuracy_percent"] == pytest.approx(sum(each) / 2)
        assert outcome["spread_percent"] == pytest.approx(abs(each[0] - each[1]) / math.sqrt(2))
    names = [(row["algorithm"], row["implementation"]) for row in found["rows"]]
    sam = [("SAM", name) for name in ALONE]
    assert names == [("sgd", "alone"), *sam, *(("BSAM", it) for it in ALONE if it != "pytorch_optimizer")]
    printed = capsys.readouterr().out
    for row in found["rows"]:
        assert row["steps"] == 2
        assert f"{row['algorithm']}, {row['implementation']}" in printed
        floor = row["passes"] * found["base_pass_ms"]
        assert row["overhead_percent"] == pytest.approx(100 * (row["step_ms"] / floor - 1))
        assert row["optimizer_percent"] == pytest.approx(100 * sum(row["phases_ms"].values()) / floor)
    assert "3 such passes" in printed
    points = [point for point in found["points"] if point["implementation"] == "cpp" and point["algorithm"] == "BSAM"]
    assert points[-1]["elements"] == found["parameters"] == 72_058
    moved = 17 * 72_058 * 4 / (points[-1]["optimizer_ms"] / 1e3)
    assert points[-1]["gb_per_s"] == pytest.approx(moved / 1e9)
    assert points[-1]["extra_mb"] == pytest.approx(2 * 72_058 * 4 / 1e6, rel=0.05)

    picture.draw(found, tmp_path / "picture.png")
    assert 10_000 < (tmp_path / "picture.png").stat().st_size < 150_000

    page = (tmp_path / "out" / "index.html").read_text()
    assert "http" not in page
    assert not re.search(r"\bsrc=|<script|@import|url\((?!#)", page)
    assert all(target.startswith(("#", "data:,")) for target in re.findall(r'href="([^"]*)"', page))
    assert page.count("<svg") == 6
    assert "prefers-color-scheme: dark" in page
    headings = ("What it is for", "What it costs", "Fused and plain learn the same", "What now")
    assert [page.index(f"<h2>{heading}") for heading in headings] == sorted(page.index(f"<h2>{it}") for it in headings)
    assert "losses agree" in page


def test_an_interrupt_keeps_the_training_runs_that_are_finished(tmp_path, monkeypatch):
    def interrupted(wanted):
        yield train(wanted[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    found = report(tmp_path, status=130)
    assert found["partial"] is True
    assert [outcome["optimizer"] for outcome in found["benefit"]["outcomes"]] == ["SGD"]
    assert found["rows"] == []
    with pytest.raises(ValueError, match="needs a whole report"):
        picture.draw(found, tmp_path / "picture.png")


def test_options_are_obeyed(tmp_path):
    options = ["--model", f"{__name__}:own_of_size", "--batch-size", "3", "--dtype", "float64"]
    found = report(tmp_path, *options, "--optimizer", "asam", "--base", "adamw")
    assert found["batch"] == "inputs (3, 4)"
    assert (found["dtype"], found["base"], found["tensors"]) == ("float64", "adamw", 2)
    assert (found["learning"], found["benefit"]) == (None, None)
    names = [row["implementation"] for row in found["rows"]]
    assert names == ["alone", "loops", "pytorch_optimizer", "torch", "cpp"]


def test_what_cannot_be_had_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer.optimizer.sam", None)
    found = report(tmp_path, "--model", f"{__name__}:own", "--optimizer", "sam")
    assert "pytorch_optimizer" in found["absent"]["SAM, pytorch_optimizer"]
    assert "pytorch_optimizer" not in [row["implementation"] for row in found["rows"]]
    assert "Not measured: SAM, pytorch_optimizer: ModuleNotFoundError" in capsys.readouterr().out
    assert "Not measured" in (tmp_path / "out" / "index.html").read_text()


def test_a_failed_write_keeps_the_old_report(monkeypatch, tmp_path):
    (tmp_path / "index.html").write_text("old")
    draft = make.Draft(make.Options(model="tiny500"))

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(models.Refused, match="no space"):
        write.files(draft.report(partial=True), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    assert (tmp_path / "index.html").read_text() == "old"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that is there and takes no file from root")
def test_where_nothing_can_be_written_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(make.Draft, "run", None)
    assert cli.main(["report", "--model", "tiny500", "--out", "/proc/self"]) == 1
    assert "--out /proc/self: " in capsys.readouterr().err


def test_figures_are_shown_before_files_are_written(monkeypatch, tmp_path, capsys):
    """A disk that filled up meanwhile must not take all of them."""

    def full(*_):
        raise models.Refused("no space left on device")

    monkeypatch.setattr(write, "files", full)
    assert cli.main(["report", "--out", str(tmp_path), "--model", f"{__name__}:own", "--steps", "1"]) == 1
    printed = capsys.readouterr()
    assert "BSAM, cpp" in printed.out
    assert "Written" not in printed.out
    assert "no space left" in printed.err


def test_a_network_that_cannot_take_a_pass_is_heard_of_before_any_training(monkeypatch, tmp_path):
    """BatchNorm takes no batch of one; minutes of training would be lost with the error."""
    monkeypatch.setattr(runner, "run", None)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        cli.main(["report", "--out", str(tmp_path / "out"), "--batch-size", "1"])
    assert not list(tmp_path.iterdir())


def test_a_graph_that_cannot_be_captured_is_told_and_the_last_backend_there_is_the_one(monkeypatch):
    work = models.workload("tiny500", 2, torch.device("cpu"), torch.float32)

    def training():
        return timing.Training(work, ["sam"], "sgd", BASES["sgd"], HostClock(), graph=True)

    assert "SAM, cpp, graph" in training().absent
    monkeypatch.setattr(timing, "graphed", lambda *_: lambda: None)
    monkeypatch.setattr(native_flat, "load", lambda: (None, "not built"))
    last = training().timed[-1]
    assert (last.implementation, last.whole is not None) == ("torch, graph", True)


# ---- models


@pytest.mark.parametrize("name", ["digits", "resnet18", "wrn28_10", "pyramidnet110", "tiny500"])
def test_built_in_models_train(name):
    work = models.workload(name, 2, torch.device("cpu"), torch.float32)
    work.loss(work.model(work.inputs), work.targets).backward()
    assert all(p.grad is not None for p in work.model.parameters())


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "gpt2"])
def test_large_built_in_models_give_logits(name):
    """On the meta device: shapes alone."""
    build, shape, classes, _ = models.BUILT_IN[name]
    with torch.device("meta"):
        inputs = torch.zeros(2, *shape) if name != "gpt2" else torch.zeros(2, *shape, dtype=torch.long)
        outputs = build()(inputs)
    assert outputs.shape == ((2, classes) if name != "gpt2" else (2 * shape[0], classes))


def own():
    return nn.Linear(4, 1), (torch.rand(3, 4), torch.rand(3, 1)), nn.functional.mse_loss


def own_of_size(batch_size=5):
    return nn.Linear(4, 2), (torch.rand(batch_size, 4), torch.zeros(batch_size, dtype=torch.long))


def floats():
    """Cross-entropy takes them for probabilities: of one class, its loss is 0, whatever the network."""
    return nn.Linear(4, 1), (torch.rand(3, 4), torch.rand(3, 1))


ok = own  # with colons around it an emoji's name
not_callable = 3
without_signature = dict


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def named():
    return Fails(4, 2), (Pair(torch.rand(3, 4), torch.zeros(3).long()), torch.zeros(3).long())


def frozen():
    return nn.Linear(4, 2).requires_grad_(False), (torch.rand(3, 4), torch.zeros(3).long())


def loss_by_name():
    return nn.Linear(4, 1), (torch.rand(3, 4), torch.rand(3, 1)), "mse"


def not_a_model():
    return "model", (0, 0)


def nothing():
    return nn.Linear(1, 1)


def test_a_module_in_the_current_directory(tmp_path, monkeypatch):
    """The installed command's path has its own folder, not the current one; `python -m` does."""
    source = (
        "import torch\n\n\ndef build():\n    return torch.nn.Linear(3, 2), (torch.ones(4, 3), torch.zeros(4).long())\n"
    )
    (tmp_path / "in_no_package.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", str(tmp_path))])
    assert models.workload("in_no_package:build", None, torch.device("cpu"), torch.float32).inputs.shape == (4, 3)


def test_a_users_model(tmp_path, capsys):
    found = report(tmp_path, "--model", f"{__name__}:ok", "--optimizer", "sam")
    assert (found["parameters"], found["batch"]) == (5, "inputs (3, 4)")
    assert f"A training step of {__name__}:ok: inputs" in capsys.readouterr().out


def test_inputs_may_be_a_namedtuple():
    inputs = models.workload(f"{__name__}:named", None, torch.device("cpu"), torch.float64).inputs
    assert (type(inputs), inputs.left.dtype, inputs.right.dtype) == (Pair, torch.float64, torch.int64)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "resnet19"], "--model resnet19: must be one of digits, resnet18,"),
        (["--model", "no_such_module:f"], "--model no_such_module:f: No module named 'no_such_module'"),
        (["--model", f"{__name__}:nowhere"], "has no function 'nowhere'"),
        (["--model", f"{__name__}:nothing"], r"return (model, (inputs, targets))"),
        (["--model", f"{__name__}:not_a_model"], "is a str, not a torch.nn.Module"),
        (["--model", ":f"], "--model :f: must be module:function"),
        (["--model", ".x:f"], "--model .x:f: must be module:function"),
        (["--model", f"{__name__}:not_callable"], "has no function 'not_callable'"),
        (["--model", f"{__name__}:without_signature", "--batch-size", "2"], "has no parameter batch_size"),
        (["--model", f"{__name__}:frozen"], "no parameters that require gradients"),
        (["--model", f"{__name__}:loss_by_name"], "the loss, is a str, not a function"),
        (["--model", f"{__name__}:floats"], "its targets are torch.float32; return their loss, too"),
        (["--model", f"{__name__}:own", "--batch-size", "2"], "--batch-size 2"),
        (["--graph"], "--graph captures CUDA graphs: it needs --device cuda, not cpu"),
        (["--device", "cuda"], "--device cuda: "),
    ],
)
def test_wrong_options_are_named(tmp_path, capsys, arguments, said):
    if arguments == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["report", "--out", str(tmp_path / "out"), *arguments]) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


class Fails(nn.Linear):
    def forward(self, x):
        raise RuntimeError("the user's own")


def no_data():
    raise FileNotFoundError("the user's own")


def wrong_value():
    raise ValueError("the user's own")


def wrong_network():
    return Fails(4, 2), (torch.rand(3, 4), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("function", [no_data, wrong_value, wrong_network])
def test_a_users_error_keeps_its_traceback(tmp_path, function):
    """One line would not say where it is."""
    with pytest.raises((OSError, ValueError, RuntimeError), match="the user's own") as raised:
        cli.main(["report", "--out", str(tmp_path), "--model", f"{__name__}:{function.__name__}"])
    assert raised.traceback[-1].path.name == "test_report.py"


def test_an_import_that_fails_inside_the_users_module_is_its_own(tmp_path, monkeypatch):
    """It is not the module that cannot be found."""
    (tmp_path / "imports_what_is_not_there.py").write_text("import not_there\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there"):
        models.workload("imports_what_is_not_there:build", None, torch.device("cpu"), torch.float32)


# ---- where it is written


@pytest.mark.parametrize("files", [{"index.html": "a site"}, {"report.json": "{}"}, {"report.json": "a table"}])
def test_others_files_are_not_overwritten(tmp_path, capsys, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cli.main(["report", "--out", str(tmp_path)]) == 1
    assert f"--out {tmp_path}: there is {next(iter(files))}, of no earlier report" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_an_earlier_report_is_replaced_and_that_is_said(tmp_path, capsys):
    assert not write.prepare(tmp_path / "out")
    write.files(make.Draft(make.Options(model="tiny500")).report(partial=True), tmp_path / "out")
    found = report(tmp_path, "--model", f"{__name__}:own", "--optimizer", "sam")
    assert re.search(r"^Replaced: the report of 20.* on tiny500, cpu$", capsys.readouterr().out, re.MULTILINE)
    assert found["model"] == f"{__name__}:own"


# ---- figures


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_clock_weighs_what_the_design_says(name):
    """A matrix of 1 MB and its bias: what each keeps beside parameters, gradients and momentum is 0 to 3 N."""
    algorithm, base, clock = ALGORITHMS[name], BASES["sgd"], HostClock()
    curvatures = coefficients(((512, 511), (512,)))
    build = implementations(algorithm, base, "cpu")["cpp"]

    def steps(build, calls):
        contestant = Contestant(build, calls, curvatures)
        for _ in range(2):
            contestant.step(lambda phase: phase())

    of_base = clock.peak_bytes(lambda: steps(partial(base.build, fused=True), ("step",)))[1]
    own = clock.peak_bytes(lambda: steps(build, algorithm.calls))[1]
    assert (own - of_base) / (4 << 18) == pytest.approx(algorithm.extra, abs=0.01)


def test_the_clock_sees_what_a_phase_allocates_for_a_moment():
    """A step that clones its one gradient: N more than the base; what the pass allocates must not hide it."""

    class Clones(torch.optim.SGD):
        def step(self, closure=None):
            copies = [p.grad.clone() for group in self.param_groups for p in group["params"]]
            super().step()
            del copies

    clock, curvatures = HostClock(), coefficients(((1 << 18,),))

    def peak(kind):
        return clock.peak_bytes(lambda: after_two_steps(partial(kind, lr=0.1), ("step",), curvatures))[1]

    assert (peak(Clones) - peak(torch.optim.SGD)) / (4 << 18) == pytest.approx(1, abs=0.01)


def test_gradients_are_as_autograd_leaves_them():
    """Python has no object for them, which would be freed with them and timed."""

    def objects():
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    curvatures = coefficients(((3,), (2, 2)))
    contestant = Contestant(lambda params: torch.optim.SGD(params, lr=0.1), ("step",), curvatures)
    before = objects()
    contestant._backward()
    assert objects() == before
    for p, t in zip(contestant.params, curvatures, strict=True):
        torch.testing.assert_close(p.grad, t + t * t)


def test_sizes_hold_shares_of_the_elements():
    shapes = [(1,)] * 256
    assert sweep.sizes(shapes) == [1, 4, 16, 64, 256]
    assert sweep.sizes([(10, 10), (10, 10), (1,)]) == [1, 3]
    assert sweep.sizes([(1,), (10, 10), (1,)]) == [1, 3], "the two largest would be one point"


# ---- learning


def otherwise(options):
    """The fused BSAM, with other options than the recipe's."""

    def build(params, recipe):
        return bsam_fused.BSAM(params, **{"rho": recipe.rho, "rho_min": recipe.rho_min, **recipe.base, **options})

    return replace(learning.FUSED_BSAM, build=build)


def test_every_implementation_trains_alike_but_for_its_formulas():
    """All start at the same weights; with ρ = 0, SAM is SGD."""
    recipe = replace(RECIPE, rho=0.0)
    runs = learning.prepare([learning.SGD, learning.PLAIN_SAM, learning.FUSED_SAM], recipe)
    assert list(learning.train(runs, tasks.digits(), recipe)) == [0, 1, 2]
    for run in runs[1:]:
        assert run.losses == pytest.approx(runs[0].losses, rel=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [{"update_from": "w_min"}, {"rho_min_decay": "none"}, {"rho": 0.05 * 1.001}, {"norm_eps": 1e-3}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_formula_does_not_agree(wrong):
    recipe = replace(RECIPE, epochs=5)
    runs = learning.prepare([learning.PLAIN_BSAM, otherwise(wrong)], recipe)
    for _ in learning.train(runs, tasks.digits(), recipe):
        pass
    (comparison,) = learning.compare(runs)
    assert not comparison.agree
    assert comparison.deviation > 10 * learning.RTOL


def test_a_wrong_formula_fails_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(learning, "STUDENTS", (*learning.STUDENTS[:-1], otherwise({"update_from": "w_min"})))
    found = report(tmp_path, "--epochs", "3", status=1)
    assert "DIFFER" in capsys.readouterr().out
    assert [row["agree"] for row in found["learning"]["comparisons"]] == [True, False]
    assert "DIFFER" in (tmp_path / "out" / "index.html").read_text()


def test_nan_never_agrees():
    runs = learning.prepare(learning.STUDENTS[1:3], RECIPE)
    for run in runs:
        run.losses = [1.0, math.nan, 1.0]
    assert not learning.compare(runs)[0].agree
