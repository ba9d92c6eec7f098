"""GraphedStep against eager steps: on a GPU, and on the host, where host_graphs.py stands in for CUDA's graphs."""

import contextlib
import copy

import pytest
import torch
from graphed import (
    assert_equal,
    data,
    eager_step,
    every_base,
    every_kind,
    loss_fn,
    network,
    optimizer,
    twins,
    where,
)
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from bsam_fused import BSAM, SAM, schedules
from bsam_fused.graphs import GraphedStep


@where
@every_kind
@every_base
@pytest.mark.usefixtures("captures")
def test_replays_train_as_eager_steps_do(kind, base):
    """With new data, and learning rate, ρ and so ρ_min scheduled; a replay calls neither model nor loss."""
    called = []

    def counted(output, target):
        called.append(target)
        return loss_fn(output, target)

    models, opts = twins(kind, base, weight_decay=0.01)
    rates = [LambdaLR(opt, lambda t: 0.7**t) for opt in opts]
    radii = [schedules.LinearRadius(opt, 6, end=0.01) for opt in opts]
    graphed = GraphedStep(models[0], counted, opts[0], data(0))
    called.clear()
    for t in range(5):
        loss = graphed(*data(t))
        assert not called
        expected = eager_step(models[1], opts[1], data(t))
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6)
        assert_equal(*models)
        for schedule in (*rates, *radii):
            schedule.step()
    assert opts[0].skipped_steps == 0
    eager_step(models[0], opts[0], data(9))  # goes on from there, eagerly
    eager_step(models[1], opts[1], data(9))
    assert_equal(*models)


@where
@every_kind
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.usefixtures("captures")
def test_building_trains_nothing(kind, steps):
    model = network().bfloat16()
    opt = optimizer(kind, model, "AdamW")
    x, y = data(0)
    batch = x.bfloat16(), y
    for _ in range(steps):
        eager_step(model, opt, batch)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = copy.deepcopy(opt.state_dict())
    before = [[v.clone() for v in values.values()] for values in state["state"].values()]
    torch.manual_seed(5)
    GraphedStep(model, loss_fn, opt, batch)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    after = opt.state_dict()
    assert after["param_groups"] == [{**group, "rounded_steps": steps} for group in state["param_groups"]]
    assert [len(values) for values in after["state"].values()] == [len(values) for values in before]
    for values, kept in zip(after["state"].values(), before, strict=True):
        assert all(torch.equal(v, w) for v, w in zip(values.values(), kept, strict=True))
    assert opt.skipped_steps == 0
    assert all(p.grad is None for p in model.parameters())


@where
@pytest.mark.usefixtures("captures")
def test_an_input_that_is_not_as_the_sample():
    model = network()
    graphed = GraphedStep(model, loss_fn, optimizer(SAM, model), data(0))
    x, y = data(0)
    with pytest.raises(ValueError, match=r"input 0 has shape \(7, 6\).*captured with \(8, 6\)"):
        graphed(*data(0, n=7))
    with pytest.raises(ValueError, match=r"input 0 has shape \(8, 6\) and torch.float64"):
        graphed(x.double(), y)
    with pytest.raises(ValueError, match="1 inputs, but sample_inputs had 2"):
        graphed(x)


@where
@pytest.mark.usefixtures("captures")
def test_what_a_graph_has_fixed():
    """Raise, rather than train otherwise than asked to."""
    model = network()
    opt = optimizer(SAM, model)
    graphed = GraphedStep(model, loss_fn, opt, data(0))
    changes = [
        ("max_grad_norm", lambda: setattr(opt, "max_grad_norm", 1.0), lambda: setattr(opt, "max_grad_norm", None)),
        ("training", model.eval, model.train),
        ("training", model[1].eval, model[1].train),
        ("requires_grad", lambda: model[0].weight.requires_grad_(False), model[0].weight.requires_grad_),
        (
            "adaptive",
            lambda: opt.param_groups[0].update(adaptive=True),
            lambda: opt.param_groups[0].update(adaptive=False),
        ),
        (
            "momentum",
            lambda: opt.param_groups[0].update(momentum=0.0),
            lambda: opt.param_groups[0].update(momentum=0.9),
        ),
    ]
    loss_fn(model(data(0)[0]), data(0)[1]).backward()
    opt.ascend()
    with pytest.raises(RuntimeError, match="a captured step while the weights are perturbed"):
        graphed(*data(1))
    opt.restore()
    for name, change, back in changes:
        change()
        with pytest.raises(RuntimeError, match=f"{name} was .* when this step was captured"):
            graphed(*data(1))
        back()
    graphed(*data(1))


