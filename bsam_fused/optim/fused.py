"""Which base optimizers have a fused update, and their scalars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bsam_fused.ops.contract import AdamScalars, SGDScalars

Group = dict[str, Any]


class FusedRule(NamedTuple):
    """How a base optimizer is fused."""

    operator: str
    """The update's name in `contract.FlatParams`."""
    keys: tuple[str, ...]
    """Its state's keys in torch.optim, in torch's order."""
    scalars: Callable[[Group], SGDScalars | AdamScalars]
    """Reads a param group's options."""


def _sgd(group: Group) -> SGDScalars:
    return SGDScalars(
        float(group["lr"]),
        float(group["momentum"]),
        float(group["dampening"]),
        float(group["weight_decay"]),
        bool(group["nesterov"]),
        bool(group["maximize"]),
    )


def _adam(group: Group, decoupled: bool) -> AdamScalars:
    beta1, beta2 = group["betas"]
    return AdamScalars(
        float(group["lr"]),
        float(beta1),
        float(beta2),
        float(group["eps"]),
        float(group["weight_decay"]),
        bool(group.get("decoupled_weight_decay", decoupled)),
        bool(group["maximize"]),
    )


_ADAM_KEYS = ("step", "exp_avg", "exp_avg_sq")
_RULES = {
    torch.optim.SGD: FusedRule("update_sgd", ("momentum_buffer",), _sgd),
    torch.optim.Adam: FusedRule("update_adam", _ADAM_KEYS, lambda group: _adam(group, decoupled=False)),
    torch.optim.AdamW: FusedRule("update_adam", _ADAM_KEYS, lambda group: _adam(group, decoupled=True)),
}


def rule_for(base: torch.optim.Optimizer, wanted: str = "") -> FusedRule | None:
    """Return the fused rule of exactly torch's SGD, Adam or AdamW, None for what takes the general path.

    The general path is the base optimizer's own ``step()``: for other classes, amsgrad, differentiable
    optimizers, and where hooks or a learning-rate scheduler wait for the ``step()`` of the base itself.

    Raises:
        ValueError: there is none, but something is ``wanted`` that needs one.
    """
    hooked = base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks or "step" in vars(base)
    special = any(group.get("amsgrad") or group.get("differentiable") for group in base.param_groups)
    rule = None if hooked or special else _RULES.get(type(base))
    if rule is None and wanted:
        raise ValueError(
            f"{wanted} with base optimizer {type(base).__name__}: only torch's SGD, Adam and AdamW, without amsgrad "
            "and hooks of their own, are fused"
        )
    return rule
