"""Flatness: against exact Hessians, closed forms and the late-phase paper's toy landscape; models are left alone."""

import copy
import math
import sys
from pathlib import Path

import processes
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from untouched import Counting, everything, same

import bsam_fused
from bsam_fused import sharpness

ROOT = Path(__file__).parents[1]


def network(dtype=torch.float64):
    """With a layer of running statistics, dropout and a parameter that takes no part."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(), nn.Linear(4, 3)).to(dtype)
    net[1](torch.randn(50, 4, dtype=dtype) * 2 + 1)
    net.unused = nn.Parameter(torch.ones(2, dtype=dtype))
    net[0].bias.requires_grad_(False)
    return net


def batches(dtype=torch.float64):
    """Of different sizes: a mean of batch means would be wrong."""
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(30, 3, generator=generator, dtype=torch.float64), torch.randint(3, (30,), generator=generator)
    return list(zip(x.to(dtype).split([16, 4, 10]), y.split([16, 4, 10])))


def exact(net, loader, of):
    """``of`` (a transform of torch.func) applied to L as a function of all trainable weights in one vector."""
    net = copy.deepcopy(net).eval()
    x, y = (torch.cat(parts) for parts in zip(*loader))
    trainable = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}
    sizes, shapes = [p.numel() for p in trainable.values()], [p.shape for p in trainable.values()]

    def loss(w):
        parts = (part.view(shape) for part, shape in zip(w.split(sizes), shapes))
        return F.cross_entropy(torch.func.functional_call(net, dict(zip(trainable, parts)), x), y)

    w = torch.cat([p.reshape(-1) for p in trainable.values()])
    return of(loss)(w) if of else (loss, w)


class Toy(nn.Module):
    """L(u, v) = ½ tanh²(v tanh u), of arXiv 2410.10373: minima at v = 0, flatter the smaller |u| is."""

    def __init__(self, u, v):
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (u, v))

    def forward(self, x):
        return (self.v * self.u.tanh()).tanh().square() / 2


def itself(output, target):
    return output


NO_DATA = [(torch.zeros(1), torch.zeros(1))]


# ---- MaxS, MinS, BilS, gradient conflict


@pytest.mark.parametrize(("rho", "rho_min"), [(0.05, None), (0.3, 0.1), (0.0, 0.2)])
def test_max_min_and_bilateral_sharpness(rho, rho_min):
    net, loader = network(), batches()
    loss, w = exact(net, loader, None)
    g = torch.func.grad(loss)(w)
    unit = g / g.norm()
    found = sharpness.measure(net, F.cross_entropy, loader, rho, rho_min)
    rho_min = rho if rho_min is None else rho_min
    at_w, at_max, at_min = (loss(w + a * unit).item() for a in (0.0, rho, -rho_min))
    assert found.loss == pytest.approx(at_w, rel=1e-12)
    assert found.max_sharpness == pytest.approx(at_max - at_w, rel=1e-9, abs=1e-14)
    assert found.min_sharpness == pytest.approx(at_w - at_min, rel=1e-9, abs=1e-14)
    assert found.bilateral_sharpness == pytest.approx(at_max - at_min, rel=1e-9)


def test_as_the_optimizer_measures_it():
    """On one batch and a network without modes, a BSAM step's own sharpness."""
    net, (x, y) = nn.Linear(3, 3).double(), batches()[0]
    opt = bsam_fused.BSAM(net.parameters(), lr=0.1, rho=0.2, rho_min=0.1)
    found = sharpness.measure(net, F.cross_entropy, [(x, y)], 0.2, 0.1)

    def closure():
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    opt.step(closure)
    for name in ("max_sharpness", "min_sharpness", "bilateral_sharpness"):
        assert getattr(found, name) == pytest.approx(getattr(opt.sharpness, name).item(), rel=1e-9)


def test_gradient_conflict():
    net, loader = network(), batches()
    loss, w = exact(net, loader, None)
    g = torch.func.grad(loss)(w)
    radii = [0.0, 0.05, 0.5, 3.0]
    expected = [F.cosine_similarity(g, torch.func.grad(loss)(w - r * g / g.norm()), dim=0).item() for r in radii]
    found = sharpness.gradient_conflict(net, F.cross_entropy, loader, radii)
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[0] == pytest.approx(1.0)


