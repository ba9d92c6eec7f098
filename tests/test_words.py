"""What is written wrongly is told in the user's words: the class and names that they used, and what to write instead.

Nothing silently means something else, and nothing has moved when an error comes.
"""

import inspect
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from bsam_fused import ASAM, BSAM, SAM, losses, schedules, sharpness
from bsam_fused.ops import native_flat

KINDS = [SAM, ASAM, BSAM]
every_kind = pytest.mark.parametrize("kind", KINDS)


def parameter(*shape):
    return nn.Parameter(torch.ones(*shape or (2,)))


def give(opt, value=1.0):
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, value)


# ---- values of the wrong type

NO_NUMBERS = ["0.05", True, 0.05j, [0.05], {}, torch.tensor([0.1, 0.2]), torch.tensor(True), np.array([0.1, 0.2])]
NO_NUMBERS += [np.str_("0.05"), np.bool_(True), torch.tensor(0.05j), torch.tensor(0.05, device="meta"), 10**400]
no_number = pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
OPTIONS = ["rho", "rho_min", "rho_min_end", "rho_min_lr_end", "eta", "norm_eps", "max_grad_norm"]


@no_number
def test_no_number_at_construction(value):
    """float("0.05") is a number, and so is float(True): a text or a switch in the wrong place trained on."""
    for option in OPTIONS:
        with pytest.raises(ValueError, match=rf"^{option}=.*must be a finite number"):
            BSAM([parameter()], lr=0.1, **{option: value})
    for option in OPTIONS[:5]:
        with pytest.raises(ValueError, match=rf"^{option}=.*in group 1: must be a finite number"):
            BSAM([{"params": [parameter()]}, {"params": [parameter()], option: value}], lr=0.1)


@no_number
def test_no_number_written_later(backend, value):
    """At the phase that reads it, before it moves anything."""
    for option, calls in [("rho", 0), ("eta", 0), ("norm_eps", 0), ("rho_min", 1), ("rho_min_end", 1)]:
        p = parameter(3)
        opt = BSAM([p], lr=0.1, backend=backend)
        for call in ("ascend", "descend")[:calls]:
            give(opt)
            getattr(opt, call)()
        before = p.detach().clone()
        if option == "norm_eps":
            opt.norm_eps = value
        else:
            opt.param_groups[0][option] = value
        give(opt)
        with pytest.raises(ValueError, match=rf"^{option}=.*must be a finite number"):
            getattr(opt, ("ascend", "descend")[calls])()
        assert torch.equal(p, before)


@pytest.mark.parametrize(
    "value",
    [0.25, np.float32(0.25), np.float64(0.25), torch.tensor(0.25), torch.tensor([0.25]), np.array(0.25)],
    ids=repr,
)
def test_what_holds_a_number(backend, value):
    """ρ = 1/4 along one element: w_max = w + 1/4."""
    p = parameter(1)
    opt = SAM([p], lr=0.1, rho=value, backend=backend)
    give(opt)
    opt.ascend()
    assert p.item() == 1.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adaptive": "yes"}, r"adaptive='yes' in group 0: must be True or False, not a str"),
        ({"adaptive": None}, "adaptive=None"),
        ({"adaptive": 2}, "adaptive=2"),
        ({"master_weights": "no"}, "master_weights='no': must be True or False"),
        ({"seed": True}, r"seed=True: must be an integer in \[0, 4294967296\)"),
        ({"seed": 1.0}, r"seed=1\.0"),
        ({"seed": "0"}, "seed='0'"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"rounding": ["nearest"]}, r"rounding=\['nearest'\]: must be \"stochastic\" or \"nearest\""),
        ({"sync": None}, "sync=None: must be"),
        ({"backend": ["cpp"]}, r"backend=\['cpp'\]: must be auto, cuda"),
        ({"rho_min_decay": 1}, "rho_min_decay=1 in group 0: must be"),
        ({"update_from": None}, "update_from=None: must be"),
    ],
)
def test_switches_and_choices(options, message):
    with pytest.raises(ValueError, match=message):
        BSAM([parameter()], lr=0.1, **options)


