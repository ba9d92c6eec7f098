"""Loops, wrappers and bases that others wrote: right, or refused by name before anything moves."""

import copy

import pytest
import reference as ref
import schedulefree
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from ranks import on_two_ranks
from samples import assign, gradients, parameters
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from bsam_fused import ASAM, BSAM, SAM

KINDS = [SAM, ASAM, BSAM]
every_kind = pytest.mark.parametrize("kind", KINDS)


def copies(params):
    return [p.detach().clone() for p in params]


def same(params, others):
    return all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


# ---- Accelerate


@pytest.fixture
def accelerator():
    """One that accumulates two micro-batches; its settings are the process's, and go with the test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield Accelerator(cpu=True, gradient_accumulation_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def squares(net, x, backward):
    def closure():
        loss = net(x).square().mean()
        backward(loss)
        return loss

    return closure


@every_kind
def test_accumulate_with_a_closure_is_refused(accelerator, kind):
    """The wrapper drops all closures but the last micro-batch's, and divides its loss by their number."""
    model, x = nn.Linear(3, 2), torch.randn(2, 4, 3)
    before = copies(model.parameters())
    net, opt = accelerator.prepare(model, kind(model.parameters(), lr=0.1))
    with accelerator.accumulate(net):
        opt.step(squares(net, x[0], accelerator.backward))
    with (
        accelerator.accumulate(net),
        pytest.raises(RuntimeError, match=r"only the last micro-batch.*by 1/2 of its loss.*docs/recipes\.md"),
    ):
        opt.step(squares(net, x[1], accelerator.backward))
    assert same(model.parameters(), before)


@every_kind
def test_closures_that_accelerate_does_not_drop_are_not_refused(accelerator, kind):
    """Another loop of the process, whose optimizer the accelerator never had; and one without accumulation."""
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    other, third = (copy.deepcopy(model) for _ in range(2))
    opt = kind(model.parameters(), lr=0.1)
    opt.step(squares(model, x, torch.Tensor.backward))
    accelerator.gradient_accumulation_steps = 1
    net, wrapper = accelerator.prepare(other, kind(other.parameters(), lr=0.1))
    wrapper.step(squares(net, x, accelerator.backward))
    assert same(other.parameters(), model.parameters())
    assert not same(other.parameters(), third.parameters())


# ---- shards that each rank has alone


@on_two_ranks
def test_zero_redundancy_optimizer_is_refused():
    """As a base, by class and instance, and around ours, whose parameters would be those of a rank."""
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    small = nn.Linear(1, 1, bias=False)  # of which one rank has nothing
    for kind in KINDS:
        for build in (
            lambda kind=kind: kind(net.parameters(), ZeroRedundancyOptimizer, optimizer_class=torch.optim.SGD, lr=0.1),
            lambda kind=kind: kind(
                net.parameters(), ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=0.1)
            ),
            lambda kind=kind: ZeroRedundancyOptimizer(net.parameters(), kind, lr=0.1),
            lambda kind=kind: ZeroRedundancyOptimizer(small.parameters(), kind, lr=0.1),
        ):
            with pytest.raises(TypeError, match=r"ZeroRedundancyOptimizer.*norm of its own part.*fully_shard"):
                build()
        kind(net.parameters(), lr=0.1)  # beside one that is somebody else's


@on_two_ranks
def test_fsdp1_is_refused():
    """With flat parameters and the original ones, which then are shards; as ``model=``, and inside it."""
    for original in (False, True):
        net = FullyShardedDataParallel(nn.Linear(3, 2), use_orig_params=original, device_id=torch.device("cpu"))
        for kind in KINDS:
            for model in (net, nn.Sequential(net)):
                with pytest.raises(TypeError, match=r"FullyShardedDataParallel \(FSDP1\).*fully_shard"):
                    kind(net.parameters(), lr=0.1, model=model)
            with pytest.raises(TypeError, match=r"parameter 0 of group 0 .*FullyShardedDataParallel.*fully_shard"):
                kind(net.parameters(), lr=0.1)


@on_two_ranks
def test_a_static_graph_is_refused_where_passes_stay_local():
    """DDP reduces every pass of a static graph alike: with sync="every" that is what is wanted."""
    model = DistributedDataParallel(nn.Linear(3, 2), static_graph=True)
    for kind in KINDS:
        with pytest.raises(ValueError, match=r'sync="last".*static_graph=True.*sync="every"'):
            kind(model.parameters(), lr=0.1, model=model, sync="last")
        opt = kind(model.parameters(), lr=0.1, model=model)
        before = copies(model.parameters())
        opt.step(squares(model, torch.ones(4, 3), torch.Tensor.backward))
        assert not same(model.parameters(), before)


# ---- Schedule-Free


FREE = {
    "SGD": (schedulefree.SGDScheduleFree, {"lr": 0.3, "warmup_steps": 3, "weight_decay": 0.01}),
    "AdamW": (schedulefree.AdamWScheduleFree, {"lr": 0.05, "warmup_steps": 3, "eps": 1e-3}),
}


