"""What cannot work says so: the parameter by group and index, shape and dtype, the value, and what to do."""

import copy
import pickle

import pytest
import torch
from torch import nn

import bsam_fused
from bsam_fused.ops import dispatch, triton_flat

KINDS = [bsam_fused.SAM, bsam_fused.ASAM, bsam_fused.BSAM]
every_kind = pytest.mark.parametrize("kind", KINDS)


def parameter(*shape, dtype=torch.float32):
    return nn.Parameter(torch.ones(*shape, dtype=dtype))


def at_second(bad):
    """Two groups, the bad parameter the second one of the second."""
    return [{"params": [parameter(2)]}, {"params": [parameter(3), bad]}]


def backward(opt, value=1.0):
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, value)


def test_sparse_gradient(backend):
    embedding = nn.Embedding(5, 4, sparse=True)
    linear = nn.Linear(4, 1)
    opt = bsam_fused.SAM([*linear.parameters(), embedding.weight], lr=0.1, backend=backend)
    before = [p.detach().clone() for p in (linear.weight, embedding.weight)]
    linear(embedding(torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(RuntimeError, match=r"parameter 2 of group 0 \(shape \(5, 4\).*sparse.*sparse=False"):
        opt.ascend()
    assert all(torch.equal(p, w) for p, w in zip((linear.weight, embedding.weight), before))
    embedding.weight.grad = embedding.weight.grad.to_dense()
    opt.ascend()  # still at rest: mended, the phase runs
    opt.restore()


@every_kind
@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.complex64, "complex.*view_as_real"),
        (torch.int64, "not a floating point tensor.*buffer"),
        (torch.float8_e4m3fn, "dtype must be one of"),
    ],
)
def test_unsupported_dtypes(backend, kind, dtype, words):
    """Of what takes part: a gradient makes even an integer do so."""
    bad = nn.Parameter(torch.zeros(2, 3, dtype=dtype), requires_grad=False)
    bad.grad = torch.zeros_like(bad)
    with pytest.raises(TypeError, match=rf"parameter 1 of group 1 \(shape \(2, 3\), {dtype}\).*{words}"):
        kind(at_second(bad), lr=0.1, backend=backend)


@every_kind
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "large", None])
@pytest.mark.parametrize("option", ["rho", "norm_eps", "eta"])
def test_radii_and_epsilons_are_not_negative(kind, option, value):
    with pytest.raises(ValueError, match=rf"{option}={value!r}.*finite number ≥ 0"):
        kind([parameter(2)], lr=0.1, **{option: value})


@pytest.mark.parametrize("option", ["rho_min", "rho_min_end", "rho_min_lr_end"])
def test_bsam_radii(option):
    with pytest.raises(ValueError, match=rf"{option}=-1.0 in group 0"):
        bsam_fused.BSAM([parameter(2)], lr=0.1, **{option: -1.0})


def test_bsam_choices():
    with pytest.raises(ValueError, match=r"rho_min_decay='linear' in group 0.*\"lr\" or \"none\""):
        bsam_fused.BSAM([parameter(2)], lr=0.1, rho_min_decay="linear")
    with pytest.raises(ValueError, match=r"update_from='w_max'.*\"w\""):
        bsam_fused.BSAM([parameter(2)], lr=0.1, update_from="w_max")


def test_a_group_option_that_goes_bad_later(backend):
    """A schedule that overshoots: said at the phase that would use it, before anything is written."""
    p = parameter(4)
    opt = bsam_fused.BSAM([{"params": [parameter(2)]}, {"params": [p]}], lr=0.1, backend=backend)
    backward(opt)
    opt.param_groups[1]["rho"] = -0.2
    with pytest.raises(ValueError, match=r"rho=-0.2 in group 1"):
        opt.ascend()
    assert torch.equal(p, torch.ones(4))
    opt.param_groups[1]["rho"] = 0.2
    opt.ascend()
    backward(opt)
    opt.param_groups[1]["rho_min"] = float("nan")
    with pytest.raises(ValueError, match=r"rho_min=nan in group 1"):
        opt.descend()
    opt.restore()
    assert torch.equal(p, torch.ones(4))


