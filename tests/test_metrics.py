"""`metrics()`: what happened in a step as floats, against the papers' formulas; what there is not is left out."""

import copy
import math
import pickle

import pytest
import reference as ref
import torch
import torch.distributed as dist
from ranks import on_two_ranks
from torch import nn

from bsam_fused import ASAM, BSAM, SAM

pytestmark = pytest.mark.usefixtures("one_thread")

CURVATURE = [torch.linspace(0.5, 2, 7, dtype=torch.float64), torch.linspace(1, 3, 4, dtype=torch.float64)]
NORMS = ("norm_g", "norm_g_max", "norm_g_min")
SHARPNESS = ("loss", "loss_max", "loss_min", "max_sharpness", "min_sharpness", "bilateral_sharpness")


class Failing(torch.optim.RMSprop):
    """No fused base; its steps may raise."""

    fails = False

    def step(self, closure=None):
        if self.fails:
            raise ArithmeticError
        return super().step(closure)


def parameters(dtypes=(torch.float64, torch.float64)):
    home = torch.get_default_device()
    return [nn.Parameter(a.flip(0).sin().to(home, dtype)) for a, dtype in zip(CURVATURE, dtypes)]


def loss_at(ws):
    """½ Σ a w²: the gradient a w differs at w, w_max and w_min, and so does its norm."""
    return sum((a.to(w.device) * w.double().square()).sum() for a, w in zip(CURVATURE, ws)) / 2


def gradient(ws):
    return [a * w for a, w in zip(CURVATURE, ws)]


def closure_of(params, factor=1.0):
    def closure():
        loss = loss_at(params) * factor
        loss.backward()
        return loss

    return closure


def by_the_papers(params, groups):
    """Norms and losses of a step from here; ``groups``: the options of each tensor's."""
    ws = [p.detach().cpu().double() for p in params]
    g = gradient(ws)
    n = ref.ascent_norm(ws, g, groups)
    w_max = [ref.w_max(w, x, n, o) for w, x, o in zip(ws, g, groups)]
    w_min = [ref.w_min(w, x, n, o) for w, x, o in zip(ws, g, groups)]
    loss, loss_max, loss_min = (loss_at(at).item() for at in (ws, w_max, w_min))
    norms = n, ref.norm(gradient(w_max)), ref.norm(gradient(w_min))
    sharpness = loss, loss_max, loss_min, loss_max - loss, loss - loss_min, loss_max - loss_min
    return dict(zip(NORMS + SHARPNESS, norms + sharpness))


def without_min(values):
    return {name: value for name, value in values.items() if "min" not in name.split("_") and "bilateral" not in name}


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("kind", [SAM, ASAM, BSAM])
def test_a_closure_step(kind, base, backend):
    """Each number has a value of its own, so that none can stand under another's name; ρ_min is decayed by half."""
    params = parameters()
    opt = kind(params, base, rho=0.3, lr=0.1, backend=backend, **({"rho_min": 0.4} if kind is BSAM else {}))
    opt.param_groups[0]["lr"] = 0.05
    options = {"rho_min": 0.2, "rho_min_decay": "none", "rho": 0.3, "adaptive": kind is ASAM, "eta": 0.01}
    right = by_the_papers(params, [options] * 2)
    right = {**right, "rho": 0.3, "rho_min": 0.2, "lr": 0.05, "skipped_steps": 0.0}
    opt.step(closure_of(params))
    got = opt.metrics()
    assert got == pytest.approx(right if kind is BSAM else without_min(right), rel=1e-9)
    assert {type(value) for value in got.values()} == {float}
    assert got["max_sharpness"] == opt.sharpness.max_sharpness.item()


