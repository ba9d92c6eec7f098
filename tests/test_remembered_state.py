"""What LookSAM and Friendly SAM remember is state: saved, copied, the user's to edit, and begun with zeros."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from members import options_of
from quadratic import assert_alike, parameters, twins, walk
from samples import TOLERANCE, gradients
from test_against_reference import BASES, step_beside
from test_checkpoints import Run, assert_same, from_file
from test_remembered import FUSED_OR_NOT, HISTORIC, between, closure_of, every_historic, remembered, same, some_bases
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from bsam_fused import FriendlySAM, LookSAM

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.part(3)]

ADAM = "step", "exp_avg", "exp_avg_sq"
PLAIN = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    "Adam": (torch.optim.Adam, {}),
    "AdamW": (torch.optim.AdamW, {}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9}),
}


@pytest.mark.parametrize("base", PLAIN)
@every_historic
def test_state_dicts_interchange_with_the_plain_base(backend, member, base):
    """What it saved begins the history with zeros; what ours saved goes on in it, whatever the key that it lacks."""
    base_class, options = PLAIN[base]
    params, copies = twins()
    plain, opt = base_class(copies, lr=0.01, **options), member.build(params, base_class, lr=0.01, backend=backend)
    for group in opt.param_groups:
        group |= options
    for t in range(2):
        walk(plain, copies, gradients(copies, t))
    opt.load_state_dict(copy.deepcopy(plain.state_dict()))
    for p, q in zip(params, copies):
        p.data.copy_(q.data)
    passes = [gradients(params, 5), gradients(params, 6)]
    walk(opt, params, *passes)
    walk(plain, copies, gradients(copies, 6))  # both directions are g_max
    assert_alike(params, copies)
    zeros = [torch.zeros_like(p) for p in params]
    right = member.memory.remembered(passes, options_of(opt, params), zeros)
    assert_alike(remembered(member, opt, params), right)

    others = [nn.Parameter(p.detach().clone()) for p in params]
    back = base_class(others, lr=0.01, **options)
    back.load_state_dict(copy.deepcopy(opt.state_dict()))
    for t in range(2):
        walk(back, others, gradients(others, 10 + t))
        walk(plain, copies, gradients(copies, 10 + t))
    assert_alike(others, copies)
    assert_alike([back.state[p][member.memory.key] for p in others], right)
    opt.load_state_dict(copy.deepcopy(back.state_dict()))
    assert_alike(remembered(member, opt, params), right)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("base", ["SGD", "general"])
@every_historic
def test_resumed_in_every_step_of_a_period(backend, member, base, dtype):
    """Bit for bit, from files; 16 bits are rounded stochastically."""
    run, files = Run(member, base, dtype, backend), []
    run.others = []
    for t in range(5):
        files.append(run.saved())
        run.step(t)
    end = run.saved()
    for t, file in enumerate(files):
        resumed = Run(member, base, dtype, backend, lr=0.9, rho=9.0)
        resumed.others = []
        resumed.load(file)
        for later in range(t, 5):
            resumed.step(later)
        assert_same(from_file(resumed.saved()), from_file(end))


@every_historic
def test_beside_master_weights(backend, member):
    """It is in the parameters' dtype, of the gradients' own; state dicts bring both back."""
    params = [nn.Parameter(torch.randn(n, dtype=torch.bfloat16)) for n in (7, 33)]
    opt = member.build(params, torch.optim.AdamW, lr=0.01, master_weights=True, backend=backend)
    for t in range(4):
        history, n = member.history(opt, params), opt.passes
        passes = [gradients(params, 2 * t + k) for k in range(n)]
        walk(opt, params, *passes)
        right = member.memory.remembered([[g.double() for g in gs] for gs in passes], options_of(opt, params), history)
        assert_alike([x.double() for x in remembered(member, opt, params)], right, rtol=TOLERANCE[torch.bfloat16])
        if t == 1:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert all(opt.state[p][member.memory.key].dtype == torch.bfloat16 for p in params)
    assert all(opt.state[p]["master_weight"].dtype == torch.float32 for p in params)


@FUSED_OR_NOT
@every_historic
def test_a_copy_goes_on_alike_and_apart(backend, member, base, options):
    opt, params, _ = between(member, backend, base, options)
    twin, copies = copy.deepcopy((opt, params))
    assert twin.passes == opt.passes
    for t in range(3):
        passes = [gradients(params, 2 * t), gradients(params, 2 * t + 1)]
        walk(opt, params, *passes[: opt.passes])
        walk(twin, copies, *passes[: twin.passes])
        assert same(params, copies)
        assert same(remembered(member, opt, params), remembered(member, twin, copies))


EDITS = {
    "in place": lambda entry, key: entry[key].mul_(-3.0),
    "zeroed": lambda entry, key: entry[key].zero_(),
    "data": lambda entry, key: setattr(entry[key], "data", entry[key].data - 2.0),
    "another tensor": lambda entry, key: entry.update({key: 2.0 * entry[key] + 1.0}),
    "of other strides": lambda entry, key: entry.update({key: torch.stack([entry[key]] * 2, -1)[..., 0] + 1.0}),
    "of another dtype": lambda entry, key: entry.update({key: torch.ones_like(entry[key], dtype=torch.float32)}),
    "deleted": lambda entry, key: entry.pop(key),
    "None": lambda entry, key: entry.update({key: None}),
    "all deleted": lambda entry, key: entry.clear(),
}


@some_bases
@pytest.mark.parametrize("edit", EDITS)
@every_historic
def test_it_is_the_users(backend, member, base, edit):
    """The next step begins from what is there, in each step of a period; what is gone begins with zeros."""
    base_class, base_options, rule = BASES[base]
    params = parameters()
    opt = member.build(params, base_class, backend=backend, **base_options)
    key = member.memory.key
    for t in range(7):
        if t in (2, 3, 4):
            EDITS[edit](opt.state[params[t - 2]], key)
        step_beside(member, opt, params, rule, [gradients(params, 2 * t), gradients(params, 2 * t + 1)])
    assert all(opt.state[p][key].shape == p.shape for p in params)


@FUSED_OR_NOT
@every_historic
def test_a_history_of_another_shape_is_an_error_and_nothing_moves(backend, member, base, options):
    opt, params, loss = between(member, backend, base, options)
    key = member.memory.key
    right = opt.state[params[1]][key]
    opt.state[params[1]][key] = torch.ones(2, dtype=torch.float64)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=rf"parameter 1 of group 0 .* has state {key} of shape \(2,\)"):
        opt.step(closure_of(loss, params))
    assert same(params, before)
    opt.state[params[1]][key] = right
    opt.step(closure_of(loss, params))
    assert not same(params, before)


@some_bases
@every_historic
def test_parameters_that_come_later(backend, member, base):
    """Unfrozen, or of a group that is added, in each step of a period: their history begins with zeros."""
    base_class, base_options, rule = BASES[base]
    params = parameters((7, 5, 4, 6, 3))
    later = {1: params[1], 2: params[2], 3: params[3]}
    for p in later.values():
        p.requires_grad_(False)
    opt = member.build(params[:4], base_class, backend=backend, **base_options)
    for t in range(6):
        if t in later:
            later[t].requires_grad_(True)
        if t == 4:
            opt.add_param_group({"params": params[4:]})
        here = params if t >= 4 else params[:4]
        frozen = {i for i, p in enumerate(here) if not p.requires_grad}
        passes = [gradients(here, 2 * t + k, without=frozen) for k in range(2)]
        step_beside(member, opt, here, rule, passes)


def test_what_is_exempt_has_no_average(backend):
    """Friendly SAM's m, of what it perturbs; LookSAM's v is of all parameters."""
    for kind, right in ((FriendlySAM, False), (LookSAM, True)):
        params = parameters((5, 6))
        opt = kind([{"params": params[:1], "perturb": False}, {"params": params[1:]}], lr=0.1, backend=backend)
        walk(opt, params, gradients(params, 0), gradients(params, 1))
        key = opt._rule.history
        exempt = opt.state.get(params[0], {}).get(key)
        assert (exempt is not None and bool(exempt.any())) is right
        assert opt.state[params[1]][key].any()


def test_it_is_one_tensor_from_step_to_step(backend):
    """What a user holds of the state is written to, as torch's momentum is."""
    for member in HISTORIC.values():
        params = parameters()
        opt = member.build(params, lr=0.1, momentum=0.9, backend=backend)
        held = []
        for t in range(4):
            walk(opt, params, *[gradients(params, 2 * t), gradients(params, 2 * t + 1)][: opt.passes])
            held.append([opt.state[p][member.memory.key] for p in params])
        assert all(x is y for tensors in held for x, y in zip(tensors, held[0]))


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("base", ["no momentum", "SGD", "AdamW", "RMSprop"])
@every_historic
def test_torchs_distributed_checkpoints_hold_it(member, base, flat, tmp_path):
    """They load what a step at a learning rate of 0 shows: what begins later would be left out, and nobody told."""
    base_class, options = PLAIN.get(base, (torch.optim.SGD, {}))
    how = StateDictOptions(flatten_optimizer_state_dict=flat)

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        return model, member.build(model.parameters(), base_class, lr=0.05, **options)

    def step(model, opt, t):
        opt.step(lambda: (model(torch.randn(8, 4, generator=torch.Generator().manual_seed(t))) ** 2).mean().backward())

    model, opt = build()
    for t in range(3):
        step(model, opt, t)
    dcp.save({"opt": get_optimizer_state_dict(model, opt, options=how)}, checkpoint_id=tmp_path)
    resumed, other = build()
    resumed.load_state_dict(model.state_dict())
    loaded = {"opt": get_optimizer_state_dict(resumed, other, options=how)}
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_optimizer_state_dict(resumed, other, loaded["opt"], options=how)
    for t in range(3, 6):
        step(model, opt, t)
        step(resumed, other, t)
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