def test_conflict_in_a_valley():
    """½ a x²: the gradient turns round once ρ_min goes past the bottom, and not before."""
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(net.weight, 0.3)
    loader = [(torch.ones(4, 1, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64))]
    assert sharpness.gradient_conflict(net, F.mse_loss, loader, [0.1, 0.29, 0.31, 5.0]) == [1.0, 1.0, -1.0, -1.0]


# ---- Hessian


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_eigenvalues_of_the_exact_hessian(dtype):
    net, loader = network(dtype), batches(dtype)
    hessian = exact(copy.deepcopy(net).double(), batches(), torch.func.hessian)
    expected = torch.linalg.eigvalsh(hessian).flip(0)
    n = len(expected)
    for k in (1, 10, n - 1, n):
        found = sharpness.hessian_eigenvalues(net, F.cross_entropy, loader, k)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected[:k], rtol=1e-4, atol=1e-4 * expected[0].item())
    assert -expected[-1] > expected[9]  # so that the largest ten are not the largest in magnitude


def test_fifty_eigenvalues():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    x, y = torch.randn(64, 8, dtype=torch.float64), torch.randint(4, (64,))
    expected = torch.linalg.eigvalsh(exact(net, [(x, y)], torch.func.hessian)).flip(0)[:50]
    found = sharpness.hessian_eigenvalues(net, F.cross_entropy, [(x, y)], 50)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_trace_of_the_exact_hessian():
    """Within four of its own standard errors, which is as small as asked; and the error is no guess."""
    net, loader = network(), batches()
    hessian = exact(net, loader, torch.func.hessian)
    expected = hessian.trace().item()
    found = sharpness.hessian_trace(net, F.cross_entropy, loader, tol=0.02)
    assert abs(found.value - expected) < 4 * found.standard_error
    assert found.standard_error <= 0.02 * found.value
    deviation = math.sqrt(2 * (hessian.square().sum() - hessian.diagonal().square().sum()).item())
    assert found.standard_error == pytest.approx(deviation / math.sqrt(found.samples), rel=0.3)
    other = sharpness.hessian_trace(net, F.cross_entropy, loader, max_samples=3, seed=1)
    assert other.samples == 3
    assert other.value != found.value


def test_trace_of_a_diagonal_hessian_is_exact():
    """With signs, not normal numbers, every sample is the trace: Σ 2 (x_i² + …)/n for a sum of squares."""
    net = nn.Linear(5, 1, bias=False).double()
    x = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
    found = sharpness.hessian_trace(net, F.mse_loss, [(x, torch.zeros(5, 1, dtype=torch.float64))])
    assert found.value == pytest.approx(2 / 5 * (1 + 4 + 9 + 16 + 25), rel=1e-4)
    assert found.standard_error < 1e-10


def test_progress():
    counts = []
    net, loader = network(), batches()
    sharpness.hessian_eigenvalues(net, F.cross_entropy, loader, 3, progress=counts.append)
    assert counts == list(range(1, len(counts) + 1))
    counts.clear()
    estimate = sharpness.hessian_trace(net, F.cross_entropy, loader, tol=0.2, progress=counts.append)
    assert counts == list(range(1, estimate.samples + 1))


def test_a_looser_tolerance_takes_fewer_products():
    counts = {1e-1: [], 1e-10: []}
    for tol, count in counts.items():
        sharpness.hessian_eigenvalues(network(), F.cross_entropy, batches(), 3, tol=tol, progress=count.append)
    assert len(counts[1e-1]) < len(counts[1e-10])


def test_a_linear_loss_has_no_curvature():
    net = nn.Linear(2, 1).double()
    loader = [(torch.ones(3, 2, dtype=torch.float64), torch.zeros(3))]
    found = sharpness.hessian_eigenvalues(net, lambda output, _: output.mean(), loader, 3)
    assert found.tolist() == [0, 0, 0]


# ---- the toy landscape


