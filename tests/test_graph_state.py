"""GraphedStep and the state of its optimizer: shared with eager steps, in checkpoints; and memory that goes away."""

import copy
import gc

import pytest
import torch
from graphed import (
    assert_equal,
    assert_same_state,
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

from bsam_fused import BSAM, SAM
from bsam_fused.graphs import GraphedStep


class Cast(nn.Module):
    def forward(self, x):
        return x.bfloat16()


@where
@every_kind
@every_base
@pytest.mark.usefixtures("captures")
def test_a_late_phase_goes_on_with_the_same_state(kind, base):
    """Plain steps and replays in turns: momentum, moments and counts are those of eager steps alone."""
    models, opts = twins(kind, base)
    graphed = GraphedStep(models[0], loss_fn, opts[0], data(0))
    for t, active in enumerate([False, False, True, True, False, True]):
        for opt in opts:
            opt.active = active
        if active:
            graphed(*data(t))
        else:
            eager_step(models[0], opts[0], data(t))
        eager_step(models[1], opts[1], data(t))
        assert_equal(*models)
        assert_same_state(*opts)


LOOKS = {"state_dict": lambda opt: opt.state_dict(), "deepcopy": copy.deepcopy, "restore": lambda opt: opt.restore()}


@where
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@every_base
@pytest.mark.usefixtures("captures")
def test_state_of_replays_is_in_checkpoints(base, look):
    """Though what was looked at before the first one had no state yet, which was taken back."""
    models, opts = twins(SAM, base, seed=3)
    graphed = GraphedStep(models[0], loss_fn, opts[0], data(0))
    look(opts[0])
    assert opts[0].state_dict()["state"] == {}
    for t in range(3):
        graphed(*data(t))
        look(opts[0])
        eager_step(models[1], opts[1], data(t))
        assert_same_state(*opts)


@where
@every_base
@pytest.mark.usefixtures("captures")
def test_parameters_of_two_dtypes(base):
    """Sums are made over both FlatParams, and 16-bit weights have master weights as their state."""
    models, opts = twins(BSAM, base, master_weights=True, max_grad_norm=0.5)
    for model in models:
        model[4].bfloat16()
        model[3] = nn.Sequential(nn.Tanh(), Cast())
    graphed = GraphedStep(models[0], loss_fn, opts[0], data(0))
    for t in range(4):
        if t % 2:
            eager_step(models[0], opts[0], data(t))
        else:
            graphed(*data(t))
        eager_step(models[1], opts[1], data(t))
        assert_equal(*models)
        assert_same_state(*opts)
    assert "master_weight" in opts[0].state[models[0][4].weight]


@where
@pytest.mark.usefixtures("captures")
def test_state_of_a_skipped_replay_is_taken_back():
    models, opts = twins(SAM, dampening=0.5)
    graphed = GraphedStep(models[0], loss_fn, opts[0], data(0))
    x, y = data(0)
    for t, factor in enumerate([float("nan"), 1.0, 1.0]):
        graphed(factor * x, y)
        eager_step(models[1], opts[1], (factor * x, y))
        assert (
            opts[0].state_dict()["state"].keys()
            == opts[1].state_dict()["state"].keys()
            == ({*range(6)} if t else set())
        )
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def _edit(opt, key="momentum_buffer"):
    entry = next(iter(opt.state.values()))
    entry[key] = entry[key].clone()


def _through_another_update(model, opt):
    """Of the base's own step(), as somebody watches it."""
    hook = opt.base_optimizer.register_step_post_hook(lambda *_: None)
    opt.active = False
    eager_step(model, opt, data(0))
    opt.active = True
    hook.remove()


def _move(model, opt):
    model[0].weight.data = model[0].weight.data.clone()


def _move_and_step(model, opt):
    with torch.no_grad():
        model[0].weight.data = model[0].weight.data.t().contiguous().t()
    eager_step(model, opt, data(0))


def _edit_and_step(model, opt):
    _edit(opt)
    eager_step(model, opt, data(0))


ENDS = {
    "load_state_dict": ("optimizer.state", lambda model, opt: opt.load_state_dict(opt.state_dict())),
    "the base's load_state_dict": (
        "optimizer.state",
        lambda model, opt: opt.base_optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict()),
    ),
    "a tensor exchanged": ("optimizer.state", lambda model, opt: _edit(opt)),
    "a tensor exchanged, then an eager step": ("optimizer.state", _edit_and_step),
    "an entry deleted": ("optimizer.state", lambda model, opt: opt.state.pop(model[0].weight)),
    "state assigned": ("optimizer.state", lambda model, opt: setattr(opt, "state", dict(opt.state))),
    "another update": ("optimizer.state", _through_another_update),
    "a parameter moved": ("parameters", _move),
    "a parameter laid out anew, then an eager step": ("parameters", _move_and_step),
    "a parameter exchanged": (
        "parameters",
        lambda model, opt: opt.param_groups[0]["params"].__setitem__(0, nn.Parameter(model[0].weight.detach().clone())),
    ),
    "a param group": ("parameters", lambda model, opt: opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})),
    "a buffer exchanged": (
        "buffers",
        lambda model, opt: setattr(model[1], "running_mean", model[1].running_mean.clone()),
    ),
}


@where
@pytest.mark.parametrize(("what", "change"), ENDS.values(), ids=ENDS)
@pytest.mark.usefixtures("captures")
def test_other_memory_ends_a_graph(what, change):
    """Its replays would read and write what the optimizer and the model do not have any more, or what is freed."""
    model = network()
    model[2].p = 0.0
    opt = optimizer(BSAM, model)
    graphed = GraphedStep(model, loss_fn, opt, data(0))
    graphed(*data(1))
    change(model, opt)
    weights = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"{what} .*build another GraphedStep"):
            graphed(*data(2))
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    twin = copy.deepcopy((model, opt))  # on the state that there is now
    GraphedStep(model, loss_fn, opt, data(0))(*data(3))
    eager_step(*twin, data(3))
    assert_equal(model, twin[0])
    assert_same_state(opt, twin[1])


@where
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_base
@pytest.mark.usefixtures("captures")
def test_a_graph_keeps_its_memory_alive(base, dtype):
    """For whoever replays it all the same; not longer than itself."""
    model = network().to(dtype)
    opt = optimizer(BSAM, model, base)
    x, y = data(0)
    batch = x.to(dtype), y
    graphed = GraphedStep(model, loss_fn, opt, batch)
    graphed(*batch)
    tensors = [model[0].weight, *opt.state[model[0].weight].values(), *(flat.state("step")[0] for flat in opt._flats)]
    tensors += [value for snapshot in opt._passes.snapshots for value in snapshot._layout.values]
    memory = [tensor.untyped_storage()._weak_ref() for tensor in tensors]
    del tensors
    # The stand-in's record holds memory, which a graph does not.
    graphed._captures = {kind: captured._replace(graph=None) for kind, captured in graphed._captures.items()}
    opt.load_state_dict(opt.state_dict())
    model[1].running_mean = model[1].running_mean.clone()
    model[0].weight.data = model[0].weight.data.clone()
    eager_step(model, opt, batch)
    gc.collect()
    assert not any(map(torch.UntypedStorage._expired, memory))
    del graphed
    gc.collect()
    assert all(map(torch.UntypedStorage._expired, memory))
    list(map(torch.UntypedStorage._free_weak_ref, memory))