@every_kind
def test_base_instances(kind):
    ours, theirs = [parameter(2)], [parameter(2)]
    with pytest.raises(ValueError, match="instance over other parameters than params"):
        kind(ours, torch.optim.SGD(theirs, lr=0.1))
    with pytest.raises(TypeError, match=r"instance.*\(momentum\) cannot be given here"):
        kind(ours, torch.optim.SGD(ours, lr=0.1), momentum=0.9)
    with pytest.raises(ValueError, match="cut otherwise"):
        kind([{"params": ours, "rho": 1.0}], torch.optim.SGD([{"params": ours}, {"params": []}], lr=0.1))
    with pytest.raises(TypeError, match=r"pass a torch\.optim\.Optimizer class or instance"):
        kind(ours, "SGD", lr=0.1)


@every_kind
def test_base_with_a_closure_of_its_own(kind):
    params = [parameter(2)]
    for base in (torch.optim.LBFGS, torch.optim.LBFGS(params)):
        with pytest.raises(TypeError, match="LBFGS needs a closure of its own"):
            kind(params, base)


@every_kind
def test_empty_parameter_list(kind):
    with pytest.raises(ValueError, match=r"params is empty: pass model.parameters\(\)"):
        kind([], lr=0.1)
    with pytest.raises(TypeError, match="params is a Tensor"):
        kind(parameter(2), lr=0.1)


@every_kind
def test_the_same_parameter_twice(kind, backend):
    p = parameter(2)
    with (
        pytest.warns(UserWarning, match="duplicate"),
        pytest.raises(ValueError, match=r"parameter 1 of group 0.*appears twice"),
    ):
        kind([p, p], lr=0.1)
    shared = nn.Parameter(p.data)
    opt = kind([p, shared], lr=0.1, backend=backend)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0.*shares memory with parameter 0"):
        opt.ascend()
    expanded = nn.Parameter(torch.ones(1).expand(4))
    with pytest.raises(ValueError, match="expanded"):
        kind([expanded], lr=0.1, backend=backend).ascend()


def calls_in(opt):
    return ["ascend", *(["descend"] if isinstance(opt, bsam_fused.BSAM) else []), "step"]


@every_kind
def test_phases_out_of_order(backend, kind):
    opt = kind([parameter(2)], lr=0.1, backend=backend)
    calls = calls_in(opt)
    for reached, following in enumerate(calls):
        for wrong in calls:
            if wrong != following:
                with pytest.raises(
                    RuntimeError,
                    match=rf"{wrong}\(\) out of order.*next come backward\(\) and {following}\(\)",
                ):
                    getattr(opt, wrong)()
        if reached:
            with pytest.raises(RuntimeError, match="out of order"):
                opt.step(lambda: None)
            with pytest.raises(RuntimeError, match=r"or restore\(\) to give up"):
                opt.ascend()
        backward(opt)
        getattr(opt, following)()


@every_kind
def test_what_is_refused_while_perturbed(backend, kind):
    opt = kind([parameter(2)], lr=0.1, backend=backend)
    clean = opt.state_dict()
    backward(opt)
    opt.ascend()
    refused = [
        opt.state_dict,
        lambda: opt.load_state_dict(clean),
        lambda: opt.add_param_group({"params": [parameter(1)]}),
        lambda: copy.deepcopy(opt),
        lambda: pickle.dumps(opt),
    ]
    for call in refused:
        with pytest.raises(RuntimeError, match=r"perturbed.*restore\(\)"):
            call()
    with opt.unperturbed():
        assert opt.state_dict()["state"] == {}
        with pytest.raises(RuntimeError, match=r"within unperturbed\(\)"):
            opt.step()
        for call in refused[1:]:  # these would change or copy the middle of a step
            with pytest.raises(RuntimeError, match=r"perturbed.*restore\(\)"):
                call()
    opt.restore()
    opt.state_dict()


