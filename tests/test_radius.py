"""What radius suits: rises against closed forms and torch.func, the suggestion their inverse; models are left alone."""

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from untouched import Counting, everything, same

from bsam_fused import sharpness
from bsam_fused.sharpness.radius import LADDER


class Quadratic(nn.Module):
    """L_B(w) = ½ wᵀ H_B w + b_Bᵀ w + 5 of two parameters, for batches (H_B, b_B)."""

    def __init__(self):
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (2, 3))

    def forward(self, hessian):
        w = torch.cat([self.u, self.v])
        return w, hessian @ w


def quadratic(output, b):
    w, hw = output
    return w @ hw / 2 + b @ w + 5


def convex_batches(count):
    roots = torch.randn(count, 5, 5, dtype=torch.float64)
    return [(root @ root.T, torch.randn(5, dtype=torch.float64)) for root in roots]


def of_a_quadratic(model, hessian, b):
    """L, ‖g‖ and ĝᵀHĝ in closed form."""
    w = torch.cat([model.u, model.v]).detach()
    g = hessian @ w + b
    unit = g / g.norm()
    return (w @ hessian @ w / 2 + b @ w + 5).item(), g.norm().item(), (unit @ hessian @ unit).item()


def network():
    """Everything that a measurement might disturb: modes, statistics, gradients, a buffer that every pass moves."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(), nn.Linear(4, 3), Counting())
    net = net.double().train()
    net[1](torch.randn(50, 4, dtype=torch.float64) * 2 + 1)
    net[2].eval()
    net[0].bias.requires_grad_(False)
    net[4].weight.grad = torch.ones_like(net[4].weight)
    return net


def batches():
    """Of different sizes, each of which makes a step."""
    x, y = torch.randn(30, 3, dtype=torch.float64), torch.randint(3, (30,))
    return list(zip(x.split([16, 4, 10]), y.split([16, 4, 10])))


# ---- rises


def test_rises_on_a_quadratic():
    """ρ‖g_B‖ + ½ρ² ĝ_BᵀHĝ_B: not the loss of the whole loader along its one gradient."""
    model, loader, radii = Quadratic(), convex_batches(3), [0.01, 0.3, 2.0]
    known = [of_a_quadratic(model, *batch) for batch in loader]
    loss, rises = sharpness.loss_rises(model, quadratic, loader, radii)
    assert loss == pytest.approx(sum(at_w for at_w, _, _ in known) / 3, rel=1e-12)
    expected = [sum(rho * norm + rho**2 * bend / 2 for _, norm, bend in known) / 3 for rho in radii]
    assert rises == pytest.approx(expected, rel=1e-9)


def test_rises_of_a_network_in_evaluation_mode():
    net, loader, rho = network(), batches(), 0.7
    evaluated = copy.deepcopy(net[:-1]).eval()  # without the count, which torch.func cannot bear
    w = {name: p.detach() for name, p in evaluated.named_parameters() if p.requires_grad}
    losses, rises = [], []
    for x, y in loader:

        def loss(at, x=x, y=y):
            return F.cross_entropy(torch.func.functional_call(evaluated, at, x), y)

        g = torch.func.grad(loss)(w)
        norm = math.sqrt(sum(part.square().sum().item() for part in g.values()))
        losses.append(loss(w).item())
        rises.append(loss({name: w[name] + rho * g[name] / norm for name in w}).item() - losses[-1])
    at_w, found = sharpness.loss_rises(net, F.cross_entropy, loader, [rho])
    assert at_w == pytest.approx(sum(losses) / 3, rel=1e-12)
    assert found == pytest.approx([sum(rises) / 3], rel=1e-9)


def test_all_passes_of_a_batch_draw_the_same():
    """Else the difference of two losses would be noise, here of 0.1 and more."""
    net = nn.Linear(3, 3).double()

    def noisy(output, target):
        return F.cross_entropy(output + torch.randn_like(output), target)

    _, rises = sharpness.loss_rises(net, noisy, batches(), [1e-6, 2e-6])
    assert rises[1] == pytest.approx(2 * rises[0], rel=1e-3)


def test_a_loss_that_overflows_far_out_has_risen_without_end():
    """−ln(w − 0.9) at w = 1 ends at ρ = 0.1."""
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(net.weight, 1.0)
    loader = [(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1))]
    found = sharpness.suggest_radius(
        net, lambda output, _: -(output - 0.9).log().mean(), loader, radii=(0.01, 0.05, 0.2), share=0.5
    )
    assert found.rises == pytest.approx([math.log(0.1 / 0.09), math.log(0.1 / 0.05), math.inf], rel=1e-9)
    assert (found.rho, found.end) == (0.05, None)


# ---- the rule


@pytest.mark.parametrize("share", [0.01, 0.1, 1.0])
def test_the_suggestion_is_the_inverse_of_the_rise(share):
    """The root of ½ρ² ĝᵀHĝ + ρ‖g‖ = share · L; a straight line of the rise itself would be further off."""
    model, loader = Quadratic(), convex_batches(1)
    loss, norm, bend = of_a_quadratic(model, *loader[0])
    expected = (math.sqrt(norm**2 + 2 * bend * share * loss) - norm) / bend
    found = sharpness.suggest_radius(model, quadratic, loader, share=share)
    assert found.rho == pytest.approx(expected, rel=0.01)
    assert (found.end, found.radii, found.share) == (None, LADDER, share)
    assert found.sought == pytest.approx(share * loss, rel=1e-12)


def test_between_radii_it_is_exact_for_powers():
    radii = (0.1, 0.2, 1.0)
    found = sharpness.radius_at(radii, [3 * rho**1.5 for rho in radii], loss=2.0, share=0.6)
    assert found.rho == pytest.approx(0.4 ** (2 / 3), rel=1e-12)


@pytest.mark.parametrize(
    ("rises", "rho", "end"),
    [
        ([0.2, 0.4, 0.8], 0.1, "smallest"),
        ([0.01, 0.02, 0.03], 1.0, "largest"),
        ([-0.01, 0.0, 0.2], 0.3, None),  # no logarithm
        ([0.05, 0.2, 0.01], 0.1 * 3**0.5, None),  # the first time that it exceeds what is sought
    ],
)
def test_ends_of_the_ladder_and_rises_that_do_not_rise(rises, rho, end):
    found = sharpness.radius_at((0.1, 0.3, 1.0), rises, loss=1.0, share=0.1)
    assert found == (pytest.approx(rho, rel=1e-12), end, (0.1, 0.3, 1.0), tuple(rises), 1.0, 0.1)


def test_the_ladder():
    assert (len(LADDER), LADDER[0], LADDER[-1]) == (13, 0.005, pytest.approx(5.0))
    steps = [larger / smaller for smaller, larger in pairwise(LADDER)]
    assert steps == pytest.approx([10**0.25] * 12)


# ---- the model is left as it was


@pytest.mark.parametrize("grad", [True, False])
def test_the_model_is_left_bit_identical(grad):
    """Also by a loader that draws."""
    net = network()
    data = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*batches())))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    before = everything(net)
    with torch.set_grad_enabled(grad):
        sharpness.suggest_radius(net, F.cross_entropy, loader)
        assert torch.is_grad_enabled() == grad
    assert same(everything(net), before)


@pytest.mark.parametrize(("error", "at"), [("nan", 1), ("nan", 4), (KeyboardInterrupt, 2), (KeyboardInterrupt, 6)])
def test_nothing_is_lost_when_it_fails(error, at):
    """In a batch's first pass a loss that is not finite is an error; an interrupt is one in any."""
    net, loader, calls = network(), batches(), []

    def failing(output, target):
        calls.append(1)
        if len(calls) == at and error is KeyboardInterrupt:
            raise KeyboardInterrupt
        return F.cross_entropy(output, target) * (float(error) if len(calls) == at else 1.0)

    before = everything(net)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else FloatingPointError):
        sharpness.loss_rises(net, failing, loader, [0.1, 0.2])
    assert same(everything(net), before)


