"""Which base optimizers have a fused update, their scalars, and their state as views of flat buffers."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsam_fused import distributed
from bsam_fused.ops import contract
from bsam_fused.ops.contract import MASTER_WEIGHT, AdamScalars, FlatParams, SGDScalars

Group = dict[str, Any]


class FusedRule(NamedTuple):
    """How a base optimizer is fused."""

    operator: str
    """The update's name in `contract.FlatParams`."""
    keys: tuple[str, ...]
    """Its state's keys in torch.optim, in torch's order."""
    always: bool
    """Whether every updated parameter has state; the base takes a parameter without any as one that begins."""
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
    torch.optim.SGD: FusedRule("update_sgd", ("momentum_buffer",), False, _sgd),
    torch.optim.Adam: FusedRule("update_adam", _ADAM_KEYS, True, lambda group: _adam(group, decoupled=False)),
    torch.optim.AdamW: FusedRule("update_adam", _ADAM_KEYS, True, lambda group: _adam(group, decoupled=True)),
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


def adopt(
    flat: FlatParams, state: MutableMapping[Tensor, dict[str, Any]], rule: FusedRule, *, cleared: bool = False
) -> None:
    """Bring the base optimizer's state into the flat buffers, and view it there under torch's keys.

    Tensors that are views of the buffers already stay. Parameters without state get none; where state that was
    there is ``cleared``, its buffers are too.

    Raises:
        ValueError: a state has another shape than its parameter, by name.
    """
    views = {key: flat.state(key) for key in rule.keys if _has(flat, state, key)}
    steps = flat.state("step")
    for i, param in enumerate(flat.params):
        held = state.get(param, {})
        if any(held.get(key) is None for key in rule.keys):
            if cleared:
                flat.clear_state(i)
            continue
        for key, buffers in views.items():
            given = torch.as_tensor(held[key])
            if given.shape != buffers[i].shape:
                name = contract.describe(param, flat.places[i])
                raise ValueError(f"{name} has state {key} of shape {tuple(given.shape)}: load a matching state dict")
            if _address(given) != _address(buffers[i]):
                buffers[i].copy_(given)
                held[key] = buffers[i]
                if "step" not in rule.keys:
                    steps[i].fill_(1.0)


def adopt_masters(flat: FlatParams, state: MutableMapping[Tensor, dict[str, Any]], rule: FusedRule) -> None:
    """Bring master weights into a flat buffer, likewise; where there are none yet, the update makes them."""
    for param, master in zip(flat.params, flat.state(MASTER_WEIGHT), strict=True):
        given = state.get(param, {}).get(MASTER_WEIGHT)
        if given is not None and _address(given) != _address(master):
            master.copy_(given)
        if given is not None or not rule.always:
            state[param][MASTER_WEIGHT] = master


def _address(tensor: Tensor) -> int:
    return distributed.local(tensor).data_ptr()


def _has(flat: FlatParams, state: MutableMapping[Tensor, dict[str, Any]], key: str) -> bool:
    return any(state.get(param, {}).get(key) is not None for param in flat.params)


def publish(
    flat: FlatParams, state: MutableMapping[Tensor, dict[str, Any]], keys: Sequence[str], begun: Sequence[int]
) -> None:
    """Put the state ``keys`` of the parameters ``begun`` under these keys, which are torch's."""
    if not begun:
        return
    views = {key: flat.state(key) for key in keys}
    for i in begun:
        state[flat.params[i]].update({key: buffers[i] for key, buffers in views.items()})


def retract(flat: FlatParams, state: MutableMapping[Tensor, dict[str, Any]], rule: FusedRule) -> None:
    """Take back the state of parameters whose every update was skipped: on a GPU `publish` could not know.

    Until then SGD's rule for a first step would be lost to whoever takes the state on. Waits for a GPU.
    """
    updates = torch.stack(flat.state("step")).tolist()
    for i, (param, count) in enumerate(zip(flat.params, updates, strict=True)):
        if count == 0 and all(state.get(param, {}).get(key) is not None for key in rule.keys):
            del state[param]
            flat.clear_state(i)


def with_steps_on_host(state: dict[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """Return a state in which "step" is on the CPU, where torch's Adam keeps it and reads it. Waits for a GPU."""
    on_device = {k: v["step"] for k, v in state.items() if isinstance(v.get("step"), Tensor) and not v["step"].is_cpu}
    if not on_device:
        return state
    home = next(iter(on_device.values())).device
    steps = torch.stack([step.to(home) for step in on_device.values()]).cpu()
    return {**state, **{k: {**state[k], "step": step} for k, step in zip(on_device, steps, strict=True)}}