@where
@pytest.mark.usefixtures("captures")
def test_what_is_frozen_is_named_and_a_mode_that_the_model_sets_itself_is_its_own():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            self.inner[1].eval()
            return self.inner(x)

    model, factor = Frozen(), nn.Parameter(torch.ones(()))
    opt = SAM([*model.parameters(), factor], lr=0.05, backend="cuda", model=model)
    graphed = GraphedStep(model, lambda output, target: loss_fn(factor * output, target), opt, data(0))
    graphed(*data(1))
    model.train()
    graphed(*data(2))
    for parameter, name in ((model.inner[4].bias, "model.inner.4.bias"), (factor, "parameter 6 of group 0")):
        parameter.requires_grad_(False)
        with pytest.raises(RuntimeError, match=rf"^{name}.requires_grad was True .* and is False: use"):
            graphed(*data(3))
        parameter.requires_grad_()
    model.inner[2].eval()
    with pytest.raises(RuntimeError, match=r"^model.inner.2.training was True"):
        graphed(*data(3))


@where
@pytest.mark.usefixtures("captures")
def test_what_the_host_would_do_in_a_step():
    """Raises, before a capture and after it, until it is taken back."""
    model = network()
    opt = optimizer(SAM, model)
    graphed = GraphedStep(model, loss_fn, opt, data(0))
    weights = copy.deepcopy(model)
    for asked, refused in [
        (lambda: opt.register_step_pre_hook(lambda *_: None).remove, "hooks on its step"),
        (lambda: opt.register_step_post_hook(lambda *_: None).remove, "hooks on its step"),
        (lambda: setattr(opt, "same_randomness", True) or (lambda: setattr(opt, "same_randomness", False)), "anew"),
    ]:
        take_back = asked()
        with pytest.raises(RuntimeError, match=refused):
            graphed(*data(1))
        with pytest.raises(RuntimeError, match=refused):
            GraphedStep(model, loss_fn, opt, data(0))
        take_back()
    assert_equal(model, weights)
    graphed(*data(1))


@where
@pytest.mark.usefixtures("captures")
def test_what_cannot_be_captured():
    model = network()
    with pytest.raises(ValueError, match="a captured step with base optimizer RMSprop: only torch's"):
        GraphedStep(model, loss_fn, SAM(model.parameters(), torch.optim.RMSprop, backend="cuda"), data(0))
    with pytest.raises(RuntimeError, match="launches carry their options"):
        GraphedStep(model, loss_fn, SAM(model.parameters(), lr=0.1, backend="torch"), data(0))
    opt = optimizer(SAM, model)
    eager_step(model, opt, data(0))
    loss_fn(model(data(0)[0]), data(0)[1]).backward()
    opt.ascend()
    with pytest.raises(RuntimeError, match="out of order"):
        GraphedStep(model, loss_fn, opt, data(0))
    opt.restore()
    opt.grad_scale, opt.found_inf = torch.ones(()), torch.zeros(())
    with pytest.raises(RuntimeError, match=r"GradScaler.step\(\) with a closure"):
        GraphedStep(model, loss_fn, opt, data(0))


