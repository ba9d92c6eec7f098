"""Options count as they are when a phase begins, however they were changed since the one before."""

import numpy as np
import pytest
import torch

from bsam_fused import BSAM, SAM


def _at_w(params):
    for p in params:
        p.grad = torch.full_like(p, 3.0)


def _distance(params, weights):
    return float(torch.stack([(p.detach() - w).norm() for p, w in zip(params, weights, strict=True)]).norm())


def _ascend(optimizer, params):
    """Return how far `ascend` goes, with the step given up again."""
    weights = [p.detach().clone() for p in params]
    _at_w(params)
    optimizer.ascend()
    far = _distance(params, weights)
    optimizer.restore()
    return far


def _fill(value):
    value.fill(0.25) if isinstance(value, np.ndarray) else value.fill_(0.25)


CHANGES = {
    "another number": (0.5, lambda optimizer: optimizer.param_groups[0].update(rho=0.25)),
    "at the base": (0.5, lambda optimizer: optimizer.base_optimizer.param_groups[0].update(rho=0.25)),
    "a tensor in place": (torch.tensor(0.5), lambda optimizer: _fill(optimizer.param_groups[0]["rho"])),
    "an array in place": (np.array(0.5), lambda optimizer: _fill(optimizer.param_groups[0]["rho"])),
    "another group": (0.5, lambda o: o.base_optimizer.param_groups.__setitem__(0, {**o.param_groups[0], "rho": 0.25})),
    "the factor of all": (0.5, lambda optimizer: setattr(optimizer, "radius_factor", 0.5)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_radius(change):
    rho, make = CHANGES[change]
    params = [torch.rand(5, requires_grad=True), torch.rand(2, 3, requires_grad=True)]
    optimizer = SAM(params, lr=0.1)
    optimizer.param_groups[0]["rho"] = rho
    for _ in range(2):
        assert _ascend(optimizer, params) == pytest.approx(0.5, rel=1e-5)
    make(optimizer)
    for _ in range(2):
        assert _ascend(optimizer, params) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("betas", [[0.9, 0.99], (torch.tensor(0.9), 0.99)], ids=["list", "tensor"])
def test_betas_that_change_in_place(betas):
    ours, theirs = [torch.ones(4, requires_grad=True)], [torch.ones(4, requires_grad=True)]
    optimizer = SAM(ours, torch.optim.Adam, lr=0.1)
    optimizer.active = False
    plain = torch.optim.Adam(theirs, lr=0.1)
    optimizer.param_groups[0]["betas"] = betas
    for beta in (0.9, 0.5):
        betas[0].fill_(beta) if isinstance(betas, tuple) else betas.__setitem__(0, beta)
        plain.param_groups[0]["betas"] = (beta, 0.99)
        for params, each in ((ours, optimizer), (theirs, plain)):
            _at_w(params)
            params[0].grad *= beta  # so that its average counts
            each.step()
    torch.testing.assert_close(ours, theirs)


def test_an_option_that_cannot_be_used_is_told_every_time():
    params = [torch.rand(5, requires_grad=True)]
    optimizer = SAM(params, lr=0.1)
    optimizer.param_groups[0]["rho"] = -1.0
    for _ in range(2):
        _at_w(params)
        with pytest.raises(ValueError, match="rho=-1"):
            optimizer.ascend()


def test_between_phases():
    params = [torch.rand(5, requires_grad=True)]
    optimizer = BSAM(params, lr=0.1, rho=0.5, rho_min=0.5, rho_min_decay="none")
    for rho_min in (0.5, 0.125):
        weights = [p.detach().clone() for p in params]
        _at_w(params)
        optimizer.ascend()
        optimizer.param_groups[0]["rho_min"] = rho_min
        _at_w(params)
        optimizer.descend()
        assert _distance(params, weights) == pytest.approx(rho_min, rel=1e-5)
        optimizer.restore()


def test_a_group_that_is_put_back_is_noted_anew():
    """What a step writes into a group is written again after a trial step: ρ_min falls from the largest lr on, 1.0."""
    params = [torch.ones(3, requires_grad=True)]
    optimizer = BSAM(params, lr=0.1, rho=0.5, rho_min=0.5, descent="extrapolate")
    (group,) = optimizer.param_groups
    group["lr"] = 1.0
    before = dict(group)
    for _ in range(2):
        for call in optimizer._calls:
            _at_w(params)
            getattr(optimizer, call)()
        assert group["largest_lr"] == 1.0
        group.update(before)


def test_what_is_kept_does_not_grow():
    """With a factor of all radii that is another one in every step."""
    params = [torch.ones(3, requires_grad=True)]
    optimizer = SAM(params, lr=0.1)
    kept = []
    for i in range(1, 6):
        optimizer.radius_factor = i / 10
        _ascend(optimizer, params)
        kept.append(len(optimizer._read._made))
    assert kept[1:] == kept[:-1]