# ---- what cannot be measured


@pytest.mark.parametrize(
    ("radii", "message"),
    [
        ((), r"radii=\(\): pass at least one"),
        ((-0.1, 0.1), r"radii=-0\.1: must be a finite number > 0"),
        ((0.0, 0.1), r"radii=0\.0: must be"),
        ((0.1, math.inf), "radii=inf"),
        ((0.2, 0.1), r"radii=\(0\.2, 0\.1\): must rise"),
        ((0.1, 0.1), "must rise"),
    ],
)
def test_wrong_radii(radii, message):
    with pytest.raises(ValueError, match=message):
        sharpness.loss_rises(network(), F.cross_entropy, batches(), radii)
    with pytest.raises(ValueError, match=message):
        sharpness.radius_at(radii, [0.1] * len(radii), loss=1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sharpness.suggest_radius(network(), F.cross_entropy, []), "the loader is empty"),
        (lambda: sharpness.suggest_radius(network(), lambda output, _: output, batches()), r"returned shape \(16, 3\)"),
        (lambda: sharpness.suggest_radius(network(), lambda output, _: -output.square().mean(), batches()), "loss=-"),
        (lambda: sharpness.radius_at([0.1], [0.1], loss=0.0), r"loss=0\.0: must be .* > 0, for a rise to be a share"),
        (lambda: sharpness.radius_at([0.1], [0.1], loss=1.0, share=-1.0), r"share=-1\.0"),
        (lambda: sharpness.radius_at([0.1, 0.2], [0.1], loss=1.0), "1 rises of 2 radii"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- the picture


def test_the_picture_marks_the_criterion_and_the_radius():
    found = sharpness.radius_at((0.1, 0.3, 1.0), (0.05, 0.2, 0.4), loss=1.0, share=0.1)
    axes = sharpness.plot_rises(found)
    criterion, radius, rises = axes.lines
    assert set(criterion.get_ydata()) == {0.1}
    assert set(radius.get_xdata()) == {found.rho}
    assert rises.get_xydata().tolist() == [[0.1, 0.05], [0.3, 0.2], [1.0, 0.4]]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["10 % of L(w)", "ρ = 0.17", "rise"]
    assert sharpness.plot_rises(found, axes) is axes
