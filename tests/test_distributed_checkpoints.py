"""torch.distributed.checkpoint, saving, copying and staging: of the fused optimizer's state as of the plain base's."""

import copy
import gc
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import on_two_ranks
from test_distributed import batch, closure_of, network, python_or_not  # noqa: F401
from test_fsdp import sharded
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from bsam_fused import ASAM, BSAM, SAM

ADAMW = {"lr": 0.01, "eps": 1e-3}
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
NESTED = StateDictOptions()


def replicated():
    """HSDP: state is sharded over one dimension of the mesh, and replicated over the other."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    return fully_shard(network(), mesh=mesh)


MODELS = {"uneven and empty shards": sharded, "HSDP": replicated}


@pytest.fixture(params=MODELS)
def shape(request):
    return request.param


def trained(shape, backend, steps=2):
    model = MODELS[shape]()
    opt = SAM(model.parameters(), torch.optim.AdamW, backend=backend, **ADAMW)
    for step in range(steps):
        opt.step(closure_of(model, batch(step)[1]))
    return model, opt


def shards(state):
    """Every tensor of a state, this rank's part of it, in a copy."""
    return [
        (value.to_local() if isinstance(value, DTensor) else value).clone()
        for entry in state.values()
        for value in entry.values()
    ]


def assert_equal(state, before):
    here = shards(state)
    assert len(here) == len(before)
    assert all(map(torch.equal, here, before))


def by_file(what):
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "torch.save": by_file,
    "deepcopy": copy.deepcopy,
    "pickle": lambda what: pickle.loads(pickle.dumps(what)),
    "staging": lambda what: DefaultStager(StagingOptions(False, False, False, False)).stage(what),
    "staging in shared memory": lambda what: DefaultStager(StagingOptions(False, True, False, False)).stage(what),
    "blocking staging": lambda what: BlockingAsyncStager().stage(what),
}


@on_two_ranks
def test_sharded_state_is_saved_copied_and_staged(shape, python_or_not):  # noqa: F811
    """The views of flat buffers lie at an offset, which DTensors over them took for memory of their own.

    The state dict and single entries; what comes of it holds the state as it was then, whatever the next steps do.
    """
    model, opt = trained(shape, python_or_not)
    before = shards(opt.state)
    results = [way(opt.state_dict())["state"] for way in WAYS.values()]
    entries = [{i: way(entry) for i, entry in enumerate(opt.state.values())} for way in WAYS.values()]
    opt.step(closure_of(model, batch(2)[1]))
    assert not all(map(torch.equal, shards(opt.state), before))
    for result in [*results, *entries]:
        assert_equal(result, before)


@on_two_ranks
def test_a_shard_of_state_is_as_large_as_the_bases(shape):
    """A file of one parameter's state holds no other's: every shard's storage is its own, and ends with it."""
    model, opt = trained(shape, "auto")
    plain = torch.optim.AdamW(model.parameters(), **ADAMW)
    plain.load_state_dict(copy.deepcopy(opt.state_dict()))
    for p in model.parameters():
        ours, theirs = (
            optimizer.state[p]["exp_avg"].to_local().untyped_storage().nbytes() for optimizer in (opt, plain)
        )
        assert ours == theirs


@on_two_ranks
def test_shards_of_state_are_still_the_live_ones(shape, python_or_not):  # noqa: F811
    """What is written to one counts in the next step, and one that somebody keeps outlives the flat buffers."""
    (model, opt), (twin, right) = trained(shape, python_or_not), trained(shape, python_or_not)
    kept = [entry["exp_avg"] for entry in opt.state.values()]
    for optimizer in (opt, right):
        for entry in optimizer.state.values():
            entry["exp_avg"].zero_()
    right.load_state_dict(copy.deepcopy(right.state_dict()))
    for optimizer, net in ((opt, model), (right, twin)):
        optimizer.step(closure_of(net, batch(2)[1]))
    assert_equal(opt.state, shards(right.state))
    before = [shard.to_local().clone() for shard in kept]
    del opt
    gc.collect()
    assert all(torch.equal(shard.to_local(), w) for shard, w in zip(kept, before))


@on_two_ranks
def test_the_optimizer_itself_is_copied(python_or_not):  # noqa: F811
    """With the parameters, as the plain base where no gradient is left."""
    model, opt = trained("uneven and empty shards", python_or_not)
    opt.zero_grad()
    before = shards(opt.state)
    copies = copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), by_file(opt)
    opt.step(closure_of(model, batch(2)[1]))
    for other in copies:
        assert_equal(other.state, before)


@on_two_ranks
def test_async_save_while_training_goes_on(tmp_path, shape, python_or_not):  # noqa: F811
    """It saves the state of the call, from which another process resumes bit for bit."""
    path = [str(tmp_path)]
    dist.broadcast_object_list(path)
    beside = dist.new_group(backend="gloo")  # the save's own: its collectives run beside training's
    model, opt = trained(shape, python_or_not)
    weights, state = get_state_dict(model, opt)
    saving = dcp.async_save({"model": weights, "optimizer": state}, checkpoint_id=path[0], process_group=beside)
    for step in (2, 3):
        opt.step(closure_of(model, batch(step)[1]))
    saving.result()

    other, resumed = trained(shape, python_or_not, steps=0)
    weights, state = get_state_dict(other, resumed)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path[0])
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=state)
    for step in (2, 3):
        resumed.step(closure_of(other, batch(step)[1]))
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p.to_local(), q.to_local())
    assert_equal(resumed.state, shards(opt.state))


# ---- one process: flattened or not, what a state dict of groups and states keeps

BASES = {
    "plain SGD": (torch.optim.SGD, {"lr": 0.05}),  # no state: each look at it is a step of lr 0
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, ADAMW),
    "general": (torch.optim.RMSprop, ADAMW),
}


