"""What is compared: optimizers of the family, each over a task's base optimizer and with its network, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bsam_fused import BSAM, GSAM, SAM, WSAM, FriendlySAM, LookSAM, MixedSAM
from bsam_fused.losses import bisam_log_loss
from bsam_fused.schedules import LargeGradients, LatePhase

BASE = "base"
"""The method that is the base optimizer alone: it has no radius."""


class Base(NamedTuple):
    """A base optimizer and its options."""

    build: type[torch.optim.Optimizer]
    options: dict[str, Any]


LossFunction = Callable[[Tensor, Tensor], Tensor]

Policy = Callable[[Any, int], Any]
"""From an optimizer and its steps in all to what is stepped after each of them, and says which perturb."""


@dataclass(frozen=True)
class Method:
    """How an optimizer is built of a network, a base and a radius."""

    build: Callable[[nn.Module, Base, float], Any]
    passes: float
    """Of a step, the mean over training; AE-SAM's, which depends on the gradients, as its authors intend it."""
    policy: Policy | None = None
    ascent: LossFunction | None = None
    """The loss whose gradient is climbed; None: that of training."""


def _base(network: nn.Module, base: Base, rho: float) -> torch.optim.Optimizer:
    return base.build(network.parameters(), **base.options)


def _built(kind: Callable[..., Any], **options: Any) -> Callable[[nn.Module, Base, float], Any]:
    """Return what builds an optimizer of the family with these options."""

    def build(network: nn.Module, base: Base, rho: float) -> Any:
        return kind(network.parameters(), base.build, rho=rho, model=network, **options, **base.options)

    return build


def _norm_layers(network: nn.Module, base: Base, rho: float) -> SAM:
    """SAM-ON (arXiv 2306.04226): normalization layers alone are perturbed."""
    layers = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    norms = [p for module in network.modules() if isinstance(module, layers) for p in module.parameters()]
    rest = [p for p in network.parameters() if all(p is not norm for norm in norms)]
    groups: list[dict[str, Any]] = [{"params": norms}, {"params": rest, "perturb": False}]
    return SAM(groups, base.build, rho=rho, model=network, **base.options)


def _without_rescaling(network: nn.Module, base: Base, rho: float) -> MixedSAM:
    """Extrapolated BSAM whose c is 1: d = g + g_max − ĝ_min = (1 + r) g_max − r g, r = ρ_min / ρ = lr / lr_0."""

    def mix(_: Any) -> tuple[float, float]:
        r = optimizer.param_groups[0]["lr"] / base.options["lr"]
        return -r, 1 + r

    optimizer: MixedSAM = _built(MixedSAM, mix=mix)(network, base, rho)
    return optimizer


def _late(share: float) -> Policy:
    """Return the policy of perturbing in the last ``share`` of training (arXiv 2410.10373)."""
    return partial(LatePhase, start=1 - share)


_SAM, _BSAM = _built(SAM), _built(BSAM)
METHODS: dict[str, Method] = {
    BASE: Method(_base, 1),
    "SAM": Method(_SAM, 2),
    "BSAM": Method(_BSAM, 3),
    "BSAM extrapolated": Method(_built(BSAM, descent="extrapolate"), 2),
    "WSAM": Method(_built(WSAM, gamma=2 / 3), 2),
    "BSAM, last 50 %": Method(_BSAM, 2.0, _late(0.5)),
    "BSAM, last 25 %": Method(_BSAM, 1.5, _late(0.25)),
    "BSAM, last 10 %": Method(_BSAM, 1.2, _late(0.1)),
    "SAM, last 50 %": Method(_SAM, 1.5, _late(0.5)),
    "ASAM": Method(_built(SAM, adaptive=True, eta=0.01), 2),
    "BiSAM": Method(_SAM, 2, ascent=bisam_log_loss),
    "GSAM": Method(_built(GSAM), 2),
    "AE-SAM": Method(_SAM, 1.5, LargeGradients),
    "LookSAM": Method(_built(LookSAM, k=5), 1.2),
    "FriendlySAM": Method(_built(FriendlySAM), 2),
    "SAM, norm layers": Method(_norm_layers, 2),
    "BSAM from w_min": Method(_built(BSAM, update_from="w_min"), 3),
    "BSAM, ρ_min stays": Method(_built(BSAM, rho_min_decay="none"), 3),
    "BSAM extrapolated, c = 1": Method(_without_rescaling, 2),
}


def training_loss(output: Tensor, y: Tensor, loss: LossFunction = cross_entropy) -> Tensor:
    """Return the mean loss of an output of shape (..., classes), by default cross-entropy, and labels (...)."""
    return loss(output.flatten(0, -2), y.flatten())
