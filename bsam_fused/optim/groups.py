"""Parameters, param groups and the base optimizer: put together and checked before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bsam_fused import checks
from bsam_fused.ops import contract
from bsam_fused.optim import names, trainers
from bsam_fused.schedules.radii import GIVEN_LR, LARGEST_LR

Group = dict[str, Any]
FORMAT = 1
"""Of our state dicts; those of 0.1 have none, and read as 1. To be raised where an older version would misread them."""

SAVED = {"bsam_fused_format": FORMAT, "rounded_steps": None}
"""What groups have beside options, as nothing else of a state dict gets through torch.distributed.checkpoint.

``rounded_steps`` is None but in state dicts, and until one that was loaded is noticed. Both are always there: torch
takes of a flattened dict what the groups have already.
"""


def build_base(
    owner: type,
    params: Iterable[Any],
    base: type[torch.optim.Optimizer] | torch.optim.Optimizer,
    base_kwargs: dict[str, Any],
    options: Iterable[str],
) -> torch.optim.Optimizer:
    """Return the base optimizer over ``params``.

    Args:
        owner: the sharpness-aware class.
        params: parameters, (name, parameter) pairs, or param groups, as torch.optim takes them.
        base: an optimizer class, or an instance over the same parameters.
        base_kwargs: options for the class.
        options: the names of the sharpness-aware options, which groups may carry.

    Raises:
        ValueError: no parameters, or an instance over other parameters.
        TypeError: ``params`` is something else, or ``base`` is no optimizer, needs a closure of its own (LBFGS), wraps
            another one (Lookahead), shards its parameters (ZeroRedundancyOptimizer), has no such option, or options
            came with an instance.
    """
    trainers.refuse_zero(base if isinstance(base, type) else type(base))
    if isinstance(params, Tensor):
        raise TypeError("params is a Tensor: pass an iterable of parameters or param groups")
    listed = _listed(params)
    if not listed:
        once = f" (a {type(params).__name__} goes once: has it been used up?)" if isinstance(params, Iterator) else ""
        raise ValueError(f"params is empty: pass model.parameters() of a model that has some{once}")
    if isinstance(listed[0], dict):
        listed = [dict(group, params=_listed(params_of(group, i), i)) for i, group in enumerate(listed)]
        if not any(group["params"] for group in listed):
            raise ValueError("params has groups, but no parameters in them: pass some")
    if isinstance(base, type) and issubclass(base, torch.optim.Optimizer):
        _refuse_closure(base)
        names.refuse_unknown(owner, base, base_kwargs)
        built = base(listed, **base_kwargs)
        _refuse_wrapper(built)
        return built
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(f"base_optimizer is {base!r}: pass a torch.optim.Optimizer class or instance")
    _refuse_closure(type(base))
    _refuse_wrapper(base)
    names.refuse_unknown(owner, type(base), base_kwargs)
    if base_kwargs:
        given = ", ".join(base_kwargs)
        raise TypeError(f"base_optimizer is an instance, so its options ({given}) cannot be given here: set them there")
    _merge(listed, base, set(options))
    return base


def _refuse_closure(base: type[torch.optim.Optimizer]) -> None:
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"base_optimizer {base.__name__} needs a closure of its own, which evaluates the loss at other weights "
            "than the sharpness-aware step: use a first-order optimizer, such as SGD or AdamW"
        )


def _refuse_wrapper(base: torch.optim.Optimizer) -> None:
    """Raise for an optimizer around another one: copies and checkpoints of ours would have the state of one of them."""
    for name, value in _attributes(base).items():
        if name.startswith("_optimizer_") or name in {"state", "param_groups", "defaults"}:
            continue  # torch's own, of every optimizer
        inner = next((x for x in _within(value) if isinstance(x, torch.optim.Optimizer) and x is not base), None)
        if inner is not None:
            raise TypeError(
                f"base_optimizer {type(base).__name__} wraps another optimizer ({name}: {type(inner).__name__}), whose "
                f"state a sharpness-aware step could not follow: pass {type(inner).__name__} itself, and wrap this "
                "optimizer instead"
            )


def _attributes(owner: Any) -> dict[str, Any]:
    slots = [name for kind in type(owner).__mro__ for name in getattr(kind, "__slots__", ())]
    return {**getattr(owner, "__dict__", {}), **{name: getattr(owner, name) for name in slots if hasattr(owner, name)}}


def _within(value: Any) -> list[Any]:
    """Return what an attribute holds, as far as an optimizer may keep another one there."""
    if isinstance(value, Tensor | torch.nn.Module | ModuleType | type):
        return []
    if isinstance(value, dict | list | tuple | set):
        return [*(value.values() if isinstance(value, dict) else value)]
    cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    return [value, getattr(value, "__self__", None), *cells, *_attributes(value).values()]


def params_of(group: Any, index: int) -> Any:
    """Return what a param group gives as its parameters.

    Raises:
        ValueError: nothing.
    """
    if not (isinstance(group, dict) and "params" in group):
        raise ValueError(f'group {index} has no "params": give it the parameters that its options are for')
    return group["params"]


def check_source(params: Any, group: int | None = None) -> None:
    """Raise where ``params`` gives no parameters, or not all of them.

    Args:
        params: what the user gave.
        group: the index of the param group that it is of; None: of no group.

    Raises:
        TypeError: it is a module, a dict, or no iterable.
        ValueError: it is a generator that is used up.
    """
    name = "params" if group is None else f"params of group {group}"
    if isinstance(params, nn.Module) and not isinstance(params, nn.ParameterList):
        raise TypeError(f"{name} is a {type(params).__name__}: pass its parameters, model.parameters()")
    if isinstance(params, dict | str) or not isinstance(params, Iterable):
        raise TypeError(f"{name} is a {type(params).__name__}: pass a list of parameters, or of param groups")
    if inspect.isgenerator(params) and inspect.getgeneratorstate(params) == inspect.GEN_CLOSED:
        raise ValueError(
            f"{name} is a generator that is used up: another optimizer, or a loop, went through it. Pass "
            "model.parameters() anew, or keep a list"
        )


def _listed(params: Any, group: int | None = None) -> list[Any]:
    if isinstance(params, Tensor):
        return [params]
    check_source(params, group)
    items = list(params)
    for item in items:
        if isinstance(item, nn.Module):
            check_source(item, group)
    return items


def _tensors(items: list[Any]) -> list[Tensor]:
    return [item[1] if isinstance(item, tuple) else item for item in items]


def _merge(params: list[Any], base: torch.optim.Optimizer, options: set[str]) -> None:
    """Check that ``base`` is over ``params``, and give its groups the sharpness-aware options of theirs."""
    theirs = base.param_groups
    given = [dict(item) for item in params] if isinstance(params[0], dict) else [{"params": params}]
    for group in given:
        group["params"] = _tensors(group["params"])
    carried = [group.keys() & options for group in given]
    alike = len(given) == len(theirs) and all(
        [id(p) for p in mine["params"]] == [id(p) for p in other["params"]]
        for mine, other in zip(given, theirs, strict=True)
    )
    for i, (mine, other) in enumerate(zip(given, theirs, strict=False) if alike else ()):
        _check_beside(mine, other, options, i)
    for group in theirs:  # what an earlier wrapper left there is not asked for now
        for name in options - base.defaults.keys() | {GIVEN_LR, LARGEST_LR, *SAVED}:
            group.pop(name, None)
    if alike:
        for mine, other, ours in zip(given, theirs, carried, strict=True):
            other.update({name: value for name, value in mine.items() if name in ours or name not in other})
        return
    ids = {id(p) for group in given for p in group["params"]}
    if ids != {id(p) for group in theirs for p in group["params"]}:
        raise ValueError(
            "base_optimizer is an instance over other parameters than params: build both from the same ones, "
            "or pass its class"
        )
    if any(carried):
        raise ValueError(
            "params has groups with sharpness-aware options, but base_optimizer's groups are cut otherwise: "
            "pass base_optimizer.param_groups, with the options in them"
        )


def _check_beside(given: Group, theirs: Group, options: set[str], index: int) -> None:
    """Raise TypeError for what a group of params says of options that the base optimizer's own group has otherwise."""
    names.refuse_slips(given.keys() - theirs.keys() - options, options, index)
    for name in given.keys() & theirs.keys() - options - {"params"}:
        if given[name] is not theirs[name] and given[name] != theirs[name]:
            raise TypeError(
                f"group {index} of params has {name}={given[name]!r}, but base_optimizer is an instance, whose group "
                f"has {theirs[name]!r}: set it there"
            )


