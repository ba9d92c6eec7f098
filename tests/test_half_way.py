"""Errors in the middle of a phase, bases that raise half way, and optimizers that are dropped: nothing stays behind."""

import functools
import gc
import math
import weakref

import pytest
import torch
from torch import nn

import bsam_fused
from bsam_fused.ops import dispatch

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.part(4)]
# LookSAM's and Friendly SAM's state has a history, which is of the same step as all else.
LOOKSAM = functools.partial(bsam_fused.LookSAM, k=1)
KINDS = {"SAM": bsam_fused.SAM, "BSAM": bsam_fused.BSAM, "LookSAM": LOOKSAM, "FriendlySAM": bsam_fused.FriendlySAM}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.1}),
    "unfused": (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.9}),
}
every_base = pytest.mark.parametrize("base", BASES)


def fill(params, value=1.0):
    for p in params:
        p.grad = torch.full_like(p, value)


def walk(opt, params):
    for k, call in enumerate(opt._calls):
        fill(params, 1.0 + k)
        getattr(opt, call)()


def left(opt, params):
    state = opt.state_dict()["state"]
    return [p.detach().clone() for p in params], {
        (i, k): torch.as_tensor(v).clone() for i, entry in state.items() for k, v in entry.items()
    }


def assert_same(one, other):
    assert all(map(torch.equal, one[0], other[0]))
    assert one[1].keys() == other[1].keys()
    for key, value in other[1].items():
        assert torch.equal(one[1][key], value), key


class Failing:
    """The second FlatParams of two, one of whose operators finds no memory the first time, before or after its work."""

    def __init__(self, flat, operator, when):
        self.__dict__.update(flat=flat, operator=operator, when=when, failed=False)

    def __getattr__(self, name):
        value = getattr(self.flat, name)
        if name != self.operator:
            return value

        def fail(*args):
            if self.failed:
                return value(*args)
            self.__dict__["failed"] = True
            if self.when == "after":
                value(*args)
            raise torch.OutOfMemoryError

        return fail


def trained(kind, base, backend, steps):
    """An optimizer of two dtypes after some steps; its FlatParams will be built anew."""
    params = [nn.Parameter(torch.linspace(0.5, 2, 5)), nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))]
    base_class, options = BASES[base]
    opt = kind(params, base_class, backend=backend, rho=0.3, **options)
    for _ in range(steps):
        walk(opt, params)
    params.append(nn.Parameter(torch.ones(1)))
    opt.add_param_group({"params": params[-1:]})
    return opt, params


def states(kind, base, backend, steps):
    """What is there before a step that nothing disturbs, after it, and after two."""
    opt, params = trained(kind, base, backend, steps)
    found = [left(opt, params)]
    for _ in range(2):
        walk(opt, params)
        found.append(left(opt, params))
    return found


@pytest.fixture
def failing(backend, monkeypatch):
    """Call it with an operator, and when: that of float64 fails once in the optimizers that build from now on."""

    def arm(operator, when="before"):
        build = dispatch._FACTORIES[backend]

        def factory(given, *args):
            flat = build(given, *args)
            return Failing(flat, operator, when) if given[0].dtype is torch.float64 else flat

        monkeypatch.setitem(dispatch._FACTORIES, backend, factory)

    return arm


@every_kind
@every_base
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("operator", ["square_norm", "ascend"])
def test_ascend_fails_half_way(backend, failing, kind, base, operator, when, steps):
    """One dtype is perturbed, and there is no memory for the other's saved w: all are at w at once, not only after
    restore(): whoever catches the error may go on with the plain model.
    """
    before, after, _ = states(kind, base, backend, steps)
    opt, params = trained(kind, base, backend, steps)
    failing("mix" if kind is bsam_fused.FriendlySAM and operator == "square_norm" else operator, when)
    fill(params)
    with pytest.raises(torch.OutOfMemoryError):
        opt.ascend()
    assert all(torch.equal(p, w) for p, w in zip(params, before[0]))
    opt.restore()
    assert_same(left(opt, params), before)
    walk(opt, params)
    assert_same(left(opt, params), after)


@every_base
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_descend_fails_half_way(backend, failing, base, when, steps):
    before, after, _ = states(bsam_fused.BSAM, base, backend, steps)
    opt, params = trained(bsam_fused.BSAM, base, backend, steps)
    failing("descend", when)
    fill(params)
    opt.ascend()
    fill(params, 2.0)
    with pytest.raises(torch.OutOfMemoryError):
        opt.descend()
    opt.restore()
    assert_same(left(opt, params), before)
    walk(opt, params)
    assert_same(left(opt, params), after)


@every_kind
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("operator", ["beginning", "state", "begin_state", "update"])
def test_the_update_fails_half_way(backend, failing, kind, base, operator, steps):
    """Before one dtype's update, when the other's may have been made: w everywhere, or the next w everywhere."""
    if operator == "update":
        operator = "update_sgd" if base == "SGD" else "update_adam"
    before, after, later = states(kind, base, backend, steps)
    opt, params = trained(kind, base, backend, steps)
    failing(operator)
    with pytest.raises(torch.OutOfMemoryError):
        walk(opt, params)
    opt.restore()
    given_up = torch.equal(params[0], before[0][0])
    assert_same(left(opt, params), before if given_up else after)
    walk(opt, params)
    assert_same(left(opt, params), after if given_up else later)


