"""What LookSAM and Friendly SAM remember: as papers have it, written with the update or not at all, and the user's."""

import copy
import math

import pytest
import reference as ref
import torch
from members import MEMBERS, Member, calls, options_of
from pytorch_optimizer.optimizer.sam import FriendlySAM as PackagedFriendlySAM
from pytorch_optimizer.optimizer.sam import LookSAM as PackagedLookSAM
from quadratic import Quadratic, assert_alike, flat, parameters, twins, walk
from samples import assign, gradients
from test_against_reference import BASES, step_beside
from test_checkpoints import assert_same
from torch import nn

from bsam_fused import FriendlySAM, LookSAM

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_THIRD = MEMBERS["LookSAM"]._replace(options={"rho": 0.3, "k": 3, "alpha": 0.6})
HISTORIC = {"LookSAM": EVERY_THIRD, "FriendlySAM": MEMBERS["FriendlySAM"]}
every_historic = pytest.mark.parametrize("member", HISTORIC.values(), ids=HISTORIC)
some_bases = pytest.mark.parametrize("base", ["SGD", "Adam", "general"])
RMSPROP = torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9}
FUSED_OR_NOT = pytest.mark.parametrize(
    ("base", "options"), [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), RMSPROP], ids=["SGD", "RMSprop"]
)


def remembered(member, opt, params):
    return [opt.state[p][member.memory.key].clone() for p in params]


def same(tensors, others):
    return all(map(torch.equal, tensors, others))


def closure_of(loss, params, fault=None):
    """Of a `Quadratic`; counts its calls. ``fault`` is called with the loss, in which it may make something wrong."""

    def closure():
        closure.calls += 1
        assign(params, loss.gradient(flat(params)).split(loss.sizes))
        return torch.tensor(1.0) if fault is None else fault(torch.tensor(1.0))

    closure.calls = 0
    return closure


# ---- as the papers have it


@pytest.mark.parametrize("base", ["SGD", "AdamW", "general"])
@every_historic
def test_a_trajectory(backend, member, base):
    """Beside the formulas, all of it in float64: v and m of each step, and what they make of the next ones."""
    base_class, base_options, rule = BASES[base]
    params, loss = parameters(), Quadratic()
    opt = member.build(params, base_class, backend=backend, **{**base_options, "lr": 0.01})
    w, state, options = [p.detach().clone() for p in params], [{} for _ in params], options_of(opt, params)
    history = [torch.zeros_like(x) for x in w]

    def gradient(at):
        return [*loss.gradient(torch.cat(at)).split(loss.sizes)]

    for t in range(7):
        opt.step(closure_of(loss, params))
        g = gradient(w)
        passes, q = [g], member.memory.along(g, options, history)
        if member.passes_of(t) == 2:
            n = ref.ascent_norm(w, q, options)
            passes.append(gradient([ref.w_max(x, y, n, o) for x, y, o in zip(w, q, options)]))
        d = member.d(passes, options, history)
        history = member.memory.remembered(passes, options, history)
        w = [rule(x, y, s, o) for x, y, s, o in zip(w, d, state, options)]
        assert_alike(params, w, rtol=1e-9)
        assert_alike(remembered(member, opt, params), history, rtol=1e-9)
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("adaptive", [False, True])
def test_friendly_sam_beside_another(backend, adaptive):
    """pytorch_optimizer's, which is as the authors' code; its norms are of float32."""
    params, copies = twins()
    options = {"rho": 0.3, "sigma": 0.7, "lmbda": 0.6, "adaptive": adaptive, "lr": 0.01, "momentum": 0.9}
    opt = FriendlySAM(params, backend=backend, **options)
    other, loss = PackagedFriendlySAM(copies, torch.optim.SGD, **options), Quadratic()
    for _ in range(5):
        loss.step(opt, params)
        for call in (other.first_step, other.second_step):
            assign(copies, loss.gradient(flat(copies)).split(loss.sizes))
            call()
    assert_alike(params, copies, rtol=3e-6)
    assert_alike([opt.state[p]["gradient_average"] for p in params], [other.state[q]["momentum"] for q in copies], 3e-6)


def test_looksam_beside_another(backend):
    """pytorch_optimizer's, of one parameter: its v is a tensor's, the paper's is of all of them."""
    params, copies = twins((16,))
    options = {"rho": 0.3, "k": 3, "alpha": 0.6, "lr": 0.01, "momentum": 0.9}
    opt = LookSAM(params, backend=backend, **options)
    other, loss = PackagedLookSAM(copies, torch.optim.SGD, **options), Quadratic((16,))
    for t in range(7):
        loss.step(opt, params)
        for call in (other.first_step, other.second_step)[t % 3 > 0 :]:
            assign(copies, loss.gradient(flat(copies)).split(loss.sizes))
            call()
    assert_alike(params, copies, rtol=3e-6)
    assert_alike([opt.state[params[0]]["orthogonal_gradient"]], [other.state[copies[0]]["gv"]], rtol=3e-6)


