"""While ``active`` is False a step is the base's own: from w, with d = g. Those of fused bases are fused, too."""

import math

import pytest
import reference as ref
import torch
from samples import TOLERANCE, assign, gradients, interpreted, parameters
from torch import nn
from torch.optim import SGD, Adam, AdamW

import bsam_fused

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.part(5)]
KINDS = [bsam_fused.SAM, bsam_fused.BSAM]
every_kind = pytest.mark.parametrize("kind", KINDS)
VARIANTS = {
    "plain SGD": (SGD, {"weight_decay": 0.01}),
    "SGD": (SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    "nesterov": (SGD, {"momentum": 0.9, "nesterov": True}),
    "maximised SGD": (SGD, {"momentum": 0.9, "maximize": True}),
    "Adam": (Adam, {"eps": 1e-3, "weight_decay": 0.01}),
    "maximised Adam": (Adam, {"eps": 1e-3, "betas": (0.8, 0.9), "maximize": True}),
    "AdamW": (AdamW, {"eps": 1e-3, "weight_decay": 0.1}),
    "unfused": (torch.optim.RMSprop, {"eps": 1e-3, "momentum": 0.9}),
}
FUSED = [name for name in VARIANTS if name != "unfused"]
STATEFUL = ["SGD", "Adam", "AdamW"]
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch.")
)


def pair(kind, name, backend, dtype=torch.float64, lr=0.05, **options):
    """An inactive optimizer of ours and torch's own, with equal parameters."""
    base, base_options = VARIANTS[name]
    params = parameters("odd", dtype)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    opt = kind(params, base, lr=lr, backend=backend, **base_options, **options)
    opt.active = False
    return opt, params, base(others, lr=lr, **base_options), others


def fill(params, t, scale=1.0, without=()):
    assign(params, [None if g is None else g * scale for g in gradients(params, t, without)])


def assert_close(params, others, **tolerance):
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **tolerance)


def assert_same_state(opt, params, plain, others, **tolerance):
    for p, q in zip(params, others, strict=True):
        mine, theirs = opt.state.get(p, {}), plain.state.get(q, {})
        assert list(mine) == list(theirs)
        for key, value in theirs.items():
            torch.testing.assert_close(mine[key], value, **tolerance)


def tolerance(dtype):
    wide = TOLERANCE[dtype] * (5 if dtype is torch.float32 else 1)
    return {"rtol": wide, "atol": wide / 10}


@every_kind
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("max_norm", [None, 0.7])
def test_is_the_bases_own(backend, kind, name, max_norm):
    """Also where a parameter has no gradient in some steps: it is left alone then."""
    opt, params, plain, others = pair(kind, name, backend, max_grad_norm=max_norm)
    for t in range(5):
        for which in (params, others):
            fill(which, t, without=(1,) if t in {0, 3} else ())
        opt.step()
        if max_norm:
            nn.utils.clip_grad_norm_(others, max_norm)
        plain.step()
        assert_close(params, others, rtol=1e-11, atol=1e-12)
        assert_same_state(opt, params, plain, others, rtol=1e-11, atol=1e-12)
    saved, right = opt.state_dict(), plain.state_dict()
    assert saved["state"].keys() == right["state"].keys()
    for i, entry in right["state"].items():
        for key, value in entry.items():
            at_home = key != "step"  # saved on the CPU, where torch makes it: but here on the default device
            torch.testing.assert_close(saved["state"][i][key], value, rtol=1e-11, atol=1e-12, check_device=at_home)
    plain.load_state_dict(saved)


@every_kind
@pytest.mark.parametrize("name", VARIANTS)
@each_dtype
def test_one_step_in_every_dtype(backend, kind, name, dtype):
    """From equal weights and gradients: of 16 bits what float32 arithmetic makes of them, rounded once."""
    opt, params, _, others = pair(kind, name, backend, dtype, lr=0.5)
    base, options = VARIANTS[name]
    if dtype is torch.bfloat16 and name != "unfused":
        others = [nn.Parameter(p.detach().float()) for p in params]
    plain = base(others, lr=0.5, **options)
    fill(params, 0)
    assign(others, [p.grad.to(q.dtype) for p, q in zip(params, others)])
    opt.step()
    plain.step()
    for p, q in zip(params, others):
        q.data = q.data.to(dtype)
        for key, value in plain.state[q].items():
            plain.state[q][key] = value.to(opt.state[p][key].dtype)
    assert_close(params, others, **tolerance(dtype))
    assert_same_state(opt, params, plain, others, **tolerance(dtype))