@every_kind
@pytest.mark.parametrize("base", FREE)
@pytest.mark.parametrize("instance", [False, True], ids=["class", "instance"])
def test_schedule_free_as_a_base(backend, kind, base, instance):
    """Beside Schedule-Free itself with d by the papers' formulas, from its training weights, y.

    Perturbing x or z, or going from one to the other at perturbed weights, would show in both weights after some steps;
    train() comes before every pass, as Hugging Face's Trainer calls it.
    """
    base_class, options = FREE[base]
    params = parameters("odd", torch.float64)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    o = {"rho": 0.2, "adaptive": kind is ASAM, "eta": 0.01 if kind is ASAM else 0.0}
    o |= {"rho_min": 0.2, "rho_min_decay": "none"}
    ours = {name: o[name] for name in (["rho", "rho_min", "rho_min_decay"] if kind is BSAM else ["rho"])}
    if instance:
        opt = kind(params, base_class(params, **options), backend=backend, **ours)
    else:
        opt = kind(params, base_class, backend=backend, **ours, **options)
    plain = base_class(twins, **options)

    def curved(ws, k):  # gradients that depend on the weights
        return [torch.sin(w.detach()) + g for w, g in zip(ws, gradients(params, k))]

    plain.train()
    for t in range(6):
        for k, call in enumerate(opt._calls):
            opt.train()
            assign(params, curved(params, 3 * t + k))
            getattr(opt, call)()
        y, each = copies(twins), [o] * len(twins)
        g = curved(y, 3 * t)
        n = ref.ascent_norm(y, g, each)
        d = g_max = curved([ref.w_max(w, x, n, o) for w, x in zip(y, g)], 3 * t + 1)
        if kind is BSAM:
            g_min = curved([ref.w_min(w, x, n, o) for w, x in zip(y, g)], 3 * t + 2)
            d = ref.bsam([g, g_max, g_min])
        assign(twins, d)
        plain.step()
        if t % 2:
            for switch in ("eval", "train"):
                getattr(opt, switch)(), getattr(plain, switch)()
                for p, q in zip(params, twins):
                    torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)
    assert opt.state is opt.base_optimizer.state


@every_kind
def test_schedule_free_goes_to_evaluation_within_a_step(backend, kind):
    """From w, not from the perturbed weights; its own error, for a step in evaluation, leaves w there."""
    params = parameters("odd", torch.float64)
    opt = kind(params, schedulefree.SGDScheduleFree, lr=0.3, backend=backend)
    opt.train()
    for t in range(2):
        for call in opt._calls:
            assign(params, gradients(params, t))
            getattr(opt, call)()
    opt.eval()
    before = copies(params)
    opt.train()
    for call in opt._calls[:-1]:
        assign(params, gradients(params, 2))
        getattr(opt, call)()
    opt.eval()
    assign(params, gradients(params, 2))
    with pytest.raises(Exception, match="not in train mode"):
        opt.step()
    for p, w in zip(params, before):
        torch.testing.assert_close(p, w, rtol=1e-14, atol=1e-14)


@every_kind
def test_a_base_with_one_set_of_weights_stays(kind):
    """Accelerate and Hugging Face's Trainer call both where there are such methods."""
    params = parameters("odd", torch.float64)
    before = copies(params)
    opt = kind(params, lr=0.1)
    opt.eval()
    opt.train()
    assert same(params, before)


# ---- frozen weights of other types


@every_kind
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_frozen_weights_may_be_of_any_kind(backend, kind, base):
    """4- and 8-bit weights under LoRA stand in params, frozen: the step is that of the others alone."""
    torch.manual_seed(1)
    quantized = [
        nn.Parameter(torch.randint(0, 100, (4, 3)).to(dtype), requires_grad=False)
        for dtype in (torch.uint8, torch.int8)
    ]
    odd = [nn.Parameter(x, requires_grad=False) for x in (torch.zeros(2, dtype=torch.cfloat), torch.eye(2).to_sparse())]
    frozen = quantized + odd
    before = [p.detach().clone() for p in frozen]
    params = parameters("odd", torch.float32)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    opt = kind([*frozen[:2], *params, *frozen[2:]], base, lr=0.1, backend=backend)
    alone = kind(twins, base, lr=0.1, backend=backend)
    for t in range(2):
        for call in opt._calls:
            for owner, theirs in ((opt, params), (alone, twins)):
                assign(theirs, gradients(theirs, t))
                getattr(owner, call)()
    assert same(params, twins)
    assert all(torch.equal(p.to_dense(), q.to_dense()) for p, q in zip(frozen, before))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)]})


@every_kind
@pytest.mark.parametrize("within", [False, True], ids=["at rest", "within a step"])
def test_what_is_thawed_must_be_of_a_kind_that_trains(backend, kind, within):
    p, q = parameters("odd", torch.float32)[0], nn.Parameter(torch.ones(2, dtype=torch.cfloat), requires_grad=False)
    opt = kind([p, q], lr=0.1, backend=backend)
    before = copies([p, q])
    p.grad = torch.ones_like(p)
    if within:
        opt.ascend()
        p.grad = torch.ones_like(p)
    q.requires_grad_(True)
    with pytest.raises(TypeError, match=r"parameter 1 of group 0 .*is complex"):
        getattr(opt, opt._following)()
    opt.restore()
    assert same([p, q], before)


# ---- step hooks


@every_kind
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_global_hooks_are_called_once_a_step_of_ours(kind, base):
    """And, as documented, once more with a base that is not fused: torch calls them in its own step()."""
    params = parameters("odd", torch.float32)
    opt = kind(params, base, lr=0.1)
    seen = []
    hooks = [
        register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(("before", optimizer))),
        register_optimizer_step_post_hook(lambda optimizer, *_: seen.append(("after", optimizer))),
    ]
    try:
        for call in opt._calls:
            assign(params, gradients(params, 0))
            getattr(opt, call)()
    finally:
        for hook in hooks:
            hook.remove()
    inner = [] if base is torch.optim.SGD else [("before", opt.base_optimizer), ("after", opt.base_optimizer)]
    assert seen == [("before", opt), *inner, ("after", opt)]
