"""`bsam-fused rho` suggests what was measured, by short runs what a plain loop gives, and refuses in one line."""

import copy
import math

import pytest
import torch
from torch import nn

from bsam_fused import cli
from bsam_fused.report import loops, models, radius_runs

pytestmark = pytest.mark.usefixtures("one_thread")  # as the command has it by default
CPU = torch.device("cpu")


def rho(*arguments, status=0):
    assert cli.main(["rho", *arguments]) == status


def model(function):
    return f"--model={__name__}:{function.__name__}"


# ---- networks of a user


def slope():
    """L(w) = 2 + 3 w, at w = 0: the rise is 3 ρ, and a tenth of the loss at ρ = 0.2 / 3. Targets of no length."""
    line = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(line.weight)
    return line, (torch.full((4, 1), 3.0), None), lambda output, _: 2 + output.mean()


def steep():
    return *slope()[:2], lambda output, _: 2 + 1e4 * output.mean()


def flat():
    return *slope()[:2], lambda output, _: 2 + 1e-4 * output.mean()


def negative():
    return *slope()[:2], lambda output, _: output.mean() - 2


def no_number():
    return *slope()[:2], lambda output, _: output.mean() * math.nan


def fails():
    return nn.Linear(2, 2), (torch.rand(3, 4), torch.zeros(3, dtype=torch.long))


class Classifier(nn.Module):
    """Of a dict, with a layer of running statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, batch):
        return self.layers(batch["x"])


def classes(batch_size=43):
    x = torch.randn(batch_size, 2)
    return Classifier(), ({"x": x, "scale": None}, (x[:, 0] > 0).long() + (x[:, 1] > 1).long())


def diverging():
    return *classes()[:2], lambda output, y: (1e30 * output.exp()).square().square().mean()


def flattened():
    """A target for each of five places of an example."""
    return nn.Linear(5, 3), (torch.rand(8, 5), torch.zeros(40, dtype=torch.long))


def of_several_lengths():
    return Classifier(), ({"x": torch.rand(8, 2), "mask": torch.ones(5)}, torch.zeros(8, dtype=torch.long))


def without_tensors():
    return Classifier(), ({"x": 3}, torch.zeros(8, dtype=torch.long))


def interrupted():
    def loss(output, _):
        raise KeyboardInterrupt

    return *classes(), loss


# ---- by the rise


def test_the_suggestion_and_its_picture(tmp_path, capsys):
    picture = tmp_path / "new" / "rises.png"
    rho(model(slope), "--out", str(picture), "--dtype", "float64")
    printed = capsys.readouterr().out
    assert "inputs (4, 1), float64, on cpu; the loss is 2.\n" in printed
    rows = [line.strip("│ ").split("│") for line in printed.splitlines() if line.startswith("│")]
    assert len(rows) == 13
    first, last = ([cell.strip() for cell in rows[i]] for i in (0, -1))
    assert (first, last) == (["0.005", "0.015", "0.75 %"], ["5", "15", "750 %"])
    assert "Suggested: ρ = 0.027: there the loss rises by 4 % of itself (0.08).\n" in printed
    assert "For BSAM half of it: ρ = 0.013.\n" in printed
    assert "random" not in printed
    assert printed.endswith(f"Written: {picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (steep, "ρ = 0.005: the smallest that was tried, and it raises the loss by more than 4 % of itself"),
        (flat, "ρ = 5: the largest that was tried, and it raises the loss by less than 4 % of itself"),
    ],
)
def test_a_radius_beyond_the_ladder_is_told(tmp_path, capsys, function, said):
    rho(model(function), "--out", str(tmp_path / "rho.svg"))
    assert said in capsys.readouterr().out


def test_random_numbers_are_told_and_the_picture_has_a_place(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rho("--model", "tiny500", "--batch-size", "2")
    printed = capsys.readouterr().out
    assert "inputs (2, 64)" in printed
    assert "The batch is random numbers: this says nothing" in printed
    assert [path.name for path in tmp_path.glob("*/*")] == ["rho.png"]


# ---- by short runs


def by_hand(rho, minibatch, epochs):
    """Held-out loss and accuracy after SAM as the paper's loop has it: 33 train, 10 judge."""
    net, inputs, targets, loss = models.workload(f"{__name__}:classes", None, CPU, torch.float64)
    x, unseen = inputs["x"][:33], inputs["x"][33:]
    base = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    optimizer = loops.PlainSAM([*net.parameters()], base, rho) if rho else base
    torch.manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(33).split(minibatch)[: 33 // minibatch]:
            for call in loops.PlainSAM.calls if rho else ("step",):
                buffers = copy.deepcopy([*net.buffers()])
                loss(net({"x": x[batch]}), targets[batch]).backward()
                if call == "step" and rho:  # only the first pass counts
                    for buffer, before in zip(net.buffers(), buffers):
                        buffer.copy_(before)
                getattr(optimizer, call)()
            optimizer.zero_grad()
    logits = net.eval()({"x": unseen})
    return loss(logits, targets[33:]).item(), 100 * (logits.argmax(1) == targets[33:]).double().mean().item()


def test_runs_are_those_of_plain_loops_from_the_same_weights(monkeypatch):
    """Every run: what one leaves behind would make the next another."""
    monkeypatch.setattr(radius_runs, "RADII", (None, 0.05, 1.0))
    found = models.workload(f"{__name__}:classes", None, CPU, torch.float64)
    before, random = copy.deepcopy(found.model.state_dict()), torch.get_rng_state()
    outcomes = [*radius_runs.runs(radius_runs.split("classes", found), radius_runs.Recipe(epochs=3), minibatch=8)]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in found.model.state_dict().items())
    assert all(p.grad is None for p in found.model.parameters())
    assert [outcome.rho for outcome in outcomes] == [None, 0.05, 1.0]
    for rho, *judged in outcomes:
        assert judged == pytest.approx(by_hand(rho, 8, 3), rel=1e-9)
    assert len({outcome.loss for outcome in outcomes}) == 3


