"""Float32 master weights of 16-bit parameters: updates are float32's, and nothing else is different."""

import copy
import io

import pytest
import reference as ref
import torch
from samples import SHAPES, strided
from torch import nn

import bsam_fused

KINDS = [bsam_fused.SAM, bsam_fused.ASAM, bsam_fused.BSAM]
every_kind = pytest.mark.parametrize("kind", KINDS)
BASES = {
    "plain SGD": (torch.optim.SGD, {"weight_decay": 0.02}, ref.sgd),
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "nesterov": False}, ref.sgd),
    "AdamW": (torch.optim.AdamW, {"eps": 1e-2, "weight_decay": 0.1}, ref.adamw),
}
each_base = pytest.mark.parametrize("base", BASES)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch.")
)


def whole_gradients(params, seed):
    """Small integers, whose sums are exact in 16 bits."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return [
        torch.empty_like(p, requires_grad=False).copy_(torch.randint(-8, 9, p.shape, generator=generator, device="cpu"))
        for p in params
    ]


def walk(opt, params, t, grads=whole_gradients):
    """A step; returns its gradients, a list a pass."""
    passes = [grads(params, 10 * t + k) for k in range(len(opt._calls))]
    for call, slopes in zip(opt._calls, passes):
        for p, g in zip(params, slopes):
            p.grad = g.clone(memory_format=torch.preserve_format)
        getattr(opt, call)()
    return passes


def master(opt, p):
    return opt.state[p]["master_weight"]


def doubled(state):
    return {k: int(v) if k == "step" else v.double().clone() for k, v in state.items() if k != "master_weight"}


@pytest.mark.pairwise
@every_kind
@each_base
@each_dtype
def test_the_update_is_float32s(backend, kind, base, dtype):
    """Beside the float64 oracle, from the master weights and state as they are, over all layouts and two groups."""
    base_class, options, rule = BASES[base]
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for name in ("odd", "block_edges") for shape in SHAPES[name]]
    params += strided(dtype)
    opt = kind(
        [{"params": params[:5]}, {"params": params[5:], "lr": 3e-4}],
        base_class,
        lr=1e-3,
        master_weights=True,
        backend=backend,
        **options,
    )
    for t in range(3):
        before = [(master(opt, p) if t else p.detach()).double().clone() for p in params]
        state = [doubled(opt.state.get(p, {})) for p in params]
        passes = [[g.double() for g in grads] for grads in walk(opt, params, t)]
        d = ref.bsam(passes) if kind is bsam_fused.BSAM else ref.sam(passes)
        for i, p in enumerate(params):
            expected = rule(before[i], d[i], state[i], opt.param_groups[i >= 5])
            torch.testing.assert_close(master(opt, p).double(), expected, rtol=2e-6, atol=2e-6)
            assert torch.equal(p.detach(), master(opt, p).to(dtype))
            assert master(opt, p).dtype == torch.float32


@every_kind
@each_dtype
def test_small_updates_add_up(backend, kind, dtype):
    """Each an eighth of the spacing of the weights, where nearest rounding alone would stand still."""
    lr, steps, ends = torch.finfo(dtype).eps / 16, 18, []
    for options in ({"master_weights": True}, {"rounding": "nearest"}):
        p = nn.Parameter(torch.ones(3000, dtype=dtype))
        opt = kind([p], lr=lr, backend=backend, **options)
        for t in range(steps):
            walk(opt, [p], t, lambda params, seed: [torch.ones_like(p) for p in params])
        ends.append(p.detach())
    assert torch.equal(ends[0], torch.full_like(p, 1 - steps * lr))
    assert torch.equal(ends[1], torch.ones_like(p))


def test_weights_set_from_outside_count(backend):
    """Element by element: where they still are the master's rounding, the master does."""
    p = nn.Parameter(torch.randn(3000).bfloat16())
    opt = bsam_fused.SAM([p], lr=1e-4, master_weights=True, backend=backend)
    walk(opt, [p], 0)
    with torch.no_grad():
        p[:1000] = 7.0
    starts = torch.where(torch.arange(3000) < 1000, torch.tensor(7.0), master(opt, p))
    d = walk(opt, [p], 1)[-1][0]
    torch.testing.assert_close(master(opt, p), starts - 1e-4 * d.float(), rtol=1e-6, atol=1e-7)