@every_kind
@pytest.mark.parametrize("name", FUSED)
def test_by_closure(backend, kind, name):
    """Called once, with gradients cleared before; the loss comes back."""
    opt, params, plain, others = pair(kind, name, backend)
    calls = []

    def loss_of(them):
        return sum(p.square().sum() for p in them)

    def closure():
        calls.append(1)
        loss = loss_of(params)
        loss.backward()
        return loss

    for t in range(3):
        params[0].grad = torch.full_like(params[0], 9.0)  # left over
        before = loss_of(params).item()
        assert opt.step(closure).item() == before
        assert len(calls) == t + 1
        plain.zero_grad()
        loss_of(others).backward()
        plain.step()
        assert_close(params, others, rtol=1e-11, atol=1e-12)
    assert opt.sharpness is None


@every_kind
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_gradient_is_skipped_and_counted(backend, kind, name, before, value):
    opt, params, plain, others = pair(kind, name, backend)
    for t in range(before):
        for which, optimizer in ((params, opt), (others, plain)):
            fill(which, t)
            optimizer.step()
    for count in (1, 2):
        fill(params, 7)
        params[2].grad.view(-1)[5] = value
        weights = [p.detach().clone() for p in params]
        opt.step()
        assert all(map(torch.equal, params, weights))
        assert opt.skipped_steps == count
    assert opt.state_dict()["state"].keys() == (plain.state_dict()["state"].keys() if before else set())
    for which, optimizer in ((params, opt), (others, plain)):
        fill(which, 8)
        optimizer.step()
    assert opt.skipped_steps == 2
    assert_close(params, others, rtol=1e-11, atol=1e-12)
    assert_same_state(opt, params, plain, others, rtol=1e-11, atol=1e-12)


@every_kind
@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("returned", ["a tensor", "a float"])
def test_a_bad_loss_is_skipped_and_counted(backend, kind, name, loss, returned):
    """Though its gradients are finite."""
    opt, params, plain, others = pair(kind, name, backend)
    weights = [p.detach().clone() for p in params]

    def closure():
        fill(params, 0)
        return torch.tensor(loss) if returned == "a tensor" else loss

    opt.step(closure)
    assert all(map(torch.equal, params, weights))
    assert opt.skipped_steps == 1
    assert not opt.state_dict()["state"]
    for which, optimizer in ((params, opt), (others, plain)):
        fill(which, 1)
        optimizer.step()
    assert_close(params, others, rtol=1e-11, atol=1e-12)
    assert_same_state(opt, params, plain, others, rtol=1e-11, atol=1e-12)


@every_kind
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("max_norm", [None, 0.7])
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
def test_a_grad_scaler(backend, kind, name, max_norm, unscale):
    """Through an overflow in the first step and a later one, as torch's own with its own scaler."""
    opt, params, plain, others = pair(kind, name, backend, torch.float32, max_grad_norm=max_norm)
    device = params[0].device.type
    scalers = [torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=1000) for _ in range(2)]
    for t in range(5):
        for which, optimizer, scaler in ((params, opt, scalers[0]), (others, plain, scalers[1])):
            scaler.scale(torch.ones((), device=device))
            fill(which, t, scaler.get_scale())
            if t in {0, 3}:
                which[1].grad.view(-1)[3] = math.inf
            if unscale or (max_norm and optimizer is plain):
                scaler.unscale_(optimizer)
            if max_norm and optimizer is plain:
                nn.utils.clip_grad_norm_(others, max_norm)
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_close(params, others, rtol=1e-5, atol=2e-6)
        if t or device == "cpu":  # a GPU is not asked yet whether the first step was skipped: zeros are shown till then
            assert_same_state(opt, params, plain, others, rtol=1e-5, atol=2e-6)
    assert scalers[0].get_scale() == 256.0
    assert not hasattr(opt, "grad_scale")
    if name != "unfused":
        assert opt.skipped_steps == 2