class Hidden(Classifier):
    """Keeps a mean of what it saw where no state dict has it, and takes it off."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, inputs):
        if self.training:
            self.seen.add_(1)
        return super().forward(inputs) * (1 + self.seen)


def test_runs_begin_alike_whatever_a_network_keeps(monkeypatch):
    """The same run thrice, of a network whose state dict does not hold all of it."""
    monkeypatch.setattr(radius_runs, "RADII", (None, None, None))
    found = models.workload(f"{__name__}:classes", None, CPU, torch.float64)
    found = found._replace(model=Hidden().double())
    runs = radius_runs.runs(radius_runs.split("hidden", found), radius_runs.Recipe(epochs=2), minibatch=8)
    assert len({outcome.loss for outcome in runs}) == 1
    assert found.model.seen == 0


@pytest.mark.parametrize(("base", "kind", "lr"), [("sgd", torch.optim.SGD, 0.05), ("adamw", torch.optim.AdamW, 1e-3)])
def test_the_base_optimizer(base, kind, lr):
    found = models.workload(f"{__name__}:classes", None, CPU, torch.float64)
    for radius_, given in ((None, None), (0.1, 0.7)):
        optimizer = radius_runs.Recipe(base, lr=given).optimizer(found, radius_)
        assert type(getattr(optimizer, "base_optimizer", optimizer)) is kind
        assert optimizer.param_groups[0]["lr"] == (given or lr)
        assert optimizer.param_groups[0].get("rho") == radius_


def test_a_sweep_is_shown(capsys):
    rho(model(classes), "--sweep", "--batch-size", "20", "--epochs", "2", "--base", "adamw", "--minibatch", "5")
    printed = capsys.readouterr().out
    assert "15 examples train, by adamw, lr 0.001, 2 epochs in minibatches of 5; 5 judge." in printed
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if line[:1] == "│"]
    assert [row[0] for row in rows] == ["adamw alone", "0.02", "0.05", "0.1", "0.2", "0.5", "1"]
    best = min(rows, key=lambda row: float(row[1]))[0]
    assert f"Best by held-out loss: {'adamw alone' if best == 'adamw alone' else f'ρ = {best}'}" in printed
    assert all(row[2].endswith("0.0 %") for row in rows)
    assert "one short run a radius, judged by 5 examples" in printed


def test_where_no_run_ends_with_a_finite_loss(capsys):
    rho(model(diverging), "--sweep", "--epochs", "1")
    assert "No run ended with a finite loss: try a smaller --lr." in capsys.readouterr().out


def outcomes(*losses):
    return [radius_runs.Outcome(rho, loss, None) for rho, loss in zip((None, 0.1, 0.4), losses)]


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ((1.0, 0.8, math.nan), ["Best by held-out loss: ρ = 0.1.", "For BSAM half of it: ρ = 0.05."]),
        ((0.5, 0.8, 0.5), ["Best by held-out loss: sgd alone; no radius helped."]),
    ],
)
def test_the_best_by_held_out_loss(losses, said):
    assert radius_runs.in_words(outcomes(*losses), "sgd", 9)[:-1] == said


@pytest.mark.parametrize(
    ("output", "targets", "percent"),
    [
        (torch.eye(4), torch.tensor([0, 1, 2, 0]), 75.0),
        (torch.eye(4), torch.tensor([0, -100, 0, -100]), 50.0),  # as cross-entropy leaves it out
        (torch.eye(3, 4)[None], torch.tensor([[0, 1, 2, 1]]), 75.0),  # classes are dimension 1
        (torch.eye(4), torch.eye(4), None),
        (torch.eye(4), torch.zeros(4, 4, dtype=torch.long), None),
        (torch.ones(4), torch.zeros(4, dtype=torch.long), None),
        (torch.ones(4, 2, 3), torch.zeros(4, 2, dtype=torch.long), None),
        ("of the user's", torch.zeros(4, dtype=torch.long), None),
        (torch.eye(4), None, None),
    ],
)
def test_accuracy_where_the_targets_are_classes(output, targets, percent):
    assert radius_runs._accuracy_percent(output, targets) == percent


# ---- refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lr", "0.1"], "--lr is of the short runs: add --sweep, or leave it out"),
        (["--sweep", "--out", "rho.png"], "--out rho.png: there is no picture of short runs; leave out --out or"),
        (["--out", "rho.py"], "--out rho.py: must end in"),
        (["--model", "resnet19"], "--model resnet19: must be one of digits, resnet18,"),
        (["--device", "cuda"], "--device cuda: "),
        (["--out", "/proc/self/rho.png", model(slope)], "--out /proc/self: "),
        ([model(negative)], "negative: its loss is -2; a rise can be a share of a positive loss alone"),
        ([model(no_number)], "no_number: the loss at w is nan"),
        (["--sweep", model(flattened)], "the first dimensions of its targets are [40], that of its first input 8;"),
        (["--sweep", model(of_several_lengths)], "the first dimensions of its inputs are [8, 5], that of its first"),
        (["--sweep", model(without_tensors)], "its inputs hold no tensor, whose first dimension"),
        (["--sweep", model(classes), "--batch-size", "3"], "3 examples are too few to split; --batch-size must be 4"),
        (["--sweep", model(classes), "--minibatch", "34"], "--minibatch 34: only 33 examples train"),
    ],
)
def test_what_cannot_be_had_is_named(tmp_path, monkeypatch, capsys, arguments, said):
    if arguments == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    rho(*arguments, status=1)
    told = capsys.readouterr().err
    assert said in told
    assert (told.count("\n"), told.startswith("bsam-fused rho: ")) == (1, True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "x"])
def test_a_learning_rate_that_is_none(capsys, value):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["rho", "--sweep", f"--lr={value}"])
    assert "argument --lr: must be a number > 0" in capsys.readouterr().err


@pytest.mark.parametrize("how", [["--out=rho.png"], ["--sweep"]])
def test_an_interrupt_ends_it(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    rho(model(interrupted), *how, status=130)


def test_a_users_error_keeps_its_traceback(tmp_path):
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        rho(model(fails), "--out", str(tmp_path / "rho.png"))
