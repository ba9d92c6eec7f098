"""BSAM with SGD in plain torch under `torch.compile`, a function a phase.

For comparison. As `bsam_fused.report.device_foreach`, but written for a compiler that fuses: temporaries vanish, and
SGD's rule is spelled out, so that restoring, the direction and the update can become one kernel. Only norms stay apart.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bsam_fused.report.device_foreach import NORM_EPS, take_gradients, total_norm

Tensors = list[Tensor]


def ascend(weights: Tensors, saved: Tensors, g: Tensors, rho: float) -> Tensor:
    """w = w + ρ g / ‖g‖; returns ‖g‖."""
    norm = total_norm(g) + NORM_EPS
    torch._foreach_copy_(saved, weights)
    torch._foreach_add_(weights, torch._foreach_mul(g, rho / norm))
    return norm


def descend(weights: Tensors, saved: Tensors, g: Tensors, g_max: Tensors, norm: Tensor, rho_min: float) -> Tensor:
    """w = w − ρ_min g / ‖g‖, g = g + g_max; returns ‖g_max‖."""
    torch._foreach_copy_(weights, torch._foreach_sub(saved, torch._foreach_mul(g, rho_min / norm)))
    torch._foreach_add_(g, g_max)
    return total_norm(g_max)


def update(
    weights: Tensors,
    saved: Tensors,
    g: Tensors,
    norm_max: Tensor,
    g_min: Tensors,
    buffers: Tensors,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """SGD with momentum from the saved w with d = g + g_max − ‖g_max‖ / ‖g_min‖ g_min, g + g_max in ``g``.

    ``buffers`` are zero at first, which makes the first step torch's.
    """
    d = torch._foreach_sub(g, torch._foreach_mul(g_min, norm_max / total_norm(g_min)))
    d = torch._foreach_add(d, saved, alpha=weight_decay)
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, d)
    torch._foreach_copy_(weights, torch._foreach_sub(saved, torch._foreach_mul(buffers, lr)))


class CompiledBSAM:
    """BSAM (arXiv 2409.13173) with SGD at a constant learning rate, ρ_min = ρ.

    Args:
        params: float parameters of one device and dtype.
        rho: radius ρ ≥ 0.
        lr: the learning rate.
        momentum: SGD's.
        weight_decay: SGD's.
    """

    def __init__(
        self, params: Iterable[Tensor], *, rho: float, lr: float, momentum: float, weight_decay: float
    ) -> None:
        self.params, self.rho = list(params), rho
        self.sgd = (lr, momentum, weight_decay)
        self.weights = [p.detach() for p in self.params]
        self.saved = [torch.empty_like(w) for w in self.weights]
        self.buffers = [torch.zeros_like(w) for w in self.weights]
        self.g: Tensors = []
        self._ascend, self._descend, self._update = (
            torch.compile(phase, fullgraph=True, dynamic=False) for phase in (ascend, descend, update)
        )

    @torch.no_grad()
    def ascend(self) -> None:
        """w = w + ρ g / ‖g‖; keeps g."""
        self.g = take_gradients(self.params)
        self.norm = self._ascend(self.weights, self.saved, self.g, self.rho)

    @torch.no_grad()
    def descend(self) -> None:
        """w = w − ρ g / ‖g‖, from w; g = g + g_max."""
        g_max = take_gradients(self.params)
        self.norm_max = self._descend(self.weights, self.saved, self.g, g_max, self.norm, self.rho)

    @torch.no_grad()
    def step(self) -> None:
        """SGD's step from w with d = g + g_max − ‖g_max‖ / ‖g_min‖ g_min."""
        g_min = take_gradients(self.params)
        self._update(self.weights, self.saved, self.g, self.norm_max, g_min, self.buffers, *self.sgd)
        self.g = []
