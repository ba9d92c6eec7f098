"""Hugging Face's Trainer does what the same training by hand does, bit for bit; Accelerate's optimizer too."""

import pytest
import torch
import trainers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from bsam_fused import BSAM, SAM
from bsam_fused.integrations.transformers import SharpnessAwareMixin

pytestmark = pytest.mark.usefixtures("one_thread")
every_kind = pytest.mark.parametrize("kind", trainers.KINDS)


class Model(nn.Module):
    """As the Trainer wants it: the loss comes first."""

    def __init__(self):
        super().__init__()
        self.net = trainers.network()

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Sharp(SharpnessAwareMixin, Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def data(images=None):
    return [{"x": x, "labels": y} for x, y in zip(trainers.DATA.x[:images], trainers.DATA.y[:images])]


def trainer(kind, folder, images=None, *, trains=Sharp, k=1, options=None, **arguments):
    model = Model()
    settings = TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": trainers.MICRO,
            "gradient_accumulation_steps": k,
            "num_train_epochs": 1,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "save_strategy": "no",
            "logging_steps": 1,
            **arguments,
        }
    )
    optimizer = trainers.optimizer(kind, model, **(options or {}))
    return trains(model=model, args=settings, train_dataset=data(images), optimizers=(optimizer, None))


@every_kind
def test_it_learns(kind, tmp_path):
    run = trainer(kind, tmp_path, num_train_epochs=3)
    run.train()
    assert trainers.accuracy(run.model.net) > 0.9
    assert trainers.same(run.model.net, trainers.by_hand(kind, list(trainers.loader()), 1, epochs=3))


@every_kind
@pytest.mark.parametrize("bf16", [False, True])
def test_every_pass_replays_the_micro_batches(kind, bf16, tmp_path):
    run = trainer(kind, tmp_path, 6 * 32, k=3, bf16=bf16, max_grad_norm=0.1)
    run.train()
    cast = torch.bfloat16 if bf16 else torch.float32
    batches = list(trainers.loader(6 * 32))
    assert run.state.global_step == 2
    assert trainers.same(run.model.net, trainers.by_hand(kind, batches, 3, cast=cast, max_grad_norm=0.1))
    assert not trainers.same(run.model.net, trainers.by_hand(kind, batches, 3, cast=cast))


@every_kind
def test_a_grad_scaler(kind, tmp_path):
    """Accelerate makes one for fp16 on a GPU only; its scale changes no bit, and is off the logged norm."""
    ends, logged = [], []
    for scale in (None, 2.0**6):
        run = trainer(kind, tmp_path, 4 * 32, k=2, max_grad_norm=0.1)
        if scale:
            run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        run.train()
        ends.append(run.model)
        logged.append([entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry])
    assert trainers.same(*ends)
    assert logged[0] == pytest.approx(logged[1])


def test_the_logged_norm_and_loss_are_those_at_w(tmp_path):
    run = trainer(BSAM, tmp_path, 64, k=2)
    run.train()
    net = trainers.network()
    loss = nn.functional.cross_entropy(net(trainers.DATA.x[:64]), trainers.DATA.y[:64])
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in net.parameters()])
    assert run.state.log_history[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert run.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-4)