@pytest.mark.parametrize("u", [0.2, 0.7, 1.5])
def test_toy_landscape(u):
    """At (u, 0) the Hessian is diag(0, tanh² u)."""
    toy = Toy(u, 0.0)
    expected = [math.tanh(u) ** 2, 0.0]
    assert sharpness.hessian_eigenvalues(toy, itself, NO_DATA, 2).tolist() == pytest.approx(expected, abs=1e-12)
    assert sharpness.hessian_eigenvalues(toy, itself, NO_DATA, 1).tolist() == pytest.approx(expected[:1], rel=1e-6)
    assert sharpness.hessian_trace(toy, itself, NO_DATA).value == pytest.approx(expected[0], rel=1e-6)


def test_smaller_u_is_flatter():
    """By every measure, near the valley's bottom."""
    measured = [sharpness.measure(Toy(u, 1e-3), itself, NO_DATA, rho=0.1) for u in (0.2, 0.7, 1.5)]
    for name in ("max_sharpness", "bilateral_sharpness"):
        flat, middle, sharp = (getattr(each, name) for each in measured)
        assert 0 < flat < middle < sharp
    along_v = [torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)]
    walls = [sharpness.loss_along(Toy(u, 0.0), itself, NO_DATA, along_v, [0.5]).item() for u in (0.2, 0.7, 1.5)]
    assert walls == sorted(walls)
    assert walls[2] == pytest.approx(math.tanh(0.5 * math.tanh(1.5)) ** 2 / 2)


# ---- landscapes


def test_loss_along_a_direction():
    net, loader = network(), batches()
    loss, w = exact(net, loader, None)
    direction = sharpness.random_direction(net, seed=1)
    d = torch.cat([part.reshape(-1) for part in direction])
    steps = [-1.0, 0.0, 0.3, 2.0]
    found = sharpness.loss_along(net, F.cross_entropy, loader, direction, steps)
    torch.testing.assert_close(found, torch.stack([loss(w + a * d) for a in steps]), rtol=1e-10, atol=0)


def test_loss_on_a_plane():
    """A row for each b, a column for each a."""
    net, loader = network(), batches()
    loss, w = exact(net, loader, None)
    directions = tuple(sharpness.random_direction(net, seed=seed) for seed in (1, 2))
    d1, d2 = (torch.cat([part.reshape(-1) for part in direction]) for direction in directions)
    along, across = [-1.0, 0.0, 1.0, 2.0], [0.0, 0.5]
    found = sharpness.loss_on_plane(net, F.cross_entropy, loader, directions, (along, across))
    expected = torch.stack([torch.stack([loss(w + a * d1 + b * d2) for a in along]) for b in across])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_random_directions_are_filter_normalised():
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Linear(4, 6))
    for p, d in zip(net.parameters(), sharpness.random_direction(net, seed=4)):
        if p.dim() < 2:
            assert d.eq(0).all()
        else:
            torch.testing.assert_close(d.flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1))
    one, again, other = (sharpness.random_direction(net, seed=seed)[0] for seed in (4, 4, 5))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_interpolation_between_two_models():
    here, there = network(), network()
    for p in there.parameters():
        p.data += p.requires_grad * torch.randn_like(p)
    direction = sharpness.direction_to(here, there.state_dict())
    found = sharpness.loss_along(here, F.cross_entropy, batches(), direction, [0.0, 1.0])
    for model, value in zip((here, there), found):
        assert value.item() == pytest.approx(sharpness.measure(model, F.cross_entropy, batches()).loss, rel=1e-10)
    with pytest.raises(ValueError, match=r"0\.weight has shape \(1, 3\) there, and \(4, 3\) here"):
        sharpness.direction_to(here, {**there.state_dict(), "0.weight": torch.ones(1, 3)})


# ---- the model is left as it was

MEASUREMENTS = {
    "measure": lambda net, fn, loader: sharpness.measure(net, fn, loader),
    "gradient_conflict": lambda net, fn, loader: sharpness.gradient_conflict(net, fn, loader, [0.1, 0.2]),
    "hessian_eigenvalues": lambda net, fn, loader: sharpness.hessian_eigenvalues(net, fn, loader, 2),
    "hessian_trace": lambda net, fn, loader: sharpness.hessian_trace(net, fn, loader, max_samples=3),
    "loss_along": lambda net, fn, loader: sharpness.loss_along(
        net, fn, loader, sharpness.random_direction(net), [0.0, 0.7]
    ),
    "loss_on_plane": lambda net, fn, loader: sharpness.loss_on_plane(
        net, fn, loader, (sharpness.random_direction(net), sharpness.random_direction(net, 1)), ([0.1, 0.3], [0.2])
    ),
}
every_measurement = pytest.mark.parametrize("measurement", MEASUREMENTS.values(), ids=MEASUREMENTS)


