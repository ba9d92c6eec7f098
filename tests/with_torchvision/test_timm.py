"""timm's scaler, layer decay, schedulers and averaged weights, around steps of ours (`make test-trainers`)."""

import pytest
import recipes
import torch
import trainers
from timm import create_model
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, NativeScaler
from torch.nn.functional import cross_entropy

from bsam_fused import BSAM, SAM

pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES = list(trainers.loader(4 * trainers.MICRO))


def train(kind, scaler, first=1.0, optimizer_options=None, **options):
    """By hand, where the scaler does backward, and the last call; the loss of the first pass times ``first``."""
    net = trainers.network()
    opt = trainers.optimizer(kind, net, **(optimizer_options or {}))
    for x, y in BATCHES:
        for call in opt._calls:
            last = call == "step"
            loss = cross_entropy(net(x), y) * (first if call == "ascend" else 1.0)
            scaler(loss, opt, parameters=net.parameters(), need_update=last, **options)
            if not last:
                getattr(opt, call)()
        opt.zero_grad()
    return net, opt


def test_recipe():
    (code,) = (code for heading, code in recipes.SNIPPETS if heading == "timm")
    recipes.run(code)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("kind", trainers.KINDS)
def test_scaled_as_by_hand(kind, create_graph):
    """To the bit: its scale is a power of two."""
    net, opt = train(kind, NativeScaler("cpu"), create_graph=create_graph)
    assert trainers.same(net, trainers.by_hand(kind, BATCHES, 1))
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("options", [{}, {"clip_grad": 1.0}, {"create_graph": False}])
@pytest.mark.parametrize("kind", trainers.KINDS)
def test_alone_it_raises(kind, options):
    """Its one pass is not what a sharpness-aware step needs; nothing has moved."""
    net = trainers.network()
    opt = trainers.optimizer(kind, net)
    x, y = BATCHES[0]
    with pytest.raises(RuntimeError, match="all passes by hand"):
        NativeScaler("cpu")(cross_entropy(net(x), y), opt, parameters=net.parameters(), **options)
    assert trainers.same(net, trainers.network())


def test_clipping_sam():
    """Of the unscaled last gradient, SAM's direction: as ``max_grad_norm`` does it."""
    theirs, _ = train(SAM, NativeScaler("cpu"), clip_grad=0.1)
    ours, _ = train(SAM, NativeScaler("cpu"), optimizer_options={"max_grad_norm": 0.1})
    for p, q in zip(theirs.parameters(), ours.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_clipping_bsam_is_refused():
    with pytest.raises(RuntimeError, match="clip with max_grad_norm="):
        train(BSAM, NativeScaler("cpu"), clip_grad=0.1)


@pytest.mark.parametrize("kind", trainers.KINDS)
def test_an_overflow_in_the_first_pass(kind):
    """Skips the step, and the scale backs off, though the scaler sees the last pass's gradients only."""
    scaler = NativeScaler("cpu")
    net, opt = train(kind, scaler, first=1e37)
    assert opt.skipped_steps == len(BATCHES)
    assert scaler.state_dict()["scale"] == 2.0 ** (16 - len(BATCHES))
    assert trainers.same(net, trainers.network())


@pytest.mark.parametrize("kind", trainers.KINDS)
def test_layer_decay_and_schedule(kind):
    """Each group steps with its own share of the scheduled lr; at the peak each has its whole ρ_min, half way half."""
    net = create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, in_chans=1, embed_dim=32, depth=2, num_heads=2)
    groups = param_groups_layer_decay(net, weight_decay=0.05, layer_decay=0.5)
    opt = kind(groups, torch.optim.AdamW, lr=0.01, rho=0.04)
    schedule = CosineLRScheduler(opt, 8, warmup_t=2, warmup_lr_init=0.0, warmup_prefix=True, t_in_epochs=False)
    scales = [group["lr_scale"] for group in opt.param_groups]
    assert len(set(scales)) > 1
    for t, share in enumerate([0.0, 0.5, 1.0]):
        schedule.step_update(t)
        got = opt.metrics()
        for i, scale in enumerate(scales):
            assert got[f"lr/{i}"] == pytest.approx(0.01 * share * scale)
            if kind is BSAM:
                assert got[f"rho_min/{i}"] == pytest.approx(0.04 * share)


@pytest.mark.parametrize("kind", trainers.KINDS)
def test_averaged_weights(kind):
    """Of w after each step, which is what the average of a run of torch's own would be of."""
    net = trainers.network()
    opt = trainers.optimizer(kind, net)
    average = ModelEmaV3(net, decay=0.75)
    expected = [p.detach().clone() for p in net.parameters()]
    for x, y in BATCHES:

        def closure(x=x, y=y):
            loss = cross_entropy(net(x), y)
            loss.backward()
            return loss

        opt.step(closure)
        average.update(net)
        expected = [torch.lerp(e, p.detach(), 0.25) for e, p in zip(expected, net.parameters())]
    for p, e in zip(average.module.parameters(), expected):
        torch.testing.assert_close(p, e)
