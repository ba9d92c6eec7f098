"""The Hessian of the loss by its products with vectors: the largest eigenvalues, and the trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bsam_fused.sharpness.extras import load
from bsam_fused.sharpness.mean_loss import LossFunction, dot, measured

Progress = Callable[[int], None]
"""Called after each product with the Hessian, with how many there have been."""

FEWEST = 10
"""Samples before the standard error of a trace is believed."""


class TraceEstimate(NamedTuple):
    """The trace of a Hessian, the standard error of that, and how many samples it is the mean of."""

    value: float
    standard_error: float
    samples: int


def hessian_eigenvalues(
    model: nn.Module,
    loss_fn: LossFunction,
    loader: Iterable[Any],
    k: int = 1,
    *,
    tol: float = 1e-5,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Return the ``k`` largest eigenvalues of the Hessian ∇²L(w), by Lanczos (SciPy's eigsh).

    L is the mean over the whole loader in evaluation mode; a product with its Hessian is a pass forward and two
    backward. About 2k + 1 vectors of float64 are kept on the host. The model is left as it was, bit for bit.

    Args:
        model: whose trainable parameters are w, n of them.
        loss_fn: as `measure` has it; twice differentiable.
        loader: as `measure` has it.
        k: how many, 1 ≤ k ≤ n.
        tol: relative accuracy.
        seed: of the first vector.
        progress: called after each product, with how many there have been.

    Returns:
        float64 (k,), falling, on the CPU.

    Raises:
        ModuleNotFoundError: SciPy is not installed, with the command that installs it.
        ValueError: ``k`` out of range, or a loader that is empty.
        TypeError: a loader that is an iterator.
        FloatingPointError: a loss or product that is not finite.
        scipy.sparse.linalg.ArpackNoConvergence: ``tol`` is out of reach.
    """
    numpy, linalg = load("numpy"), load("scipy.sparse.linalg")
    with measured(model, loss_fn, loader) as loss:
        n = sum(p.numel() for p in loss.params)
        if not 1 <= k <= n:
            raise ValueError(f"k={k!r}: must be between 1 and the number of parameters, {n}")
        products = 0

        def product(vector: Any) -> Any:
            nonlocal products
            v = torch.from_numpy(vector.reshape(-1).astype("float64"))
            parts = zip(loss.params, v.split([p.numel() for p in loss.params]), strict=True)
            found = loss.hessian_product([part.view(p.shape).to(p.device, p.dtype) for p, part in parts])
            products += 1
            if progress:
                progress(products)
            return torch.cat([h.double().reshape(-1).cpu() for h in found]).numpy()

        hessian = linalg.LinearOperator((n, n), matvec=product, dtype="float64")
        if k == n:  # more than Lanczos can find
            found = numpy.linalg.eigvalsh(hessian @ numpy.eye(n))
        else:
            start = numpy.random.default_rng(seed).standard_normal(n)
            found = linalg.eigsh(hessian, k, which="LA", tol=tol, v0=start, return_eigenvectors=False)
    return torch.from_numpy(found).sort(descending=True).values


def hessian_trace(
    model: nn.Module,
    loss_fn: LossFunction,
    loader: Iterable[Any],
    *,
    tol: float = 0.01,
    max_samples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> TraceEstimate:
    """Return the trace of the Hessian ∇²L(w): Hutchinson's mean of vᵀ H v over random signs v.

    Stops when the standard error of that mean is down to ``tol`` of it. L is as `hessian_eigenvalues` has it.
    The model is left as it was, bit for bit.

    Args:
        model: as `hessian_eigenvalues` has it.
        loss_fn: as `hessian_eigenvalues` has it.
        loader: as `hessian_eigenvalues` has it.
        tol: the relative standard error to stop at.
        max_samples: stop there, whatever the error, ≥ 2.
        seed: of the signs.
        progress: called after each product, with how many there have been.

    Raises:
        ValueError: ``max_samples`` below 2, or a loader that is empty.
        TypeError: a loader that is an iterator.
        FloatingPointError: a loss or product that is not finite.
    """
    if max_samples < 2:
        raise ValueError(f"max_samples={max_samples!r}: must be 2 or more")
    random = torch.Generator().manual_seed(seed)
    samples: list[float] = []
    with measured(model, loss_fn, loader) as loss:
        while len(samples) < max_samples:
            v = [_signs(p, random) for p in loss.params]
            samples.append(dot(v, loss.hessian_product(v)))
            if progress:
                progress(len(samples))
            if len(samples) >= FEWEST and _standard_error(samples) <= tol * abs(fmean(samples)):
                break
    return TraceEstimate(fmean(samples), _standard_error(samples), len(samples))


def _signs(like: Tensor, random: torch.Generator) -> Tensor:
    return (2 * torch.randint(2, like.shape, generator=random) - 1).to(like.device, like.dtype)


def _standard_error(samples: list[float]) -> float:
    return stdev(samples) / len(samples) ** 0.5
