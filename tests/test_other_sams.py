"""Checkpoints of other SAM implementations: what is in them, and training that goes on as theirs does."""

import copy
import io
import warnings

import pytest
import torch
from pytorch_optimizer.optimizer.sam import SAM as PackagedSAM
from torch import nn

from bsam_fused import SAM

pytestmark = pytest.mark.usefixtures("one_thread")


class Davda54SAM(torch.optim.Optimizer):
    """As davda54's class behaves: groups are its base's, w is left in its state, the base keeps its own to itself."""

    def __init__(self, params, base_optimizer, rho=0.05, adaptive=False, **kwargs):
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        weighted = [(p.abs() if g["adaptive"] else 1.0) * p.grad for g in self.param_groups for p in g["params"]]
        norm = torch.stack([x.norm() for x in weighted]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.clone()
                p.add_((p.square() if group["adaptive"] else 1.0) * p.grad * group["rho"] / (norm + 1e-12))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old_p"])
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


class OlderSAM(Davda54SAM):
    """Its first version, which kept the perturbation and took it off again."""

    def second_step(self, zero_grad=False):
        super().second_step(zero_grad)
        for entry in self.state.values():
            entry["e_w"] = entry.pop("old_p")


THEIRS = {"davda54": Davda54SAM, "older davda54": OlderSAM, "pytorch_optimizer": PackagedSAM}
BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5}),
}


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def train(net, opt, steps):
    for t in steps:
        x = torch.randn(16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        for call in (opt.first_step, opt.second_step):
            (net(x) - x[:, :3].sin()).square().mean().backward()
            call(zero_grad=True)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("theirs", THEIRS)
def test_goes_on_as_theirs_does(theirs, base, adaptive):
    """Ours loads the file as it is, theirs likewise: both go on alike, with the saved radius and learning rate."""
    kind, (base_kind, options) = THEIRS[theirs], BASES[base]
    net = network()
    before = kind(net.parameters(), base_kind, rho=0.2, adaptive=adaptive, **options)
    train(net, before, range(5))
    before.param_groups[0]["lr"] *= 0.5
    saved, weights = through_a_file(before.state_dict()), copy.deepcopy(net.state_dict())

    resumed, mine = network(), network()
    resumed.load_state_dict(weights), mine.load_state_dict(weights)
    again = kind(resumed.parameters(), base_kind, rho=0.05, **options)
    opt = SAM(mine.parameters(), base_kind, rho=0.05, **options)
    again.load_state_dict(copy.deepcopy(saved))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.load_state_dict(saved)
    if theirs == "pytorch_optimizer":
        assert not caught
    else:
        assert ["begin anew" in str(w.message) for w in caught] == [True]
        assert caught[0].filename == __file__
    assert not any({"old_p", "e_w"} & entry.keys() for entry in opt.state_dict()["state"].values())
    train(resumed, again, range(5, 12))
    train(mine, opt, range(5, 12))
    for p, q in zip(mine.parameters(), resumed.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("base", BASES)
def test_with_the_bases_state_nothing_is_lost(base):
    """davda54's own resume begins momentum anew; what its base saves has all, radii included: as if not stopped."""
    base_kind, options = BASES[base]
    net = network()
    theirs = Davda54SAM(net.parameters(), base_kind, rho=0.2, **options)
    train(net, theirs, range(5))
    mine = network()
    mine.load_state_dict(net.state_dict())
    opt = SAM(mine.parameters(), base_kind, rho=0.05, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(through_a_file(theirs.base_optimizer.state_dict()))
    train(net, theirs, range(5, 12))
    train(mine, opt, range(5, 12))
    for p, q in zip(mine.parameters(), net.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