def measured_network(dtype=torch.float32):
    """Modes and gradients of all kinds."""
    net = network(dtype).append(Counting()).train()
    net[2].eval()
    net[4].weight.grad = torch.ones_like(net[4].weight)
    return net


@every_measurement
@pytest.mark.parametrize("grad", [True, False])
def test_the_model_is_left_bit_identical(measurement, grad):
    net = measured_network()
    before = everything(net)
    with torch.set_grad_enabled(grad):
        measurement(net, F.cross_entropy, batches(torch.float32))
        assert torch.is_grad_enabled() == grad
    assert same(everything(net), before)


@every_measurement
@pytest.mark.parametrize("error", [KeyboardInterrupt, "nan", "inf"])
@pytest.mark.parametrize("at", [1, 2, 5, 8])
def test_nothing_is_lost_when_a_measurement_fails(measurement, error, at):
    """In any pass: the error tells, and the model is bit-identical."""
    net, calls = measured_network(), []

    def failing(output, target):
        calls.append(1)
        if len(calls) == at and error is KeyboardInterrupt:
            raise KeyboardInterrupt
        return F.cross_entropy(output, target) * (float(error) if len(calls) == at else 1.0)

    before = everything(net)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else FloatingPointError):
        measurement(net, failing, batches(torch.float32) * 2)
    assert same(everything(net), before)


def test_the_error_says_where_the_loss_was_not_finite():
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(net.weight, 1.0)
    loader = [(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1))]

    def log(output, target):
        return -(output - 0.9).log().mean()  # falls with w: w_max is where it ends

    with pytest.raises(FloatingPointError, match="the loss at w_max is nan"):
        sharpness.measure(net, log, loader, rho=0.2)
    with pytest.raises(FloatingPointError, match=r"the loss at w \+ -0\.5 d is nan"):
        sharpness.loss_along(net, log, loader, [torch.ones(1, 1)], [0.5, -0.5])
    with pytest.raises(FloatingPointError, match="the gradient at w is not finite"):
        sharpness.measure(net, lambda output, _: (output - 1).abs().sqrt().mean(), loader)
    with pytest.raises(FloatingPointError, match="product with the Hessian is not finite"):
        sharpness.hessian_eigenvalues(net, lambda output, _: ((output - 1) ** 2).pow(0.75).mean(), loader)
    with pytest.raises(FloatingPointError, match="a gradient is zero"):
        sharpness.gradient_conflict(net, lambda output, _: 0 * output.mean(), loader, [0.1])


# ---- loaders


def test_a_loader_that_shuffles_and_augments_gives_the_same_examples_in_every_pass():
    """And training goes on with the random numbers that it would have had."""

    class Noisy(torch.utils.data.TensorDataset):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + torch.randn_like(x), y

    x, y = (torch.cat(parts) for parts in zip(*batches()))
    loader = torch.utils.data.DataLoader(Noisy(x, y), batch_size=8, shuffle=True, drop_last=True)
    before = torch.get_rng_state()
    found = sharpness.measure(network(), F.cross_entropy, loader, rho=0.0)
    assert found.loss == found.loss_max == found.loss_min
    torch.set_rng_state(before)
    assert sharpness.measure(network(), F.cross_entropy, loader, rho=0.0).loss == found.loss


@every_measurement
@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (lambda: [], ValueError, "the loader is empty"),
        (lambda: iter(batches()), TypeError, "which goes once"),
        (lambda: (batch for batch in batches()), TypeError, "loader is a generator"),
    ],
    ids=["empty", "iterator", "generator"],
)
def test_loaders_that_cannot_be_measured_on(measurement, loader, error, message):
    net = measured_network(torch.float64)
    before = everything(net)
    with pytest.raises(error, match=message):
        measurement(net, F.cross_entropy, loader())
    assert same(everything(net), before)