VARIANTS = {
    "maximize": {"maximize": True},
    "max_grad_norm": {"max_grad_norm": 2.0},
    "loss_budget": {"loss_budget": 0.5},
    "weight_decay": {"weight_decay": 0.3},
}


@pytest.mark.part(2)
@pytest.mark.parametrize("base", ["SGD", "Adam"])
@pytest.mark.parametrize("variant", VARIANTS)
@every_historic
def test_what_the_options_leave_of_it(backend, member, base, variant):
    """It is of the gradients as they came: neither clipped, nor turned by maximize, nor with the weights' decay."""
    base_class, base_options, rule = BASES[base]
    params = parameters()
    opt = member.build(params, base_class, backend=backend, **{**base_options, **VARIANTS[variant]})
    for t in range(4):
        step_beside(member, opt, params, rule, [gradients(params, 2 * t), gradients(params, 2 * t + 1)])
    assert opt.skipped_steps == 0


@pytest.mark.part(2)
@some_bases
@pytest.mark.parametrize("zero", [{0}, {1}, {0, 1}], ids=["g", "g_max", "both"])
@every_historic
def test_zero_norms(backend, member, base, zero):
    """Gradients that are 0 in some pass of the first step, or of a later one: nothing is divided by them."""
    base_class, base_options, rule = BASES[base]
    params = parameters()
    opt = member.build(params, base_class, backend=backend, **base_options)
    for t in range(7):
        passes = [gradients(params, 2 * t), gradients(params, 2 * t + 1)]
        for k in zero if t in (0, 3, 4) else ():
            passes[k] = [torch.zeros_like(p) for p in params]
        step_beside(member, opt, params, rule, passes)
    assert opt.skipped_steps == 0


def test_a_gradient_along_the_average_perturbs_nothing(backend):
    """q = g − m = 0, of σ = 1 and a gradient that does not change: w_max is w."""
    params = parameters()
    opt = FriendlySAM(params, lr=0.1, sigma=1.0, backend=backend)
    g = gradients(params, 0)
    walk(opt, params, g, g)
    before = [p.detach().clone() for p in params]
    assign(params, g)
    opt.ascend()
    assert same(params, before)
    assert opt.norms[0] == 0


def test_v_is_of_all_parameters(backend):
    """⟨g, g_max⟩ and ‖g‖ over groups and dtypes; a v of each would be orthogonal to its own g."""
    member = MEMBERS["LookSAM"]
    params = [nn.Parameter(torch.randn(40, dtype=d)) for d in (torch.float32, torch.float64, torch.float32)]
    opt = member.kind([{"params": [p]} for p in params], lr=0.1, backend=backend, **member.options)
    g = gradients(params, 0)
    walk(opt, params, g, gradients(params, 1))
    products = [(opt.state[p]["orthogonal_gradient"].double() * x.double()).sum().item() for p, x in zip(params, g)]
    assert sum(products) == pytest.approx(0, abs=1e-5)
    assert min(map(abs, products)) > 0.1
    step_beside(member, opt, params, ref.sgd, [gradients(params, 2)])


# ---- which passes


def test_passes_are_counted(backend):
    """LookSAM with k = 5 makes 1.2 a step, by hand as with closures, and says before each step how many."""
    params, copies = twins()
    loss = Quadratic()
    opt, by_hand = (LookSAM(ps, lr=0.01, k=5, backend=backend) for ps in (params, copies))
    closure, made = closure_of(loss, params), 0
    for t in range(20):
        assert opt.passes == by_hand.passes == (1 if t % 5 else 2)
        opt.step(closure)
        made += len(calls(by_hand))
        loss.step(by_hand, copies)
    assert closure.calls == made == 24
    assert same(params, copies)


def test_a_call_of_a_pass_that_does_not_come(backend):
    """Between LookSAM's k-th steps there is no ascent, and an error says so; the step comes yet."""
    params = parameters()
    opt = LookSAM(params, lr=0.1, backend=backend)
    walk(opt, params, gradients(params, 0), gradients(params, 1))
    before = [p.detach().clone() for p in params]
    assign(params, gradients(params, 2))
    for call in (opt.ascend, opt.first_step):
        with pytest.raises(
            RuntimeError, match=r"in a step of one pass, as optimizer.passes says: (second_)?step\(\) comes next"
        ):
            call()
    assert same(params, before)
    step_beside(MEMBERS["LookSAM"], opt, params, ref.sgd, [gradients(params, 2)])