# ---- in turn with sharpness-aware steps


class Oracle:
    """Of one group, in float64: SAM's or BSAM's steps and the base's own, gradients as a function of the weights."""

    def __init__(self, kind, name, ws, rho, lr):
        _, options = VARIANTS[name]
        defaults = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "betas": (0.9, 0.999), "eps": 1e-8}
        self.o = {**defaults, "weight_decay": 0.0, "lr": lr, "rho": rho, "rho_min": rho, "rho_min_decay": "none"}
        self.o |= {"adaptive": False, "eta": 0.0, **options}
        self.update = {"SGD": ref.sgd, "nesterov": ref.sgd, "Adam": ref.adam, "AdamW": ref.adamw}[name]
        self.bilateral = kind is bsam_fused.BSAM
        self.ws, self.states = [w.clone() for w in ws], [{} for _ in ws]

    def step(self, slope, active):
        gs = [slope(w) for w in self.ws]
        ds = self.directions(gs, slope) if active else gs
        self.ws = [self.update(w, d, s, self.o) for w, d, s in zip(self.ws, ds, self.states)]

    def directions(self, gs, slope):
        n = ref.ascent_norm(self.ws, gs, [self.o] * len(gs))
        g_max = [slope(ref.w_max(w, g, n, self.o)) for w, g in zip(self.ws, gs)]
        if not self.bilateral:
            return g_max
        g_min = [slope(ref.w_min(w, g, n, self.o)) for w, g in zip(self.ws, gs)]
        return ref.bsam([gs, g_max, g_min])


def slope(w):
    return w.sin() + 0.1 * w**3


@every_kind
@pytest.mark.parametrize("name", ["SGD", "nesterov", "Adam", "AdamW"])
@pytest.mark.parametrize("first", [True, False])
def test_in_turn_with_sharpness_aware_steps(backend, kind, name, first):
    """One state serves both: a momentum kept twice, or begun twice, would show in the next step."""
    base, options = VARIANTS[name]
    params = parameters("odd", torch.float64)
    more = {"rho_min_decay": "none"} if kind is bsam_fused.BSAM else {}
    opt = kind(params, base, lr=0.05, rho=0.4, backend=backend, **options, **more)
    oracle = Oracle(kind, name, [p.detach() for p in params], rho=0.4, lr=0.05)
    for t in range(6):
        opt.active = (t % 3 == 0) is first
        for call in opt._calls if opt.active else ["step"]:
            assign(params, [slope(p.detach()) for p in params])
            getattr(opt, call)()
        oracle.step(slope, opt.active)
        assert_close(params, oracle.ws, rtol=1e-9, atol=1e-10)
    for p, state in zip(params, oracle.states):
        for key, value in state.items():
            torch.testing.assert_close(
                opt.state[p][key].double(), torch.as_tensor(value).double(), rtol=1e-8, atol=1e-9
            )


@every_kind
@pytest.mark.parametrize("name", STATEFUL)
def test_state_stays_where_it_is(backend, kind, name):
    """Never handed over: the same tensors, at the same addresses, whichever kind of step comes."""
    opt, params, *_ = pair(kind, name, backend)

    def walk(active):
        opt.active = active
        for call in opt._calls if active else ["step"]:
            fill(params, 0)
            getattr(opt, call)()

    def tensors():
        return [v for p in params for v in opt.state[p].values()]

    for begin in (False, True):
        walk(begin)
        before, addresses = tensors(), [v.data_ptr() for v in tensors()]
        for active in (True, False, False, True, True, False):
            walk(active)
            assert all(a is b for a, b in zip(before, tensors(), strict=True))
            assert [v.data_ptr() for v in before] == addresses


@every_kind
@pytest.mark.parametrize("name", VARIANTS)
def test_not_skipped_for_what_an_earlier_step_met(backend, kind, name):
    """The sums of a SAM step that was skipped, or given up, say nothing of the plain one that follows."""
    for end in ("step", "restore"):
        opt, params, plain, others = pair(kind, name, backend)
        opt.active = True
        for call in [*opt._calls[:-1], end]:
            fill(params, 0)
            params[0].grad[0] = math.nan
            getattr(opt, call)()
        opt.active = False
        skipped = opt.skipped_steps
        for which, optimizer in ((params, opt), (others, plain)):
            fill(which, 1)
            optimizer.step()
        assert opt.skipped_steps == skipped == (1 if end == "step" else 0)
        assert_close(params, others, rtol=1e-11, atol=1e-12)
        assert_same_state(opt, params, plain, others, rtol=1e-11, atol=1e-12)


