"""The options that all sharpness-aware optimizers have in common: names, defaults, checks and words, once.

Each class spells its signature; the tests hold it, and its docstring, against this table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import nn

from bsam_fused import checks
from bsam_fused.distributed import Sync

Rounding = Literal["stochastic", "nearest"]


class Option(NamedTuple):
    """An option of an optimizer, not of its param groups."""

    default: Any
    check: Callable[[str, Any], Any]
    """Returns the value, named for its errors, as it is kept."""
    words: str
    """Its docstring."""


def clipping_norm(value: Any) -> float:
    """Return ``max_grad_norm`` as a float, None as infinity.

    Raises:
        ValueError: it is not positive, infinite, NaN, or no number.
    """
    return math.inf if value is None else checks.positive("max_grad_norm", value, ", or None for no clipping")


def _max_norm(name: str, value: Any) -> Any:
    clipping_norm(value)
    return value


def _model(name: str, value: Any) -> nn.Module | None:
    if value is not None and not isinstance(value, nn.Module):
        raise TypeError(f"{name} is a {type(value).__name__}: pass the nn.Module whose buffers to guard")
    return value


def _backend(name: str, value: Any) -> Any:
    """`dispatch.choose` says what there is."""
    return value


COMMON: dict[str, Option] = {
    "norm_eps": Option(1e-12, checks.non_negative, "added to the norm, ≥ 0."),
    "max_grad_norm": Option(
        None,
        _max_norm,
        "> 0: scale the direction down to this norm over all parameters where it is longer, as "
        "torch.nn.utils.clip_grad_norm_ would; after a GradScaler's scale is divided out. None: do not.",
    ),
    "rounding": Option(
        "stochastic",
        partial(checks.choice, choices=Rounding),
        "of bfloat16 and float16 parameters when they are perturbed and updated, and of their base state: "
        '"stochastic", up or down at random so that the mean is right, or "nearest", which loses most of a small '
        "perturbation. Wider parameters need none.",
    ),
    "seed": Option(
        0,
        partial(checks.integer, least=0, below=2**32),
        "of stochastic rounding, in [0, 2³²): the same gradients then give the same bits on every backend.",
    ),
    "master_weights": Option(
        False,
        checks.flag,
        'update 16-bit parameters from and to a float32 copy, ``state[p]["master_weight"]``, of which the weights are '
        "the rounding to nearest; a weight set from outside counts from there on. Fused bases only.",
    ),
    "sync": Option(
        "every",
        partial(checks.choice, choices=Sync),
        'what DistributedDataParallel averages: "every" pass\'s gradients, or only what comes "last", the direction: '
        "each rank then perturbs by the gradient of its own batch (m-sharpness), and one all-reduce a step is left. "
        "Needs ``model=`` to be the DDP module; passes by hand go into ``with optimizer.one_pass():``.",
    ),
    "same_randomness": Option(
        False,
        checks.flag,
        "whether dropout, drop-path and augmentation draw the same in all passes of a step, and go on after it as "
        "after one: the generators of the CPU and of the parameters' devices, not those passed to layers, NumPy's or "
        "Python's. Passes by hand go into ``with optimizer.one_pass():``.",
    ),
    "model": Option(
        None,
        _model,
        "whose buffers (running statistics, observers, codebooks, queues) the extra passes shall leave as the first "
        "one left them, whatever writes them, the loop included; not those that share memory with a parameter, nor "
        "what is no buffer. Also which FSDP2 is to gather anew for every pass.",
    ),
    "backend": Option("auto", _backend, '"auto", "cuda", "triton", "cpp" or "torch".'),
}


def common(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options in common of a constructor's ``locals()``, checked.

    Raises:
        TypeError, ValueError: one that cannot be used, by name.
    """
    return {name: option.check(name, names[name]) for name, option in COMMON.items()}