def test_switches_and_choices_written_later(backend):
    p = parameter(3)
    opt = BSAM([p], lr=0.1, backend=backend)
    give(opt)
    for bad in ("no", None, 2):
        opt.active = bad
        for call in (opt.ascend, opt.step, lambda: opt.step(lambda: None)):
            with pytest.raises(ValueError, match=rf"^active={bad!r}: must be True or False"):
                call()
        assert p.grad is not None  # not even that
    opt.active = np.True_
    opt.param_groups[0]["adaptive"] = "no"
    with pytest.raises(ValueError, match=r"^adaptive='no' in group 0"):
        opt.ascend()
    opt.param_groups[0]["adaptive"] = 0  # as argparse and YAML have it
    opt.ascend()
    at_max = p.detach().clone()
    give(opt)
    opt.param_groups[0]["rho_min_decay"] = "linear"
    with pytest.raises(ValueError, match=r"^rho_min_decay='linear' in group 0: must be \"lr\" or \"none\""):
        opt.descend()
    assert torch.equal(p, at_max)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda opt: schedules.LatePhase(opt, "10"), "total_steps='10': must be an integer ≥ 1"),
        (lambda opt: schedules.LatePhase(opt, 10, start="0.5"), "start='0.5'"),
        (lambda opt: schedules.LatePhase(opt, 10, early="no"), "early='no'"),
        (lambda opt: schedules.LatePhase(opt, 10, every=True), "every=True"),
        (lambda opt: schedules.LinearRadius(opt, 10, end="0.1"), "end='0.1': must be a finite number"),
        (lambda opt: schedules.ExponentialRadius(opt, [True]), "gamma=True"),
        (lambda opt: schedules.ConstantRadius(opt, radius=["rho"]), r"radius=\['rho'\]: must be"),
        (lambda opt: schedules.LambdaRadius(opt, 0.5), "factor=0.5: pass a function"),
        (lambda opt: losses.BiSAMTanhLoss(alpha="1")(torch.zeros(1, 2), torch.zeros(1).long()), "alpha='1'"),
        (lambda opt: losses.bisam_log_loss(torch.zeros(1, 2), torch.zeros(1).long(), mu=True), "mu=True"),
        (lambda opt: sharpness.measure(nn.Linear(1, 1), nn.functional.mse_loss, [], rho="1"), "rho='1'"),
    ],
)
def test_schedules_losses_and_measurements(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build(SAM([parameter()], lr=0.1))


# ---- names of options


@every_kind
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        *[("rh0", "rho"), ("Rho", "rho"), ("etta", "eta"), ("normeps", "norm_eps"), ("max_gradnorm", "max_grad_norm")],
        *[("masterweights", "master_weights"), ("weigth_decay", "weight_decay"), ("Lr", "lr"), ("backed", "backend")],
    ],
)
def test_a_misspelt_option(kind, base, slip, meant):
    """By our class: SGD.__init__() would be blamed for an option that it never had."""
    words = rf"{kind.__name__} has no option {slip}, nor has its base optimizer {base.__name__}: did you mean {meant}\?"
    for optimizer in (base, base([parameter()])):
        with pytest.raises(TypeError, match=words):
            kind([parameter()], optimizer, **{slip: 0.1})


def test_an_option_like_no_other():
    with pytest.raises(TypeError, match=r"SAM has no option warmup.*their options are rho, adaptive, .*, lr, momentum"):
        SAM([parameter()], warmup=3)


def test_options_of_subclasses():
    class Mine(BSAM):
        def __init__(self, params, *, mine=1, **options):
            super().__init__(params, **options)

    with pytest.raises(TypeError, match=r"Mine has no option rho_mim.*did you mean rho_min\?"):
        Mine([parameter()], rho_mim=0.1)
    with pytest.raises(TypeError, match=r"did you mean mine\?"):
        Mine([parameter()], mime=0.1)