@every_kind
@each_base
def test_a_skipped_step_and_restore_leave_them(backend, kind, base):
    base_class, options, _ = BASES[base]
    p = nn.Parameter(torch.randn(3000).bfloat16())
    opt = kind([p], base_class, lr=1e-3, master_weights=True, backend=backend, **options)
    walk(opt, [p], 0)
    before = p.detach().clone(), {k: v.clone() for k, v in opt.state[p].items()}
    walk(opt, [p], 1, lambda params, seed: [torch.full_like(p, float("nan")) for p in params])
    p.grad = torch.ones_like(p)
    opt.ascend()
    opt.restore()
    assert opt.skipped_steps == 1
    assert torch.equal(p, before[0])
    for key, value in before[1].items():
        assert torch.equal(opt.state[p][key], value), key


@every_kind
@each_base
def test_a_skipped_first_step(backend, kind, base):
    """Nothing has begun, also where the host cannot know it."""
    ends = []
    for skip in (True, False):
        torch.manual_seed(0)
        base_class, options, _ = BASES[base]
        p = nn.Parameter(torch.randn(300).bfloat16())
        opt = kind([p], base_class, lr=1e-3, rounding="nearest", master_weights=True, backend=backend, **options)
        if skip:
            walk(opt, [p], 1, lambda params, seed: [torch.full_like(p, float("nan")) for p in params])
            opt.state_dict()
        walk(opt, [p], 0)
        ends.append(master(opt, p).clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("kind", [bsam_fused.LookSAM, bsam_fused.FriendlySAM])
def test_a_history_of_zeros_takes_nothing_from_them(backend, kind):
    """64 steps of lr = 1e-3 along d = 1, each less than half of what bfloat16 resolves below 1.

    Of g_max = g LookSAM's v is 0; Friendly SAM remembers nothing of what is left out of the perturbation. Plain SGD
    keeps no state that would say that an update was made.
    """
    p, q = params = [nn.Parameter(torch.ones(5, dtype=torch.bfloat16)) for _ in range(2)]
    groups = [{"params": [p]}, {"params": [q], "perturb": False}]
    opt = kind(groups, lr=1e-3, rounding="nearest", master_weights=True, backend=backend)
    for t in range(64):
        opt.active = t < 32
        for call in opt._calls if opt.passes > 1 else ["step"]:
            for w in params:
                w.grad = torch.ones_like(w)
            getattr(opt, call)()
    torch.testing.assert_close(master(opt, q), torch.full_like(master(opt, q), 1 - 64e-3))
    assert torch.equal(q, master(opt, q).bfloat16())


@pytest.mark.parametrize("kind", [bsam_fused.SAM, bsam_fused.LookSAM, bsam_fused.FriendlySAM])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_loaded_ones_outlive_a_skipped_first_step(backend, kind, momentum):
    """Nothing else has begun: the momentum, of which torch would not make the first step's any more, neither."""
    p = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    before = bsam_fused.SAM([p], lr=1e-3, rounding="nearest", master_weights=True, backend=backend)
    walk(before, [p], 0)
    kept = master(before, p).clone()
    opt = kind([p], lr=1e-3, rounding="nearest", master_weights=True, backend=backend)
    opt.load_state_dict(before.state_dict())
    opt.param_groups[0]["momentum"] = momentum
    walk(opt, [p], 1, lambda params, seed: [torch.full_like(p, float("nan"))])
    assert opt.skipped_steps == 1
    (entry,) = opt.state_dict()["state"].values()
    assert entry.keys() == {"master_weight"}
    assert torch.equal(entry["master_weight"], kept)


def stored(what):
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.pairwise
@every_kind
@each_base
@pytest.mark.parametrize("how", ["file", "copy"])
def test_they_go_on_bit_for_bit(backend, kind, base, how):
    base_class, options, _ = BASES[base]
    options = {"lr": 1e-3, "master_weights": True, "backend": backend, **options}
    params = [nn.Parameter(torch.randn(300, 5).bfloat16()), nn.Parameter(torch.randn(7))]
    opt = kind(params, base_class, **options)
    for t in range(2):
        walk(opt, params, t)
    if how == "file":
        others = [nn.Parameter(p.detach().clone()) for p in params]
        resumed = kind(others, base_class, **options)
        walk(resumed, others, 9)
        with torch.no_grad():
            for p, q in zip(params, others):
                q.copy_(p)
        resumed.load_state_dict(stored(opt.state_dict()))
    else:
        resumed = copy.deepcopy(opt)
        others = [p for group in resumed.param_groups for p in group["params"]]
    for t in range(2, 4):
        walk(opt, params, t)
        walk(resumed, others, t)
    for p, q in zip(params, others):
        assert torch.equal(p, q)
        assert opt.state[p].keys() == resumed.state[q].keys()
        assert all(torch.equal(value, resumed.state[q][key]) for key, value in opt.state[p].items())
    assert "master_weight" not in opt.state[params[1]]


@each_base
def test_state_dicts_interchange_with_the_plain_base(backend, base):
    base_class, options, _ = BASES[base]
    p = nn.Parameter(torch.randn(300).bfloat16())
    opt = bsam_fused.SAM([p], base_class, lr=1e-3, master_weights=True, backend=backend, **options)
    walk(opt, [p], 0)
    plain = base_class([p], lr=1e-3, **options)
    plain.load_state_dict(stored(opt.state_dict()))
    p.grad = torch.ones_like(p)
    plain.step()
    opt.load_state_dict(stored(plain.state_dict()))
    without = bsam_fused.SAM([p], base_class, lr=1e-3, backend=backend, **options)
    without.load_state_dict(stored(opt.state_dict()))
    assert "master_weight" not in without.state.get(p, {})
    fresh = base_class([p], lr=1e-3, **options)
    fresh.step()
    opt.load_state_dict(stored(fresh.state_dict()))
    start, d = p.detach().float(), walk(opt, [p], 1)[-1][0].float()
    assert torch.equal(p.detach(), master(opt, p).bfloat16())
    if base == "plain SGD":
        torch.testing.assert_close(master(opt, p), start - 1e-3 * (d + 0.02 * start), rtol=1e-6, atol=1e-7)


@each_base
def test_an_inactive_step_between(backend, base):
    """The plain base's own step, in 16 bits: what it sets counts."""
    base_class, options, _ = BASES[base]
    params = [nn.Parameter(torch.randn(300).bfloat16()), nn.Parameter(torch.randn(9).bfloat16())]
    opt = bsam_fused.SAM(params, base_class, lr=0.1, master_weights=True, backend=backend, **options)
    walk(opt, params[:1], 0)
    opt.active = False
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    opt.active = True
    before = [p.detach().clone() for p in params]
    for group in opt.param_groups:
        group["lr"] = 1e-9
    walk(opt, params, 1)
    for p, w in zip(params, before):
        torch.testing.assert_close(master(opt, p), w.float(), rtol=0.005, atol=1e-6)


def test_float32_parameters_need_none(backend):
    runs = []
    for masters in (True, False):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(300))
        opt = bsam_fused.BSAM([p], torch.optim.AdamW, lr=1e-3, master_weights=masters, backend=backend)
        walk(opt, [p], 0)
        runs.append(p.detach())
        assert "master_weight" not in opt.state[p]
    assert torch.equal(*runs)


def test_what_cannot_have_them():
    p = nn.Parameter(torch.ones(2).bfloat16())
    with pytest.raises(ValueError, match=r"master_weights=True with base optimizer RMSprop"):
        bsam_fused.SAM([p], torch.optim.RMSprop, lr=0.1, master_weights=True)
    with pytest.raises(ValueError, match=r'master_weights=True with update_from="w_min"'):
        bsam_fused.BSAM([p], lr=0.1, update_from="w_min", master_weights=True)
    opt = bsam_fused.SAM([p], torch.optim.Adam, lr=0.1, master_weights=True)
    p.grad = torch.ones_like(p)
    opt.ascend()
    opt.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="master_weights=True with base optimizer Adam"):
        opt.step()
    opt.restore()
    assert torch.equal(p, torch.ones_like(p))
