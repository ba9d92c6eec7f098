"""Nothing is lost: whatever happens in a pass, weights and state are bit for bit as before the step."""

import copy

import pytest
import torch
from members import MEMBERS, calls, each_pass, every_member, some_of_each_member
from torch import nn

import bsam_fused
from bsam_fused import ASAM, SAM, FriendlySAM
from bsam_fused.ops import dispatch, torch_flat
from bsam_fused.optim import state

BASES = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {}),
    "general": (torch.optim.RMSprop, {"momentum": 0.9}),
}


class Interrupt(BaseException):
    """Like KeyboardInterrupt: no Exception."""


def network(dtype=torch.float32):
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def snapshot(net, opt):
    return [p.detach().clone() for p in net.parameters()], copy.deepcopy(state_of(opt))


def state_of(opt):
    with opt.unperturbed():
        return opt.state_dict()["state"]


def assert_unchanged(net, opt, before):
    weights, state = before
    for p, w in zip(net.parameters(), weights):
        assert torch.equal(p, w)
    now = state_of(opt)
    assert now.keys() == state.keys()
    for i, values in state.items():
        for key, value in values.items():
            assert torch.equal(now[i][key], value), key


def step_with(opt, net, fault=None, at=None):
    """A closure step in whose pass number ``at`` the fault happens after backward."""
    x, y = torch.randn(16, 6, dtype=net[0].weight.dtype), torch.randint(3, (16,))
    passes = 0

    def closure():
        nonlocal passes
        passes += 1
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        if passes == at:
            return fault(loss, net)
        return loss

    opt.step(closure)
    return passes


def raising(loss, net):
    raise Interrupt


def non_finite_loss(value):
    return lambda loss, net: loss * value


def non_finite_gradient(value):
    def fault(loss, net):
        net[3].weight.grad[1, 2] = value  # perturbed, also where others are not
        return loss

    return fault


each_base = pytest.mark.parametrize("base", BASES)
before_training = pytest.mark.parametrize("steps_before", [0, 2])


def prepared(member, base, backend, steps_before, **options):
    base_class, base_options = BASES[base]
    net = network()
    opt = member.build(net.parameters(), base_class, lr=0.05, backend=backend, **base_options, **options)
    for _ in range(steps_before):
        step_with(opt, net)
    return net, opt


@each_pass
@each_base
@before_training
def test_closure_raises(backend, member, base, at, steps_before):
    net, opt = prepared(member, base, backend, steps_before)
    opt.model = net
    modes = [(m.training, getattr(m, "track_running_stats", None)) for m in net.modules()]
    before = snapshot(net, opt)
    with pytest.raises(Interrupt):
        step_with(opt, net, raising, at)
    assert_unchanged(net, opt, before)
    assert [(m.training, getattr(m, "track_running_stats", None)) for m in net.modules()] == modes
    assert all(p.grad is None for p in net.parameters()) or at == 1
    step_with(opt, net)
    assert not torch.equal(net[0].weight, before[0][0])
    assert opt.skipped_steps == 0


@each_pass
@each_base
@before_training
@pytest.mark.parametrize(
    "fault",
    [non_finite_loss(float("inf")), non_finite_loss(float("nan")), non_finite_gradient(float("-inf"))],
    ids=["inf loss", "NaN loss", "inf gradient"],
)
@pytest.mark.filterwarnings("error")
def test_non_finite_pass_is_skipped_and_counted(backend, member, base, at, steps_before, fault):
    net, opt = prepared(member, base, backend, steps_before)
    before = snapshot(net, opt)
    assert step_with(opt, net, fault, at) == member.passes
    assert_unchanged(net, opt, before)
    assert opt.skipped_steps == 1
    step_with(opt, net)
    assert not torch.equal(net[0].weight, before[0][0])
    assert all(p.isfinite().all() for p in net.parameters())
    assert opt.skipped_steps == 1


@pytest.mark.parametrize(("name", "at"), [(f"{k}, some exempt", at) for k in ("SAM", "BSAM", "GSAM") for at in (1, 2)])
def test_an_inf_of_what_is_exempt(backend, name, at):
    """Skipped and counted; but SAM, which keeps no g, does not read that of what it does not perturb."""
    net, opt = prepared(MEMBERS[name], "SGD", backend, 1)
    before = snapshot(net, opt)

    def fault(loss, net):
        net[3].bias.grad[1] = float("inf")
        return loss

    step_with(opt, net, fault, at)
    if (name, at) == ("SAM, some exempt", 1):
        assert opt.skipped_steps == 0
        assert all(p.isfinite().all() for p in net.parameters())
    else:
        assert_unchanged(net, opt, before)
        assert opt.skipped_steps == 1


