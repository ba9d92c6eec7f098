"""What happens to parameters, state and gradients between the calls: found by attack, kept from coming back."""

import pytest
import torch
from samples import parameters
from torch import nn

import bsam_fused

KINDS = [bsam_fused.SAM, bsam_fused.ASAM, bsam_fused.BSAM]
every_kind = pytest.mark.parametrize("kind", KINDS)


def fill(params, value=1.0):
    for p in params:
        p.grad = torch.full_like(p, value)


def walk(opt, params, value=1.0):
    for call in opt._calls:
        fill(params, value)
        getattr(opt, call)()


@every_kind
def test_a_parameter_thawed_within_a_step(backend, kind):
    """As in adversarial training: it takes part from there on, and nobody else's restore is lost."""
    a, b = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5), requires_grad=False)
    opt = kind([a, b], lr=0.1, rho=1.0, backend=backend)
    fill([a])
    opt.ascend()
    b.requires_grad_(True)
    assert opt.norms[0] > 0
    opt.restore()
    assert torch.equal(a, torch.ones(5))
    b.requires_grad_(False)
    fill([a])
    opt.ascend()
    b.requires_grad_(True)
    for call in opt._calls[1:]:
        fill([a, b])
        getattr(opt, call)()
    assert opt._phase.value == "at rest"
    # a: SAM's d = 1; BSAM's 1 + 1 − c. b, without g: SAM's 1; BSAM's 1 − c; c = 1, both norms being alike.
    bilateral = kind is bsam_fused.BSAM
    torch.testing.assert_close(a.detach(), torch.full((5,), 0.9))
    torch.testing.assert_close(b.detach(), torch.full((5,), 1.0 if bilateral else 0.9))


@every_kind
def test_lazily_negated_and_zero_gradients(backend, kind):
    """Their memory does not say what they are."""
    results = []
    for negated in (torch._neg_view(torch.ones(3000)), -torch.ones(3000)):
        p = nn.Parameter(torch.zeros(3000))
        opt = kind([p], lr=0.1, rho=0.0, backend=backend)
        for call in opt._calls:
            p.grad = negated
            getattr(opt, call)()
        results.append(p.detach())
    assert torch.equal(*results)
    p = nn.Parameter(torch.zeros(50_000))
    opt = kind([p], lr=0.1, backend=backend)
    p.grad = torch._efficientzerotensor((50_000,), device=p.device)
    opt.ascend()
    assert opt.norms[0] == 0


@pytest.mark.parametrize("whose", ["gradient", "weights"])
@pytest.mark.parametrize("strides", [(5, 1), (1, 4)])
@pytest.mark.parametrize(("offset", "left"), [(0, 0), (3, 0), (0, 40), (3, 88)])
def test_memory_that_was_freed(backend, offset, left, strides, whose):
    """Of a gradient that is read in place, and of one laid out otherwise, which is copied; also part of it.

    What was freed has an address, its offset's, where that is not 0; 88 bytes lack the last element alone, at 3.
    """
    there = torch.ones(30).as_strided((4, 5), strides, offset)
    p = nn.Parameter(there if whose == "weights" else torch.ones(4, 5))
    opt = bsam_fused.SAM([p], lr=0.1, backend=backend)
    p.grad = torch.ones(4, 5) if whose == "weights" else there
    there.untyped_storage().resize_(left)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*was freed"):
        opt.ascend()


@pytest.mark.parametrize("left", [0, 40])
def test_weights_that_were_freed_after_their_last_gradient(backend, left):
    """They have none in this pass, but w is put back there."""
    p, q = parameters("many")[:2]
    opt = bsam_fused.SAM([p, q], lr=0.1, backend=backend)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    opt.ascend()
    q.grad = torch.ones_like(q)
    p.untyped_storage().resize_(left)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*was freed"):
        opt.step()


def test_weights_without_a_gradient_that_were_freed_under_a_base_of_its_own_rule(backend):
    p, q = parameters("many")[:2]
    opt = bsam_fused.SAM([p, q], torch.optim.RMSprop, lr=0.1, backend=backend)
    p.untyped_storage().resize_(0)
    q.grad = torch.ones_like(q)
    opt.ascend()
    q.grad = torch.ones_like(q)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0.*was freed"):
        opt.step()


