"""What compute-sanitizer watches: small SAM and BSAM steps over all dtypes and kinds of shapes.

[compute-sanitizer ...] python -m bench.gpu.sanitize
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import bsam_fused
from bench.gpu.cases import SUBJECT
from bsam_fused.ops.contract import DTYPES
from bsam_fused.report.contestant import Shapes
from bsam_fused.report.implementations import BASES as MEASURED
from bsam_fused.report.implementations import RHO

SHAPES: Shapes = ((), (0,), (1,), (3,), (33, 5), (127,), (1031,), (4099,))
"""None a multiple of a vector, a warp or a block; a scalar, and a tensor without elements."""
MANY: Shapes = ((5,),) * 900
"""More tensors than one launch takes."""
BASES: dict[type[torch.optim.Optimizer], dict[str, Any]] = {
    torch.optim.SGD: {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
    torch.optim.AdamW: {**MEASURED["adamw"].options, "adaptive": True},
    torch.optim.RMSprop: {"lr": 1e-3, "eps": 1e-3},  # not fused; float16 has no 1e-8, its default
}
STEPS = 2
"""The second finds state."""


def main(backend: str = SUBJECT, device: str = "cuda") -> None:
    """Take the steps."""
    for dtype in DTYPES:
        params = [_random(shape, dtype).to(device).requires_grad_() for shape in SHAPES]
        params.append(_random((9, 6), dtype).to(device).t().requires_grad_())
        for base, options in BASES.items():
            _exercise(bsam_fused.SAM(params, base, rho=RHO, backend=backend, **options), params)
            _exercise(bsam_fused.BSAM(params, base, rho=RHO, backend=backend, **options), params)
    params = [_random(shape, torch.float32).to(device).requires_grad_() for shape in MANY]
    _exercise(bsam_fused.BSAM(params, rho=RHO, backend=backend, lr=1e-3, momentum=0.9), params)
    print("all steps taken, all weights finite")


def _exercise(optimizer: bsam_fused.SAM | bsam_fused.BSAM, params: list[Tensor]) -> None:
    """Take steps, the second with a parameter that has no gradient, and give one up."""
    descend = [optimizer.descend] if isinstance(optimizer, bsam_fused.BSAM) else []
    for step in range(STEPS):
        for phase in (optimizer.ascend, *descend, optimizer.step):
            _backward(params[step:])
            phase()
    _backward(params)
    optimizer.ascend()
    with optimizer.unperturbed():
        pass
    optimizer.restore()
    if not torch.cat([p.detach().flatten() for p in params]).isfinite().all():
        raise ArithmeticError(f"{optimizer}: weights that are not finite")


def _backward(params: list[Tensor]) -> None:
    """Give every parameter a gradient, made on the CPU: other kernels than ours only cost the sanitizer time."""
    for p in params:
        p.grad = torch.empty_like(p, requires_grad=False).copy_(_random(p.shape, p.dtype))


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


if __name__ == "__main__":
    main()
