"""FSDP2 on two ranks: shards of DTensors against one process on the joint batch."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import on_two_ranks
from test_distributed import RULES, SGD, batch, closure_of, network, rule  # noqa: F401
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from bsam_fused import SAM


def sharded(reshard=None):
    """101 rows are sharded unevenly, and the last layer's one row leaves rank 1 without."""
    model = network()
    for layer in (model[0], model[2]):
        fully_shard(layer, reshard_after_forward=reshard)
    return fully_shard(model)


def full(params):
    return [p.detach().full_tensor() for p in params]


def assert_equal(sharded_params, params, rtol=1e-11, atol=1e-13):
    for p, q in zip(full(sharded_params), params):
        torch.testing.assert_close(p, q.detach(), rtol=rtol, atol=atol)


BASES = {
    "SGD": (torch.optim.SGD, SGD),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "eps": 1e-3}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "eps": 1e-3}),  # the general path
}


@pytest.fixture(params=BASES)
def base(request):
    return request.param


@pytest.fixture(params=[None, False], ids=["reshards", "keeps"])
def reshard(request):
    return request.param


@on_two_ranks
def test_equals_one_process(rule, base, reshard):  # noqa: F811
    kind, options = RULES[rule]
    kind_of_base, base_options = BASES[base]
    options = {**options, **base_options, "adaptive": True, "eta": 0.1, "rho": 0.2, "max_grad_norm": 0.3}
    alone, model = network(), sharded(reshard)
    single = kind(alone.parameters(), kind_of_base, **options)
    opt = kind(model.parameters(), kind_of_base, model=model, **options)
    assert sum(p.to_local().numel() == 0 for p in model.parameters()) == 2 * dist.get_rank()
    for step in range(4):
        joint, mine = batch(step)
        single.step(closure_of(alone, joint))
        opt.step(closure_of(model, mine))
        opt.zero_grad(), single.zero_grad()
    assert_equal(model.parameters(), alone.parameters())
    torch.testing.assert_close(opt.norms, single.norms)
    for p, q in zip(model.parameters(), alone.parameters()):
        for key, value in single.state[q].items():
            mine = opt.state[p][key]
            torch.testing.assert_close(mine.full_tensor() if isinstance(mine, DTensor) else mine, value)


@on_two_ranks
def test_equals_ddp(rule):  # noqa: F811
    """By hand, looking at w in between."""
    kind, options = RULES[rule]
    models = sharded(), DDP(network())
    opts = [kind(m.parameters(), model=m, **options, **SGD) for m in models]
    for step in range(3):
        before = full(models[0].parameters())
        for call in opts[0]._calls:
            for model, opt in zip(models, opts):
                closure_of(model, batch(step)[1])()
                getattr(opt, call)()
                assert call == "step" or all(p.grad is None for p in model.parameters())
            assert_equal(models[0].parameters(), models[1].parameters())
            if call != "step":
                assert not torch.equal(before[0], full(models[0].parameters())[0])
                with opts[0].unperturbed():
                    assert all(torch.equal(p, w) for p, w in zip(full(models[0].parameters()), before))
        for opt in opts:
            opt.zero_grad()


@on_two_ranks
def test_restore(rule):  # noqa: F811
    kind, options = RULES[rule]
    model = sharded()
    opt = kind(model.parameters(), model=model, **options, **SGD)
    before = full(model.parameters())
    for call in opt._calls:
        closure_of(model, batch(0)[1])()
        if call != "step":
            getattr(opt, call)()
    opt.restore()
    assert all(torch.equal(p, w) for p, w in zip(full(model.parameters()), before))
    assert all(p.grad is None for p in model.parameters())


@on_two_ranks
def test_storage_that_was_replaced(rule):  # noqa: F811
    """Between steps, as FSDP does when it pads shards anew."""
    kind, options = RULES[rule]
    models = sharded(), sharded()
    opts = [kind(m.parameters(), model=m, **options, **SGD) for m in models]
    for step in range(2):
        for model, opt in zip(models, opts):
            opt.step(closure_of(model, batch(step)[1]))
        for p in models[0].parameters():
            p._local_tensor = p._local_tensor.clone()
        for opt in opts:
            opt.zero_grad()
            for p in opt.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            opt.ascend()
        for p, q in zip(*map(full, (models[0].parameters(), models[1].parameters()))):
            assert torch.equal(p, q)
        for opt in opts:
            opt.restore()
        for module in (models[0][0], models[0][2], models[0]):
            for param in module._get_fsdp_state()._fsdp_param_group.fsdp_params:
                param.reset_sharded_param()
    for p, q in zip(*map(full, (models[0].parameters(), models[1].parameters()))):
        assert torch.equal(p, q)