class Run:
    """A small bfloat16 model in training, whose every step's bits depend on how many there were."""

    def __init__(self, kind, base, **options):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16()
        kind_of_base, base_options = BASES[base]
        groups = [{"params": list(layer.parameters())} for layer in (self.net[0], self.net[2])]
        self.opt = (
            kind(groups, kind_of_base, **base_options, **options) if kind else kind_of_base(groups, **base_options)
        )

    def train(self, *steps):
        for t in steps:
            x = torch.randn(16, 6, generator=torch.Generator().manual_seed(t)).bfloat16()

            def closure(x=x):
                loss = self.net(x).float().square().mean()
                loss.backward()
                return loss

            self.opt.zero_grad()
            self.opt.step(closure)
        self.opt.zero_grad()
        return self

    def state(self, options):
        return {
            "model": get_model_state_dict(self.net),
            "optimizer": get_optimizer_state_dict(self.net, self.opt, options=options),
        }

    def load(self, saved, options):
        set_model_state_dict(self.net, saved["model"])
        set_optimizer_state_dict(self.net, self.opt, saved["optimizer"], options=options)


@pytest.mark.parametrize("options", [FLAT, NESTED], ids=["flat", "nested"])
@pytest.mark.parametrize("masters", [False, True], ids=["", "masters"])
@pytest.mark.parametrize("kind", [SAM, ASAM, BSAM])
@pytest.mark.parametrize("base", BASES)
def test_resumes_with_the_same_random_bits(kind, base, masters, options, tmp_path):
    """As the run that was never saved, and as the one that went on after it was."""
    if masters and base == "general":
        return
    whole, saved, resumed = (Run(kind, base, master_weights=masters) for _ in range(3))
    dcp.save(saved.train(0, 1, 2).state(options), checkpoint_id=tmp_path, no_dist=True)
    template = resumed.state(options)
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    resumed.load(template, options)
    whole.train(0, 1, 2, 3, 4)
    for run in (saved.train(3, 4), resumed.train(3, 4)):
        assert all(map(torch.equal, run.net.parameters(), whole.net.parameters()))
        assert run.opt.state_dict()["param_groups"][0]["rounded_steps"] == 5


@pytest.mark.parametrize("kind", [SAM, BSAM])
def test_a_flattened_state_of_the_plain_base(kind):
    """torch asks it for every option that the groups have here, by name; what it lacks is taken from here."""
    plain, run = Run(None, "AdamW").train(0, 1, 2), Run(kind, "AdamW", rho=0.3)
    flat = plain.state(FLAT)["optimizer"]
    with pytest.raises(KeyError, match=r"param_groups\.0\.weight\.rho"):
        set_optimizer_state_dict(run.net, run.opt, flat, options=FLAT)
    assert not any(entry["exp_avg"].any() for entry in run.opt.state.values())
    flat = {**get_optimizer_state_dict(run.net, run.opt, options=FLAT), **flat}
    set_optimizer_state_dict(run.net, run.opt, flat, options=FLAT)
    assert [group["rho"] for group in run.opt.param_groups] == [0.3, 0.3]
    for p, q in zip(run.net.parameters(), plain.net.parameters()):
        assert all(torch.equal(value, plain.opt.state[q][key]) for key, value in run.opt.state[p].items())


@pytest.mark.parametrize("options", [FLAT, NESTED], ids=["flat", "nested"])
def test_a_checkpoint_of_the_plain_base(options, tmp_path):
    """The same of what the planner is asked for: torch names what is missing, or leaves it as it is here."""
    plain, run = Run(None, "AdamW").train(0, 1, 2), Run(BSAM, "AdamW", rho=0.3)
    dcp.save(plain.state(options), checkpoint_id=tmp_path, no_dist=True)
    state = run.state(options)
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: .*\.rho"):
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(state, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    run.load(state, options)
    assert run.opt.param_groups[0]["rho"] == 0.3
    for p, q in zip(run.net.parameters(), plain.net.parameters()):
        assert torch.equal(p, q)
        assert all(torch.equal(value, plain.opt.state[q][key]) for key, value in run.opt.state[p].items())


@pytest.mark.parametrize("kind", [SAM, BSAM])
@pytest.mark.parametrize("options", [FLAT, NESTED], ids=["flat", "nested"])
def test_our_state_in_the_plain_base(kind, options):
    plain, run = Run(None, "AdamW"), Run(kind, "AdamW").train(0, 1, 2)
    plain.load(copy.deepcopy(run.state(options)), options)
    for p, q in zip(plain.net.parameters(), run.net.parameters()):
        assert plain.opt.state[p].keys() == run.opt.state[q].keys()
        assert all(torch.equal(value, run.opt.state[q][key]) for key, value in plain.opt.state[p].items())
    plain.train(3)


@pytest.mark.parametrize("options", [FLAT, NESTED], ids=["flat", "nested"])
def test_a_later_format_is_refused(options):
    run, later = Run(SAM, "AdamW").train(0), Run(SAM, "AdamW").train(0, 1)
    saved, before = later.state(options), copy.deepcopy(run.opt.state_dict())
    for name in saved["optimizer"]:
        if name.endswith("bsam_fused_format"):
            saved["optimizer"][name] = 2
    for group in saved["optimizer"].get("param_groups", ()):
        group["bsam_fused_format"] = 2
    with pytest.raises(ValueError, match=r"bsam_fused_format=2 in group 0: .* reads state dicts of format 1.*upgrade"):
        set_optimizer_state_dict(run.net, run.opt, saved["optimizer"], options=options)
    after = run.opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert_equal(after["state"], shards(before["state"]))
    run.train(1)