def test_several_groups_and_dtypes(backend):
    """One norm over both FlatParams; radii and learning rates, tensors or not, a group each."""
    params = parameters((torch.float32, torch.float64))
    groups = [{"params": [params[0]], "rho": 0.1}, {"params": [params[1]], "lr": torch.tensor(0.3), "maximize": True}]
    opt = BSAM(groups, rho=0.2, lr=0.1, rho_min_decay="none", backend=backend)
    n = ref.norm(gradient([p.detach().cpu().double() for p in params]))
    opt.step(closure_of(params))
    got = opt.metrics()
    assert got["norm_g"] == pytest.approx(n, rel=1e-6)
    of_groups = {name: value for name, value in got.items() if "/" in name}
    right = {"rho/0": 0.1, "rho/1": 0.2, "rho_min/0": 0.1, "rho_min/1": 0.2, "lr/0": 0.1, "lr/1": 0.3}
    assert of_groups == pytest.approx(right)
    assert got.keys() - of_groups == {*NORMS, *SHARPNESS, "skipped_steps"}


@pytest.mark.parametrize("kind", [SAM, BSAM])
def test_at_any_time(kind, backend):
    """A norm that no pass of this step has made yet is left out, not 0 nor the last step's."""
    params = parameters()
    opt = kind(params, lr=0.1, backend=backend)
    always = {"rho", "lr", "skipped_steps"} | ({"rho_min"} if kind is BSAM else set())
    norms = NORMS if kind is BSAM else NORMS[:2]
    assert opt.metrics().keys() == always
    for _ in range(2):
        opt.zero_grad()
        g = ref.norm(gradient([p.detach().cpu() for p in params]))
        for call in opt._calls:
            closure_of(params)()
            getattr(opt, call)()
            told = norms if call == "step" else norms[:1]
            with opt.unperturbed(), torch.no_grad():
                assert opt.metrics().keys() == always | {*told}
            assert opt.metrics()["norm_g"] == pytest.approx(g)
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert other.metrics().keys() == always
    closure_of(params)()
    opt.ascend()
    opt.restore()
    assert opt.metrics().keys() == always | {"norm_g"}


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_plain_steps(base, backend):
    """Their one pass is at w: ‖g‖ is no ‖g_max‖. A base's own step measures nothing, and the last one's is over."""
    params = parameters()
    opt = SAM(params, base, lr=0.1, backend=backend)
    opt.step(closure_of(params))
    opt.active = False
    g = ref.norm(gradient([p.detach().cpu() for p in params]))
    opt.step(closure_of(params))
    right = {"norm_g": g} if base is torch.optim.SGD else {}
    assert opt.metrics() == pytest.approx({**right, "rho": 0.05, "lr": 0.1, "skipped_steps": 0.0})


def test_a_skipped_step(backend):
    params = parameters()
    opt = BSAM(params, lr=0.1, backend=backend)
    opt.step(closure_of(params, math.nan))
    got = opt.metrics()
    assert got["skipped_steps"] == 1
    assert math.isnan(got["norm_g"])
    assert math.isnan(got["loss"])


def test_norms_that_are_over(backend):
    """Those of a step before are none of the one that began, be it declined later, or given up by its base."""
    (p, _) = params = parameters()
    opt = SAM(params, Failing, lr=0.1, max_grad_norm=1e9, backend=backend)
    opt.step(closure_of(params))
    told = {"norm_g", "norm_g_max"}
    assert told <= opt.metrics().keys()
    opt.decide = lambda square: True
    p.grad = torch.ones_like(p)
    assert opt.passes == 2
    assert not told & opt.metrics().keys()
    opt.restore()
    opt.decide = None
    opt.step(closure_of(params))
    opt.active, Failing.fails = False, True
    with pytest.raises(ArithmeticError):
        opt.step(closure_of(params))
    Failing.fails = False
    assert not told & opt.metrics().keys()


def test_losses_in_the_same_memory(backend):
    """As a graph's replays return them: each pass's is what it was when it was returned."""
    params, memory = parameters(), torch.zeros((), dtype=torch.float64)
    opt = SAM(params, rho=0.3, lr=0.1, backend=backend)
    right = by_the_papers(params, [{"rho": 0.3, "rho_min": 0.0, "rho_min_decay": "none", "adaptive": False}] * 2)

    def closure():
        return memory.copy_(closure_of(params)().detach())

    opt.step(closure)
    told = opt.metrics()
    for name in ("loss", "loss_max", "max_sharpness"):
        assert told[name] == pytest.approx(right[name], rel=1e-9), name


