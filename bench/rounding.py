"""What rounding leaves of a perturbation of 16-bit weights: python -m bench.rounding.

The applied perturbation e = w_max − w beside the true one ε = ρ g / ‖g‖, on the 11.2 M weights of a ResNet-18 as
Kaiming has them (one for the scales and zero for the shifts of BatchNorm) and normal gradients.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

import bsam_fused
from bench.cases import Shapes, resnet18


class Kept(NamedTuple):
    """How e compares with ε."""

    projection: float
    """e·ε / ‖ε‖²"""
    norm: float
    """‖e‖ / ρ"""
    cosine: float
    """Between e and ε."""


def weights(shapes: Shapes) -> list[Tensor]:
    """Return Kaiming's weights; of the vectors, scales of 1 and shifts of 0 in turn."""
    found: list[Tensor] = []
    for shape in shapes:
        if len(shape) > 1:
            found.append(nn.init.kaiming_normal_(torch.empty(shape)))
        else:
            scale = bool(found) and found[-1].dim() > 1
            found.append(torch.full(shape, float(scale)))
    return found


def kept(shapes: Shapes, dtype: torch.dtype, rho: float, rounding: str) -> Kept:
    """Return what is left of an ascent step by ``rho``."""
    torch.manual_seed(0)
    params = [nn.Parameter(w.to(dtype)) for w in weights(shapes)]
    before = [p.detach().double() for p in params]
    for p in params:
        p.grad = torch.randn(p.shape).to(dtype)
    g = torch.cat([p.grad.double().flatten() for p in params])
    bsam_fused.SAM(params, lr=0.1, rho=rho, rounding=rounding).ascend()
    e = torch.cat([(p.detach().double() - w).flatten() for p, w in zip(params, before, strict=True)])
    true = rho * g / g.norm()
    along = (e @ true).item()
    return Kept(along / rho**2, e.norm().item() / rho, along / (e.norm().item() * rho))


def main() -> None:
    """Print the table."""
    shapes = resnet18()
    print(f"{sum(math.prod(s) for s in shapes):,} weights, {len(shapes)} tensors, torch {torch.__version__}")
    print("| dtype | ρ | rounding | projection | norm / ρ | cosine |\n| --- | --- | --- | --- | --- | --- |")
    for dtype in (torch.bfloat16, torch.float16):
        for rho in (0.05, 0.1, 0.2, 0.5, 1.0):
            for rounding in ("nearest", "stochastic"):
                figures = " | ".join(f"{figure:.3f}" for figure in kept(shapes, dtype, rho, rounding))
                print(f"| {str(dtype).removeprefix('torch.')} | {rho} | {rounding} | {figures} |")


if __name__ == "__main__":
    main()
