"""BiSAM's ascent losses (arXiv 2407.12993): smooth lower bounds of the 0-1 loss, whose ascent flips predictions.

The update's loss stays cross-entropy: ``SAM.step(closure, ascent_closure=…)``, the ascent closure with one of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsam_fused import checks

Reduction = Literal["mean", "sum", "none"]
GAMMA = math.log(math.e - 1)
"""γ, which makes the log bound pass through the step's corner: φ(0) = 0."""


def bisam_log_loss(
    logits: Tensor, target: Tensor, mu: float = 1.0, reduction: Reduction = "mean", ignore_index: int = -100
) -> Tensor:
    """Return Q = mean_i 1/μ log Σ_j exp(μ φ(f_j − f_y)) with φ(x) = 1 − log(1 + exp(γ − x)), γ = log(e − 1).

    BiSAM (arXiv 2407.12993) eq. 11, "−log"; Q − log(K)/μ is a lower bound of the error rate.

    Args:
        logits: f, floating point (B, K), (B, K, d1, …) or (K,); never written to. float16 and bfloat16 are
            computed with in float32.
        target: y, the classes' indices, integers (B,), (B, d1, …) or ().
        mu: μ > 0; the larger, the closer to the largest φ.
        reduction: "mean" over the targets that count, "sum" or "none".
        ignore_index: targets of this value count for nothing, whatever their logits.

    Returns:
        A scalar, or the target's shape for "none", in the logits' dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit.
        IndexError: a target out of range; on a GPU it is a device-side assertion, as of F.cross_entropy.
    """
    return _lower_bound(logits, target, lambda x: 1 + F.logsigmoid(x - GAMMA), mu, reduction, ignore_index)


def bisam_tanh_loss(
    logits: Tensor,
    target: Tensor,
    mu: float = 10.0,
    alpha: float = 0.1,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Return Q = mean_i 1/μ log Σ_j exp(μ φ(f_j − f_y)) with φ(x) = tanh(α x).

    BiSAM (arXiv 2407.12993) eq. 11, "tanh"; Q − log(K)/μ is a lower bound of the error rate.

    Args:
        logits: as `bisam_log_loss` has it.
        target: as `bisam_log_loss` has it.
        mu: μ > 0; the larger, the closer to the largest φ.
        alpha: α > 0; the larger, the closer to a step.
        reduction: as `bisam_log_loss` has it.
        ignore_index: as `bisam_log_loss` has it.

    Returns:
        As `bisam_log_loss`.

    Raises:
        ValueError, TypeError, IndexError: as `bisam_log_loss`.
    """
    checks.positive("alpha", alpha)
    return _lower_bound(logits, target, lambda x: torch.tanh(alpha * x), mu, reduction, ignore_index)


class BiSAMLogLoss(nn.Module):
    """`bisam_log_loss` as a module.

    Args:
        mu: as `bisam_log_loss` has it.
        reduction: as `bisam_log_loss` has it.
        ignore_index: as `bisam_log_loss` has it.
    """

    def __init__(self, mu: float = 1.0, reduction: Reduction = "mean", ignore_index: int = -100) -> None:
        super().__init__()
        self.mu, self.reduction, self.ignore_index = mu, reduction, ignore_index

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return `bisam_log_loss` of ``logits`` and ``target``."""
        return bisam_log_loss(logits, target, self.mu, self.reduction, self.ignore_index)


class BiSAMTanhLoss(nn.Module):
    """`bisam_tanh_loss` as a module.

    Args:
        mu: as `bisam_tanh_loss` has it.
        alpha: as `bisam_tanh_loss` has it.
        reduction: as `bisam_tanh_loss` has it.
        ignore_index: as `bisam_tanh_loss` has it.
    """

    def __init__(
        self, mu: float = 10.0, alpha: float = 0.1, reduction: Reduction = "mean", ignore_index: int = -100
    ) -> None:
        super().__init__()
        self.mu, self.alpha, self.reduction, self.ignore_index = mu, alpha, reduction, ignore_index

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return `bisam_tanh_loss` of ``logits`` and ``target``."""
        return bisam_tanh_loss(logits, target, self.mu, self.alpha, self.reduction, self.ignore_index)


def _lower_bound(
    logits: Tensor, target: Tensor, phi: Callable[[Tensor], Tensor], mu: float, reduction: Reduction, ignore_index: int
) -> Tensor:
    """Return Q, for any φ below the unit step."""
    checks.positive("mu", mu)
    classes = 1 if logits.dim() > 1 else 0
    _check(logits, target, classes, reduction, ignore_index)
    ignored = target == ignore_index
    f = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(ignored.unsqueeze(classes), 0.0)
    f_y = f.gather(classes, target.masked_fill(ignored, 0).long().unsqueeze(classes))
    q = (torch.logsumexp(mu * phi(f - f_y), classes) / mu).masked_fill(ignored, 0.0)
    if reduction == "mean":
        q = q.sum() / (~ignored).sum()
    elif reduction == "sum":
        q = q.sum()
    return q.to(logits.dtype)


def _check(logits: Tensor, target: Tensor, classes: int, reduction: Reduction, ignore_index: int) -> None:
    checks.choice("reduction", reduction, Reduction)
    if not logits.is_floating_point():
        raise TypeError(f"logits are {logits.dtype}: pass floating point ones")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target is {target.dtype}: pass the classes' indices, integers")
    expected = logits.shape[:classes] + logits.shape[classes + 1 :]
    if logits.dim() == 0 or target.shape != expected:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and target {tuple(target.shape)}: they must be (B, K) and (B,), "
            "(B, K, d1, …) and (B, d1, …), or (K,) and ()"
        )
    if not target.is_cuda:  # on a GPU, looking would wait for it
        k = logits.shape[classes]
        wrong = target[((target < 0) | (target >= k)) & (target != ignore_index)]
        if wrong.numel():
            raise IndexError(f"target {wrong[0].item()} is out of range: there are {k} classes, from 0 on")
