"""Gradients of every origin: autograd's own, other people's, odd ones, broken ones."""

import math
import weakref

import torch
from hypothesis import strategies as st

from .setups import values

KINDS = (
    "held",
    "storage",
    "weak",
    "none",
    "nan",
    "inf",
    "aliased",
    "strided",
    "expanded",
    "numpy",
    "reused",
    "of_weight",
    "of_another",
    "of_state",
    "bucket",
    "negated",
    "zeros",
)

NO_GRADIENTS = dict.fromkeys(range(9), "none")
TINY = dict.fromkeys(range(9), "tiny")  # so short, all of a pass, that what is divided by them is beyond float32
faults = st.tuples(
    st.dictionaries(st.integers(0, 4), st.sampled_from([*KINDS, "nan", "nan"]), max_size=4),
    st.sampled_from([*9 * [False], True]),
).map(lambda drawn: TINY if drawn[1] else drawn[0])


class Gradients:
    """Gives parameters their gradients, and remembers those that are not the optimizer's to write to."""

    def __init__(self):
        self.buffers = {}  # NumPy's, one a parameter for all passes
        self.forget()

    def forget(self):
        self.held = {}  # by whose it is: what looks at it, None where it is gone, and what it must stay

    def assert_untouched(self):
        for look, kept in self.held.values():
            tensor = look()
            assert tensor is None or torch.equal(tensor, kept), "a gradient that somebody else holds was written to"

    def give(self, params, optimizer, seed, kinds):
        """A gradient of its own for each of ``params``, {index: parameter}, but where ``kinds`` says otherwise."""
        taken = None
        for i, p in params.items():
            g = values(p.shape, p.dtype, 100 * seed + i)
            kind = kinds.get(i, "own")
            g = (
                taken
                if kind == "aliased" and _fits(taken, p)
                else getattr(self, f"_{kind}", self._own)(g, p, i, optimizer)
            )
            p.grad = g
            taken = g if g is not None else taken

    def _own(self, g, p, i, optimizer):
        return torch.empty_like(p, requires_grad=False).copy_(g)

    def _hold(self, g, look=None, owner=None):
        self.held[object() if owner is None else owner] = look or (lambda: g), g.clone()
        return g

    def _held(self, g, p, i, optimizer):
        return self._hold(self._own(g, p, i, optimizer))

    def _storage(self, g, p, i, optimizer):
        """Its memory alone is held."""
        g = self._own(g, p, i, optimizer)
        storage, like = g.untyped_storage(), torch.empty_like(g)
        return self._hold(g, lambda: like.new_empty(0).set_(storage, 0, like.shape, like.stride()))

    def _weak(self, g, p, i, optimizer):
        g = self._own(g, p, i, optimizer)
        return self._hold(g, weakref.ref(g))

    def _tiny(self, g, p, i, optimizer):
        return self._own(1e-60 * g, p, i, optimizer)

    def _none(self, g, p, i, optimizer):
        return None

    def _nan(self, g, p, i, optimizer, value=math.nan):
        g = self._own(g, p, i, optimizer)
        if g.numel():
            g[(-1,) * g.dim()] = value
        return g

    def _inf(self, g, p, i, optimizer):
        return self._nan(g, p, i, optimizer, math.inf)

    def _aliased(self, g, p, i, optimizer):
        return self._held(g, p, i, optimizer)

    def _strided(self, g, p, i, optimizer):
        return torch.stack([g, g], -1)[..., 0]

    def _expanded(self, g, p, i, optimizer):
        return self._hold(values((), p.dtype, i).expand(p.shape))

    def _numpy(self, g, p, i, optimizer):
        return self._held(g, p, i, optimizer) if p.dtype == torch.bfloat16 else self._array_of(g.numpy().copy())

    def _reused(self, g, p, i, optimizer):
        if p.dtype == torch.bfloat16:
            return self._held(g, p, i, optimizer)
        owner = i, p.dtype
        buffer = self.buffers.setdefault(owner, g.numpy().copy())
        buffer[...] = g.numpy()
        return self._array_of(buffer, owner)

    def _array_of(self, array, owner=None):
        """The memory is NumPy's, and no tensor says so."""
        return self._hold(torch.from_numpy(array), lambda: torch.from_numpy(array), owner)

    def _of_weight(self, g, p, i, optimizer):
        return p.detach()

    def _of_another(self, g, p, i, optimizer):
        """Another parameter, if one is like this: perhaps of another param group, and so of another kind."""
        params = [q for group in optimizer.param_groups for q in group["params"]]
        others = [q for q in params if q is not p and _fits(q, p)]
        return others[i % len(others)].detach() if others else self._own(g, p, i, optimizer)

    def _of_state(self, g, p, i, optimizer):
        """Not in Adam's count of steps, which torch's own Adam counts up before it reads gradients."""
        entry = {key: value for key, value in optimizer.state.get(p, {}).items() if key != "step"}
        return next((v for v in entry.values() if torch.is_tensor(v) and _fits(v, p)), self._own(g, p, i, optimizer))

    def _bucket(self, g, p, i, optimizer):
        flat = torch.cat([g.reshape(-1), g.reshape(-1)])
        return flat[: g.numel()].view(g.shape)

    def _negated(self, g, p, i, optimizer):
        return torch._neg_view(g)

    def _zeros(self, g, p, i, optimizer):
        return torch._efficientzerotensor(tuple(p.shape), dtype=p.dtype)


def _fits(g, p):
    return g is not None and (g.shape, g.dtype) == (p.shape, p.dtype)


def read(params):
    """{index: float64 copy} of the gradients that there are."""
    return {i: p.grad.detach().double().clone() for i, p in params.items() if p.grad is not None}
