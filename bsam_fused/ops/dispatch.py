"""Which backend runs, and why: argument, then BSAM_FUSED_BACKEND, then the best that is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bsam_fused.ops import contract, native_flat, torch_lists, triton_flat

Factory = Callable[[Sequence[Tensor], Sequence[tuple[int, int]], int | None, bool], contract.FlatParams]

Backend = Literal["auto", "cuda", "triton", "cpp", "torch"]
BACKENDS = get_args(Backend)[1:]
VARIABLE = "BSAM_FUSED_BACKEND"
_PREFERENCE = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpp", "torch")}
_FACTORIES: dict[str, Factory] = {
    "cuda": native_flat.cuda_flat_params,
    "triton": triton_flat.TritonFlatParams,
    "cpp": native_flat.cpu_flat_params,
    "torch": torch_lists.flat_params,
}


class Choice(NamedTuple):
    """A backend and why it was chosen."""

    backend: str
    why: str
    build: Factory
    slower: str = ""
    """What to warn of, where there is a faster one that could not be had."""


def unavailable(backend: str, device: torch.device | str) -> str | None:
    """Return why ``backend`` cannot work on tensors on ``device``, None if it can."""
    device = torch.device(device)
    if backend == "triton":
        return triton_flat.why_not(device) or None
    if backend == "cuda":
        if device.type != "cuda":
            return f"cuda works on CUDA tensors, not on {device.type}"
        return native_flat.why_no_cuda(device) or None
    if backend == "cpp":
        if device.type != "cpu":
            return f"cpp works on CPU tensors, not on {device.type}"
        return native_flat.load()[1] or None
    return None


def choose(requested: str, device: torch.device) -> Choice:
    """Return the backend for tensors on ``device``.

    Args:
        requested: "auto", or a backend's name. "auto" gives way to the environment variable
            BSAM_FUSED_BACKEND, and else takes cuda, triton, torch for CUDA tensors, cpp, torch for CPU
            tensors, torch for others.
        device: where the tensors are.

    Raises:
        ValueError: ``requested`` is no backend.
        RuntimeError: the one asked for by name cannot be had, with the reason.
    """
    source = f"backend={requested!r}"
    if requested == "auto" and os.environ.get(VARIABLE, "auto") != "auto":
        requested = os.environ[VARIABLE]
        source = f"{VARIABLE}={requested}"
    if requested not in get_args(Backend):
        raise ValueError(f"{source}: must be auto, {', '.join(BACKENDS)}")
    if requested != "auto":
        reason = unavailable(requested, device)
        if reason:
            raise RuntimeError(f"{source} for tensors on {device}: {reason}")
        return Choice(requested, f"asked for by {source}", _FACTORIES[requested])
    return _best(device)


def _best(device: torch.device) -> Choice:
    missing = []
    for backend in _PREFERENCE.get(device.type, ("torch",)):
        reason = unavailable(backend, device)
        if reason is None:
            break
        missing.append(f"{backend}: {reason}")
    slower = f"bsam_fused runs on its slower torch backend; {missing[0]}" if backend == "torch" and missing else ""
    why = f"auto's choice for {device.type} tensors" + "".join(f"; without {reason}" for reason in missing)
    return Choice(backend, why, _FACTORIES[backend], slower)


def read_gradients(flats: Sequence[contract.FlatParams]) -> None:
    """Have all FlatParams of an optimizer, of a device those of one backend, note the gradients of a pass."""
    for flat in flats:
        flat.read_gradients()
    for flat in flats:
        if beside := [other for other in flats if other is not flat and other.device == flat.device]:
            flat.copy_shared([_over_shards(other) for other in beside])


def updates(
    operator: str, flats: Sequence[contract.FlatParams], totals: Sequence[Tensor], how: Sequence[Any]
) -> list[tuple[contract.FlatParams, Callable[[], None]]]:
    """Return the calls that make an update, each with a FlatParams that knows whether it was made.

    Args:
        operator: "update_sgd" or "update_adam".
        flats: all FlatParams of an optimizer; those of the compiled module are updated in one call.
        totals: the sums, for each.
        how: the update's other arguments.
    """
    if len(flats) == 1:
        return [(flats[0], partial(getattr(flats[0], operator), totals[0], *how))]
    calls: list[tuple[contract.FlatParams, Callable[[], None]]] = []
    compiled: list[tuple[contract.FlatParams, Tensor]] = []
    for flat, sums in zip(flats, totals, strict=True):
        native = _over_shards(flat)
        if native_flat.is_compiled(native):
            compiled.append((native, sums))
        else:
            calls.append((flat, partial(getattr(flat, operator), sums, *how)))
    if compiled:
        calls.append((compiled[0][0], native_flat.update_together(operator, compiled, how)))
    return calls


def _over_shards(flat: Any) -> Any:
    """Return what the operators know: of DTensors the backend's own FlatParams."""
    return getattr(flat, "over_shards", flat)
