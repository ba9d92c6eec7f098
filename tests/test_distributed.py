"""DDP and FSDP2 on two ranks: against one process on the joint batch, and float64 oracles of the papers' rules.

What is decorated with `on_two_ranks` runs in two processes (tests/ranks.py), not in pytest's own.
"""

import datetime
import math

import pytest
import reference as ref
import torch
import torch.distributed as dist
from ranks import on_two_ranks
from samples import assign, gradients, parameters, strided
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from bsam_fused import ASAM, BSAM, SAM, WSAM, MixedSAM
from bsam_fused.ops.contract import MIN, SCALE, Radius

RULES = {"SAM": (SAM, {}), "ASAM": (ASAM, {}), "BSAM": (BSAM, {"rho_min": 0.03})}
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


@pytest.fixture(params=["SAM", "BSAM"])
def rule(request):
    return request.param


def network():
    """Weights large enough to be taken rather than copied, and one of which two ranks shard one row."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 101), nn.Tanh(), nn.Linear(101, 7), nn.Tanh(), nn.Linear(7, 1)).double()


def batch(seed):
    """Inputs and targets of all ranks, and this rank's half of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(16, 1, generator=generator, dtype=torch.float64)
    half = slice(8 * dist.get_rank(), 8 * dist.get_rank() + 8)
    return (x, y), (x[half], y[half])


def closure_of(model, data):
    def closure():
        loss = nn.functional.mse_loss(model(data[0]), data[1])
        loss.backward()
        return loss

    return closure


def assert_same_on_all_ranks(params):
    for p in params:
        mine = p.detach().clone()
        theirs = mine.clone()
        dist.broadcast(theirs, 0)
        assert torch.equal(mine, theirs)


@pytest.fixture(params=[False, True], ids=["buckets apart", "gradients in buckets"])
def as_view(request):
    return request.param