@pytest.mark.parametrize(
    ("name", "at"),
    [(name, at) for name, member in MEMBERS.items() if not member.exempt for at in range(1, member.passes + 1)],
)
def test_an_inf_of_what_is_exempt_and_has_a_gradient_in_one_pass_alone(backend, name, at):
    """Nothing of the other passes says so. It is read where d is of it."""
    member = MEMBERS[name]._replace(exempt=True)
    p, q = params = [nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2)]
    opt = member.build(params, lr=0.1, momentum=0.9, backend=backend)
    before = [p.detach().clone() for p in params]
    for n, call in enumerate(calls(opt), 1):
        p.grad = n + p.detach().square()
        q.grad = torch.tensor([1.0, 2.0, 3.0, -float("inf"), 4.0]) if n == at else None
        getattr(opt, call)()
    if at == 1 and member.kind in {SAM, ASAM, FriendlySAM}:  # d is of the last gradient alone
        assert (opt.skipped_steps, torch.equal(q, before[1])) == (0, True)
        assert not torch.equal(p, before[0])
        assert p.isfinite().all()
    else:
        assert opt.skipped_steps == 1
        assert all(map(torch.equal, params, before))


def test_such_an_inf_where_the_torch_backend_has_no_lists(monkeypatch):
    """As on any device but a CPU."""
    monkeypatch.setitem(dispatch._FACTORIES, "torch", torch_flat.TorchFlatParams)
    test_an_inf_of_what_is_exempt_and_has_a_gradient_in_one_pass_alone("torch", "BSAM", 1)


@every_member
def test_a_skipped_first_step_leaves_the_first_step_rule(backend, member):
    """SGD's momentum starts as d whatever the dampening, also when the first attempt was skipped.

    LookSAM counts a skipped step: with k = 1 the next one is like it.
    """
    k = {"k": 1} if "k" in member.options else {}
    skipped, plain = (prepared(member, "SGD", backend, 0, dampening=0.5, **k) for _ in range(2))
    plain[0].load_state_dict(skipped[0].state_dict())
    step_with(*reversed(skipped), non_finite_gradient(float("nan")), 1)
    for net, opt in (skipped, plain):
        torch.manual_seed(5)
        step_with(opt, net)
    assert all(torch.equal(p, q) for p, q in zip(skipped[0].parameters(), plain[0].parameters()))


@pytest.mark.parametrize("name", ["SAM", "ASAM", "BSAM", "GSAM"])
@pytest.mark.parametrize("then", ["copied", "another group", "inactive", "plain base", "nothing"])
def test_a_skipped_first_step_leaves_the_first_step_to_come(backend, name, then):
    """The momentum starts as d, whatever the dampening, also where the host cannot know that a step was skipped."""
    p = nn.Parameter(torch.ones(3))
    opt = MEMBERS[name].build([p], lr=0.1, momentum=0.9, dampening=0.5, rho=0.0, backend=backend)

    def walk(slope):
        for call in opt._calls if opt.active else ["step"]:
            p.grad = torch.full_like(p, slope)
            getattr(opt, call)()

    walk(float("nan"))
    if then == "copied":
        opt.load_state_dict(copy.deepcopy(opt).state_dict())
    if then == "another group":
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    if then == "inactive":
        opt.active = False
    if then == "plain base":
        plain = torch.optim.SGD([p], lr=0.1, momentum=0.9, dampening=0.5)
        plain.load_state_dict(opt.state_dict())
        p.grad = torch.ones_like(p)
        plain.step()
    else:
        walk(1.0)
    torch.testing.assert_close(p.detach(), torch.full_like(p, 0.9))


