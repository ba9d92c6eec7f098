"""The base optimizer stays torch's: same update, same state, both ways."""

import copy
import io

import pytest
import torch
from samples import assign, gradients, parameters

import bsam_fused

KINDS = [bsam_fused.SAM, bsam_fused.ASAM, bsam_fused.BSAM]
every_kind = pytest.mark.parametrize("kind", KINDS)

FUSED = {
    "plain SGD": (torch.optim.SGD, {"weight_decay": 0.01}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    "Adam": (torch.optim.Adam, {"weight_decay": 0.01, "betas": (0.8, 0.9)}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1, "eps": 1e-6, "maximize": True}),
}
GENERAL = {
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "Rprop": (torch.optim.Rprop, {}),
    "ASGD": (torch.optim.ASGD, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "subclass": (type("MySGD", (torch.optim.SGD,), {}), {"momentum": 0.9}),
}


def constant_passes(opt, params, seed):
    """A step in which every pass has the same gradients, as with ρ = 0: then d = g for SAM and BSAM alike."""
    grads = gradients(params, seed)
    for call in getattr(opt, "_calls", ["step"]):
        assign(params, grads)
        getattr(opt, call)()


def pair(base, options, dtype=torch.float64):
    params = parameters("odd", dtype)
    return params, [torch.nn.Parameter(p.detach().clone()) for p in params]


def assert_same(params, others, **tolerance):
    for p, q in zip(params, others):
        torch.testing.assert_close(p.detach(), q.detach(), **tolerance)


@every_kind
@pytest.mark.parametrize("name", [*FUSED, *GENERAL])
def test_radius_zero_is_the_plain_base(backend, kind, name):
    base, options = {**FUSED, **GENERAL}[name]
    params, others = pair(base, options)
    options = {"lr": 0.05, **options}
    radii = {"rho": 0.0, **({"rho_min": 0.0} if kind is bsam_fused.BSAM else {})}
    opt, plain = kind(params, base, backend=backend, **radii, **options), base(others, **options)
    for t in range(6):
        constant_passes(opt, params, t)
        constant_passes(plain, others, t)
    assert_same(params, others, rtol=1e-12, atol=1e-13)
    for p, q in zip(params, others):
        assert list(opt.state[p]) == list(plain.state[q])
        for key, value in plain.state[q].items():
            torch.testing.assert_close(opt.state[p][key], value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", FUSED)
def test_which_bases_are_fused(name):
    base, options = FUSED[name]
    opt = bsam_fused.SAM(parameters("one"), base, lr=0.1, **options)
    assert bsam_fused.optim.fused.rule_for(opt.base_optimizer) is not None


@pytest.mark.parametrize("name", GENERAL)
def test_which_bases_take_the_general_path(name):
    base, options = GENERAL[name]
    opt = bsam_fused.SAM(parameters("one"), base, lr=0.1, **options)
    assert bsam_fused.optim.fused.rule_for(opt.base_optimizer) is None


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_kind
@pytest.mark.parametrize("name", FUSED)
def test_the_plain_bases_state_dict_loads_and_training_goes_on(backend, kind, name):
    base, options = FUSED[name]
    params, others = pair(base, options)
    options = {"lr": 0.05, **options}
    plain = base(others, **options)
    for t in range(3):
        constant_passes(plain, others, t)
    with torch.no_grad():
        for p, q in zip(params, others):
            p.copy_(q)
    radii = {"rho": 0.0, **({"rho_min": 0.0} if kind is bsam_fused.BSAM else {})}
    opt = kind(params, base, backend=backend, **{**options, "lr": 9.0}, **radii)
    constant_passes(opt, params, 99)  # into buffers that must not matter after loading
    with torch.no_grad():
        for p, q in zip(params, others):
            p.copy_(q)
    opt.load_state_dict(saved_and_loaded(plain.state_dict()))
    assert opt.param_groups[0]["lr"] == 0.05
    assert opt.param_groups[0]["rho"] == 0.0
    assert opt.base_optimizer.param_groups is opt.param_groups
    assert opt.base_optimizer.state is opt.state
    for t in range(3, 6):
        constant_passes(plain, others, t)
        constant_passes(opt, params, t)
    assert_same(params, others, rtol=1e-12, atol=1e-13)


@every_kind
@pytest.mark.parametrize("name", FUSED)
def test_our_state_dict_loads_into_the_plain_base(backend, kind, name):
    base, options = FUSED[name]
    params, others = pair(base, options)
    options = {"lr": 0.05, **options}
    radii = {"rho": 0.0, **({"rho_min": 0.0} if kind is bsam_fused.BSAM else {})}
    opt = kind(params, base, backend=backend, **options, **radii)
    for t in range(3):
        constant_passes(opt, params, t)
    with torch.no_grad():
        for p, q in zip(params, others):
            q.copy_(p)
    plain = base(others, **options)
    plain.load_state_dict(saved_and_loaded(opt.state_dict()))
    for t in range(3, 6):
        constant_passes(plain, others, t)
        constant_passes(opt, params, t)
    assert_same(params, others, rtol=1e-12, atol=1e-13)


@every_kind
@pytest.mark.parametrize("name", [*FUSED, "RMSprop"])
def test_resume_is_bit_identical(backend, kind, name):
    base, options = {**FUSED, **GENERAL}[name]
    params, others = pair(base, options, torch.float32)
    opt = kind(params, base, lr=0.05, backend=backend, **options)

    def step(opt, params, t):
        for k, call in enumerate(opt._calls):
            assign(params, gradients(params, 10 * t + k))
            getattr(opt, call)()

    for t in range(3):
        step(opt, params, t)
    checkpoint = copy.deepcopy(opt.state_dict())
    weights = [p.detach().clone() for p in params]
    for t in range(3, 6):
        step(opt, params, t)
    resumed = kind(others, base, lr=0.7, rho=0.0, backend=backend, **options)
    with torch.no_grad():
        for q, w in zip(others, weights):
            q.copy_(w)
    resumed.load_state_dict(checkpoint)
    for t in range(3, 6):
        step(resumed, others, t)
    assert all(torch.equal(p, q) for p, q in zip(params, others))


def test_checkpoints_are_as_large_as_the_bases(backend):
    """No perturbation buffers: they hold nothing between steps."""
    sizes = []
    for make in (
        lambda p: bsam_fused.BSAM(p, lr=0.1, momentum=0.9, backend=backend),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ):
        params = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(10)]
        opt = make(params)
        constant_passes(opt, params, 0)
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        sizes.append(file.tell())
    assert sizes[0] < 1.05 * sizes[1]


@every_kind
def test_a_base_instance_with_state_is_carried_on(backend, kind):
    params, others = pair(None, None)
    base, plain = (torch.optim.SGD(ps, lr=0.05, momentum=0.9) for ps in (params, others))
    for t in range(2):
        constant_passes(base, params, t)
        constant_passes(plain, others, t)
    radii = {"rho": 0.0, **({"rho_min": 0.0} if kind is bsam_fused.BSAM else {})}
    opt = kind(params, base, backend=backend, **radii)
    assert opt.base_optimizer is base
    for t in range(2, 5):
        constant_passes(opt, params, t)
        constant_passes(plain, others, t)
    assert_same(params, others, rtol=1e-12, atol=1e-13)


def test_a_base_instance_with_groups_takes_their_options():
    weights, biases = parameters("odd"), parameters("one")
    base = torch.optim.SGD([{"params": weights}, {"params": biases, "lr": 0.5}], lr=0.1)
    opt = bsam_fused.BSAM([{"params": weights, "rho": 0.3}, {"params": biases, "adaptive": True}], base)
    assert [g["rho"] for g in opt.param_groups] == [0.3, 0.05]
    assert [g["rho_min"] for g in opt.param_groups] == [0.3, 0.05]
    assert [g["adaptive"] for g in opt.param_groups] == [False, True]
    assert [g["lr"] for g in opt.param_groups] == [0.1, 0.5]


@every_kind
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_inactive_is_the_plain_base(backend, kind, name):
    """And switching over keeps the base's state, in both directions."""
    base, options = FUSED[name]
    params, others = pair(base, options)
    options = {"lr": 0.05, **options}
    radii = {"rho": 0.0, **({"rho_min": 0.0} if kind is bsam_fused.BSAM else {})}
    opt, plain = kind(params, base, backend=backend, **options, **radii), base(others, **options)
    for t in range(8):
        opt.active = t % 4 >= 2
        grads = gradients(params, t)
        for call in opt._calls if opt.active else ["step"]:
            assign(params, grads)
            getattr(opt, call)()
        assign(others, grads)
        plain.step()
    assert_same(params, others, rtol=1e-12, atol=1e-13)
    opt.active = False
    with pytest.raises(RuntimeError, match="active is False"):
        opt.ascend()


@every_kind
def test_at_rest_with_every_lr_zero_the_plain_base_steps(backend, kind):
    """torch.distributed.checkpoint makes the state this way, to load into it."""
    params = parameters("odd")
    before = [p.detach().clone() for p in params]
    opt = kind(params, torch.optim.AdamW, lr=0.0, backend=backend)
    assign(params, [torch.zeros_like(p) for p in params])
    opt.step()
    assert all(torch.equal(p, w) for p, w in zip(params, before))
    assert set(opt.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_hooks_on_the_base_instance_still_run(backend):
    params = parameters("odd")
    base = torch.optim.SGD(params, lr=0.1)
    calls = []
    base.register_step_post_hook(lambda *_: calls.append(1))
    constant_passes(bsam_fused.SAM(params, base, backend=backend), params, 0)
    assert calls == [1]


def test_a_base_with_an_option_named_rho():
    """Adadelta's rho is its own; ours lies beside it."""
    opt = bsam_fused.BSAM(parameters("odd"), torch.optim.Adadelta, lr=0.1, rho=0.2)
    group = opt.param_groups[0]
    assert (group["rho"], group["sharpness_rho"], group["rho_min"]) == (0.9, 0.2, 0.2)
    assert opt._radii("rho", 1.0)[0].radius == 0.2