@on_two_ranks
def test_ddp_equals_one_process(rule, as_view):
    """Three reductions: with gradients that are views of buckets, each backward overwrites what the last one left."""
    kind, options = RULES[rule]
    alone, model = network(), DDP(network(), gradient_as_bucket_view=as_view)
    single = kind(alone.parameters(), **options, **SGD)
    opt = kind(model.parameters(), model=model, **options, **SGD)
    for step in range(4):
        joint, mine = batch(step)
        single.step(closure_of(alone, joint))
        opt.step(closure_of(model, mine))
    for p, q in zip(model.parameters(), alone.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(opt.norms, single.norms)
    assert_same_on_all_ranks(model.parameters())


def oracle_step(name, model, states, options, max_norm):
    """m-sharpness: every rank's own perturbations and direction from its own half, and the update by their mean."""
    ws = [p.detach().clone() for p in model.parameters()]
    names = [n for n, _ in model.named_parameters()]

    def grads(weights, data):
        at = {n: w.clone().requires_grad_() for n, w in zip(names, weights)}
        loss = nn.functional.mse_loss(torch.func.functional_call(model, at, (data[0],)), data[1])
        return torch.autograd.grad(loss, list(at.values()))

    directions = []
    for half in range(2):
        data = tuple(t[8 * half : 8 * half + 8] for t in options["data"])
        g = grads(ws, data)
        n = ref.norm(g)
        g_max = grads([ref.w_max(w, x, n, options) for w, x in zip(ws, g)], data)
        if name == "BSAM":
            g_min = grads([ref.w_min(w, x, n, options) for w, x in zip(ws, g)], data)
            directions.append(ref.bsam([g, g_max, g_min]))
        else:
            directions.append(g_max)
    d = [(a + b) / 2 for a, b in zip(*directions)]
    factor = min(1.0, max_norm / (ref.norm(d) + 1e-6))  # as torch clips
    return [ref.sgd(w, factor * x, state, options) for w, x, state in zip(ws, d, states)]


@pytest.fixture(params=["closure", "by hand"])
def style(request):
    return request.param


@pytest.fixture(params=["cpp", "torch"])
def python_or_not(request):
    return request.param


@on_two_ranks
def test_sync_last_is_m_sharpness(rule, style, python_or_not):
    kind, options = RULES[rule]
    model = DDP(network())
    opt = kind(
        model.parameters(),
        model=model,
        sync="last",
        max_grad_norm=0.5,
        backend=python_or_not,
        rho=0.2,
        **options,
        **SGD,
    )
    o = {**SGD, "rho": 0.2, "adaptive": False, "eta": 0.0, "nesterov": False, "dampening": 0.0, **options}
    o |= {"rho_min_decay": "none"}
    states = [{} for _ in model.parameters()]
    for step in range(3):
        joint, mine = batch(step)
        expected = oracle_step(rule, model.module, states, {**o, "data": joint}, max_norm=0.5)
        closure = closure_of(model, mine)
        if style == "closure":
            opt.step(closure)
        else:
            for call in opt._calls:
                with opt.no_sync():
                    closure()
                getattr(opt, call)()
            opt.zero_grad()
        for p, w in zip(model.parameters(), expected):
            torch.testing.assert_close(p.detach(), w, rtol=1e-10, atol=1e-12)
    assert_same_on_all_ranks(model.parameters())
    assert opt.skipped_steps == 0


def coefficients(sums):
    """Each rank's own."""
    return (-8.0, 9.0) if dist.get_rank() == 0 else (0.0, 1.0)


@pytest.fixture(params=[(WSAM, {"gamma": 0.9}, 9.0), (MixedSAM, {"mix": coefficients}, 1.0)], ids=["WSAM", "MixedSAM"])
def longer(request):
    """An optimizer whose d is longer than its gradients, and the factor of g_max in d on the second rank."""
    return request.param


@pytest.fixture(params=[None, 2.0**16], ids=["no scaler", "scaler"])
def scale(request):
    return request.param


@on_two_ranks
def test_a_direction_that_float16_does_not_hold(longer, python_or_not, scale):
    """g is 26,624, g_max 33,280, at the scale of the loss; 9 g_max − 8 g is 86,528, as float16 goes up to 65,504.

    Of ½ A w², w = 1 and ρ = 1/4, g is A. The second rank's are half as long, and its coefficients may be others.
    """
    kind, options, last = longer
    slope = 26624 / (1 + dist.get_rank()) / (scale or 1.0)
    weight = nn.Parameter(torch.ones(1, dtype=torch.float16))
    model, lr = DDP(Curved(weight)), 0.1 / 26624 * (scale or 1.0)
    opt = kind(model.parameters(), rho=0.25, lr=lr, model=model, sync="last", backend=python_or_not, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for call in opt._calls:
        with opt.one_pass():
            scaler.scale(model(slope)).backward()
        if call == "step":
            scaler.step(opt)
        else:
            getattr(opt, call)()
    scaler.update()
    assert opt.skipped_steps == 0
    assert scaler.get_scale() == (scale or 1.0)
    d = (86528 + last * 16640 - (last - 1) * 13312) / 2
    torch.testing.assert_close(weight.detach().item(), 1 - 0.1 * d / 26624, rtol=1e-3, atol=0)


@pytest.fixture(params=["once more", "given up"])
def then(request):
    return request.param


@on_two_ranks
def test_an_update_that_raises_after_directions_were_averaged(python_or_not, then):
    """The step cannot be taken up again; given up, it leaves nothing to the next one, which is the first one's twin."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.float16))
    model = DDP(Curved(weight))
    opt = WSAM([weight], gamma=0.9, rho=0.25, lr=1e-6, momentum=0.9, model=model, sync="last", backend=python_or_not)

    def pass_and_call(call):
        with opt.one_pass():
            model(26624.0).backward()
        getattr(opt, call)()

    pass_and_call("ascend")
    opt.state[weight]["momentum_buffer"] = torch.zeros(7, dtype=torch.float16)
    with pytest.raises(ValueError, match="momentum_buffer"):
        pass_and_call("step")
    del opt.state[weight]
    if then == "once more":
        with pytest.raises(RuntimeError, match=r"restore\(\) gives it up"):
            opt.step()
    opt.restore()
    assert weight.item() == 1.0
    opt.zero_grad()
    for call in opt._calls:
        pass_and_call(call)
    torch.testing.assert_close(weight.item(), 1 - 1e-6 * 86528, rtol=1e-3, atol=0)


@on_two_ranks
def test_small_directions_are_not_rounded_away(longer, python_or_not):
    """Where float16 holds d there is no room to make: 9 g_max − 8 g of gradients that are no normal numbers."""
    kind, options, last = longer
    weight = nn.Parameter(torch.ones(1, dtype=torch.float16))
    model = DDP(Curved(weight))
    opt = kind([weight], rho=0.25, lr=1000.0, model=model, sync="last", backend=python_or_not, **options)
    slope = 2.0**-18
    opt.step(lambda: model(slope).backward())
    d = ((9 * 1.25 - 8) + (last * 1.25 - (last - 1))) / 2 * slope
    torch.testing.assert_close(weight.item(), 1 - 1000.0 * d, rtol=1e-3, atol=0)


class Curved(nn.Module):
    """A weight whose loss is ½ A w²."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, slope):
        return slope / 2 * self.weight.float().square().sum()


@on_two_ranks
def test_a_fused_and_another_base_average_alike(rule):
    class Other(torch.optim.SGD):
        """Takes the general path."""

    kind, options = RULES[rule]
    models = [DDP(network()) for _ in range(2)]
    opts = [
        kind(m.parameters(), base, model=m, sync="last", max_grad_norm=0.5, **options, **SGD)
        for m, base in zip(models, (torch.optim.SGD, Other))
    ]
    for step in range(3):
        for model, opt in zip(models, opts):
            opt.step(closure_of(model, batch(step)[1]))
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.fixture(params=["every", "last"])
def sync(request):
    return request.param


@pytest.fixture(params=[torch.inf, torch.nan])
def bad(request):
    return request.param


@on_two_ranks
def test_inf_on_one_rank_skips_on_all(rule, sync):
    kind, options = RULES[rule]
    for wrong in range(len(kind._calls)):
        model = DDP(network())
        opt = kind(model.parameters(), model=model, sync=sync, **options, **SGD)
        opt.step(closure_of(model, batch(0)[1]))
        before = [p.detach().clone() for p in model.parameters()]
        x, y = batch(1)[1]
        passes = [(x * math.inf if k == wrong and dist.get_rank() == 1 else x, y) for k in range(3)]
        opt.step(lambda model=model, passes=passes: closure_of(model, passes.pop(0))())
        assert opt.skipped_steps == 1
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before))
        opt.step(closure_of(model, batch(2)[1]))
        assert opt.skipped_steps == 1
        assert_same_on_all_ranks(model.parameters())