class Wrapper(torch.Tensor):
    """A tensor that holds another one and has no memory: its storage has a size, but no address."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*(arg.held if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))


def test_a_gradient_that_only_wraps_one(backend):
    p = nn.Parameter(torch.ones(2000))
    opt = bsam_fused.SAM([p], lr=0.1, backend=backend)
    p.grad = Wrapper(torch.ones(2000))
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0"):
        opt.ascend()
    assert (p == 1).all()


@every_kind
def test_groups_edited_by_hand(backend, kind):
    params = parameters("many")[:4]
    opt = kind([{"params": [p]} for p in params[:3]], lr=0.1, momentum=0.9, backend=backend)
    walk(opt, params)
    opt.param_groups[0]["params"].append(params[3])
    before = params[3].detach().clone()
    walk(opt, params)
    assert not torch.equal(params[3], before)
    opt.param_groups.pop()
    dropped = params[2].detach().clone()
    walk(opt, params)
    assert torch.equal(params[2], dropped)


def test_float16_sum_of_gradients_that_overflows_skips_the_step(backend):
    p = nn.Parameter(torch.ones(2000, dtype=torch.float16))
    opt = bsam_fused.BSAM([p], lr=1e-6, backend=backend)
    walk(opt, [p], 40_000.0)
    assert torch.equal(p, torch.ones_like(p))
    assert opt.skipped_steps == 1


def test_moved_while_unperturbed(backend):
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    opt = bsam_fused.SAM([p], lr=0.1, rho=1.0, backend=backend)
    fill([p])
    opt.ascend()
    with opt.unperturbed():
        p.data = p.data.double()
    assert not torch.equal(p.float(), torch.tensor([1.0, -2.0]))
    opt.restore()
    assert torch.equal(p, torch.tensor([1.0, -2.0], dtype=torch.float64))


@every_kind
def test_an_interrupt_while_showing_w(backend, kind, monkeypatch):
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    opt = kind([p], lr=0.1, rho=1.0, backend=backend)
    fill([p])
    opt.ascend()
    show = opt._show_w

    def interrupted(at_w):
        show(at_w)
        if at_w:
            raise KeyboardInterrupt

    monkeypatch.setattr(opt, "_show_w", interrupted)
    with pytest.raises(KeyboardInterrupt), opt.unperturbed():
        pass
    opt.restore()
    assert torch.equal(p, torch.tensor([1.0, -2.0]))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_state_cleared_by_hand_begins_anew(backend, base):
    results = []
    for clear in (True, False):
        p = nn.Parameter(torch.ones(3))
        opt = bsam_fused.SAM([p], base, lr=0.1, backend=backend)
        if clear:
            walk(opt, [p], 5.0)
            opt.state.clear()
            p.data.fill_(1.0)
        walk(opt, [p])
        results.append(p.detach().clone())
        assert opt.state_dict()["state"] or base is torch.optim.SGD  # which has none without momentum
    assert torch.equal(*results)


@every_kind
def test_bases_without_a_learning_rate(backend, kind):
    class Signs(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"scale": 0.5})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad.sign(), alpha=group["scale"])

    p = nn.Parameter(torch.ones(3))
    opt = kind([p], Signs, backend=backend)
    with pytest.raises(RuntimeError, match="out of order"):
        opt.step()
    walk(opt, [p])
    assert p.tolist() == [0.5] * 3


def test_a_base_instance_wrapped_again():
    p = nn.Parameter(torch.ones(3))
    base = torch.optim.SGD([p], lr=0.1)
    with pytest.raises(ValueError, match=r"rho=-1\.0"):
        bsam_fused.SAM([p], base, rho=-1.0)
    assert bsam_fused.SAM([p], base, rho=0.1).param_groups[0]["rho"] == 0.1
    assert bsam_fused.BSAM([p], base, rho=0.5).param_groups[0]["rho_min"] == 0.5


@pytest.mark.filterwarnings("error")
def test_a_scheduler_on_the_base_instance(backend):
    p = nn.Parameter(torch.ones(3))
    base = torch.optim.SGD([p], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(base, 1)
    opt = bsam_fused.SAM([p], base, backend=backend)
    walk(opt, [p])
    schedule.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0.01)


def test_columns_of_one_matrix(backend):
    """Interleaved, but no element is shared."""
    matrix = torch.ones(6, 8)
    params = [nn.Parameter(matrix[:, :4]), nn.Parameter(matrix[:, 4:])]
    opt = bsam_fused.BSAM(params, lr=0.1, backend=backend)
    walk(opt, params)
    torch.testing.assert_close(matrix, torch.full((6, 8), 0.9))


def test_no_norm_and_no_epsilon(backend):
    p = nn.Parameter(torch.ones(3))
    opt = bsam_fused.BSAM([p], lr=0.1, norm_eps=0.0, backend=backend)
    fill([p], 0.0)
    opt.ascend()
    assert torch.equal(p, torch.ones(3))


def test_what_cannot_be_a_parameter_or_a_base():
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="no parameters in them"):
        bsam_fused.SAM([{"params": []}], lr=0.1)
    with pytest.raises(TypeError, match=r"parameter 0 of group 0.*sparse"):
        bsam_fused.SAM([nn.Parameter(torch.eye(3).to_sparse())], lr=0.1)
    with pytest.raises(TypeError, match="sharpness-aware itself"):
        bsam_fused.BSAM([p], bsam_fused.SAM, lr=0.1)


def test_state_of_another_shape_is_named(backend):
    p = nn.Parameter(torch.ones(6))
    opt = bsam_fused.SAM([p], lr=0.1, momentum=0.9, backend=backend)
    walk(opt, [p])
    p.data = torch.ones(2, 2)
    p.grad = torch.ones(2, 2)
    opt.ascend()
    p.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0.*momentum_buffer of shape \(6,\)"):
        opt.step()
    opt.restore()
    assert torch.equal(p, torch.ones(2, 2))
