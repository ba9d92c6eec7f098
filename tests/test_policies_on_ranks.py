"""All ranks take as many passes as each other, and as one process on the joint batch: decided by one gradient."""

import pytest
import torch
from ranks import on_two_ranks
from test_distributed import SGD, assert_same_on_all_ranks, batch, closure_of, network
from test_fsdp import full, sharded
from torch.nn.parallel import DistributedDataParallel as DDP

from bsam_fused import SAM, LookSAM
from bsam_fused.schedules import LargeGradients, RandomSteps

STEPS = 10
MODELS = {"DDP": (lambda: DDP(network()), list), "FSDP2": (sharded, full)}


@pytest.fixture(params=MODELS)
def parallel(request):
    return request.param


@pytest.fixture(params=["closure", "by hand"])
def style(request):
    return request.param


@pytest.fixture(params=["large gradients", "LookSAM", "at random"])
def thrift(request):
    return request.param


def thrifty(thrift, params, **options):
    """An optimizer with steps of one pass, and its policy."""
    kind = LookSAM if thrift == "LookSAM" else SAM
    opt = kind(params, **({"k": 3} if kind is LookSAM else {}), backend="cpp", **SGD, **options)
    if thrift == "large gradients":
        return opt, LargeGradients(opt, STEPS, lambda_1=-1.0, lambda_2=0.4, decay=0.3)
    return opt, RandomSteps(opt, 0.5 if thrift == "at random" else 1.0)


def train(style, model, opt, policy, data):
    """Return how many passes each step took."""
    passes = []
    for t in range(STEPS):
        closure, calls = closure_of(model, data(t)), []
        if style == "closure":
            opt.step(lambda: calls.append(1) or closure())  # noqa: B023
            passes.append(len(calls))
        else:
            closure()
            passes.append(opt.passes)
            for call in opt._calls[: passes[-1] - 1]:
                getattr(opt, call)()
                closure()
            opt.step()
            opt.zero_grad()
        policy.step()
    return passes


@on_two_ranks
def test_ranks_decide_alike(parallel, style, thrift):
    build, gathered = MODELS[parallel]
    model, alone = build(), network()
    passes = train(style, model, *thrifty(thrift, model.parameters(), model=model), lambda t: batch(t)[1])
    assert passes == train(style, alone, *thrifty(thrift, alone.parameters()), lambda t: batch(t)[0])
    assert {*passes} == {1, 2}
    params = gathered(model.parameters())
    for p, q in zip(params, alone.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-11, atol=1e-13)
    assert_same_on_all_ranks(params)


@on_two_ranks
def test_each_rank_by_its_own_batch_is_refused():
    """With no collective left open, and nothing written; active steps of a policy by number are fine."""
    model = DDP(network())
    opt = SAM(model.parameters(), model=model, sync="last", **SGD)
    policy = LargeGradients(opt, STEPS)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match='decide with sync="last"'):
        opt.step(closure_of(model, batch(0)[1]))
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert policy.mean == 0.0
    opt.decide = None
    RandomSteps(opt)
    opt.step(closure_of(model, batch(0)[1]))
