"""The algorithms and base optimizers that are measured, and everyone who implements them. Needs torch alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import bsam_fused
from bsam_fused.ops.dispatch import Backend
from bsam_fused.report import device_foreach, foreach, loops
from bsam_fused.report.packaged import PackagedFriendlySAM, PackagedGSAM, PackagedSAM, PackagedWSAM

Build = Callable[[list[Tensor]], Any]
"""Makes an optimizer of parameters, whose methods are its algorithm's calls."""

RHO = 0.05
REFERENCE = "loops"
"""The papers' loops, which all others are compared with."""
BACKENDS: dict[str, tuple[Backend, ...]] = {"cpu": ("torch", "cpp"), "cuda": ("torch", "triton", "cuda")}
"""Device type -> backends, the one that matters last."""
PACKAGE = "pytorch_optimizer"
WORDS = {
    "alone": "torch's own optimizer, one pass a step: what the others are measured against",
    REFERENCE: "the papers' formulas in plain Python, a tensor at a time",
    "foreach": "the same as a careful engineer writes it, by torch's operations on lists of tensors",
    PACKAGE: "SAM, GSAM, WSAM and Friendly SAM of the package of this name",
    "torch": "this package on torch's operations alone, without compiled code",
    "cpp": "this package's C++ kernels",
    "triton": "this package's Triton kernels",
    "cuda": "this package's CUDA kernels",
}
"""Implementation -> what it is."""


class Base(NamedTuple):
    """A base optimizer of torch."""

    kind: type[torch.optim.Optimizer]
    options: dict[str, Any]
    state: int
    """Elements of state that it keeps, in N."""

    def build(self, params: list[Tensor], **how: Any) -> torch.optim.Optimizer:
        """Return it over parameters; ``how``: fused or foreach."""
        return self.kind(params, **how, **self.options)


BASES = {
    "sgd": Base(torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}, 1),
    "adamw": Base(torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 1e-2}, 2),
}


class Algorithm(NamedTuple):
    """A sharpness-aware optimizer."""

    name: str
    stateless: int
    """Elements that a step must move over a base without state, in N (docs/design.md)."""
    extra: int
    """Elements that it keeps beside the base optimizer's, in N (docs/design.md)."""
    fused: Callable[..., Any]
    options: dict[str, Any]
    loops: type[loops.PlainSAM]
    foreach: type | None = None
    device_foreach: type | None = None
    packaged: Callable[..., Any] | None = None
    """Where `PACKAGE` has the same algorithm."""
    exempts: bool = False
    """Whether it leaves parameters of more than one dimension as they are: those of normalization layers have one."""

    @property
    def calls(self) -> tuple[str, ...]:
        """Its phases, one after each pass."""
        return self.loops.calls

    def moves(self, base: Base) -> int:
        """Return the elements that a step over ``base`` must move, in N: its state is read and written."""
        return self.stateless + 2 * base.state

    def perturbed(self, params: list[Tensor], perturb: bool = True) -> list[Tensor]:
        """Return the parameters that are perturbed, or the others."""
        return [p for p in params if (not self.exempts or p.dim() < 2) == perturb]

    def groups(self, params: list[Tensor]) -> list[dict[str, Any]]:
        """Return param groups of ours that say so."""
        groups = [{"params": self.perturbed(params, perturb), "perturb": perturb} for perturb in (True, False)]
        return [group for group in groups if group["params"]]


def _looksam_between(params: Any, base: type[torch.optim.Optimizer], **options: Any) -> bsam_fused.LookSAM:
    """Return LookSAM in the steps between, of which there is no end; v, which stays, is all ones."""
    optimizer = bsam_fused.LookSAM(params, base, k=sys.maxsize, **options)
    optimizer.param_groups[0]["looks"] = 1
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p]["orthogonal_gradient"] = p.new_ones(()).expand(p.shape)  # no memory of its own
    return optimizer