@where
@pytest.mark.usefixtures("captures")
def test_options_are_written_before_a_capture_and_not_in_it():
    """Else all replays would write those of the capture."""
    model = network()
    opt = optimizer(BSAM, model)
    passes = iter(range(100))

    def late(output, target):
        if next(passes) == 9:  # the capture's first pass
            opt.param_groups[0]["rho"] = 0.2
        return loss_fn(output, target)

    with pytest.raises(RuntimeError, match=r"optimizer.write_options\(\) before"):
        GraphedStep(model, late, opt, data(0))


def test_only_tensors_on_one_gpu():
    model = network()
    opt = SAM(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="needs all tensors on one GPU, but there is model on cpu, optimizer on cpu"):
        GraphedStep(model, loss_fn, opt, data(0))
    elsewhere = [x.to("meta") for x in data(0)]
    with pytest.raises(ValueError, match="sample_inputs on meta"):
        GraphedStep(model, loss_fn, opt, elsewhere)
    with pytest.raises(TypeError, match="pass one of bsam_fused, such as SAM"):
        GraphedStep(model, loss_fn, torch.optim.SGD(model.parameters()), data(0))
    with pytest.raises(TypeError, match="sample_inputs: pass a sequence"):
        GraphedStep(model, loss_fn, opt, data(0)[0])
    with pytest.raises(TypeError, match="model is a function"):
        GraphedStep(network, loss_fn, opt, data(0))


@where
@pytest.mark.parametrize("passes_before", [0, 1])
def test_a_capture_that_fails_does_nothing(captures, passes_before):
    """Here in the first pass or the second: what was captured was never done; the current stream is what it was.

    So is the generator: torch's refuses to be drawn from while it takes a capture to be under way.
    """
    model = network()
    opt = optimizer(SAM, model)
    batch = data(0)
    eager_step(model, opt, batch)
    weights = [p.detach().clone() for p in model.parameters()]
    streams = [*captures.streams] if captures else torch.cuda.current_stream()
    passes = iter(range(100))

    def waits(output, target):
        loss = loss_fn(output, target)
        if next(passes) == 6 + passes_before:
            loss.item()
        return loss

    torch.manual_seed(5)
    with pytest.raises(RuntimeError):
        GraphedStep(model, waits, opt, batch)
    assert captures is None or not captures.draws_are_captured
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert (captures.streams if captures else torch.cuda.current_stream()) == streams
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    eager_step(model, opt, data(0))
    assert opt.skipped_steps == 0
    GraphedStep(model, loss_fn, opt, data(0))(*data(1))


@where
def test_other_threads_go_on_while_a_step_is_captured(captures):
    """A data loader's pins memory meanwhile, which torch's default forbids to all threads."""
    if captures is None:
        pytest.skip("what torch is told is seen in the stand-in alone")
    model = network()
    GraphedStep(model, loss_fn, optimizer(SAM, model), data(0))
    assert captures.error_modes == ["thread_local"]


@where
@every_kind
def test_a_gpu_that_is_not_the_current_one(captures, kind, monkeypatch):
    """Not the stand-in's first device: nothing may be captured from its stream, nor done on it."""
    if captures is None and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.device("cuda", 1) if captures is None else contextlib.nullcontext():
        monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", torch.cuda.Stream())  # of a capture there
        models, opts = twins(kind)
        graphed = GraphedStep(models[0], loss_fn, opts[0], data(0))
        assert_equal(*models)
        for t in range(2):
            graphed(*data(t))
            eager_step(models[1], opts[1], data(t))
            assert_equal(*models)


@where
@pytest.mark.usefixtures("captures")
def test_a_warm_up_that_fails_trains_nothing():
    model = network()
    opt = optimizer(SAM, model)
    eager_step(model, opt, data(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    passes = iter(range(100))

    def fails(output, target):
        if next(passes) == 3:
            raise KeyboardInterrupt
        return loss_fn(output, target)

    with pytest.raises(KeyboardInterrupt):
        GraphedStep(model, fails, opt, data(0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert opt.skipped_steps == 0