def test_a_first_momentum_is_taken_back_beside_a_history(backend):
    """It starts as d, whatever the dampening: zeros that are left of a skipped step would be those of a later one."""
    params, copies = twins()
    opts = [LookSAM(ps, k=1, lr=0.1, backend=backend) for ps in (params, copies)]
    for opt, ps in zip(opts, (params, copies), strict=True):
        walk(opt, ps, gradients(ps, 0), gradients(ps, 1))
        opt.param_groups[0] |= {"momentum": 0.9, "dampening": 0.5}
    walk(opts[0], params, [torch.full_like(p, float("inf")) for p in params], gradients(params, 2))
    opts[0].load_state_dict(copy.deepcopy(opts[0].state_dict()))
    for opt, ps in zip(opts, (params, copies), strict=True):
        walk(opt, ps, gradients(ps, 3), gradients(ps, 4))
    assert_alike(params, copies)
    key = "orthogonal_gradient"
    assert_alike([opts[0].state[p][key] for p in params], [opts[1].state[q][key] for q in copies])


@every_historic
def test_skipped_at_a_learning_rate_of_0_it_is_not_shown(backend, member):
    """Beside nothing of Adam's own, which was taken back, torch's Adam could be neither copied nor pickled."""
    p = nn.Parameter(torch.ones(3))
    opt = member.build([p], torch.optim.Adam, lr=0.0, backend=backend)
    for value in (torch.nan, 1.0):
        p.grad = torch.full_like(p, value)
        opt.step()
        copied = copy.deepcopy(opt)
        (entry,) = copied.state.values() or ({},)
        assert entry.keys() == ({member.memory.key, *ADAM} if value == 1.0 else set())


@every_historic
def test_an_interrupt_as_it_is_first_shown_after_a_base_has_stepped(member, monkeypatch):
    """Looking a parameter up runs Python, torch's: the step is made, and all of it, once `restore` was called."""
    params, copies = twins()
    opt = member.build(params, torch.optim.RMSprop, lr=0.01)
    base = opt.base_optimizer
    stepped, plain_hash = [], torch.Tensor.__hash__

    def interrupted(tensor):
        if len(stepped) == 1:
            stepped.append("interrupted")
            raise KeyboardInterrupt
        return plain_hash(tensor)

    base.register_step_post_hook(lambda *_: stepped.append("stepped"))
    monkeypatch.setattr(torch.Tensor, "__hash__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        walk(opt, params, gradients(params, 0), gradients(params, 1))
    opt.restore()
    other = member.build(copies, torch.optim.RMSprop, lr=0.01)
    walk(other, copies, gradients(copies, 0), gradients(copies, 1))
    assert_alike(params, copies)
    assert_alike(*(remembered(member, o, ps) for o, ps in ((opt, params), (other, copies))))
    assert opt.passes == other.passes
