"""Gradients in the memory of weights and state, and weights in one another's, of one FlatParams and of several."""

import pytest
import torch
from torch import nn

import bsam_fused
from bsam_fused.ops import dispatch
from bsam_fused.ops.contract import ASCENT, GIVEN_LAST, MAX, Mixing, Radius, Rule, RuleNumber

SAM, BSAM = bsam_fused.SAM, bsam_fused.BSAM


def parameter(value=1.0, n=2):
    return nn.Parameter(torch.full((n,), value))


def whole_step(opt):
    for call in opt._calls:
        backward(opt)
        getattr(opt, call)()


def backward(opt):
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)


IN_MEMORY_OF_P = {"weights": lambda opt, p: p.detach(), "state": lambda opt, p: opt.state[p]["momentum_buffer"]}
OF_ANOTHER_KIND = {
    "exempt": lambda: {"params": [parameter(n=6)], "perturb": False},
    "of another dtype": lambda: {"params": [nn.Parameter(torch.ones(3, dtype=torch.float64))]},
}


@pytest.mark.parametrize("kind", [SAM, BSAM])
@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("lies_in", IN_MEMORY_OF_P)
@pytest.mark.parametrize("of", OF_ANOTHER_KIND)
def test_a_gradient_in_the_memory_of_parameters_of_another_kind(backend, of, lies_in, active, kind):
    """Each FlatParams knew its own memory alone; the second's gradient, in the first one's, had moved before its turn.

    Right is what a copy of the gradient, in memory of its own, leads to.
    """

    def trained(own):
        group = OF_ANOTHER_KIND[of]()
        p, (q,) = parameter(n=6), group["params"]
        opt = kind([{"params": [p]}, group], lr=0.1, momentum=0.9, backend=backend)
        whole_step(opt)
        opt.active = active
        for call in opt._calls if active else ["step"]:
            backward(opt)
            grad = IN_MEMORY_OF_P[lies_in](opt, p).view(q.dtype)
            q.grad = grad.clone() if own else grad
            getattr(opt, call)()
        assert len(list(opt._flats)) == 2
        return p.detach(), q.detach()

    for there, own in zip(trained(own=False), trained(own=True), strict=True):
        assert torch.equal(there, own)


@pytest.mark.parametrize("group", [{}, {"perturb": False}])
def test_a_gradient_that_is_a_parameter(backend, group):
    """The storage has no other holder where the two are one tensor."""
    p, q = parameter(n=2000), parameter(n=2000)
    opt = SAM([{"params": [p]}, {"params": [q], **group}], lr=0.1, backend=backend)
    whole_step(opt)
    opt.active = False
    p.data, w = torch.full_like(p, 3.0), q.detach().clone()  # a storage that Python has not seen
    p.grad, q.grad = torch.ones_like(p), p
    opt.step()
    torch.testing.assert_close(q.detach(), w - 0.1 * 3.0)


def test_a_gradient_that_is_a_step_count(backend):
    """It is state, too, though in no flat buffer, and was counted before the gradient was read."""

    def trained(own):
        p, q = parameter(), nn.Parameter(torch.tensor(1.0))
        opt = SAM([p, q], torch.optim.Adam, lr=0.1, backend=backend)
        whole_step(opt)
        opt.active = False
        backward(opt)
        count = opt.state[p]["step"]
        q.grad = count.clone() if own else count
        opt.step()
        return q.detach()

    assert torch.equal(trained(own=False), trained(own=True))


def test_a_gradient_that_another_kind_has_merged(backend):
    """It lies where the next direction is put together, of all of one FlatParams before any of the next."""
    p, q = (parameter(n=2000, value=w) for w in (1.0, 2.0))
    build = dispatch.choose(backend, p.device).build
    flats = [build([param], [(0, i)], None, exempt) for i, (param, exempt) in enumerate([(p, False), (q, True)])]

    def merge(last):
        """A step of the first one, and up to there of the second."""
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        dispatch.read_gradients(flats)
        for flat in flats:
            flat.square_norm(ASCENT, [Radius(0.0)])
            flat.ascend(flat.sums, [Radius(0.0)], 1e-12, Mixing(Rule.GIVEN, [RuleNumber()]))
            flat.sums[GIVEN_LAST] = 1.0
        p.grad, q.grad = last
        dispatch.read_gradients(flats)
        flats[0].merge(flats[0].sums, 1.0)

    merge([torch.ones_like(p), torch.ones_like(q)])
    merged = p.grad
    for flat in flats:
        flat.restore()
    merge([torch.full_like(p, 3.0), merged])
    flats[1].square_norm(MAX, [Radius(0.0)])
    assert flats[1].sums[MAX].item() == pytest.approx(2000)


@pytest.mark.parametrize("first", ["torch", None])
def test_another_backend_within_a_step(backend, first):
    """A parameter that is thawed then goes on with that of its step: two cannot know each other's memory."""
    p, q = parameter(), parameter()
    q.requires_grad_(False)
    opt = SAM([p, q], lr=0.1, backend=first or backend)
    p.grad = torch.ones_like(p)
    opt.ascend()
    q.requires_grad_(True)
    opt.backend = backend if first else "torch"
    backward(opt)
    opt.step()
    whole_step(opt)
    for param in (p, q):
        torch.testing.assert_close(param.detach(), torch.full((2,), 0.8))


@pytest.mark.parametrize("q", [lambda p: p[2:], lambda p: p[2:].view(torch.bfloat16)], ids=["exempt", "other dtype"])
def test_parameters_of_two_kinds_share_memory(backend, q):
    """Only those of one kind were compared, and the others trained twice."""
    memory = torch.ones(4)
    p, q = nn.Parameter(memory), nn.Parameter(q(memory))
    opt = SAM([{"params": [p]}, {"params": [q], "perturb": False}], lr=0.1, backend=backend)
    with pytest.raises(ValueError, match=r"parameter 0 of group 1.*shares memory with parameter 0 of group 0"):
        whole_step(opt)
    assert torch.equal(memory, torch.ones(4))


@pytest.mark.parametrize("left", [0, 4])
def test_parameters_without_memory_share_none(backend, left):
    """Both have the address of their offset, or memory of their own that ends before they do."""
    p, q, r = nn.Parameter(torch.ones(5)[1:]), nn.Parameter(torch.ones(5)[1:]), parameter()
    opt = SAM([p, q, r], lr=0.1, backend=backend)
    for param in (p, q):
        param.untyped_storage().resize_(left)
    for call in opt._calls:
        r.grad = torch.ones_like(r)
        getattr(opt, call)()
    torch.testing.assert_close(r.detach(), torch.full((2,), 0.9))


def test_a_thawed_parameter_shares_memory(backend):
    """What takes part from a later pass on was not compared with what did from the first."""
    memory = torch.ones(4)
    p, q = nn.Parameter(memory), nn.Parameter(memory[2:], requires_grad=False)
    opt = SAM([p, q], lr=0.1, backend=backend)
    p.grad = torch.ones_like(p)
    opt.ascend()
    q.requires_grad_(True)
    backward(opt)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0.*shares memory with parameter 0 of group 0"):
        opt.step()
    opt.restore()
    assert torch.equal(memory, torch.ones(4))