@FUSED_OR_NOT
@every_historic
def test_untouched_while_inactive(backend, member, base, options):
    """Bit for bit, and those steps are not counted: of two alike the one goes on as the other."""
    params = parameters()
    opt = member.build(params, base, backend=backend, **options)
    for t in range(2):
        walk(opt, params, *[gradients(params, 2 * t), gradients(params, 2 * t + 1)][: opt.passes])
    before, passes = remembered(member, opt, params), opt.passes
    opt.active = False
    for t in range(4):  # by which LookSAM would look again
        assert opt.passes == 1
        walk(opt, params, gradients(params, 10 + t))
    assert same(remembered(member, opt, params), before)
    opt.active = True
    assert opt.passes == passes
    params = [p for p in params if opt.state[p]]
    history = member.history(opt, params)
    passes = [gradients(params, 20), gradients(params, 21)][: opt.passes]
    walk(opt, params, *passes)
    assert_alike(remembered(member, opt, params), member.memory.remembered(passes, options_of(opt, params), history))


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@FUSED_OR_NOT
def test_an_edit_before_an_inactive_step_counts_after_it(backend, base, options, max_grad_norm):
    """v that a user deletes is gone: that step, which has no use for it, does not bring it back."""
    p = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
    opt = LookSAM([p], base, k=4, alpha=0.6, max_grad_norm=max_grad_norm, backend=backend, **options)
    walk(opt, [p], [torch.tensor([1.0, 2.0, 3.0])], [torch.tensor([-4.0, 2.0, 1.0])])
    del opt.state[p]["orthogonal_gradient"]
    opt.active = False
    walk(opt, [p], [torch.tensor([1.0, 1.0, 1.0])])
    plain = copy.deepcopy(opt)
    opt.active = True
    for optimizer in (opt, plain):  # a copy has only what the state shows
        walk(optimizer, optimizer.param_groups[0]["params"], [torch.tensor([3.0, -2.0, 1.0])])
    assert torch.equal(p, plain.param_groups[0]["params"][0])


def test_state_that_begins_in_an_inactive_step_of_a_base_that_is_hooked_goes_on(backend):
    """That step is the base's own, and so is its momentum: the fused ones that follow take it up."""
    p, q = nn.Parameter(torch.tensor([0.5, -1.0, 2.0])), nn.Parameter(torch.tensor([1.0, 2.0]))
    opt = LookSAM([p, q], torch.optim.SGD, lr=0.1, momentum=0.9, k=4, max_grad_norm=50.0, backend=backend)
    walk(opt, [p], [torch.tensor([1.0, 2.0, 3.0])], [torch.tensor([-4.0, 2.0, 1.0])])
    hook = opt.base_optimizer.register_step_post_hook(lambda *_: None)
    opt.active = False
    walk(opt, [p, q], [torch.ones(3), torch.tensor([3.0, 4.0])])
    hook.remove()
    walk(opt, [p, q], [torch.ones(3), torch.ones(2)])
    torch.testing.assert_close(opt.state[q]["momentum_buffer"], torch.tensor([0.9 * 3 + 1, 0.9 * 4 + 1]))
    torch.testing.assert_close(q.detach(), torch.tensor([1 - 0.1 * (3 + 3.7), 2 - 0.1 * (4 + 4.6)]))


def test_alpha_that_differs_cannot_be_clipped(backend):
    """‖d‖ of the steps between is of one α; nothing is written, and without the limit the step is made."""
    params = parameters()
    member = Member(LookSAM, ref.looksam, {"k": 2}, memory=ref.ORTHOGONAL)
    groups = [{"params": [p], "alpha": 0.1 * i} for i, p in enumerate(params)]
    opt = LookSAM(groups, k=2, lr=0.1, max_grad_norm=1.0, backend=backend)
    walk(opt, params, gradients(params, 0), gradients(params, 1))
    before = [p.detach().clone() for p in params]
    assign(params, gradients(params, 2))
    with pytest.raises(ValueError, match="max_grad_norm=1 where alpha differs"):
        opt.step()
    assert same(params, before)
    opt.max_grad_norm = None
    step_beside(member, opt, params, ref.sgd, [gradients(params, 3)])


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "5", None])
def test_a_k_that_cannot_be(wrong):
    with pytest.raises((TypeError, ValueError), match=r"^k\b"):
        LookSAM(parameters(), lr=0.1, k=wrong)


# ---- faults. Those in passes of every member are in test_faults.py


class Raised(Exception):
    pass


def raising(loss):
    raise Raised


def snapshot(member, opt, params):
    return [p.detach().clone() for p in params], copy.deepcopy(opt.state_dict())