def test_a_base_that_takes_any_option():
    """It knows best, but for what is a slip of ours."""

    class Any(torch.optim.SGD):
        def __init__(self, params, **options):
            self.beta = options.pop("beta", None)
            super().__init__(params, **options)

    assert SAM([parameter()], Any, lr=0.1, beta=0.5).base_optimizer.beta == 0.5
    with pytest.raises(TypeError, match=r"SAM has no option rh0.*did you mean rho\?"):
        SAM([parameter()], Any, lr=0.1, rh0=0.5)


@pytest.mark.parametrize("slip", ["rh0", "rhoo", "RHO", "etaa", "adaptve", "rho_mn", "rho_min_ed", "rho_min_dcay"])
def test_a_slip_in_a_group(slip):
    """torch lets any key pass: the group would train with the default radius."""
    with pytest.raises(TypeError, match=rf"group 1 has a key {slip}, which nothing reads: did you mean "):
        BSAM([{"params": [parameter()]}, {"params": [parameter()], slip: 0.1}], lr=0.1)
    opt = BSAM([parameter()], lr=0.1)
    with pytest.raises(TypeError, match=rf"group 1 has a key {slip}"):
        opt.add_param_group({"params": [parameter()], slip: 0.1})
    assert len(opt.param_groups) == 1


def test_keys_of_the_users_own():
    """As in torch; also what another algorithm left there."""
    keys = {"name": "head", "lr_scale": 0.1, "beta": 1, "theta": 2, "adapter": True, "rho_max": 1.0, 0: None}
    groups = BSAM([{"params": [parameter()], **keys}], lr=0.1).param_groups
    opt = SAM(groups, lr=0.1)
    opt.add_param_group({"params": [parameter()], **keys})
    assert all(group[key] == value for group in opt.param_groups for key, value in keys.items())


# ---- what is optimized


@every_kind
@pytest.mark.parametrize("net", [nn.Linear(2, 1), nn.Sequential(nn.Linear(2, 1)), nn.ModuleList([nn.Linear(2, 1)])])
def test_a_module_as_parameters(kind, net):
    name = type(net).__name__
    for params in (net, [net]):
        with pytest.raises(TypeError, match=rf"^params is a {name}: pass its parameters, model\.parameters\(\)"):
            kind(params, lr=0.1)
        with pytest.raises(TypeError, match=rf"^params of group 1 is a {name}: pass its parameters"):
            kind([{"params": [parameter()]}, {"params": params}], lr=0.1)
    opt = kind([parameter()], lr=0.1)
    with pytest.raises(TypeError, match=rf"params of group 1 is a {name}"):
        opt.add_param_group({"params": net})
    kind(nn.ParameterList([parameter()]), lr=0.1)  # which is a module, too, and torch's own take it


@pytest.mark.parametrize(
    "params", [None, 3, "all", {"params": [parameter()]}, dict(nn.Linear(2, 1).named_parameters())]
)
def test_no_parameters(params):
    with pytest.raises(TypeError, match=rf"^params is a {type(params).__name__}: pass a list"):
        SAM(params, lr=0.1)


def test_a_group_without_parameters():
    for group in ({"rho": 0.1}, parameter()):
        with pytest.raises(ValueError, match=r"group 1 has no \"params\""):
            SAM([{"params": [parameter()]}, group], lr=0.1)
    with pytest.raises(ValueError, match=r"group 1 has no \"params\""):
        SAM([parameter()], lr=0.1).add_param_group({"rho": 0.1})