def check_model(model: nn.Module, params: Iterable[Tensor]) -> None:
    """Raise ValueError where ``model`` has none of ``params``: another's buffers would be guarded."""
    trained = {id(p) for p in params}
    if not any(id(p) in trained for p in model.parameters()):
        raise ValueError(
            f"model, a {type(model).__name__}, has none of the parameters in params: pass the module that is trained, "
            "or a wrapper of it"
        )


def takes_part(param: Tensor) -> bool:
    """Return whether ``param`` has a gradient, or can get one; the others, frozen, may be of any kind."""
    return param.requires_grad or param.grad is not None


def check_parameters(group: Group, index: int, others: Iterable[Tensor]) -> None:
    """Raise where a param group has parameters that take part and cannot be optimized, or has one twice.

    Raises:
        TypeError, ValueError: as `contract.check_param` has them; ValueError for a duplicate.
    """
    seen = {id(param) for param in others}
    for i, param in enumerate(group["params"]):
        if takes_part(param):
            contract.check_param(param, (index, i))
        if id(param) in seen:
            raise ValueError(f"{contract.describe(param, (index, i))} appears twice: list each parameter once")
        seen.add(id(param))


def check_saved(group: Group, index: int) -> None:
    """Raise ValueError where what is `SAVED` in a param group cannot be read, named by the group's index."""
    version, count = group["bsam_fused_format"], group["rounded_steps"]
    if version != FORMAT:
        raise ValueError(
            f"bsam_fused_format={version!r} in group {index}: this bsam_fused reads state dicts of format {FORMAT}, "
            "and older ones, without a format; upgrade to the version that wrote this one"
        )
    if count is not None:
        checks.integer("rounded_steps", count, 0, group=index)