@every_kind
def test_cast_between_steps(backend, kind):
    """The state goes along, as it does with load_state_dict; torch's own optimizers would mix dtypes."""
    p = parameter(3)
    opt = kind([parameter(2), p], lr=0.1, momentum=0.9, backend=backend)
    for call in calls_in(opt):
        backward(opt)
        getattr(opt, call)()
    momentum = opt.state[p]["momentum_buffer"].clone()
    p.data = p.data.double()
    for call in calls_in(opt)[:-1]:
        backward(opt)
        getattr(opt, call)()
    opt.restore()
    assert p.dtype == torch.float64
    for call in calls_in(opt):
        backward(opt)
        getattr(opt, call)()
    after = opt.state[p]["momentum_buffer"]
    assert after.dtype == torch.float64
    torch.testing.assert_close(after, 1.9 * momentum.double())


@every_kind
def test_cast_within_a_step(backend, kind):
    p = parameter(3)
    opt = kind([parameter(2), p], lr=0.1, backend=backend)
    backward(opt)
    opt.ascend()
    p.data = p.data.double()
    p.grad = None
    expected = r"parameter 1 of group 0 \(shape \(3,\), torch.float64\).*was on \S+ as torch.float32.*restore\(\) first"
    with pytest.raises(RuntimeError, match=expected):
        getattr(opt, calls_in(opt)[1])()
    opt.restore()
    assert p.tolist() == [1.0] * 3


def test_reshaped_within_a_step(backend):
    p = parameter(6)
    opt = bsam_fused.SAM([p], lr=0.1, backend=backend)
    backward(opt)
    opt.ascend()
    p.grad = None
    p.data = p.data.view(2, 3)
    with pytest.raises(RuntimeError, match="another shape or other strides"):
        opt.step()


def test_add_param_group_that_is_refused_adds_nothing(backend):
    opt = bsam_fused.BSAM([parameter(2)], lr=0.1, backend=backend)
    for group, error in [
        ({"params": [parameter(1)], "rho": -1.0}, ValueError),
        ({"params": [nn.Parameter(torch.zeros(1, dtype=torch.complex64))]}, TypeError),
        ({"params": opt.param_groups[0]["params"]}, ValueError),
    ]:
        with pytest.raises(error):
            opt.add_param_group(group)
    assert len(opt.param_groups) == len(opt.base_optimizer.param_groups) == 1


def test_backends_by_name(monkeypatch):
    with pytest.raises(ValueError, match=r"backend='fast': must be auto"):
        bsam_fused.SAM([parameter(2)], lr=0.1, backend="fast")
    monkeypatch.setattr(triton_flat, "interpreted", lambda: False)
    monkeypatch.setattr(triton_flat, "why_not", triton_flat.why_not.__wrapped__)
    for name in ("cuda", "triton"):
        with pytest.raises(RuntimeError, match=rf"backend='{name}' for tensors on cpu"):
            bsam_fused.SAM([parameter(2)], lr=0.1, backend=name)
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    assert "asked for by BSAM_FUSED_BACKEND=torch" in bsam_fused.SAM([parameter(2)], lr=0.1).backends["cpu"]
    assert "cpp" in bsam_fused.SAM([parameter(2)], lr=0.1, backend="cpp").backends["cpu"]
    monkeypatch.setenv(dispatch.VARIABLE, "slow")
    with pytest.raises(ValueError, match=r"BSAM_FUSED_BACKEND=slow: must be auto"):
        bsam_fused.SAM([parameter(2)], lr=0.1)


def test_closure_arguments():
    sam, bsam = bsam_fused.SAM([parameter(2)], lr=0.1), bsam_fused.BSAM([parameter(2)], lr=0.1)
    with pytest.raises(TypeError, match="BSAM takes no ascent_closure"):
        bsam.step(lambda: None, ascent_closure=lambda: None)
    with pytest.raises(TypeError, match="ascent_closure without closure"):
        sam.step(ascent_closure=lambda: None)
    with pytest.raises(TypeError, match=r"model is a function: pass the nn\.Module"):
        bsam_fused.SAM([parameter(2)], lr=0.1, model=lambda: None)


def test_lazy_parameters_need_a_forward_pass():
    layer = nn.LazyLinear(3)
    opt = bsam_fused.SAM(layer.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 \(uninitialized.*forward pass"):
        opt.ascend()
    layer(torch.ones(2, 4)).sum().backward()
    opt.ascend()
