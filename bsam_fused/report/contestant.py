"""One implementation on parameters of its own, driven through steps. Needs torch alone, nothing of the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Shapes = Sequence[tuple[int, ...]]
Result = TypeVar("Result")


def coefficients(
    shapes: Shapes, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """Return the curvatures t of the loss Σ ½ t (1 + w)², in [0, 1), the same ones every time."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.rand(shape, generator=generator, dtype=dtype, device=device) for shape in shapes]


class Contestant:
    """An optimizer that goes from w = t down Σ ½ t (1 + w)².

    That loss's gradient t + t w is made in one pass, and turns with w, so that every phase counts.

    Args:
        build: makes the optimizer of parameters.
        calls: the optimizer's phases, in order.
        curvatures: t, a tensor a parameter.
    """

    def __init__(
        self, build: Callable[[list[Tensor]], Any], calls: Sequence[str], curvatures: Sequence[Tensor]
    ) -> None:
        self.curvatures = curvatures
        self.params = [t.clone().requires_grad_() for t in curvatures]
        # Stays, as what a pass allocated beside the gradients would hide what phases allocate from whoever weighs them.
        self._scratch = torch.empty_like(max(curvatures, key=torch.numel)).flatten()
        self.optimizer = build(self.params)
        self.phases = [getattr(self.optimizer, call) for call in calls]

    def step(self, measure: Callable[[Callable[[], object]], Result]) -> list[Result]:
        """Take a step; return what ``measure`` says of each phase, without making gradients and clearing the last."""
        results = []
        for phase in self.phases:
            self._backward()
            results.append(measure(phase))
        for p in self.params:
            p.grad = None
        return results

    def _backward(self) -> None:
        """Give every parameter a fresh gradient that nobody else holds, and of which Python does not know.

        Autograd does it itself: the copy it makes has no Python object that would be freed with it.
        """
        for p, t in zip(self.params, self.curvatures, strict=True):
            gradient = self._scratch[: t.numel()].view_as(t)
            torch.autograd.backward(p, torch.addcmul(t, t, p.detach(), out=gradient))


def after_two_steps(
    build: Callable[[list[Tensor]], Any], calls: Sequence[str], curvatures: Sequence[Tensor]
) -> Contestant:
    """Return a contestant whose buffers are there, and whose second step found state."""
    contestant = Contestant(build, calls, curvatures)
    for _ in range(2):
        contestant.step(lambda phase: phase())
    return contestant
