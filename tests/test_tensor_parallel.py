"""Tensor parallelism, alone and under FSDP2, on two and four ranks: against one process on the joint batch."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_four_ranks, on_two_ranks
from test_distributed import RULES, SGD, batch, closure_of, rule  # noqa: F401
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from bsam_fused import SAM

BASES = {
    "SGD": (torch.optim.SGD, SGD),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "eps": 1e-3}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "eps": 1e-3}),  # the general path
}


@pytest.fixture(params=BASES)
def base(request):
    return request.param


def network():
    """A norm that no rank shards, between layers of which each has a row or column of weights more than the other.

    Whoever sums the squares of the norm's gradients, or of the last bias's, over ranks has them twice.
    """
    torch.manual_seed(1)
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1)).double()


def parallel(mesh):
    return parallelize_module(network(), mesh, {"1": ColwiseParallel(), "3": RowwiseParallel()})


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_equals_one_process(model, rule, base, mine):  # noqa: F811
    """Weights, norms and state after some clipped steps.

    Args:
        mine: this rank's share of the joint batch.
    """
    kind, options = RULES[rule]
    kind_of_base, base_options = BASES[base]
    options = {**options, **base_options, "adaptive": True, "eta": 0.1, "rho": 0.2, "max_grad_norm": 0.3}
    alone = network()
    single = kind(alone.parameters(), kind_of_base, **options)
    opt = kind(model.parameters(), kind_of_base, model=model, **options)
    for step in range(3):
        joint, _ = batch(step)
        single.step(closure_of(alone, joint))
        opt.step(closure_of(model, [t[mine] for t in joint]))
    torch.testing.assert_close(opt.norms, single.norms)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(full(p.detach()), q.detach(), rtol=1e-10, atol=1e-12)
        for key, value in single.state[q].items():
            torch.testing.assert_close(full(opt.state[p][key]), value)


@on_two_ranks
def test_tensor_parallel_equals_one_process(rule, base):  # noqa: F811
    """Every rank has the whole batch; 12 rows are 6 a rank."""
    assert_equals_one_process(parallel(init_device_mesh("cpu", (2,))), rule, base, slice(None))


@on_four_ranks
def test_fsdp2_of_tensor_parallel_equals_one_process(rule, base):  # noqa: F811
    """Two by two; the shards of one dimension are cut again along the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = fully_shard(parallel(mesh["tensor"]), mesh=mesh["data"])
    half = mesh.get_local_rank("data")
    assert_equals_one_process(model, rule, base, slice(8 * half, 8 * half + 8))


@on_two_ranks
def test_sharded_grad_scaler():
    """Its numbers have the shape (1,): the step is the unscaled one, and an inf of one rank alone skips it on both."""
    models = [fully_shard(network()) for _ in range(2)]
    opt, other = (SAM(model.parameters(), model=model, **SGD) for model in models)
    scaler = ShardedGradScaler("cpu", init_scale=1024.0, process_group=dist.group.WORLD)
    for step in range(3):
        before = [full(p.detach()).clone() for p in models[0].parameters()]
        for call in (opt.ascend, lambda: scaler.step(opt)):
            _, data = batch(step)
            scaler.scale(nn.functional.mse_loss(models[0](data[0]), data[1])).backward()
            if call != opt.ascend:
                if step == 1 and dist.get_rank() == 0:
                    models[0][1].weight.grad.to_local()[0, 0] = torch.inf
                scaler.unscale_(opt)
            call()
        scaler.update()
        opt.zero_grad()
        if step == 1:
            assert all(torch.equal(full(p.detach()), w) for p, w in zip(models[0].parameters(), before))
        else:
            other.step(closure_of(models[1], batch(step)[1]))
            other.zero_grad()
        for p, q in zip(*(model.parameters() for model in models)):
            torch.testing.assert_close(full(p.detach()), full(q.detach()), rtol=1e-11, atol=1e-13)
    assert opt.skipped_steps == 1
    assert scaler.get_scale() == 512.0
