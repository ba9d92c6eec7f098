"""What is measured of a trained network: accuracy, also with weights of few bits, and the sharpness it ended at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from scipy.sparse.linalg import ArpackError
from torch import nn

from bsam_fused.report.training.methods import training_loss
from bsam_fused.report.training.tasks import Part
from bsam_fused.sharpness import hessian_eigenvalues, measure

BITS = (8, 4, 3, 2)
RHO = 0.05
"""Radius of MaxS, MinS and BilS, of all methods."""
EXAMPLES = 500
"""Of a pass that measures accuracy."""
LABELS = 3200
"""That sharpness is measured on at most: of the first `EXAMPLES` training examples, as many as have them."""


@torch.no_grad()
def accuracy_percent(network: nn.Module, part: Part) -> float:
    """Return how many labels the network, in evaluation mode, names rightly, in percent."""
    network.eval()
    right = 0
    for x, y in zip(part.x.split(EXAMPLES), part.y.split(EXAMPLES), strict=True):
        right += int((network(x).argmax(-1) == y).sum())
    return 100 * right / part.y.numel()


def quantized_percent(network: nn.Module, part: Part) -> dict[str, float]:
    """Return, for each of `BITS`, `accuracy_percent` of the network with weights of so many bits."""
    found = {}
    for bits in BITS:
        with _rounded(network, bits):
            found[str(bits)] = accuracy_percent(network, part)
    return found


@contextmanager
def _rounded(network: nn.Module, bits: int) -> Iterator[None]:
    """Round each matrix and kernel W to s · {−m, …, m}, m = 2^(bits − 1) − 1, s = max |W| / m; put it back after."""
    weights = [p for p in network.parameters() if p.requires_grad and p.dim() > 1]
    kept = [p.detach().clone() for p in weights]
    levels = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for p in weights:
            step = p.abs().max() / levels
            if step > 0:
                p.copy_((p / step).round() * step)
        try:
            yield
        finally:
            for p, w in zip(weights, kept, strict=True):
                p.copy_(w)


def sharpness(network: nn.Module, training: Part) -> dict[str, float]:
    """Return MaxS, MinS and BilS at `RHO`, and the Hessian's largest eigenvalue to 1 %, where training ended.

    Of the loss, in evaluation mode, of the first `EXAMPLES` training examples, of fewer where those have more than
    `LABELS`; {} where a loss or gradient is not finite, or no eigenvalue is found.
    """
    some = min(EXAMPLES, LABELS // training.y[0].numel())
    loader = [(training.x[:some], training.y[:some])]
    try:
        found = measure(network.eval(), training_loss, loader, RHO)
        top = hessian_eigenvalues(network, training_loss, loader, tol=1e-2).item()
    except (FloatingPointError, ArpackError):
        return {}
    named = {"MaxS": found.max_sharpness, "MinS": found.min_sharpness, "BilS": found.bilateral_sharpness}
    return {**named, "eigenvalue": top}