@every_kind
def test_a_sharpness_aware_step_after_a_skipped_plain_one(backend, kind):
    opt, params, *_ = pair(kind, "SGD", backend, rho=0.0, **({"rho_min": 0.0} if kind is bsam_fused.BSAM else {}))
    before = [p.detach().clone() for p in params]
    fill(params, 0, math.nan)
    opt.step()
    opt.active = True
    for call in opt._calls:
        assign(params, [torch.ones_like(p) for p in params])
        getattr(opt, call)()
    assert opt.skipped_steps == 1
    for p, w in zip(params, before):
        torch.testing.assert_close(p.detach(), w - 0.05 * (1 + 0.01 * w))  # the momentum begins, undampened


@every_kind
def test_weights_that_were_written_are_seen(backend, kind):
    """Version counters and autocast's cache, as after every other phase."""
    net = nn.Linear(3, 2)
    opt = kind(net.parameters(), lr=1.0, backend=backend)
    opt.active = False
    x = torch.ones(4, 3)
    loss = net(x).square().sum()
    loss.backward(retain_graph=True)
    version = net.weight._version
    opt.step()
    assert net.weight._version > version
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        first = net(x)
        assign(list(net.parameters()), [torch.ones_like(p) for p in net.parameters()])
        opt.step()
        assert not torch.equal(net(x), first)


# ---- 16 bits


@every_kind
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_steps_far_below_half_a_unit(backend, kind, rounding):
    """The weights move in the mean by as much as they should, or not at all."""
    n = 3000 if interpreted(backend) else 20_000
    p = nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    opt = kind([p], lr=2.0**-12, rounding=rounding, backend=backend)
    opt.active = False
    for _ in range(4):
        p.grad = torch.ones_like(p)
        opt.step()
    moved = 1 - p.double().mean().item()
    if rounding == "nearest":
        assert moved == 0
    else:
        assert moved == pytest.approx(4 * 2.0**-12, rel=0.2)


@every_kind
@pytest.mark.parametrize("name", ["plain SGD", *STATEFUL])
def test_master_weights_move(backend, kind, name):
    """As float32 weights do; the weights are their rounding to nearest."""
    opt, params, *_ = pair(kind, name, backend, torch.bfloat16, lr=1e-3, master_weights=True)
    base, options = VARIANTS[name]
    wide = [nn.Parameter(p.detach().float()) for p in params]
    plain = base(wide, lr=1e-3, **options)
    for t in range(4):
        if t == 2:  # and are not what a step that is given up leaves
            opt.active = True
            fill(params, 8)
            opt.ascend()
            opt.restore()
            opt.active = False
        fill(params, t)
        assign(wide, [p.grad.float() for p in params])
        opt.step()
        plain.step()
        for p, w in zip(params, wide):
            master = opt.state[p]["master_weight"]
            assert torch.equal(p.detach(), master.bfloat16())
            # the state in between is of 16 bits
            torch.testing.assert_close(master, w.detach(), rtol=1e-6, atol=1e-6 if name == "plain SGD" else 1e-4)


@every_kind
@pytest.mark.parametrize("seed", [0, 5])
def test_bits_depend_on_the_seed_and_the_step_alone(backend, kind, seed):
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        opt, params, *_ = pair(kind, "SGD", backend, torch.bfloat16, seed=seed)
        for t in range(3):
            fill(params, t)
            opt.step()
        runs.append([p.detach().clone() for p in params])
    assert all(map(torch.equal, *runs))
    assert opt.state_dict()["param_groups"][0]["rounded_steps"] == 3
    other, others, *_ = pair(kind, "SGD", backend, torch.bfloat16, seed=seed + 1)
    for p, q in zip(others, params):
        p.data.copy_(q)
    for which, optimizer in ((params, opt), (others, other)):
        fill(which, 9)
        optimizer.step()
    assert not all(map(torch.equal, params, others))
