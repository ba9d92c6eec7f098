"""Lightning's own loop does what the same training by hand does, bit for bit, and says so where it would not."""

import math
import os
import warnings

import pytest
import torch
import trainers
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from bsam_fused import BSAM, SAM
from bsam_fused.integrations.lightning import SharpnessAwareMixin

pytestmark = pytest.mark.usefixtures("one_thread")
every_kind = pytest.mark.parametrize("kind", trainers.KINDS)


class Plain(LightningModule):
    def __init__(self, kind, **options):
        super().__init__()
        self.net = trainers.network()
        self.kind, self.options = kind, options

    def training_step(self, batch):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        self.optimizer = trainers.optimizer(self.kind, self.net, **self.options)
        return self.optimizer


class Sharp(SharpnessAwareMixin, Plain):
    pass


def fit(module, images=None, *, epochs=1, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few workers, few batches
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        trainer.fit(module, trainers.loader(images))
    return trainer


def half(scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    return scaler, plugin


@every_kind
def test_it_learns(kind):
    module = Plain(kind)
    trainer = fit(module, epochs=3)
    assert trainer.global_step == 3 * 43
    assert trainers.accuracy(module.net) > 0.9
    assert trainers.same(module.net, trainers.by_hand(kind, list(trainers.loader()), 1, epochs=3))


@every_kind
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_pass_replays_the_micro_batches(kind, precision):
    """Seven micro-batches, three a step: the last step has one."""
    module = Sharp(kind)
    trainer = fit(module, 7 * 32, precision=precision, accumulate_grad_batches=3, gradient_clip_val=0.1)
    cast = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    batches = list(trainers.loader(7 * 32))
    assert trainer.global_step == 3
    assert trainers.same(module.net, trainers.by_hand(kind, batches, 3, cast=cast, max_grad_norm=0.1))
    assert not trainers.same(module.net, trainers.by_hand(kind, batches, 3, cast=cast))


@pytest.fixture
def _environment(monkeypatch):
    """What launching a process group leaves behind is taken away."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_environment")
@every_kind
def test_distributed_data_parallel(kind):
    """One process: through DDP's forward, and its no_sync for all micro-batches but the last of each pass."""
    module = Sharp(kind)
    quiet = []
    strategy = DDPStrategy(process_group_backend="gloo")
    block = strategy.block_backward_sync
    strategy.block_backward_sync = lambda: quiet.append(1) or block()
    fit(module, 6 * 32, strategy=strategy, devices=1, accumulate_grad_batches=3, use_distributed_sampler=False)
    assert len(quiet) == 2 * 2 * len(module.optimizer._calls)  # steps, micro-batches, passes
    assert trainers.same(module.net, trainers.by_hand(kind, list(trainers.loader(6 * 32)), 3))


@every_kind
@pytest.mark.parametrize("k", [1, 2])
def test_sixteen_bit_precision(kind, k):
    """As with no scaler, since powers of two scale exactly; and an overflow in an earlier pass skips."""
    ends = []
    for scale in (2.0**10, 2.0**4):
        module = Sharp(kind)
        scaler, plugin = half(scale)
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
        fit(module, 4 * 32, plugins=[plugin], accumulate_grad_batches=k)
        assert scaler.get_scale() == scale
        ends.append(module)
    assert trainers.same(ends[0].net, trainers.by_hand(kind, list(trainers.loader(4 * 32)), k))
    assert trainers.same(*ends)

    class Overflows(Sharp):
        passes = 0

        def training_step(self, batch):
            self.passes += 1
            return super().training_step(batch) * (math.inf if self.passes == k else 1.0)

    module = Overflows(kind)  # in the first pass, which GradScaler does not look at
    scaler, plugin = half(2.0)
    fit(module, k * 32, plugins=[plugin], accumulate_grad_batches=k)
    assert (module.optimizer.skipped_steps, scaler.get_scale()) == (1, 1.0)
    assert trainers.same(module.net, trainers.network())


@pytest.mark.parametrize("plugins", [[], [half(2.0)[1]]], ids=["32", "16"])
def test_an_inactive_optimizer_is_the_base_over_all_micro_batches(plugins):
    class Late(Sharp):
        def configure_optimizers(self):
            super().configure_optimizers().active = False
            return self.optimizer

    for plugin in plugins:
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
    module = Late(BSAM)
    fit(module, 5 * 32, plugins=plugins, accumulate_grad_batches=2, gradient_clip_val=0.1)
    batches = list(trainers.loader(5 * 32))
    assert trainers.same(module.net, trainers.by_hand(BSAM, batches, 2, active=False, max_grad_norm=0.1))


class Thrifty(Sharp):
    """With a policy, stepped after the optimizer."""

    policy = None

    def configure_optimizers(self):
        options = dict(self.options)
        self.options, policy = options, options.pop("policy")
        optimizer = super().configure_optimizers()
        self.policy = policy and policy(optimizer)
        return optimizer

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        if self.policy:
            self.policy.step()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(("kind", "options", "policy"), trainers.THRIFTY.values(), ids=trainers.THRIFTY)
def test_steps_of_one_pass(kind, options, policy, k):
    """Between others of all passes: over all micro-batches, each of them once; decided when they have accumulated."""
    module = Thrifty(kind, policy=policy, **options)
    forwards = []
    module.net.register_forward_hook(lambda *_: forwards.append(1))
    fit(module, 6 * k * 32, accumulate_grad_batches=k, gradient_clip_val=0.5)
    passes = []
    expected = trainers.by_hand(
        kind, list(trainers.loader(6 * k * 32)), k, policy=policy, passes=passes, max_grad_norm=0.5, **options
    )
    assert {*passes} == {1, 2}
    assert len(forwards) == k * sum(passes)
    assert trainers.same(module.net, expected)


@pytest.mark.parametrize("k", [1, 2])
def test_looksam_under_sixteen_bit_precision(k):
    """Its history is of scaled gradients, of which the length does not count."""
    _, plugin = half(2.0**6)
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
    module = Sharp(trainers.LookSAM, k=2)
    fit(module, 4 * k * 32, plugins=[plugin], accumulate_grad_batches=k)
    assert trainers.same(module.net, trainers.by_hand(trainers.LookSAM, list(trainers.loader(4 * k * 32)), k, k=2))


@pytest.mark.parametrize("passes", [1, 2])
def test_what_gradients_decide_is_refused_under_sixteen_bit_precision(passes):
    c = 9.0 if passes == 1 else -9.0
    module = Thrifty(SAM, policy=lambda opt: trainers.LargeGradients(opt, 4, lambda_1=c, lambda_2=c))
    with pytest.raises(RuntimeError, match="decide with GradScaler"):
        fit(module, 64, plugins=[half(2.0)[1]])
    assert trainers.same(module.net, trainers.network())


class Seen(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(outputs["loss"].item())


@every_kind
def test_logs_and_callbacks_see_w(kind):
    module, seen = Sharp(kind, lr=0.0), Seen()
    trainer = fit(module, 4 * 32, callbacks=[seen], accumulate_grad_batches=2)
    at_w = [nn.functional.cross_entropy(module.net(x), y).item() for x, y in trainers.loader(4 * 32)]
    assert seen.losses == pytest.approx([loss / 2 for loss in at_w])
    assert trainer.callback_metrics["loss"].item() == pytest.approx(sum(at_w) / 4)


def test_what_would_be_silently_wrong_raises():
    mixin = "SharpnessAwareMixin before LightningModule"
    for options in ({"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}):
        with pytest.raises(RuntimeError, match=rf"Trainer\({next(iter(options))}=.*{mixin}"):
            fit(Plain(BSAM), 64, **options)
    with pytest.raises(RuntimeError, match=r"at rest.*16-bit precision.*Lightning: manual optimization.*recipes"):
        fit(Plain(SAM), 64, plugins=[half(2.0)[1]])
    with pytest.raises(ValueError, match=r"gradient_clip_algorithm=.*'value'"):
        fit(Sharp(SAM), 64, gradient_clip_val=1.0, gradient_clip_algorithm="value")


def test_a_hook_without_super_is_noticed():
    class Own(Sharp):
        def on_train_batch_start(self, batch, batch_idx):
            pass

    with pytest.raises(RuntimeError, match=r"0 of 2 micro-batches seen.*must call super"):
        fit(Own(SAM), 64, accumulate_grad_batches=2)


@pytest.mark.parametrize("at", [1, 4], ids=["accumulating", "replaying"])
def test_an_error_leaves_w(at):
    """And a second fit goes well."""

    class Broken(Sharp):
        passes = 0

        def training_step(self, batch):
            self.passes += 1
            if self.passes == at:
                raise KeyError("here")
            return super().training_step(batch)

    for plugins in ([], [half(2.0)[1]]):
        module = Broken(BSAM)
        with pytest.raises(KeyError):
            fit(module, 64, accumulate_grad_batches=2, plugins=plugins)
        assert trainers.same(module.net, trainers.network())
        module.optimizer.state_dict()  # at rest
        assert fit(module, 64, accumulate_grad_batches=2, plugins=plugins).global_step == 1
        assert not trainers.same(module.net, trainers.network())


class Manual(Plain):
    """The recipe for 16 bits without the mixin."""

    automatic_optimization = False

    def training_step(self, batch):
        x, y = batch
        wrapper = self.optimizers()
        optimizer = wrapper.optimizer
        for call in (optimizer.ascend, optimizer.descend, wrapper.step):
            self.manual_backward(nn.functional.cross_entropy(self.net(x), y))
            call()
        optimizer.zero_grad()


@pytest.mark.parametrize("scale", [None, 2.0**8])
def test_manual_optimization(scale):
    """In 32 bits Lightning puts a closure of its own, which does nothing, in place of none."""
    stepped = []
    module, plugins = Manual(BSAM), []
    module.on_before_optimizer_step = lambda optimizer: stepped.append(optimizer)
    if scale:
        scaler, plugin = half(scale)
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
        plugins = [plugin]
    assert fit(module, 96, plugins=plugins).global_step == 3
    assert stepped == [module.optimizer] * 3
    assert scale is None or scaler.get_scale() == scale
    assert trainers.same(module.net, trainers.by_hand(BSAM, list(trainers.loader(96)), 1))


def test_manual_optimization_with_a_closure():
    class WithClosure(Plain):
        automatic_optimization = False

        def training_step(self, batch):
            self.optimizers().step(closure=lambda: self.manual_backward(super(WithClosure, self).training_step(batch)))

    module = WithClosure(BSAM)
    fit(module, 96)
    assert trainers.same(module.net, trainers.by_hand(BSAM, list(trainers.loader(96)), 1))


def test_manual_optimization_as_with_other_optimizers_is_named():
    """Not a step of no gradients."""

    class OnePass(Plain):
        automatic_optimization = False

        def training_step(self, batch):
            self.manual_backward(super().training_step(batch))
            self.optimizers().step()

    with pytest.raises(RuntimeError, match=r"step\(\) out of order: the optimizer is at rest.*all passes by hand"):
        fit(OnePass(SAM), 32)


def test_phases_of_the_wrapper_are_refused():
    class Wrong(Manual):
        def training_step(self, batch):
            self.manual_backward(self.net(batch[0]).sum())
            self.optimizers().ascend()

    module = Wrong(SAM)
    with pytest.raises(RuntimeError, match=r"ascend\(\) of LightningSAM, a wrapper.*use_pl_optimizer=False"):
        fit(module, 32)
    assert trainers.same(module.net, trainers.network())