@on_two_ranks
def test_a_bad_loss_on_one_rank_does_not_part_them(rule, sync):
    """Its gradients may be finite; then only its own rank knows."""
    kind, options = RULES[rule]
    model = DDP(network())
    opt = kind(model.parameters(), model=model, sync=sync, **options, **SGD)

    def closure():
        loss = closure_of(model, batch(0)[1])()
        return loss * math.inf if dist.get_rank() == 1 else loss

    opt.step(closure)
    assert opt.skipped_steps == (1 if sync == "last" else 0)
    assert_same_on_all_ranks(model.parameters())


@on_two_ranks
def test_scalers_of_all_ranks_back_off_together(rule, sync):
    kind, options = RULES[rule]
    for wrong in range(len(kind._calls)):
        model = DDP(network())
        opt = kind(model.parameters(), model=model, sync=sync, **options, **SGD)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for step in range(2):
            before = [p.detach().clone() for p in model.parameters()]
            for k, call in enumerate(opt._calls):
                x, y = batch(step)[1]
                if step == 0 and k == wrong and dist.get_rank() == 1:
                    x = x * math.inf
                with opt.no_sync():
                    scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
                scaler.step(opt) if call == "step" else getattr(opt, call)()
            scaler.update()
            opt.zero_grad()
            moved = [not torch.equal(p, w) for p, w in zip(model.parameters(), before)]
            assert all(moved) if step == 1 else not any(moved)
        assert scaler.get_scale() == 128.0
        assert opt.skipped_steps == 1
        assert_same_on_all_ranks(model.parameters())