def test_schedulers_and_resume(tmp_path):
    """The Trainer's own warm-up from lr = 0, and a checkpoint in the middle of it."""
    arguments = {"k": 2, "lr_scheduler_type": "cosine", "warmup_steps": 2, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(BSAM, tmp_path, 12 * 32, **arguments)
    whole.train()
    again = trainer(BSAM, tmp_path, 12 * 32, **arguments)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert whole.optimizer.param_groups[0]["lr"] == 0.0
    assert trainers.same(again.model, whole.model)


def test_the_trainer_builds_the_optimizer(tmp_path):
    """Over groups of its own, for weight decay."""
    run = trainer(SAM, tmp_path, 64, max_grad_norm=0.3)
    run.optimizer, run.optimizer_cls_and_kwargs = None, (BSAM, {"lr": 0.1, "rho": 0.1})
    run.train()
    optimizer = run.optimizer.optimizer
    assert (len(optimizer.param_groups), optimizer.max_grad_norm) == (2, 0.3)
    assert not trainers.same(run.model.net, trainers.network())


def test_an_inactive_optimizer_is_the_base(tmp_path):
    run = trainer(BSAM, tmp_path, 4 * 32, k=2, max_grad_norm=0.1)
    run.optimizer.active = False
    run.train()
    batches = list(trainers.loader(4 * 32))
    assert all(entry["grad_norm"] > 0.1 for entry in run.state.log_history[:2])
    assert trainers.same(run.model.net, trainers.by_hand(BSAM, batches, 2, active=False, max_grad_norm=0.1))


class Stepping(TrainerCallback):
    def __init__(self, policy):
        self.policy = policy

    def on_optimizer_step(self, *args, **kwargs):
        self.policy.step()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(("kind", "options", "policy"), trainers.THRIFTY.values(), ids=trainers.THRIFTY)
def test_steps_of_one_pass(kind, options, policy, k, tmp_path):
    """Between others of all passes: over all micro-batches, each of them once; decided when they have accumulated.

    The logged norm is then that of the one pass.
    """
    run = trainer(kind, tmp_path, 6 * k * 32, k=k, options=options, max_grad_norm=0.5)
    forwards = []
    run.model.net.register_forward_hook(lambda *_: forwards.append(1))
    if policy:
        run.add_callback(Stepping(policy(run.optimizer)))
    run.train()
    passes = []
    expected = trainers.by_hand(
        kind, list(trainers.loader(6 * k * 32)), k, policy=policy, passes=passes, max_grad_norm=0.5, **options
    )
    assert {*passes} == {1, 2}
    assert len(forwards) == k * sum(passes)
    assert trainers.same(run.model.net, expected)
    assert len([entry for entry in run.state.log_history if entry.get("grad_norm", 0) > 0.1]) == 6


def test_an_error_in_a_replayed_pass_leaves_w(tmp_path):
    run = trainer(SAM, tmp_path, 64, k=2)
    forwards = []

    def fail_in_the_fourth(*_):
        forwards.append(1)
        if len(forwards) == 4:
            raise KeyError("here")

    run.model.register_forward_pre_hook(fail_in_the_fourth)
    with pytest.raises(KeyError):
        run.train()
    assert trainers.same(run.model.net, trainers.network())


def test_without_the_mixin_it_is_named(tmp_path):
    for options in ({}, {"max_grad_norm": 1.0}):
        run = trainer(BSAM, tmp_path, 64, trains=Trainer, **options)
        with pytest.raises(RuntimeError, match=r"at rest.*Hugging Face's Trainer.*mixin of bsam_fused.integrations"):
            run.train()


# ---- Accelerate, by hand


@every_kind
@pytest.mark.parametrize(("precision", "scale"), [("no", None), ("bf16", None), ("no", 2.0**6)])
def test_accelerate(kind, precision, scale):
    """Seven micro-batches, three a step: the last step has one, which Accelerate too divides by three."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3, mixed_precision=precision)
    accelerator.scaler = scale and torch.amp.GradScaler("cpu", init_scale=scale)
    net = trainers.network()
    net, opt, loader = accelerator.prepare(
        net, trainers.optimizer(kind, net, max_grad_norm=0.1), trainers.loader(7 * 32)
    )

    def run_pass(x, y):
        with accelerator.autocast():
            loss = nn.functional.cross_entropy(net(x), y)
        accelerator.backward(loss)

    micro_batches = []
    for batch in loader:
        with accelerator.accumulate(net):
            run_pass(*batch)
            micro_batches.append(batch)
            if accelerator.sync_gradients:
                for call in opt.optimizer._calls[:-1]:
                    getattr(opt.optimizer, call)()
                    for earlier in micro_batches:
                        run_pass(*earlier)
                micro_batches.clear()
            opt.step()
            opt.zero_grad()
    cast = torch.bfloat16 if precision == "bf16" else torch.float32
    expected = trainers.by_hand(kind, list(trainers.loader(7 * 32)), 3, cast=cast, max_grad_norm=0.1)
    for p, q in zip(net.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_accelerate_stepping_alone_is_named():
    AcceleratorState._reset_state(reset_partial_state=True)
    net = trainers.network()
    accelerator = Accelerator(cpu=True)
    net, opt = accelerator.prepare(net, trainers.optimizer(SAM, net))
    accelerator.backward(net(trainers.DATA.x[:8]).sum())
    with pytest.raises(RuntimeError, match=r"at rest.*Accelerate.*all passes by hand"):
        opt.step()
