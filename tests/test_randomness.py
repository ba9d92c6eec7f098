"""same_randomness: all passes of a step draw the same, and the generators go on as after one pass."""

import pytest
import torch
from torch import nn

from bsam_fused import BSAM, SAM

PASSES = {SAM: 2, BSAM: 3}


@pytest.fixture(params=PASSES)
def kind(request):
    return request.param


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 64), nn.Dropout(0.5)
        self.masks = []

    def forward(self, x):
        y = self.drop(self.linear(x))
        self.masks.append(y != 0)
        return y

    def run(self, x):
        loss = self(x).square().mean()
        loss.backward()
        return loss


@pytest.mark.parametrize("how", ["closure", "one_pass"])
def test_masks_are_equal_across_passes_and_differ_across_steps(kind, how):
    """And the generator goes on as after one pass."""
    torch.manual_seed(0)
    net, x = Noisy(), torch.randn(3, 4)
    opt = kind(net.parameters(), lr=0.01, rho=0.1, model=net, same_randomness=True)
    for step in range(2):
        if how == "closure":
            opt.step(lambda: net.run(x))
        else:
            for call in opt._calls:
                with opt.one_pass():
                    net.run(x)
                getattr(opt, call)()
        masks = net.masks[step * PASSES[kind] :]
        assert len(masks) == PASSES[kind]
        assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert not torch.equal(net.masks[0], net.masks[-1])
    ours = torch.rand(3)
    torch.manual_seed(0)
    plain, x = Noisy(), torch.randn(3, 4)
    for _ in range(2):
        plain(x)
    assert torch.equal(ours, torch.rand(3))
    assert torch.equal(plain.masks[1], net.masks[-1])


def test_without_it_masks_differ(kind):
    net, x = Noisy(), torch.randn(3, 4)
    kind(net.parameters(), lr=0.01, rho=0.1, model=net).step(lambda: net.run(x))
    assert not torch.equal(net.masks[0], net.masks[1])


def test_same_randomness_by_hand_needs_one_pass(kind):
    net, x = Noisy(), torch.randn(3, 4)
    opt = kind(net.parameters(), lr=0.01, rho=0.1, same_randomness=True)
    for inside in range(len(opt._calls)):
        for i, call in enumerate(opt._calls[: inside + 1]):
            if i < inside:
                with opt.one_pass():
                    net.run(x)
                getattr(opt, call)()
            else:
                net.run(x)
                with pytest.raises(RuntimeError, match=rf"{call}\(\) with same_randomness=True.*one_pass"):
                    getattr(opt, call)()
        opt.restore()