@on_two_ranks
def test_a_gradient_in_storage_of_shards_that_was_replaced():
    """The first one to be read lies where the last one's shards are now: these were followed too late."""

    def trained(own):
        first, last = (nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (4, 6))
        mesh = init_device_mesh("cpu", (2,))
        shards, others = (distribute_tensor(k * torch.ones(12, dtype=torch.float64), mesh, [Shard(0)]) for k in (1, 3))
        shards = nn.Parameter(shards)
        opt = SAM([first, shards, last], torch.optim.RMSprop, lr=0.1, max_grad_norm=1e30)
        for active in (True, False):
            opt.active = active
            for call in opt._calls if active else ["step"]:
                for p in (first, shards, last):
                    p.grad = torch.ones_like(p)
                if not active:
                    shards._local_tensor = others._local_tensor
                    last.grad = others._local_tensor.clone() if own else others._local_tensor.detach()
                getattr(opt, call)()
        return last.detach(), shards.detach().to_local()

    for there, own in zip(trained(own=False), trained(own=True)):
        assert torch.equal(there, own)


@on_two_ranks
def test_weights_that_stay_gathered_after_backward(rule):  # noqa: F811
    """FSDP's forward would go on with the weights that it gathered before the phase."""
    kind, options = RULES[rule]
    alone, model = network(), sharded()
    model.set_reshard_after_backward(False)
    single = kind(alone.parameters(), **options, **SGD)
    opt = kind(model.parameters(), model=model, **options, **SGD)
    for step in range(3):
        joint, mine = batch(step)
        single.step(closure_of(alone, joint))
        opt.step(closure_of(model, mine))
    for module in (model, model[0], model[2]):
        module.reshard()
    assert_equal(model.parameters(), alone.parameters())


@on_two_ranks
def test_inf_in_one_shard_skips_on_all(rule):  # noqa: F811
    kind, options = RULES[rule]
    for wrong in range(len(kind._calls)):
        model = sharded()
        opt = kind(model.parameters(), model=model, **options, **SGD)
        opt.step(closure_of(model, batch(0)[1]))
        before = full(model.parameters())
        for step, wrong_now in enumerate((wrong, None)):
            for k, call in enumerate(opt._calls):
                closure_of(model, batch(step)[1])()
                if k == wrong_now and dist.get_rank() == 1:
                    model[0].weight.grad.to_local()[0, 0] = math.inf
                getattr(opt, call)()
            opt.zero_grad()
            moved = [not torch.equal(p, w) for p, w in zip(full(model.parameters()), before)]
            assert all(moved) if step else not any(moved)
            assert opt.skipped_steps == 1


@on_two_ranks
def test_a_scaler_backs_off(rule):  # noqa: F811
    kind, options = RULES[rule]
    for wrong in range(len(kind._calls)):
        model, alone = sharded(), network()
        opt = kind(model.parameters(), model=model, max_grad_norm=0.1, **options, **SGD)
        kind(alone.parameters(), max_grad_norm=0.1, **options, **SGD).step(closure_of(alone, batch(1)[0]))
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for step in range(2):
            before = full(model.parameters())
            for k, call in enumerate(opt._calls):
                x, y = batch(step)[1]
                scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
                if step == 0 and k == wrong and dist.get_rank() == 1:
                    model[0].weight.grad.to_local()[0, 0] = math.inf
                scaler.step(opt) if call == "step" else getattr(opt, call)()
            scaler.update()
            opt.zero_grad()
            moved = [not torch.equal(p, w) for p, w in zip(full(model.parameters()), before)]
            assert all(moved) if step else not any(moved)
        assert_equal(model.parameters(), alone.parameters())
        assert scaler.get_scale() == 128.0
        assert opt.skipped_steps == 1


@on_two_ranks
def test_a_bad_loss_on_one_rank_skips_on_all():
    model = sharded()
    opt = SAM(model.parameters(), model=model, **SGD)
    before = full(model.parameters())
    opt.step(lambda: closure_of(model, batch(0)[1])() * (math.nan if dist.get_rank() == 1 else 1.0))
    assert opt.skipped_steps == 1
    assert all(torch.equal(p, w) for p, w in zip(full(model.parameters()), before))


