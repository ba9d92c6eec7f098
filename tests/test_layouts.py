"""Parameters whose layout, dtype or memory others change within a step: w comes back exactly, or an error says why."""

import pytest
import torch
from samples import interpreted
from torch import nn

import bsam_fused

pytestmark = pytest.mark.part(3)

KINDS = [bsam_fused.SAM, bsam_fused.BSAM]
every_kind = pytest.mark.parametrize("kind", KINDS)
BASES = {"SGD": torch.optim.SGD, "unfused": torch.optim.Adagrad}


def transposed(p):
    p.data = p.data.t().contiguous().t()


def cloned(p):
    p.data = p.data.clone()


def with_gaps(p):
    p.data = torch.zeros(20, 30, dtype=p.dtype)[::2, 3:23:2].copy_(p.data)


def doubled(p):
    p.data = p.data.double()


def halved(p):
    p.data = p.data.bfloat16()


def swapped(p):
    torch.utils.swap_tensors(p, nn.Parameter(p.detach().t().contiguous().t()))


MOVES = {f.__name__: f for f in (transposed, cloned, with_gaps, doubled, halved, swapped)}


def perturbed(kind, base, backend):
    params = [nn.Parameter(torch.randn(10, 10)), nn.Parameter(torch.randn(10, 10).t()), nn.Parameter(torch.randn(3))]
    w = [p.detach().clone() for p in params]
    radii = {"rho": 0.5} if kind is bsam_fused.SAM else {"rho": 0.5, "rho_min": 0.5}
    opt = kind(params, BASES[base], lr=0.1, backend=backend, **radii)
    for call in opt._calls[:-1]:
        for p in params:
            p.grad = torch.randn_like(p)
        getattr(opt, call)()
    assert not any(map(torch.equal, params, w))
    return opt, params, w


def are(params, w):
    return all(torch.equal(p, x.to(p.dtype)) for p, x in zip(params, w))


@every_kind
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("when", ["before the look", "within it", "after it"])
def test_restored_exactly_whatever_a_parameter_became(backend, kind, base, move, when):
    opt, params, w = perturbed(kind, base, backend)
    if when == "before the look":
        for p in params[:2]:
            MOVES[move](p)
    with opt.unperturbed():
        assert are(params, w)
        if when == "within it":
            for p in params[:2]:
                MOVES[move](p)
            assert are(params, w)
    assert not are(params, w)
    if when == "after it":
        for p in params[:2]:
            MOVES[move](p)
    opt.restore()
    assert are(params, w)
    opt.restore()
    assert are(params, w)


def cut_off(p):
    p.data = p.data[:1]


def flattened(p):
    p.data = p.data.reshape(-1)


def grown(p):
    p.data = torch.zeros(11, 10)


def emptied(p):
    p.data = torch.empty(0)


def resized(p):
    p.requires_grad_(False).resize_(3, 3).requires_grad_(True)


SHAPES = {f.__name__: f for f in (cut_off, flattened, grown, emptied, resized)}


@every_kind
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("ask", ["restore", "unperturbed"])
def test_another_shape_is_an_error_and_saved_is_kept(backend, kind, shape, which, ask):
    """Nothing is written, into this one or the others; with the old shape back, all is."""
    opt, params, w = perturbed(kind, "SGD", backend)
    before = [p.detach().clone() for p in params]
    data = params[which].data
    SHAPES[shape](params[which])
    changed = params[which].detach().clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"parameter {which} of group 0.*shape"):
            opt.restore() if ask == "restore" else opt.unperturbed().__enter__()
        assert torch.equal(params[which], changed)
        assert all(torch.equal(p, x) for i, (p, x) in enumerate(zip(params, before)) if i != which)
    params[which].data = data
    with opt.unperturbed():
        assert are(params, w)
    assert are(params, before)
    opt.restore()
    assert are(params, w)


@every_kind
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_changed_while_looking(backend, kind, shape):
    """Leaving raises; the others are not half perturbed, and w comes back once the shape is."""
    opt, params, w = perturbed(kind, "SGD", backend)
    look = opt.unperturbed()
    look.__enter__()
    data = params[0].data
    SHAPES[shape](params[0])
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*shape"):
        look.__exit__(None, None, None)
    params[0].data = data
    opt.restore()
    assert are(params, w)


def test_memory_freed_within_a_step(backend):
    """As sharding frees it: an error, and w once it is there again."""
    if interpreted(backend):
        pytest.skip("the interpreter would write to address 0")
    opt, params, w = perturbed(bsam_fused.SAM, "SGD", backend)
    storage = params[0].untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    if backend == "torch":
        storage.resize_(size)
    else:
        with pytest.raises(RuntimeError, match=r"parameter 0 of group 0"):
            opt.restore()
        storage.resize_(size)
    opt.restore()
    assert are(params, w)
