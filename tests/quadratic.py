"""A quadratic loss of several parameters, and steps by hand with prescribed gradients."""

import torch
from members import calls
from samples import assign
from torch import nn


def parameters(sizes=(7, 5, 4)):
    return [nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in sizes]


def twins(sizes=(7, 5, 4)):
    params = parameters(sizes)
    return params, [nn.Parameter(p.detach().clone()) for p in params]


def walk(opt, params, *passes):
    """A step by hand with these gradients."""
    for call, grads in zip(calls(opt), passes, strict=True):
        assign(params, grads)
        getattr(opt, call)()


def assert_alike(params, others, rtol=1e-11):
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=rtol, atol=rtol)


class Quadratic:
    """½ wᵀ H w + bᵀ w of all parameters together; ``coupled``: with H between them."""

    def __init__(self, sizes=(7, 5, 4), coupled=True):
        n = sum(sizes)
        h = torch.randn(n, n, dtype=torch.float64)
        blocks = torch.block_diag(*(torch.ones(k, k, dtype=torch.float64) for k in sizes))
        self.sizes, self.hessian = sizes, (h + h.T) * (1.0 if coupled else blocks)
        self.slope = torch.randn(n, dtype=torch.float64)

    def gradient(self, w):
        return self.hessian @ w + self.slope

    def step(self, opt, params):
        """A step by hand; every pass has the gradient at the weights that there are then."""
        for call in calls(opt):
            assign(params, self.gradient(flat(params)).split(self.sizes))
            getattr(opt, call)()


def flat(tensors):
    return torch.cat([t.detach() for t in tensors])