def test_a_loader_that_runs_dry():
    class Once:
        left = iter(batches())

        def __iter__(self):
            return self.left

    with pytest.raises(ValueError, match="gave 30 examples, and now 0"):
        sharpness.measure(network(), F.cross_entropy, Once())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, data: sharpness.hessian_eigenvalues(net, F.cross_entropy, data, 100), "k=100: .* parameters, 37"),
        (lambda net, data: sharpness.hessian_eigenvalues(net, F.cross_entropy, data, 0), "k=0"),
        (lambda net, data: sharpness.hessian_trace(net, F.cross_entropy, data, max_samples=1), "max_samples=1"),
        (lambda net, data: sharpness.measure(net, F.cross_entropy, data, rho=-0.1), r"rho=-0\.1"),
        (lambda net, data: sharpness.measure(net, F.cross_entropy, data, rho_min=math.nan), "rho_min=nan"),
        (lambda net, data: sharpness.gradient_conflict(net, F.cross_entropy, data, [0.1, math.inf]), "rho_mins=inf"),
        (lambda net, data: sharpness.loss_along(net, F.cross_entropy, data, [torch.ones(1)], [0.0]), "direction"),
        (lambda net, data: sharpness.measure(net, lambda o, y: o, data), r"returned shape \(16, 3\)"),
        (lambda net, data: sharpness.measure(net.requires_grad_(False), F.cross_entropy, data), "no parameters"),
    ],
)
def test_bad_input(call, message):
    net = network()
    before = everything(net)["state"]
    with pytest.raises(ValueError, match=message):
        call(net, batches())
    assert same(everything(net)["state"], before)


# ---- pictures and extras


def test_plots_show_what_was_measured():
    spectra = {"SGD": torch.tensor([3.0, 2.0, 1.0]), "SAM": torch.tensor([1.5, 1.0, 0.5])}
    axes = sharpness.plot_spectrum(spectra)
    assert [line.get_ydata().tolist() for line in axes.lines] == [[3, 2, 1], [1.5, 1, 0.5]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["SGD", "SAM"]
    assert axes.get_yscale() == "log"
    assert sharpness.plot_spectrum({"SGD": torch.tensor([1.0, -1.0])}).get_yscale() == "linear"
    assert sharpness.plot_spectrum(spectra, axes) is axes

    line = sharpness.plot_loss_along([0.0, 1.0], {"loss": torch.tensor([2.0, 3.0])}).lines[0]
    assert line.get_xydata().tolist() == [[0, 2], [1, 3]]
    line = sharpness.plot_conflict([0.1, 0.2], {"w": [0.5, -0.5]}, xlabel="epoch").lines[0]
    assert line.get_xydata().tolist() == [[0.1, 0.5], [0.2, -0.5]]
    axes = sharpness.plot_landscape(([0.0, 1.0], [0.0, 1.0, 2.0]), torch.arange(6.0).view(3, 2))
    assert axes.get_xlim() == (0, 1)
    assert axes.get_ylim() == (0, 2)

    measured = [sharpness.Sharpness(1.0, 1.5, 0.25), sharpness.Sharpness(1.0, 1.25, 0.5)]
    panels = sharpness.plot_sharpness([1, 2], {"SAM": measured})
    drawn = {panel.get_title(): panel.lines[0].get_ydata().tolist() for panel in panels}
    assert drawn == {"MaxS": [0.5, 0.25], "MinS": [0.75, 0.5], "BilS": [1.25, 0.75]}


@pytest.mark.parametrize(
    ("call", "missing"),
    [
        ("sharpness.hessian_eigenvalues(net, loss, data)", "scipy"),
        ("sharpness.plot_spectrum({})", "matplotlib"),
    ],
)
def test_without_the_extra_an_error_names_the_command(call, missing):
    code = f"""
import sys
sys.modules["scipy"] = sys.modules["matplotlib"] = None
import torch
from bsam_fused import sharpness
net, loss, data = torch.nn.Linear(2, 2), torch.nn.functional.mse_loss, [(torch.ones(1, 2), torch.ones(1, 2))]
sharpness.measure(net, loss, data), sharpness.hessian_trace(net, loss, data, max_samples=2)
{call}
"""
    done = processes.run([sys.executable, "-c", code], cwd=ROOT)
    assert f"ModuleNotFoundError: this needs {missing}: pip install 'bsam_fused[sharpness]'" in done.stderr