@every_kind
@every_base
@pytest.mark.parametrize("enabled", [True, False])
def test_whether_autograd_records_is_left_as_it_was(backend, kind, base, enabled):
    """After every phase; one that ends with gradients off has the next backward raise."""
    opt, params = trained(kind, base, backend, 1)
    with torch.set_grad_enabled(enabled):
        for active in (True, False):
            opt.active = active
            for call in [*opt._calls[:-1], "restore", *opt._calls] if active else ["step"]:
                fill(params)
                getattr(opt, call)()
                assert torch.is_grad_enabled() is enabled, call
                with opt.unperturbed():
                    assert torch.is_grad_enabled() is enabled, call


# ---- bases that raise


class Interrupt(BaseException):
    """Like KeyboardInterrupt: no Exception."""


def moving(error, moved):
    """A base that moves the parameters ``moved`` and raises."""

    class Moving(torch.optim.SGD):
        def step(self, closure=None):
            for i in moved:
                self.param_groups[0]["params"][i].data.add_(1.0)
            if error is not None:
                raise error

    return Moving


PASSES = {"first": {0}, "last": {-1}, "all": {0, 1, -1}, "none": set()}
"""Each parameter has gradients in these passes."""


@every_kind
@pytest.mark.parametrize(("error", "by"), [(ValueError, "hand"), (Interrupt, "closure")])
@pytest.mark.parametrize("moved", [*range(4), "all"])
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float32, torch.float64]], ids=["one dtype", "two"])
def test_a_base_that_raises_has_every_weight_put_back(backend, kind, error, by, moved, dtypes):
    """Whichever it moved: with a gradient in one pass, in all or in none."""
    params = [nn.Parameter(torch.full((3,), 1.0 + i, dtype=dtypes[i % len(dtypes)])) for i in range(4)]
    before = [p.detach().clone() for p in params]
    everything = range(4) if moved == "all" else [moved]
    opt = kind(params, moving(error, everything), lr=0.1, rho=0.5, backend=backend)
    run = 0

    def backward():
        nonlocal run
        here = {run, run - len(opt._calls)}
        for p, passes in zip(params, PASSES.values()):
            p.grad = torch.ones_like(p) if passes & here else None
        run += 1
        return 1.0

    def by_hand():
        for call in opt._calls:
            backward()
            getattr(opt, call)()

    with pytest.raises(error):
        by_hand() if by == "hand" else opt.step(backward)
    assert all(torch.equal(p, w) for p, w in zip(params, before))
    opt.restore()
    assert all(torch.equal(p, w) for p, w in zip(params, before))


@every_kind
def test_a_base_that_moves_what_has_no_gradient_keeps_its_word(backend, kind):
    """Decay of all weights, say: what it did counts where it did not raise."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    opt = kind(params, moving(None, [0, 1]), lr=0.1, rho=0.5, backend=backend)
    for call in opt._calls:
        fill(params[:1])
        getattr(opt, call)()
    opt.restore()
    assert all(torch.equal(p, torch.full((3,), 2.0)) for p in params)


# ---- what outlives an optimizer


def network():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def hooks_of(net):
    return [
        hook for p in net.parameters() for hook in [*(p._post_accumulate_grad_hooks or ()), *(p._backward_hooks or ())]
    ]


ENDS = {
    "at rest": lambda opt, backward: [(backward(), getattr(opt, call)()) for call in opt._calls],
    "never used": lambda opt, backward: None,
    "perturbed": lambda opt, backward: (backward(), opt.ascend()),
    "perturbed by an inf": lambda opt, backward: (backward(math.inf), opt.ascend()),
    "given up": lambda opt, backward: (backward(), opt.ascend(), opt.restore()),
    "in the plain base's step": lambda opt, backward: (setattr(opt, "active", False), backward(), opt.step()),
    "copied": lambda opt, backward: (backward(), opt.ascend(), opt.restore(), opt.load_state_dict(opt.state_dict())),
}


@every_kind
@pytest.mark.parametrize("end", ENDS)
def test_a_dropped_optimizer_is_gone(backend, kind, end):
    """No hook of its own on any parameter, no frozen layer, and nothing that keeps it alive."""
    net = network()
    opt = kind(net.parameters(), lr=0.1, momentum=0.9, backend=backend, model=net)

    def backward(scale=1.0):
        (net(torch.randn(4, 2)).sum() * scale).backward()

    ENDS[end](opt, backward)
    dropped = weakref.ref(opt)
    del opt
    gc.collect()
    assert dropped() is None
    assert hooks_of(net) == []
    assert type(net[1]) is nn.BatchNorm1d
    net.zero_grad()
    net(torch.ones(4, 2)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@every_kind
def test_a_dropped_optimizers_inf_reaches_no_later_gradient(backend, kind):
    """Its watch over the last pass would make the first gradient that comes NaN."""
    p = nn.Parameter(torch.ones(2))
    opt = kind([p], lr=0.1, backend=backend)
    fill([p], math.nan)
    opt.ascend()
    del opt
    gc.collect()
    p.grad = None
    p.square().sum().backward()
    assert p.grad.tolist() == [2.0, 2.0]


def test_hooks_of_others_stay(backend):
    net = network()
    heard = []
    handle = net[0].weight.register_post_accumulate_grad_hook(lambda p: heard.append(1))
    opt = bsam_fused.SAM(net.parameters(), lr=0.1, backend=backend)
    for call in opt._calls:
        net(torch.randn(4, 2)).sum().backward()
        getattr(opt, call)()
    del opt
    gc.collect()
    assert len(heard) == 2
    assert len(hooks_of(net)) == 1
    handle.remove()