def between(member, backend, base, options):
    """An optimizer whose next step is LookSAM's of one pass."""
    params, loss = parameters(), Quadratic()
    opt = member.build(params, base, backend=backend, **options)
    for _ in range(2):
        opt.step(closure_of(loss, params))
    return opt, params, loss


@FUSED_OR_NOT
@every_historic
def test_an_error_leaves_it_and_the_count(backend, member, base, options):
    """In LookSAM's pass between: the step is yet to be made."""
    opt, params, loss = between(member, backend, base, options)
    before, passes = snapshot(member, opt, params), opt.passes
    with pytest.raises(Raised):
        opt.step(closure_of(loss, params, raising))
    assert same(params, before[0])
    assert_same(opt.state_dict(), before[1])
    assert opt.passes == passes


@FUSED_OR_NOT
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@every_historic
def test_a_skipped_step_leaves_it_and_counts(backend, member, base, options, value, what):
    opt, params, loss = between(member, backend, base, options)
    before, looks = snapshot(member, opt, params), opt.param_groups[0].get("looks")

    def fault(one):
        if what == "gradient":
            params[1].grad[2] = value
        return one * value if what == "loss" else one

    opt.step(closure_of(loss, params, fault))
    assert opt.skipped_steps == 1
    assert same(params, before[0])
    assert_same(opt.state_dict()["state"], before[1]["state"])
    if looks is not None:
        assert opt.param_groups[0]["looks"] == looks + 1 == 3
    opt.step(closure_of(loss, params))
    assert opt.skipped_steps == 1
    assert not same(params, before[0])


class Hostile(torch.optim.RMSprop):
    """A base that is not fused, writes to the gradients that it is given, and may raise after that."""

    raises = False

    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.fill_(7.0)
                p.data.add_(1.0 if Hostile.raises else 0.0)
        if Hostile.raises:
            raise Raised


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
@every_historic
def test_a_base_that_raises_leaves_it(backend, monkeypatch, member, steps):
    """In every step of LookSAM's period; and what a base writes to the gradients is not remembered."""
    params, loss = parameters(), Quadratic()
    opt = member.build(params, Hostile, backend=backend, lr=0.01)
    for t in range(steps):
        history = member.history(opt, params)
        passes = [gradients(params, 2 * t), gradients(params, 2 * t + 1)][: opt.passes]
        walk(opt, params, *passes)
        right = member.memory.remembered(passes, options_of(opt, params), history)
        assert_alike(remembered(member, opt, params), right)
    before, looks = member.history(opt, params), opt.param_groups[0].get("looks")
    weights = [p.detach().clone() for p in params]
    monkeypatch.setattr(Hostile, "raises", True)
    with pytest.raises(Raised):
        opt.step(closure_of(loss, params))
    assert same(params, weights)
    assert same(member.history(opt, params), before)
    assert opt.param_groups[0].get("looks") == looks
    opt.restore()
    monkeypatch.setattr(Hostile, "raises", False)
    opt.step(closure_of(loss, params))
    assert not same(params, weights)


@pytest.mark.parametrize("active", [True, False])
@every_historic
def test_local_passes_are_refused_whenever_asked_for(backend, member, active):
    """At once; and where ``sync`` is set later, in every kind of step, before anything is written."""
    with pytest.raises(ValueError, match='sync="last": every rank would remember'):
        member.build(parameters(), lr=0.1, sync="last", backend=backend)
    params, loss = parameters(), Quadratic()
    opt = member.build(params, lr=0.1, momentum=0.9, backend=backend)
    for _ in range(3):
        before = snapshot(member, opt, params)
        opt.sync, opt.active = "last", active
        for _ in range(2):
            with pytest.raises(ValueError, match='sync="last": every rank would remember'):
                opt.step(closure_of(loss, params))
            assign(params, gradients(params, 0))
            with pytest.raises(ValueError, match='sync="last": every rank would remember'):
                getattr(opt, calls(opt)[0])()
        assert same(params, before[0])
        assert_same(opt.state_dict(), before[1])
        opt.sync, opt.active = "every", True
        opt.step(closure_of(loss, params))


def test_a_scaler_is_refused_in_every_step_and_before_anything_is_written(backend):
    params, loss = parameters(), Quadratic()
    opt = FriendlySAM(params, lr=0.1, momentum=0.9, backend=backend)
    for _ in range(2):
        before = snapshot(HISTORIC["FriendlySAM"], opt, params)
        opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        assign(params, gradients(params, 0))
        opt.ascend()
        assign(params, gradients(params, 1))
        with pytest.raises(RuntimeError, match="FriendlySAM with GradScaler: it remembers the mean of gradients"):
            opt.step()
        opt.restore()
        assert same(params, before[0])
        assert_same(opt.state_dict(), before[1])
        opt.step(closure_of(loss, params))
