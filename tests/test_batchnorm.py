"""Running statistics in extra passes: bit for bit where they were, whatever the layer and whatever happens inside."""

import copy

import pytest
import torch
from torch import nn

import bsam_fused
from bsam_fused.batchnorm import frozen_running_stats

LAYERS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (8, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (4, 3, 5, 5)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3, affine=False), (4, 3, 2, 2, 2)),
    "cumulative": (lambda: nn.BatchNorm1d(3, momentum=None), (8, 3)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(3), (4, 3, 5)),
    "SyncBatchNorm, cumulative": (lambda: nn.SyncBatchNorm(3, momentum=None), (4, 3, 5)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3, track_running_stats=True), (4, 3, 5)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, track_running_stats=True, affine=True), (4, 3, 5, 5)),
    "LazyBatchNorm1d": (lambda: nn.LazyBatchNorm1d(), (8, 3)),
    "LazyInstanceNorm2d": (lambda: nn.LazyInstanceNorm2d(track_running_stats=True), (4, 3, 5, 5)),
    "a subclass": (lambda: Renamed(3), (8, 3)),
}
every_layer = pytest.mark.parametrize(("build", "shape"), LAYERS.values(), ids=LAYERS)


class Renamed(nn.BatchNorm1d):
    """As libraries have them."""


def statistics(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unmoved(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def moving(model, shape):
    """Whether an ordinary pass moves the statistics, as it should."""
    before = statistics(model)
    model(1 + torch.randn(shape))
    return not unmoved(model, before)


@every_layer
def test_statistics_stay_and_batches_are_normalised_by_their_own(build, shape):
    model, plain = (nn.Sequential(build()) for _ in range(2))
    for x in (torch.randn(shape), 3 + torch.randn(shape)):
        assert torch.equal(model(x), plain(x))
    before, x = statistics(model), 5 + 2 * torch.randn(shape)
    with frozen_running_stats(model):
        frozen = model(x)
    assert unmoved(model, before)
    assert torch.equal(frozen, plain(x))
    assert type(model[0]) is type(plain[0])
    model[0].load_state_dict(plain[0].state_dict())
    for x in (torch.randn(shape), torch.randn(shape)):  # and then on as if nothing had been, momentum and all
        assert torch.equal(model(x), plain(x))
    assert unmoved(model, statistics(plain))


@pytest.mark.parametrize("momentum", [0.3, None])
def test_later_statistics_are_of_the_live_passes_alone(momentum):
    """momentum=None averages over the batches that count: num_batches_tracked must not move with the others."""
    model, xs = nn.BatchNorm1d(2, momentum=momentum), [t + torch.randn(16, 2) for t in range(5)]
    for t, x in enumerate(xs):
        if t in (1, 3):
            with frozen_running_stats(model):
                model(x)
        else:
            model(x)
    means = [xs[t].mean(0) for t in (0, 2, 4)]
    expected = torch.stack(means).mean(0)
    if momentum:
        expected = sum(0.3 * 0.7 ** (2 - t) * mean for t, mean in enumerate(means))
    torch.testing.assert_close(model.running_mean, expected)
    assert model.num_batches_tracked == 3
    assert model.momentum == momentum


@every_layer
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_inf_activation_reaches_nothing(build, shape, bad):
    """A momentum of zero would not do: 0 · inf is NaN."""
    model = nn.Sequential(build())
    model(torch.randn(shape))
    before = statistics(model)
    with frozen_running_stats(model):
        model(torch.full(shape, bad))
    assert unmoved(model, before)


@every_layer
def test_nesting_and_calling_twice(build, shape):
    model, x = nn.Sequential(build()), torch.randn(shape)
    model(x)
    before = statistics(model)
    with frozen_running_stats(model):
        with frozen_running_stats(model), frozen_running_stats(model[0]):
            model(x)
        assert unmoved(model, before)
        model(x)
    assert unmoved(model, before)
    first, second = frozen_running_stats(model), frozen_running_stats(model)
    first.__enter__()
    second.__enter__()
    model(x)
    first.__exit__(None, None, None)  # another optimizer's step may end first
    model(x)
    second.__exit__(None, None, None)
    assert unmoved(model, before)
    assert moving(model, shape)


@every_layer
def test_exceptions_restore(build, shape):
    model = nn.Sequential(build())
    model(torch.randn(shape))
    kind = type(model[0])

    def interrupted():
        with frozen_running_stats(model):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert type(model[0]) is kind
    assert moving(model, shape)


def test_compiled_models():
    """No graph is compiled for the extra passes: what they run is what they would run anyway."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True))
    compiled, x = torch.compile(model, backend="eager"), torch.randn(4, 3, 3)
    compiled(x)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(2):
        before = statistics(model)
        with frozen_running_stats(compiled):
            compiled(x)
        assert unmoved(model, before)
        compiled(x)
        assert not unmoved(model, before)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("kind", [bsam_fused.SAM, bsam_fused.BSAM])
@every_layer
def test_the_optimizers_use_it(build, shape, kind):
    """model=: after a step the statistics are those of one plain pass at w."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = nn.Sequential(nn.Linear(shape[-1], shape[-1]), build())
    model(x)
    plain = copy.deepcopy(model)
    opt = kind(model.parameters(), lr=0.1, rho=1.0, model=model)

    def closure():
        loss = model(x).square().sum() + model[0].weight.sum()
        loss.backward()
        return loss

    opt.step(closure)
    plain(x)
    assert unmoved(model[1], statistics(plain[1])) == (not any(p.requires_grad for p in model[1].parameters()))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(model[1], name), getattr(plain[1], name))
