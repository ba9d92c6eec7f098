"""A pass that made no gradient: an error that says so, and not a step that trains nothing."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_two_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from bsam_fused import BSAM, SAM, distributed

PASSES = {SAM: 2, BSAM: 3}
BASES = [torch.optim.SGD, torch.optim.RMSprop]  # one that is fused, one that is not


@pytest.fixture(params=[SAM, BSAM])
def kind(request):
    return request.param


def made(kind, base, backend, **options):
    p = nn.Parameter(torch.ones(3))
    return p, kind([p], base, lr=0.1, backend=backend, **options)


def stepped(kind, base, backend):
    p, opt = made(kind, base, backend)
    opt.step(lambda: p.square().sum().backward())
    return p.tolist()


def assert_nothing_happened(p, opt):
    assert p.tolist() == [1.0] * 3
    assert opt.state_dict()["state"] == {}
    assert opt.skipped_steps == 0
    opt.step(lambda: p.square().sum().backward())
    assert p.tolist() != [1.0] * 3


@pytest.mark.parametrize("returned", [True, False])
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("base", BASES)
def test_a_closure_without_backward(backend, kind, base, at, returned):
    """In each of its calls: with a loss returned, or, after the first one, without."""
    if at == PASSES[kind] or not (at or returned):
        pytest.skip("there is no such call")
    p, opt = made(kind, base, backend)
    calls = []

    def closure():
        calls.append(1)
        loss = p.square().sum()
        if len(calls) != at + 1:
            loss.backward()
        return loss if returned else None

    with pytest.raises(RuntimeError, match=r"no parameter has a gradient.*loss\.backward\(\)"):
        opt.step(closure)
    assert len(calls) == at + 1
    assert_nothing_happened(p, opt)


@pytest.mark.parametrize("base", BASES)
def test_no_backward_before_a_phase(backend, kind, base):
    calls = ("ascend", "descend", "step") if kind is BSAM else ("ascend", "step")
    for lacking in calls:
        p, opt = made(kind, base, backend)
        for call in calls[: calls.index(lacking)]:
            p.square().sum().backward()
            getattr(opt, call)()
        moved = p.tolist()
        with pytest.raises(RuntimeError, match=rf"^{lacking}\(\): no parameter has a gradient"):
            getattr(opt, lacking)()
        assert p.tolist() == moved
        for call in calls[calls.index(lacking) :]:  # the step goes on where it was
            p.square().sum().backward()
            getattr(opt, call)()
        assert p.tolist() == stepped(kind, base, backend)


@pytest.mark.parametrize("active", [True, False])
def test_a_closure_that_does_nothing_gives_up_the_step(backend, kind, active):
    """As Lightning has it: a training_step that returns None skips its batch. It is called once, and nothing counts."""
    p, opt = made(kind, torch.optim.SGD, backend)
    opt.active = active
    calls = []
    assert opt.step(lambda: calls.append(1)) is None
    assert len(calls) == 1
    opt.active = True
    assert_nothing_happened(p, opt)


def test_a_closure_that_returns_a_loss_without_backward_while_inactive(backend):
    p, opt = made(SAM, torch.optim.SGD, backend)
    opt.active = False
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        opt.step(lambda: p.square().sum())
    opt.step()  # by hand it is the base's, which is silent
    opt.active = True
    assert_nothing_happened(p, opt)


@pytest.mark.parametrize("built", [True, False])
def test_frozen_parameters_stay_silent(backend, kind, built):
    """As in torch: a step in which nothing requires a gradient does nothing, whenever they were frozen."""
    p, opt = made(kind, torch.optim.SGD, backend)
    if built:
        opt.step(lambda: p.square().sum().backward())
    before = p.tolist()
    p.requires_grad_(False)
    assert opt.step(lambda: p.square().sum()) == p.square().sum()
    assert p.tolist() == before


def test_a_gradient_of_one_parameter_is_enough(backend):
    """In each pass of another one; also where the first parameter has none at all."""
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    opt = BSAM([a, b, c], lr=0.1, rho=0.0, backend=backend)
    for call, p in ((opt.ascend, b), (opt.descend, c), (opt.step, c)):
        p.sum().backward()
        call()
    assert a.tolist() == [1.0, 1.0]
    assert b.tolist() != [1.0, 1.0]


@pytest.fixture(params=["DDP, sync=last", "FSDP2"])
def how(request):
    return request.param


@pytest.fixture(params=["one rank", "both"])
def who(request):
    return request.param


@on_two_ranks
def test_all_ranks_raise_or_none(kind, how, who):
    """In whichever pass: a rank that raised alone would leave the other one waiting in the exchange."""
    for lacking in range(PASSES[kind]):
        net = nn.Linear(4, 2)
        if how == "FSDP2":
            fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
            opt = kind(net.parameters(), lr=0.1, model=net)
        else:
            replica = DDP(net)
            opt = kind(replica.parameters(), lr=0.1, model=replica, sync="last")
        before = [distributed.local(p).clone() for p in net.parameters()]

        def made_all_passes(net=net, opt=opt, lacking=lacking):
            for i, call in enumerate(opt._calls):
                for p in net.parameters():
                    none = i == lacking and (who == "both" or dist.get_rank() == 0)
                    p.grad = None if none else torch.ones_like(p)
                getattr(opt, call)()

        with pytest.raises(RuntimeError, match="no parameter has a gradient" if who == "both" else "ranks disagree"):
            made_all_passes()
        opt.restore()
        assert all(torch.equal(distributed.local(p), w) for p, w in zip(net.parameters(), before))


@on_two_ranks
def test_closures_that_do_nothing_give_up_the_step_on_all_ranks(kind):
    replica = DDP(nn.Linear(4, 2))
    opt = kind(replica.parameters(), lr=0.1, model=replica, sync="last")
    before = [p.detach().clone() for p in replica.parameters()]
    assert opt.step(lambda: None) is None
    assert all(torch.equal(p, w) for p, w in zip(replica.parameters(), before))
