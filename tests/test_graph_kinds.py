"""GraphedStep where steps are of several kinds: one capture each, made when the first of them comes."""

import copy

import pytest
import torch
from graphed import assert_equal, assert_same_state, data, eager_step, every_base, loss_fn, network, twins, where
from torch import nn

from bsam_fused import BSAM, SAM, LookSAM, schedules
from bsam_fused.graphs import GraphedStep

POLICIES = {
    "late": lambda opt: schedules.LatePhase(opt, 6, start=0.5),
    "every second": lambda opt: schedules.EveryKth(opt, 2, scale_radius=True),
    "at random": lambda opt: schedules.RandomSteps(opt, seed=1),
}


class Counted:
    """A loss that counts how often it is called: by a capture, and never by a replay."""

    def __init__(self):
        self.calls = 0

    def __call__(self, output, target):
        self.calls += 1
        return loss_fn(output, target)


@where
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.usefixtures("captures")
def test_policies_replay_steps_of_both_kinds(policy):
    """All steps are replays, and each kind is captured once: four times the passes, of a warm-up and of the capture."""
    models, opts = twins(BSAM)
    policies = [policy(opt) for opt in opts]
    counted = Counted()
    graphed = GraphedStep(models[0], counted, opts[0], data(0))
    passes = []
    for t in range(6):
        passes.append(opts[0].passes)
        loss = graphed(*data(t))
        assert counted.calls == 4 * sum({*passes} | {1 if not t and not opts[0].active else passes[0]})
        expected = eager_step(models[1], opts[1], data(t))
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-6)
        assert_equal(*models)
        assert_same_state(*opts)
        assert opts[0].metrics() == pytest.approx(opts[1].metrics(), rel=1e-5)  # of this kind of step, and no other
        for one in policies:
            one.step()
    assert {*passes} == {1, 3}
    assert opts[0].skipped_steps == 0


@where
@every_base
@pytest.mark.usefixtures("captures")
def test_looksam(base):
    """Replays count as steps; those of one pass reuse what the replays of two have remembered."""
    models, opts = twins(LookSAM, base, k=3, rho=0.2)
    counted = Counted()
    graphed = GraphedStep(models[0], counted, opts[0], data(0))
    assert opts[0].param_groups[0]["looks"] == 0
    passes = []
    for t in range(7):
        passes.append(opts[0].passes)
        graphed(*data(t))
        eager_step(models[1], opts[1], data(t))
        assert_equal(*models)
        assert_same_state(*opts)
        assert opts[0].param_groups[0]["looks"] == t + 1
    assert passes == [2, 1, 1, 2, 1, 1, 2]
    assert counted.calls == 4 * (2 + 1)
    assert opts[0].state[models[0][0].weight]["orthogonal_gradient"].any()
    eager_step(models[0], opts[0], data(9))  # one of one pass, eagerly
    graphed(*data(10))
    for t in (9, 10):
        eager_step(models[1], opts[1], data(t))
    assert_equal(*models)


@where
@pytest.mark.usefixtures("captures")
def test_a_history_that_comes_late_has_other_memory():
    """Before LookSAM is active there is none; plain steps are then captured anew, as theirs was let go of."""
    models, opts = twins(LookSAM, k=2)
    for opt in opts:
        opt.active = False
    counted = Counted()
    graphed = GraphedStep(models[0], counted, opts[0], data(0))
    for t, active in enumerate([False, False, True, False, True, False]):
        for opt in opts:
            opt.active = active
        graphed(*data(t))
        eager_step(models[1], opts[1], data(t))
        assert_equal(*models)
        assert_same_state(*opts)
    assert counted.calls == 4 * (1 + 2 + 1 + 1)


@where
@pytest.mark.usefixtures("captures")
def test_a_capture_in_the_midst_of_training_trains_nothing():
    """Its warm-up neither moves weights, state or running statistics, nor draws or counts."""
    model = network().bfloat16()
    opt = LookSAM(model.parameters(), lr=0.05, momentum=0.9, k=2, backend="cuda", model=model)
    x, y = data(0)
    batch = x.bfloat16(), y
    graphed = GraphedStep(model, loss_fn, opt, batch)
    graphed(*batch)
    before = copy.deepcopy((model.state_dict(), opt.state_dict()))
    torch.manual_seed(5)
    graphed._make(graphed._kind())
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    after = model.state_dict(), opt.state_dict()
    assert all(torch.equal(value, before[0][name]) for name, value in after[0].items())
    assert after[1]["param_groups"] == before[1]["param_groups"]
    for entry, kept in zip(after[1]["state"].values(), before[1]["state"].values(), strict=True):
        assert all(torch.equal(value, kept[key]) for key, value in entry.items())
    assert opt.skipped_steps == 0


@where
@pytest.mark.usefixtures("captures")
def test_a_plain_step_at_a_learning_rate_of_0():
    """It draws no random bits and counts for nothing: a capture of its own, or all later steps would draw the same."""
    models, opts = twins(LookSAM, k=3, seed=3)
    for model in models:
        model.bfloat16()
        model.append(nn.Identity())
    graphed = None
    for t, lr in enumerate([0.05, 0.0, 0.05, 0.05, 0.0, 0.05]):
        batch = data(t)[0].bfloat16(), data(t)[1]
        graphed = graphed or GraphedStep(models[0], loss_fn, opts[0], batch)
        for opt in opts:
            opt.param_groups[0]["lr"] = lr
        graphed(*batch)
        eager_step(models[1], opts[1], batch)
        states = [opt.state_dict()["param_groups"][0] for opt in opts]
        assert states[0]["looks"] == states[1]["looks"]
        assert states[0]["rounded_steps"] == states[1]["rounded_steps"]
        assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))


@where
@pytest.mark.usefixtures("captures")
def test_what_gradients_decide_is_refused():
    models, opts = twins(SAM)
    graphed = GraphedStep(models[0], loss_fn, opts[0], data(0))
    for opt in opts:
        schedules.LargeGradients(opt, 10)
    with pytest.raises(RuntimeError, match=r"optimizer.decide is set.*use optimizer.step\(closure\)"):
        graphed(*data(0))
    with pytest.raises(RuntimeError, match="decide is set"):
        GraphedStep(models[1], loss_fn, opts[1], data(0))
    opts[0].decide = None
    graphed(*data(0))
