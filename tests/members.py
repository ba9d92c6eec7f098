"""Every member of the family, once: what tests that hold for all of them are parametrised by."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import reference as ref
import torch

from bsam_fused import ASAM, BSAM, GSAM, SAM, WSAM, FriendlySAM, LookSAM, MixedSAM


class Member(NamedTuple):
    """A class with the options that make the member, and the oracle of its direction."""

    kind: type
    direction: Callable
    """Of the passes' gradients, the parameters' options, and the history if there is one; tests/reference.py."""
    options: dict[str, Any]
    passes: int = 2
    """The most that a step of it takes."""
    exempt: bool = False
    """Whether every second param group is left out of the perturbation."""
    memory: ref.Memory | None = None
    """What it remembers."""

    @property
    def mixes(self):
        """Whether a step of several passes has a direction that is not the last gradient."""
        return self.direction not in {ref.sam, ref.looksam, ref.friendly_sam}

    @property
    def refuses_a_scaler(self):
        """Whether it goes by the lengths of the first pass's gradients."""
        return "loss_budget" in self.options or self.memory is ref.AVERAGED

    def passes_of(self, t):
        """How many passes the t-th step takes, from 0 on."""
        return 1 if t % self.options.get("k", 1) else self.passes

    def history(self, opt, params):
        """What it remembers of each parameter, in float64; zeros at first."""
        assert self.memory
        held = [opt.state.get(p, {}).get(self.memory.key) for p in params]
        return [(torch.zeros_like(p) if h is None else h).detach().double().clone() for p, h in zip(params, held)]

    def d(self, passes, options, history):
        """Its direction; the history counts where there is one."""
        return self.direction(passes, options, *([history] if self.memory else []))

    def groups(self, sets):
        """A param group a list of parameters."""
        return [{"params": ps, "perturb": not (self.exempt and i % 2)} for i, ps in enumerate(sets)]

    def build(self, params, base=torch.optim.SGD, **options):
        """An optimizer of ours; where some are exempt, every second parameter is."""
        params = list(params)
        sets = [params[::2], params[1::2]] if self.exempt and len(params) > 1 else [params]
        return self.kind(self.groups(sets), base, **{**self.options, **options})


def options_of(opt, params):
    """Of each parameter, its group's options."""
    return [{**group} for p in params for group in opt.param_groups if any(p is q for q in group["params"])]


def calls(opt):
    """The calls of the coming step by hand, one a pass; a plain base's, too."""
    return opt._calls[-opt.passes :] if hasattr(opt, "_calls") else ("step",)


def by_cosine(sums):
    """The more g and g_max point the same way, the more of g: a mix of all three sums."""
    cosine = sums.product / (sums.g * sums.g_max).sqrt()
    return cosine, 1 - cosine


EXTRAPOLATED = {"descent": "extrapolate", "rho": 0.3, "rho_min": 0.2}
MEMBERS = {
    "SAM": Member(SAM, ref.sam, {"rho": 0.3}),
    "ASAM": Member(ASAM, ref.sam, {"rho": 0.7, "eta": 0.05}),
    "BSAM": Member(BSAM, ref.bsam, {"rho": 0.3, "rho_min": 0.2, "rho_min_end": 0.05, "rho_min_lr_end": 0.001}, 3),
    "adaptive BSAM": Member(BSAM, ref.bsam, {"rho": 0.3, "rho_min": 0.2, "adaptive": True, "eta": 0.1}, 3),
    "extrapolated BSAM": Member(BSAM, ref.extrapolated_bsam, EXTRAPOLATED),
    "adaptive extrapolated BSAM": Member(BSAM, ref.extrapolated_bsam, {**EXTRAPOLATED, "adaptive": True, "eta": 0.1}),
    "GSAM": Member(GSAM, ref.gsam, {"rho": 0.3, "alpha": 0.4}),
    "adaptive GSAM": Member(GSAM, ref.gsam, {"rho": 0.3, "alpha": 0.7, "adaptive": True, "eta": 0.1}),
    "WSAM": Member(WSAM, ref.wsam, {"rho": 0.3, "gamma": 0.9}),
    "adaptive WSAM": Member(WSAM, ref.wsam, {"rho": 0.3, "gamma": 0.3, "adaptive": True, "eta": 0.1}),
    "MixedSAM": Member(MixedSAM, ref.given(by_cosine), {"rho": 0.3, "mix": by_cosine}),
    # Of the sample inputs' gradients, ‖g‖ is about 300: some groups' radii are cut, others' not.
    "SAM with a loss budget": Member(SAM, ref.sam, {"rho": 0.3, "loss_budget": 150.0}),
    # Every second step is of one pass.
    "LookSAM": Member(LookSAM, ref.looksam, {"rho": 0.3, "k": 2, "alpha": 0.6}, memory=ref.ORTHOGONAL),
    "FriendlySAM": Member(FriendlySAM, ref.friendly_sam, {"rho": 0.3, "sigma": 0.8, "lmbda": 0.7}, memory=ref.AVERAGED),
    "SAM, some exempt": Member(SAM, ref.sam, {"rho": 0.3}, exempt=True),
    "BSAM, some exempt": Member(BSAM, ref.bsam, {"rho": 0.3, "rho_min": 0.2}, 3, exempt=True),
    "GSAM, some exempt": Member(GSAM, ref.gsam, {"rho": 0.3, "alpha": 0.4}, exempt=True),
    "adaptive LookSAM, some exempt": Member(
        LookSAM,
        ref.looksam,
        {"rho": 0.3, "k": 2, "adaptive": True, "eta": 0.1},
        exempt=True,
        memory=ref.ORTHOGONAL,
    ),
    "adaptive FriendlySAM, some exempt": Member(
        FriendlySAM,
        ref.friendly_sam,
        {"rho": 0.3, "adaptive": True, "eta": 0.1},
        exempt=True,
        memory=ref.AVERAGED,
    ),
}
LONG_TESTED = {"SAM", "ASAM", "BSAM", "adaptive BSAM"}


def _few(name, *values):
    """An argument, or several, of a member; those that share their loops with others meet fewer other arguments."""
    # No divisor of the number of members, nor of any other argument, so that each meets others each time.
    marks = () if name in LONG_TESTED else pytest.mark.every(7)
    return pytest.param(*values, marks=marks, id="-pass".join(map(str, (name, *values[1:]))))


every_member = pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS)
some_of_each_member = pytest.mark.parametrize("member", [_few(name, member) for name, member in MEMBERS.items()])
each_pass = pytest.mark.parametrize(
    ("member", "at"),
    [_few(name, member, at) for name, member in MEMBERS.items() for at in range(1, member.passes + 1)],
)
