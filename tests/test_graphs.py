"""GraphedStep against eager steps: on a GPU, and on the host, where host_graphs.py stands in for CUDA's graphs."""

import contextlib
import copy
import gc

import host_graphs
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from bsam_fused import ASAM, BSAM, SAM, schedules
from bsam_fused.graphs import GraphedStep

KINDS = {"SAM": SAM, "ASAM": ASAM, "BSAM": BSAM}
BASES = {"SGD": (torch.optim.SGD, {"momentum": 0.9}), "AdamW": (torch.optim.AdamW, {"eps": 1e-3})}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_base = pytest.mark.parametrize("base", BASES)
where = pytest.mark.parametrize(
    "backend", ["cuda-on-host", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True
)
loss_fn = nn.functional.cross_entropy


@pytest.fixture
def captures(backend, monkeypatch):
    """Have the stand-in where there is no GPU; returns it."""
    return None if torch.get_default_device().type == "cuda" else host_graphs.stand_in(monkeypatch)


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.Dropout(0.2), nn.Tanh(), nn.Linear(40, 3))


class Cast(nn.Module):
    def forward(self, x):
        return x.bfloat16()


def data(seed, n=8):
    torch.manual_seed(seed)
    return torch.randn(n, 6), torch.randint(3, (n,))


def optimizer(kind, model, base="SGD", **options):
    kind_of_base, base_options = BASES[base]
    return kind(model.parameters(), kind_of_base, lr=0.05, backend="cuda", model=model, **base_options, **options)


def eager_step(model, opt, batch):
    def closure():
        loss = loss_fn(model(batch[0]), batch[1])
        loss.backward()
        return loss

    return opt.step(closure)


def twins(kind, base="SGD", **options):
    """Two models and their optimizers, alike; without dropout, as a graph draws other numbers than eager steps do."""
    models = [network() for _ in range(2)]
    for model in models:
        model[2].p = 0.0
    return models, [optimizer(kind, model, base, **options) for model in models]


def assert_same_state(opt, other):
    """What checkpoints would hold, and what is shown."""
    for (one, two), shown in (((opt, other), False), ((opt.state_dict(), other.state_dict()), True)):
        states = [
            x["state"] if shown else {i: x.state.get(p, {}) for i, p in enumerate(x._parameters())} for x in (one, two)
        ]
        assert states[0].keys() == states[1].keys()
        for i, entry in states[0].items():
            assert entry.keys() == states[1][i].keys()
            for key, value in entry.items():
                torch.testing.assert_close(value, states[1][i][key], rtol=1e-6, atol=1e-7, msg=lambda m: f"{key}: {m}")  # noqa: B023


def assert_equal(model, other):
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


@where
@every_kind
@every_base
@pytest.mark.usefixtures("captures")
def test_replays_train_as_eager_steps_do(kind, base):
    """With new data, and learning rate, ρ and so ρ_min scheduled."""
    models, opts = twins(kind, base, weight_decay=0.01)
    rates = [LambdaLR(opt, lambda t: 0.7**t) for opt in opts]
    radii = [schedules.LinearRadius(opt, 6, end=0.01) for opt in opts]
    graphed = GraphedStep(models[0], loss_fn, opts[0], data(0))
    for t in range(5):
        loss = graphed(*data(t))
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
    state = opt.state_dict()
    before = [[v.clone() for v in values.values()] for values in state["state"].values()]
    torch.manual_seed(5)
    GraphedStep(model, loss_fn, opt, batch)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    after = opt.state_dict()
    assert after["param_groups"][0]["rounded_steps"] == steps
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
    """LatePhase sets `active`: raise, rather than train otherwise than asked to."""
    model = network()
    opt = optimizer(SAM, model)
    graphed = GraphedStep(model, loss_fn, opt, data(0))
    changes = [
        ("active", lambda: setattr(opt, "active", False), lambda: setattr(opt, "active", True)),
        ("max_grad_norm", lambda: setattr(opt, "max_grad_norm", 1.0), lambda: setattr(opt, "max_grad_norm", None)),
        ("model.training", model.eval, model.train),
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
    opt.active = False
    with pytest.raises(RuntimeError, match="active is False"):
        GraphedStep(model, loss_fn, opt, data(0))


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
    with pytest.raises(TypeError, match="pass a SAM, ASAM or BSAM"):
        GraphedStep(model, loss_fn, torch.optim.SGD(model.parameters()), data(0))
    with pytest.raises(TypeError, match="sample_inputs: pass a sequence"):
        GraphedStep(model, loss_fn, opt, data(0)[0])
    with pytest.raises(TypeError, match="model is a function"):
        GraphedStep(network, loss_fn, opt, data(0))


@where
@pytest.mark.parametrize("passes_before", [0, 1])
def test_a_capture_that_fails_does_nothing(captures, passes_before):
    """Here in the first pass or the second: what was captured was never done; the current stream is what it was."""
    model = network()
    opt = optimizer(SAM, model)
    eager_step(model, opt, data(0))
    weights = [p.detach().clone() for p in model.parameters()]
    streams = [*captures.streams] if captures else torch.cuda.current_stream()
    passes = iter(range(100))

    def waits(output, target):
        loss = loss_fn(output, target)
        if next(passes) == 6 + passes_before:
            loss.item()
        return loss

    with pytest.raises(RuntimeError):
        GraphedStep(model, waits, opt, data(0))
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


# ---- the state of the optimizer, and its memory


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
@every_base
@pytest.mark.usefixtures("captures")
def test_a_graph_keeps_its_memory_alive(base):
    """For whoever replays it all the same; not longer than itself."""
    model = network().bfloat16()
    opt = optimizer(BSAM, model, base)
    x, y = data(0)
    graphed = GraphedStep(model, loss_fn, opt, (x.bfloat16(), y))
    graphed(x.bfloat16(), y)
    entry = opt.state[model[0].weight]
    tensors = [*entry.values(), *(flat.state("step")[0] for flat in opt._flats), *(flat.sums for flat in opt._flats)]
    tensors += [value for snapshot in opt._mark().passes.snapshots for value in snapshot._values]
    memory = [tensor.untyped_storage()._weak_ref() for tensor in tensors]
    del entry, tensors
    opt.load_state_dict(opt.state_dict())
    model[1].running_mean = model[1].running_mean.clone()
    eager_step(model, opt, (x.bfloat16(), y))
    gc.collect()
    assert not any(map(torch.UntypedStorage._expired, memory))
    del graphed
    gc.collect()
    assert all(map(torch.UntypedStorage._expired, memory))
    list(map(torch.UntypedStorage._free_weak_ref, memory))