def test_a_finite_loss_whose_sum_is_not(backend):
    """Of many elements, in 16 bits."""
    params = parameters()
    opt = SAM(params, lr=0.1, backend=backend)

    def closure():
        closure_of(params)()
        return torch.full((1000,), 100.0, dtype=torch.float16)

    opt.step(closure)
    assert opt.skipped_steps == 0


def test_norms_after_a_pass_that_was_not_finite(backend):
    """They may be NaN, and are no other number: of g and g_max that were there, ĝ_min = 2 g − g_max for ρ_min = ρ."""
    p, q = params = parameters()
    g = gradient([p.detach().cpu()])[0]
    g_max = torch.ones_like(g)
    opt = BSAM(params, descent="extrapolate", rho_min_decay="none", lr=0.1, backend=backend)
    p.grad, q.grad = g.to(p.device, copy=True), torch.full_like(q, math.nan)
    opt.ascend()
    p.grad = g_max.to(p.device, copy=True)
    opt.step()
    told = opt.metrics()
    for name, right in (("norm_g_max", ref.norm([g_max])), ("norm_g_min", ref.norm([2 * g - g_max]))):
        assert told[name] == pytest.approx(right) or math.isnan(told[name])
    assert opt.skipped_steps == 1


def test_what_is_no_single_number_is_left_out():
    """A closure's loss of one element is one; of several it is none. A base may have no lr."""

    class Constant(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            pass

    for losses, told in ((1, {"loss", "loss_max", "max_sharpness"}), (2, set())):
        params = parameters()
        opt = SAM(params, Constant)

        def closure(params=params, losses=losses):
            loss_at(params).backward()
            return torch.ones(losses)

        opt.step(closure)
        assert opt.metrics().keys() == {"norm_g", "norm_g_max", "rho", "skipped_steps"} | told


def test_where_the_base_has_our_option():
    """Adadelta's rho is no radius."""
    params = parameters()
    assert SAM(params, torch.optim.Adadelta(params, rho=0.9), rho=0.3).metrics()["rho"] == 0.3


def test_one_wait_for_a_device(monkeypatch):
    """Whatever is not on a CPU comes in one transfer, with the count of skipped steps: as if nothing were on one."""
    params = parameters((torch.float32, torch.float64))
    groups = [{"params": [p], "lr": torch.tensor(0.1)} for p in params]
    opt = SAM(groups, lr=0.1)
    opt.step(closure_of(params))
    right = opt.metrics()
    tolist, transfers = torch.Tensor.tolist, []
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: transfers.append(len(self)) or tolist(self))
    for reader in ("item", "__float__", "__int__", "__bool__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, reader, None)
    monkeypatch.setattr(SAM, "_all_radii", lambda self: [[]])  # reads options, which are a host's numbers
    assert opt.metrics() == pytest.approx({name: value for name, value in right.items() if "rho" not in name})
    assert transfers == [len(right) - 2 + 1]


@pytest.mark.cuda
def test_one_wait_for_a_gpu():
    with torch.device("cuda"):
        params = parameters()
    opt = BSAM(params, lr=0.1)
    opt.step(closure_of(params))
    opt.metrics()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as waits:
            opt.metrics()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1


@on_two_ranks
def test_on_a_rank_alone():
    """Of shards: over all of them, and one rank may ask without the other."""
    from torch.distributed.fsdp import fully_shard

    def network():
        torch.manual_seed(1)
        return nn.Linear(6, 5).double()

    def closure_of(net):
        def closure():
            loss = net(torch.ones(3, 6, dtype=torch.float64)).square().mean()
            loss.backward()
            return loss

        return closure

    alone, model = network(), network()
    fully_shard(model)
    single, opt = BSAM(alone.parameters(), lr=0.1), BSAM(model.parameters(), lr=0.1, model=model)
    for _ in range(2):
        single.step(closure_of(alone))
        opt.step(closure_of(model))
    if dist.get_rank() == 0:
        assert opt.metrics() == pytest.approx(single.metrics(), rel=1e-9)
    closure_of(model)()
    opt.ascend()
    if dist.get_rank() == 1:
        assert opt.metrics().keys() == {"norm_g", "rho", "rho_min", "lr", "skipped_steps"}
    opt.restore()
