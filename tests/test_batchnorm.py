"""Frozen running statistics: bit for bit where they were, whatever the layer and whatever happens inside."""

import copy
import io
import pickle

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


@every_layer
def test_layers_in_evaluation_mode_go_on_using_them(build, shape):
    model = nn.Sequential(build())
    model(3 + torch.randn(shape))
    x = torch.randn(shape)
    expected = model.eval()(x)
    with frozen_running_stats(model):
        assert torch.equal(model(x), expected)
        assert not torch.equal(model.train()(x), expected)  # modes may change inside
        assert torch.equal(model.eval()(x), expected)


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
        model(x)
    assert unmoved(model, before)
    first, second = frozen_running_stats(model), frozen_running_stats(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # another optimizer's step may end first
    model(x)
    assert unmoved(model, before)
    second.__exit__(None, None, None)
    assert type(model[0]) is type(nn.Sequential(copy.deepcopy(model[0]))[0])
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


@pytest.mark.parametrize("lazy", ["LazyBatchNorm1d", "LazyInstanceNorm2d"])
@pytest.mark.parametrize("first_pass", ["inside", "outside"])
def test_lazy_layers_may_meet_their_first_input_inside(lazy, first_pass):
    build, shape = LAYERS[lazy]
    model = nn.Sequential(build())
    with frozen_running_stats(model):
        if first_pass == "inside":
            with frozen_running_stats(model):
                model(3 + torch.randn(shape))
            model(3 + torch.randn(shape))
            assert model[0].state_dict()["running_mean"].tolist() == [0, 0, 0]
            assert model[0].state_dict()["running_var"].tolist() == [1, 1, 1]
            assert model[0].num_batches_tracked == 0
    model(3 + torch.randn(shape))
    assert type(model[0]).__name__ == lazy.removeprefix("Lazy")
    assert moving(model, shape)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_layer
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, by_pickle, by_file])
def test_copies_made_inside_are_not_frozen(build, shape, copied):
    model = nn.Sequential(build())
    model(torch.randn(shape))
    with frozen_running_stats(model), frozen_running_stats(model):
        layer = copied(model[0])
        assert type(layer) is not type(model[0])
    assert type(layer) is type(model[0])
    assert unmoved(layer, statistics(model[0]))
    assert moving(layer, shape)


def test_what_is_read_and_written_inside():
    """State dicts hold the statistics, and load them; flags set inside are kept; printing names the layer."""
    model, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    other(3 + torch.randn(8, 2))
    with frozen_running_stats(model):
        assert model.state_dict().keys() == other.state_dict().keys()
        model.load_state_dict(other.state_dict())
        assert repr(model) == repr(other)
        model.track_running_stats = False
    assert unmoved(model, statistics(other))
    assert not model.track_running_stats


def test_layers_without_statistics_are_left_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.InstanceNorm1d(3))
    kinds = [type(m) for m in model]
    with frozen_running_stats(model):
        assert [type(m) for m in model] == kinds


def test_compiled_models():
    """The compiled pass is made anew for frozen layers, and not used for live ones, nor the other way round."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True))
    compiled, x = torch.compile(model, backend="eager"), torch.randn(4, 3, 3)
    compiled(x)
    for _ in range(2):
        before = statistics(model)
        with frozen_running_stats(compiled):
            compiled(x)
        assert unmoved(model, before)
        compiled(x)
        assert not unmoved(model, before)


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
