"""An optimizer of ours at radius zero, and torch's own beside it: d = g then, so what is done to both has to agree."""

import torch
from samples import assign, gradients
from torch import nn

import bsam_fused

KINDS = {"SAM": (bsam_fused.SAM, {"rho": 0.0}), "BSAM": (bsam_fused.BSAM, {"rho": 0.0, "rho_min": 0.0})}

# Of each base, options and those of a second group. The dampening shows whether a momentum begins or goes on.
BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}, {"lr": 0.03, "momentum": 0.5}),
    "Adam": (torch.optim.Adam, {"lr": 0.1, "eps": 1e-3}, {"lr": 0.03, "betas": (0.5, 0.6)}),
    "unfused": (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.9, "eps": 1e-3}, {"lr": 0.03, "momentum": 0.5}),
}


def ours(kind, base, groups, backend, **options):
    optimizer, radii = KINDS[kind]
    base_class, base_options, _ = BASES[base]
    return optimizer(groups, base_class, backend=backend, **{**base_options, **radii, **options})


def plain(base, groups, **options):
    base_class, base_options, _ = BASES[base]
    return base_class(groups, **{**base_options, **options})


def copies(params):
    return [nn.Parameter(p.detach().clone(), p.requires_grad) for p in params]


def trained(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(optimizer, t):
    """One step of whatever ``optimizer`` has in its groups now; every pass has the gradients of step ``t``."""
    params = trained(optimizer)
    frozen = [i for i, p in enumerate(params) if not p.requires_grad]
    for call in optimizer._calls if getattr(optimizer, "active", False) else ["step"]:
        assign(params, gradients(params, t, without=frozen))
        getattr(optimizer, call)()


def assert_alike(optimizer, params, twin, others):
    """Weights and state of two lists of parameters, ours and torch's."""
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-11, atol=1e-12, msg=lambda m, i=i: f"{i}: {m}")
        mine, theirs = optimizer.state.get(p, {}), twin.state.get(q, {})
        assert mine.keys() == theirs.keys(), i
        for key, value in theirs.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-11, atol=1e-12)
    assert optimizer.base_optimizer.state is optimizer.state
    assert optimizer.base_optimizer.param_groups is optimizer.param_groups