@every_kind
def test_a_generator_that_is_used_up(kind):
    """The base took them all: params is no empty list, nor is the group one without parameters."""
    net = nn.Linear(2, 1)
    for source in (net.parameters, net.named_parameters):
        params = source()
        base = torch.optim.SGD(params, lr=0.1)
        for optimizer in (base, torch.optim.SGD):
            with pytest.raises(ValueError, match=r"^params is a generator that is used up.*model\.parameters\(\) anew"):
                kind(params, optimizer)
        groups = [{"params": params}, {"params": [parameter()]}]
        with pytest.raises(ValueError, match=r"^params of group 0 is a generator that is used up"):
            kind(groups, lr=0.1)
    opt = kind([parameter()], lr=0.1)
    with pytest.raises(ValueError, match="params of group 1 is a generator that is used up"):
        opt.add_param_group({"params": params})
    assert len(opt.param_groups) == 1
    with pytest.raises(ValueError, match=r"params is empty.*\(a filter goes once: has it been used up\?\)"):
        kind(filter(None, ()), lr=0.1)


def test_a_generator_that_finds_nothing():
    """A group for biases, of a network that has none: legal in torch."""
    net = nn.Linear(2, 1, bias=False)
    biases = (p for name, p in net.named_parameters() if "bias" in name)
    opt = SAM([{"params": net.weight}, {"params": biases, "weight_decay": 0.0}], lr=0.1)
    assert [len(group["params"]) for group in opt.param_groups] == [1, 0]


@every_kind
def test_a_model_of_other_parameters(kind):
    """Its running statistics would be frozen, and those of the one that is trained would move in every pass."""
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    other = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for model in (other, nn.Flatten()):
        with pytest.raises(
            ValueError, match=rf"^model, a {type(model).__name__}, has none of the parameters in params"
        ):
            kind(net.parameters(), lr=0.1, model=model)
    lazy = nn.LazyLinear(2)
    for params, model in [
        (net.parameters(), nn.Sequential(other, net)),
        (net[0].parameters(), net),  # a part of it is trained
        ([*net.parameters(), parameter()], net),  # and something besides
        ([{"params": [parameter()]}, {"params": net.parameters()}], net[1]),
        (net.parameters(), torch.compile(net)),
        (net.parameters(), nn.DataParallel(net)),
        (lazy.parameters(), lazy),
    ]:
        kind(params, lr=0.1, model=model)


@every_kind
def test_parameters_on_meta(backend, kind):
    """Legal until they are used: swap_tensors and to_empty can give them memory meanwhile."""
    with torch.device("meta"):
        net = nn.Linear(3, 2)
    opt = kind(net.parameters(), lr=0.1, momentum=0.9, model=net, backend=backend)
    assert opt.backends == {}
    words = r"^parameter 0 of group 0 \(shape \(2, 3\), torch.float32\) is on meta, without values: build the optimizer"
    net.to_empty(
        device=torch.get_default_device()
    )  # makes new ones: torch's optimizers go on without a word, and train nothing

    def closure():
        loss = net(torch.ones(1, 3)).sum()
        loss.backward()
        return loss

    for call in (opt.ascend, lambda: opt.step(closure)):
        with pytest.raises(RuntimeError, match=words):
            call()
    opt.param_groups[0]["params"] = list(net.parameters())
    for p in net.parameters():
        nn.init.ones_(p)
    opt.step(closure)
    assert (net.weight != 1).all()


def test_parameters_that_leave_meta(monkeypatch):
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    with torch.device("meta"):
        net = nn.Linear(3, 2)
    opt = SAM(net.parameters(), lr=0.1, model=net)
    net.to_empty(device="cpu")
    for p in net.parameters():
        nn.init.ones_(p)
    give(opt)
    opt.ascend()
    give(opt)
    opt.step()
    assert torch.allclose(net.weight, torch.tensor(0.9))


# ---- calls