@on_two_ranks
def test_ranks_that_disagree_on_gradients(rule):
    """sync="last": an error on every rank, before anything is written."""
    kind, options = RULES[rule]
    model = DDP(network(), find_unused_parameters=True)
    opt = kind(model.parameters(), model=model, sync="last", **options, **SGD)
    for _ in range(2):
        before = [p.detach().clone() for p in model.parameters()]
        for k, call in enumerate(opt._calls):
            with opt.no_sync():
                closure_of(model, batch(0)[1])()
            if k == 0 and dist.get_rank() == 1:
                model.module[0].bias.grad = None
            if call == "step":
                with pytest.raises(RuntimeError, match="disagree: on which parameters have gradients"):
                    opt.step()
            else:
                getattr(opt, call)()
        opt.restore()
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before))
        opt.step(closure_of(model, batch(0)[1]))
    assert_same_on_all_ranks(model.parameters())


@on_two_ranks
def test_a_last_pass_that_was_not_reduced():
    model = DDP(network())
    opt = SAM(model.parameters(), model=model, sync="last", **SGD)
    for call in ("ascend", "step"):
        with model.no_sync():
            closure_of(model, batch(0)[1])()
        if call == "step":
            with pytest.raises(RuntimeError, match=r"last pass's gradient; it must be outside DDP's no_sync"):
                opt.step()
        else:
            opt.ascend()
    opt.restore()


@on_two_ranks
def test_a_rank_that_does_not_come(rule):
    """The others hear of it when the process group's timeout is over."""
    kind, options = RULES[rule]
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    model = DDP(network(), process_group=group)
    opt = kind(model.parameters(), model=model, sync="last", **options, **SGD)
    for call in opt._calls:
        with opt.no_sync():
            closure_of(model, batch(0)[1])()
        if call == "step" and dist.get_rank() == 0:
            with pytest.raises(RuntimeError, match="a rank did not take part in the optimizer's collective"):
                opt.step()
        elif call != "step":
            getattr(opt, call)()
    opt.restore()


def test_sync_last_needs_ddp():
    model = network()
    with pytest.raises(ValueError, match=r"torch.distributed is not initialised.*torchrun"):
        SAM(model.parameters(), model=model, sync="last", lr=0.1)
    with pytest.raises(ValueError, match="sync='first': must be"):
        SAM(model.parameters(), sync="first", lr=0.1)
    with pytest.raises(ValueError, match="every rank has another w_min"):
        BSAM(model.parameters(), sync="last", update_from="w_min", lr=0.1)


@pytest.mark.parametrize("missing", [(), (1,)], ids=["all", "some missing"])
def test_merge(backend, missing):
    """A share of d, without a scale, in one flat buffer, whose views are the gradients."""
    params = parameters("odd") + strided()
    opt = BSAM(params, lr=0.1, rho=0.0, backend=backend)
    grads = [gradients(params, seed, missing if seed == 2 else ()) for seed in range(3)]
    for given, call in zip(grads, (opt.ascend, opt.descend, opt._read_gradients)):
        assign(params, given)
        call()
    (flat,) = opt._flats
    flat.square_norm(MIN, [Radius(0.0)])
    sums = flat.sums.clone()
    sums[SCALE] = 1024.0
    buffer = flat.merge(sums, 0.25)
    wide = [[None if g is None else g.double() for g in one] for one in grads]
    for p, d in zip(params, ref.bsam(wide)):
        torch.testing.assert_close(p.grad.double(), 0.25 / 1024 * d, rtol=1e-6, atol=1e-9)
    buffer.zero_()
    assert all(not p.grad.any() for p in params)
    opt.restore()