def test_no_memory_for_the_update(backend, monkeypatch):
    """The step is given up, tried again, and has its state; no FlatParams steps where another one cannot."""
    params = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5, dtype=torch.float64))]
    opt = bsam_fused.SAM(params, lr=0.1, momentum=0.9, backend=backend)

    def backward():
        for p in params:
            p.grad = torch.ones_like(p)

    backward()
    opt.ascend()
    backward()
    second, held = list(opt._flats)[1], state._held
    with monkeypatch.context() as patch:
        patch.setattr(state, "_held", lambda flat, *a: out_of_memory() if flat is second else held(flat, *a))
        with pytest.raises(torch.OutOfMemoryError):
            opt.step()
    opt.restore()
    assert all(torch.equal(p, torch.ones_like(p)) for p in params)
    for call in opt._calls:
        backward()
        getattr(opt, call)()
    assert all("momentum_buffer" in opt.state[p] for p in params)


def out_of_memory():
    raise torch.OutOfMemoryError


@every_member
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_no_later_pass_sees_moved_weights_after_a_bad_gradient(backend, member, value):
    net, opt = prepared(member, "SGD", backend, 2)
    before = snapshot(net, opt)
    net(torch.randn(4, 6)).sum().backward()
    net[0].weight.grad[2, 3] = value
    opt.ascend()
    assert_unchanged(net, opt, before)
    opt.restore()
    if member.passes == 3:
        net(torch.randn(4, 6)).square().sum().backward()
        opt.ascend()
        net(torch.randn(4, 6)).square().sum().backward()
        net[0].weight.grad[2, 3] = value
        opt.descend()
        if backend in {"cuda", "triton"}:  # learns of it in the pass that writes w_min, which is finite
            assert all(p.isfinite().all() for p in net.parameters())
        else:
            assert_unchanged(net, opt, before)
        opt.restore()
        assert_unchanged(net, opt, before)
    assert opt.skipped_steps == 0


@some_of_each_member
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_restore_is_exact(backend, member, dtype):
    """Bit for bit, for weights of all magnitudes: w + ε − ε would lose the small ones' low bits."""
    p = nn.Parameter((torch.randn(5000) * torch.logspace(-4, 2, 5000)).to(dtype))
    before = p.detach().clone()
    opt = member.build([p], lr=0.1, rho=3.0, backend=backend)
    for call in opt._calls[:-1]:
        p.grad = torch.randn_like(p)
        getattr(opt, call)()
        assert not torch.equal(p, before)
    opt.restore()
    assert torch.equal(p, before)
    opt.restore()  # at rest, nothing
    assert torch.equal(p, before)


@some_of_each_member
@each_base
def test_lr_zero_leaves_weights_bit_identical(backend, member, base):
    base_class, base_options = BASES[base]
    net = network()
    opt = member.build(net.parameters(), base_class, backend=backend, **{"lr": 0.0, **base_options})
    before = [p.detach().clone() for p in net.parameters()]
    for _ in range(20):
        step_with(opt, net)
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), before))


@every_member
def test_a_base_that_raises_has_its_weights_restored(backend, member):
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["params"][0].data.add_(1.0)  # it got half way
            raise Interrupt

    net = network()
    opt = member.build(net.parameters(), Failing, lr=0.1, backend=backend)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(Interrupt):
        step_with(opt, net)
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), before))
    with pytest.raises(RuntimeError, match="ascend"):
        opt.step()


@every_member
def test_batchnorm_statistics_move_in_the_first_pass_only(backend, member):
    """As after one plain forward pass at w; without model= they move in every pass."""
    net, reference = network(), network()
    reference.load_state_dict(net.state_dict())
    torch.manual_seed(3)
    opt = member.build(net.parameters(), lr=0.1, rho=1.0, model=net, backend=backend)
    step_with(opt, net)
    torch.manual_seed(3)
    reference(torch.randn(16, 6))
    assert torch.equal(net[1].running_mean, reference[1].running_mean)
    assert torch.equal(net[1].running_var, reference[1].running_var)
    assert net[1].num_batches_tracked == 1
    assert net[1].track_running_stats


def test_restore_of_a_parameter_moved_within_the_step(backend):
    net = network()
    opt = bsam_fused.SAM(net.parameters(), lr=0.1, backend=backend)
    before = [p.detach().clone() for p in net.parameters()]
    net(torch.randn(4, 6)).sum().backward()
    opt.ascend()
    net.double()
    net(torch.randn(4, 6).double()).sum().backward()
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 .*float64.*restore\(\) first"):
        opt.step()
    opt.restore()
    assert all(torch.equal(p, w.double()) for p, w in zip(net.parameters(), before))
    net(torch.randn(4, 6).double()).sum().backward()
    opt.ascend()