@every_kind
@pytest.mark.parametrize("loss", [torch.tensor(1.0), 0.5, nn.Parameter(torch.ones(2)), [print]], ids=repr)
def test_a_loss_as_closure(backend, kind, loss):
    p = parameter()
    opt = kind([p], lr=0.1, backend=backend)
    give(opt)
    words = rf"^step\(\) was given a {type(loss).__name__}: pass a function that does forward and backward"
    calls = [lambda: opt.step(loss)]
    if kind is not BSAM:
        calls += [lambda: opt.step(print, ascent_closure=loss), lambda: opt.step(loss, ascent_closure=print)]
    for call in calls:
        with pytest.raises(TypeError, match=words):
            call()
    assert torch.equal(p, torch.ones(2))
    assert p.grad is not None  # nothing was cleared
    opt.ascend()
    at_max = p.detach().clone()
    with pytest.raises(TypeError, match=words):
        opt.step(loss)
    assert torch.equal(p, at_max)
    opt.restore()


NUMBERED = ("first_step", "second_step", "third_step")


@every_kind
def test_calls_out_of_order_by_number(backend, kind):
    """Who calls second_step is not told of step or descend, and the other way round."""
    opt = kind([parameter()], lr=0.1, backend=backend)
    calls = NUMBERED[: len(opt._calls)]
    for reached, following in enumerate(calls):
        for wrong in calls:
            if wrong != following:
                with pytest.raises(RuntimeError) as told:
                    getattr(opt, wrong)()
                assert str(told.value).startswith(f"{kind.__name__}.{wrong}() out of order: ")
                assert f"next come backward() and {following}()" in str(told.value)
                assert not any(f" {name}()" in str(told.value) for name in ("ascend", "descend", "step"))
                assert not any(f".{name}()" in str(told.value) for name in ("ascend", "descend", "step"))
        if reached:
            with pytest.raises(RuntimeError, match=rf"step\(closure\) out of order.*next come.*{following}\(\)"):
                opt.step(lambda: None)
            with opt.unperturbed(), pytest.raises(RuntimeError, match=rf"^{following}\(\) within unperturbed"):
                getattr(opt, following)()
        give(opt)
        getattr(opt, following)()
    for own in opt._calls[1:]:  # the next step is whose calls it has
        with pytest.raises(RuntimeError, match=rf"{own}\(\) out of order.*next come backward\(\) and ascend\(\)"):
            getattr(opt, own)()
    give(opt)
    opt.first_step()
    opt.restore()
    with pytest.raises(RuntimeError, match=r"next come backward\(\) and ascend\(\)"):
        opt.step()
    with pytest.raises(RuntimeError, match=rf"\.{calls[-1]}\(\) out of order"):
        getattr(opt, calls[-1])()
    with pytest.raises(RuntimeError, match=r"\.step\(\) out of order.*next come backward\(\) and ascend\(\)"):
        opt.step()


def test_an_inactive_first_step():
    opt = BSAM([parameter()], lr=0.1)
    opt.active = False
    with pytest.raises(RuntimeError, match=r"^first_step\(\) while active is False: third_step\(\) is then"):
        opt.first_step()
    with pytest.raises(RuntimeError, match=r"^ascend\(\) while active is False: step\(\) is then"):
        opt.ascend()
    give(opt)
    opt.third_step()


# ---- the warning of a missing backend


def test_the_fallback_points_at_the_users_line(monkeypatch):
    """Where the optimizer is built, also by a class of one's own; and nowhere else."""
    monkeypatch.setattr(native_flat, "load", lambda: (None, "there is no extension"))
    p = parameter()

    class Mine(BSAM):
        def __init__(self, params):
            super().__init__(params, lr=0.1)

    def closure():
        p.grad = torch.ones_like(p)
        return 1.0

    def told(call, line):
        with pytest.warns(
            UserWarning, match=r"^bsam_fused runs on its slower torch backend; cpp: there is no"
        ) as caught:
            opt = call()
        assert {(warning.filename, warning.lineno) for warning in caught} == {(__file__, line)}
        return opt

    def here():
        return inspect.currentframe().f_back.f_lineno

    opt = told(lambda: SAM([p], lr=0.1), here())
    told(lambda: Mine([p]), Mine.__init__.__code__.co_firstlineno + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is told once
        assert opt.backends
        opt.step(closure)