@on_two_ranks
def test_ranks_that_disagree_on_gradients(rule):  # noqa: F811
    kind, options = RULES[rule]
    model = sharded()
    opt = kind(model.parameters(), model=model, **options, **SGD)
    before = full(model.parameters())
    closure_of(model, batch(0)[1])()
    if dist.get_rank() == 1:
        model[0].bias.grad = None
    with pytest.raises(RuntimeError, match="disagree: on which parameters have gradients"):
        opt.ascend()
    assert all(torch.equal(p, w) for p, w in zip(full(model.parameters()), before))
    opt.zero_grad()
    opt.step(closure_of(model, batch(0)[1]))
    assert opt.skipped_steps == 0


@on_two_ranks
def test_replicated_and_sharded_dimensions(rule):  # noqa: F811
    """HSDP: sums go over shards, not over replicas; parameters that FSDP leaves alone count once."""
    kind, options = RULES[rule]
    alone, model = network(), network()
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh, ignored_params=set(model[4].parameters()))
    single = kind(alone.parameters(), **options, **SGD)
    opt = kind(model.parameters(), model=model, **options, **SGD)
    joint, mine = batch(0)
    for call in opt._calls:
        closure_of(alone, joint)()
        closure_of(model, mine)()
        for p in model[4].parameters():
            dist.all_reduce(p.grad)
            p.grad /= 2
        getattr(single, call)(), getattr(opt, call)()
    for p, q in zip(model.parameters(), alone.parameters()):
        torch.testing.assert_close(p.full_tensor() if isinstance(p, DTensor) else p, q, rtol=1e-11, atol=1e-13)


@on_two_ranks
def test_16_bit_shards_draw_different_bits():
    """And those of master weights are sharded, too."""
    model = nn.Linear(64, 128, bias=False).bfloat16()
    nn.init.constant_(model.weight, 1.0)
    fully_shard(model)
    opt = SAM(model.parameters(), lr=0.1, rho=0.1, momentum=0.9, master_weights=True)
    model.weight.grad = torch.ones_like(model.weight)
    opt.ascend()
    halves = model.weight.detach().full_tensor().chunk(2)
    assert not torch.equal(*halves)
    model.weight.grad = torch.ones_like(model.weight)
    opt.step()
    master = opt.state[model.weight]["master_weight"].full_tensor()
    assert master.dtype == torch.float32
    torch.testing.assert_close(master, torch.full((128, 64), 0.9))


@on_two_ranks
def test_checkpoint(rule, base, tmp_path):  # noqa: F811
    """torch.distributed.checkpoint: resumes bit for bit, into fewer ranks' and the plain base's state dicts, too."""
    kind, options = RULES[rule]
    kind_of_base, base_options = BASES[base]
    path = [str(tmp_path)]
    dist.broadcast_object_list(path)

    def make():
        model = sharded()
        return model, kind(model.parameters(), kind_of_base, model=model, **options, **base_options)

    model, opt = make()
    for step in range(2):
        opt.step(closure_of(model, batch(step)[1]))
    weights, state = get_state_dict(model, opt)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path[0])
    opt.step(closure_of(model, batch(2)[1]))

    other, resumed = make()
    weights, state = get_state_dict(other, resumed)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path[0])
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state)
    resumed.step(closure_of(other, batch(2)[1]))
    for p, q in zip(full(model.parameters()), full(other.parameters())):
        assert torch.equal(p, q)

    plain_model = sharded()
    plain = kind_of_base(plain_model.parameters(), **base_options)
    set_optimizer_state_dict(plain_model, plain, get_optimizer_state_dict(model, opt))
    _, back = make()
    back.load_state_dict(plain.state_dict())
    for p, q in zip(model.parameters(), plain_model.parameters()):
        assert plain.state[q].keys() == opt.state[p].keys()
        for key, value in opt.state[p].items():
            if isinstance(value, DTensor):
                assert torch.equal(plain.state[q][key].full_tensor(), value.full_tensor())


@on_two_ranks
def test_what_is_refused():
    """Partial sums, and gradients that are not sharded as their parameter is."""
    mesh = init_device_mesh("cpu", (2,))
    partial = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    with pytest.raises(TypeError, match="a partial sum: redistribute it"):
        SAM([partial], lr=0.1)
    w = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    opt = SAM([w], lr=0.1)
    w.grad = distribute_tensor(torch.ones(4), mesh, [Replicate()])
    with pytest.raises(RuntimeError, match=r"but its gradient .*Replicate.*: redistribute it before the phase"):
        opt.ascend()
    model = DDP(network())
    opt = SAM([w, *model.parameters()], lr=0.1, model=model, sync="last")
    w.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    with pytest.raises(ValueError, match='is a DTensor, with sync="last"'):
        opt.ascend()
