"""A base that wraps another optimizer keeps state where no checkpoint of ours finds it: refused, with the reason."""

from collections import OrderedDict, defaultdict

import pytest
import pytorch_optimizer
import torch
from test_owners import every_kind, made
from twins import KINDS

import bsam_fused


class Shared(torch.optim.Optimizer):
    """Shows the inner one's groups and state as its own."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner, self.defaults = inner, inner.defaults
        self.param_groups, self.state = inner.param_groups, inner.state

    def step(self, closure=None):
        return self.inner.step(closure)


class Apart(torch.optim.Optimizer):
    """timm's pattern: the inner one's groups, a state of its own that begins empty, and no super().__init__()."""

    def __init__(self, base_optimizer):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self._base_optimizer = base_optimizer
        self.param_groups, self.defaults = base_optimizer.param_groups, base_optimizer.defaults
        self.state = defaultdict(dict)

    def step(self, closure=None):
        return self._base_optimizer.step(closure)


class Listed(torch.optim.Optimizer):
    """Several, one a group or kind of parameter, in a list."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, dict(inner.defaults))
        self.optimizers = [inner]

    def step(self, closure=None):
        for inner in self.optimizers:
            inner.step()


class Named(Listed):
    """The same, by name."""

    def __init__(self, inner):
        super().__init__(inner)
        self.optimizers = {"all": inner}

    def step(self, closure=None):
        for inner in self.optimizers.values():
            inner.step()


class Paired(Listed):
    """The same, in a tuple."""

    def __init__(self, inner):
        super().__init__(inner)
        self.optimizers = (inner, inner)


class Built(torch.optim.Optimizer):
    """Makes the inner one itself."""

    def __init__(self, params, lr):
        params = list(params)
        super().__init__(params, {"lr": lr})
        self.fast = torch.optim.SGD(params, lr=lr, momentum=0.9)

    def step(self, closure=None):
        return self.fast.step(closure)


WRAPPERS = {
    **{kind.__name__: kind for kind in (Shared, Apart, Listed, Named, Paired)},
    "pytorch_optimizer's": pytorch_optimizer.Lookahead,
}


def options_of(optimizer):
    return [set(group) for group in optimizer.param_groups]


@every_kind
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.AdamW])
def test_an_instance_that_wraps_another(kind, wrapper, inner):
    p = made(5)
    base = inner([p], lr=0.1)
    wrapped = WRAPPERS[wrapper](base)
    before = options_of(base)
    with pytest.raises((TypeError, ValueError), match=rf"{type(wrapped).__name__}.*wrap.*{inner.__name__}"):
        KINDS[kind][0]([p], wrapped)
    assert options_of(base) == before  # goes on without ours
    p.grad = torch.ones_like(p)
    wrapped.step()
    KINDS[kind][0]([p], base)  # what the message advises: the inner one


@every_kind
def test_a_class_that_makes_the_one_it_wraps(kind):
    with pytest.raises((TypeError, ValueError), match=r"Built.*wrap.*SGD"):
        KINDS[kind][0]([made(5)], Built, lr=0.1)


def test_what_only_looks_like_it():
    """A scheduler, a model or a note of the class in an optimizer's attributes are no inner optimizer."""

    class Innocent(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr=lr)
            self.kind, self.model, self.history = torch.optim.Adam, torch.nn.Linear(2, 2), [1.0, None]

    p = made(5)
    optimizer = bsam_fused.SAM([p], Innocent, lr=0.1, rho=0.0)
    w = p.detach().clone()
    for call in optimizer._calls:
        p.grad = torch.ones_like(p)
        getattr(optimizer, call)()
    torch.testing.assert_close(p.detach(), w - 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([p], lr=0.1), 1)  # hangs itself onto its optimizer
    bsam_fused.SAM([p], schedule.optimizer)
