"""What a run begins with: parameters, param groups, base optimizers."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import nn

from .model import ALPHA, GAMMA, LMBDA, SIGMA, K

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""Of a step's result, relative to 1 + |value|: roundings, and far less than a wrong formula."""


class Leaf(NamedTuple):
    """A parameter to be."""

    shape: tuple[int, ...] = (3,)
    layout: str = "plain"
    dtype: str = "float64"
    frozen: bool = False
    group: int = 0


LAYOUTS = {
    "plain": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() >= 2 else t,
    "gaps": lambda t: torch.stack([t, t], -1)[..., 0],  # every other element of its memory
}
# Empty, 0-dim, more than the 4 KB up to which gradients are copied anyway, and small ones of any number of dimensions.
SHAPES = [(3,), (), (0,), (4, 5), (2, 3, 4, 3), (1100,), (1,), (0, 4)]


def values(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameter(leaf, seed):
    data = LAYOUTS[leaf.layout](values(leaf.shape, getattr(torch, leaf.dtype), seed))
    return nn.Parameter(data, requires_grad=not leaf.frozen)


class Counting(torch.optim.RMSprop):
    """Not fused, and with a string key in its state."""

    raising = False

    def step(self, closure=None):
        self.state["calls"] = torch.as_tensor(self.state.get("calls", 0)) + 1
        if Counting.raising:
            for p in (p for group in self.param_groups for p in group["params"] if p.requires_grad):
                p.data.add_(1.0)
            raise ArithmeticError("raised by the base")
        return super().step(closure)

    def train(self):
        """Have other weights, as Schedule-Free has to train and to evaluate."""
        for p in (p for group in self.param_groups for p in group["params"]):
            p.data.neg_()

    eval = train


# eps as large as d makes what is divided by √v no more sensitive than the rest: tolerances stay small.
BASES = {
    "SGD": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "dampened": (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.5, "maximize": True}),
    "Adam": (torch.optim.Adam, {"betas": (0.8, 0.9), "eps": 0.1, "weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"betas": (0.8, 0.9), "eps": 0.1, "weight_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9, "eps": 0.1}),
    "Counting": (Counting, {"eps": 0.1}),
}

leaves = st.builds(
    Leaf,
    st.sampled_from(SHAPES),
    st.sampled_from(list(LAYOUTS)),
    st.sampled_from(["float64", "float32", "bfloat16"]),
    st.sampled_from([False, False, False, True]),
    st.integers(0, 1),
)
group_options = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.sampled_from([0.1, 0.01]),
        "rho": st.sampled_from([0.0, 0.5, 2.0]),
        "adaptive": st.booleans(),
        "weight_decay": st.sampled_from([0.0, 0.2]),
        "maximize": st.booleans(),
        "perturb": st.booleans(),
        "loss_budget": st.sampled_from([None, 0.5]),
    },
)
PLAIN = {"rho": 0.05, "adaptive": False, "eta": 0.0}
BILATERAL = {**PLAIN, "rho_min": None, "rho_min_decay": "lr", "rho_min_end": 0.0, "rho_min_lr_end": 0.0}
DEFAULTS = {
    "SAM": PLAIN,
    "ASAM": {"rho": 0.5, "adaptive": True, "eta": 0.01},
    "GSAM": PLAIN,
    "WSAM": PLAIN,
    "BSAM": BILATERAL,
    "extrapolated BSAM": BILATERAL,
    "LookSAM": {**PLAIN, "looks": 0},
    "FriendlySAM": PLAIN,
}
OWN = {
    "GSAM": {"alpha": ALPHA},
    "WSAM": {"gamma": GAMMA},
    "extrapolated BSAM": {"descent": "extrapolate"},
    "LookSAM": {"alpha": ALPHA, "k": K},
    "FriendlySAM": {"sigma": SIGMA, "lmbda": LMBDA},
}
"""What a kind's class is told beside what all are."""


def completed(kind, group):
    """A param group with the sharpness-aware options that it lacks."""
    options = {"lr": 0.1, "maximize": False, "perturb": True, "loss_budget": None, **DEFAULTS[kind], **group}
    if "rho_min" in options:
        options.setdefault("given_lr", options["lr"])
        options.setdefault("largest_lr", 0.0)
        options["rho_min"] = options["rho"] if options["rho_min"] is None else options["rho_min"]
    return options