ALGORITHMS = {
    "sam": Algorithm(
        *("SAM", 9, 1, bsam_fused.SAM, {}),
        *(loops.PlainSAM, foreach.ForeachSAM, device_foreach.DeviceForeachSAM, PackagedSAM),
    ),
    "asam": Algorithm(
        *("ASAM", 10, 1, bsam_fused.ASAM, {"rho": RHO, "eta": 0.0}),
        *(loops.PlainASAM, None, None, partial(PackagedSAM, adaptive=True)),
    ),
    "bsam": Algorithm(  # the package's BSAM is another algorithm
        *("BSAM", 15, 2, bsam_fused.BSAM, {}),
        *(loops.PlainBSAM, foreach.ForeachBSAM, device_foreach.DeviceForeachBSAM),
    ),
    "extrapolated": Algorithm(
        *("BSAM, extrapolated", 11, 2, bsam_fused.BSAM, {"descent": "extrapolate"}),
        *(loops.PlainExtrapolated, foreach.ForeachExtrapolated, device_foreach.DeviceForeachExtrapolated),
    ),
    "gsam": Algorithm(
        *("GSAM", 11, 2, bsam_fused.GSAM, {"alpha": loops.PlainGSAM.alpha}),
        *(loops.PlainGSAM, foreach.ForeachGSAM, device_foreach.DeviceForeachGSAM, PackagedGSAM),
    ),
    "wsam": Algorithm(
        *("WSAM", 10, 2, bsam_fused.WSAM, {"gamma": loops.PlainWSAM.gamma}),
        *(loops.PlainWSAM, foreach.ForeachWSAM, device_foreach.DeviceForeachWSAM, PackagedWSAM),
    ),
    "looksam": Algorithm(  # the package's has norms and products a tensor at a time: another algorithm
        *("LookSAM, every k-th step", 13, 3, bsam_fused.LookSAM, {"k": 1}),
        *(loops.PlainLookSAM, foreach.ForeachLookSAM, device_foreach.DeviceForeachLookSAM),
    ),
    "looksam_between": Algorithm(
        *("LookSAM between", 6, 1, _looksam_between, {"alpha": loops.PlainLookSAM.alpha}),
        *(loops.PlainLookSAMBetween, foreach.ForeachLookSAMBetween, device_foreach.DeviceForeachLookSAMBetween),
    ),
    "friendly": Algorithm(
        *("Friendly SAM", 14, 3, bsam_fused.FriendlySAM),
        *({"sigma": loops.PlainFriendlySAM.sigma, "lmbda": loops.PlainFriendlySAM.lmbda}, loops.PlainFriendlySAM),
        *(foreach.ForeachFriendlySAM, device_foreach.DeviceForeachFriendlySAM, PackagedFriendlySAM),
    ),
    "norms": Algorithm(  # the package cannot leave parameters out of the norm
        *("SAM on normalization layers", 4, 0, bsam_fused.SAM, {}),
        *(loops.PlainSAM, foreach.ForeachSAM, device_foreach.DeviceForeachSAM, None, True),
    ),
}
"""By name. Bytes of the one on normalization layers are those of a network whose other parameters are nearly all."""


def implementations(
    algorithm: Algorithm, base: Base, device_type: str, model: nn.Module | None = None
) -> dict[str, Build]:
    """Return name -> build, for everyone who implements an algorithm on a kind of device.

    Args:
        algorithm: one of `ALGORITHMS`.
        base: one of `BASES`.
        device_type: "cpu" or "cuda".
        model: whose buffers our backends keep as the first pass leaves them; None: nobody's.

    Returns:
        "loops" first, the backend that matters last. What cannot be had here raises the reason when built.
    """
    found: dict[str, Build] = {
        REFERENCE: lambda params: algorithm.loops(algorithm.perturbed(params), base.build(params, foreach=False), RHO)
    }
    listed = algorithm.foreach if device_type == "cpu" else algorithm.device_foreach
    if listed is not None:
        found["foreach"] = lambda params: listed(algorithm.perturbed(params), base.build(params, fused=True), RHO)
    packaged = algorithm.packaged
    if packaged is not None:
        found[PACKAGE] = lambda params: packaged(params, base.kind, RHO, **base.options)
    return found | {backend: _fused(algorithm, base, backend, model) for backend in BACKENDS[device_type]}


def _fused(algorithm: Algorithm, base: Base, backend: Backend, model: nn.Module | None) -> Build:
    options = {"rho": RHO, "model": model, **algorithm.options, **base.options}
    return lambda params: algorithm.fused(algorithm.groups(params), base.kind, backend=backend, **options)


def reason(error: BaseException) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
