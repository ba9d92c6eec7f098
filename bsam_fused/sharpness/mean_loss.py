"""L(w), the mean loss over a data loader: its value, gradient and Hessian products, here and at other weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LossFunction = Callable[[Any, Any], Tensor]
"""From the model's output and the target to the mean loss of the batch, a scalar: F.cross_entropy, for one."""
Direction = Sequence[Tensor]
"""A tensor for each trainable parameter, in the order of model.parameters()."""


class MeanLoss:
    """L(w) = mean over a loader's examples of loss_fn(model(x), y), a batch (x, y) counting as len(y) examples.

    Made by `measured`, which see. Every pass sees the same random numbers, and leaves torch's generator alone, so a
    loader that shuffles or augments by it gives the same examples each time.

    Args:
        model: whose trainable parameters are w.
        loss_fn: from the model's output and y to the mean loss of the batch.
        loader: iterable of (x, y), as often as asked.

    Raises:
        TypeError: ``loader`` is an iterator, which could be passed over only once.
        ValueError: nothing to train in the model.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, loader: Iterable[Any]) -> None:
        if isinstance(loader, Iterator):
            raise TypeError(f"loader is a {type(loader).__name__}, which goes once: pass the DataLoader, or a list")
        self.model, self.loss_fn, self.loader = model, loss_fn, loader
        self.params = [p for p in model.parameters() if p.requires_grad]
        if not self.params:
            raise ValueError("model has no parameters that require a gradient")
        self._w = [p.detach().clone() for p in self.params]
        self._examples: int | None = None

    def place(self, *moves: tuple[float, Direction]) -> None:
        """Put the weights at w + Σ a d over the moves (a, d); at w, bit for bit, without any."""
        with torch.no_grad():
            for i, (p, w) in enumerate(zip(self.params, self._w, strict=True)):
                p.copy_(w)
                for a, d in moves:
                    p.add_(d[i], alpha=a)
        torch.clear_autocast_cache()

    def value(self, where: str = "w") -> float:
        """Return the loss where the weights are now.

        Args:
            where: what errors call that place.

        Raises:
            FloatingPointError: the loss is not finite.
            ValueError: the loader is empty, or gives fewer examples than before, or the loss is no scalar.
        """
        with torch.no_grad():
            total = math.fsum(size * loss.item() for loss, size in self._losses(where))
        return total / self._size

    def gradient(self, where: str = "w") -> tuple[float, list[Tensor]]:
        """Return the loss and its gradient where the weights are now.

        Raises:
            FloatingPointError, ValueError: as `value`; also where the gradient is not finite.
        """
        total, gradient = 0.0, [torch.zeros_like(p) for p in self.params]
        with torch.enable_grad():
            for loss, size in self._losses(where):
                total += size * loss.item()
                _add(gradient, size, self._derivative(loss))
        for g in gradient:
            g /= self._size
        if not all(g.isfinite().all() for g in gradient):
            raise FloatingPointError(f"the gradient at {where} is not finite")
        return total / self._size, gradient

    def hessian_product(self, v: Direction) -> list[Tensor]:
        """Return H v at w, H = ∇²L(w): the gradient of ∇L · v.

        Raises:
            FloatingPointError, ValueError: as `value`; also where the product is not finite.
        """
        product = [torch.zeros_like(p) for p in self.params]
        with torch.enable_grad():
            for loss, size in self._losses("w"):
                slope = sum((g * d).sum() for g, d in zip(self._derivative(loss, create_graph=True), v, strict=True))
                if isinstance(slope, Tensor) and slope.requires_grad:  # else the batch's loss is linear in w
                    _add(product, size, self._derivative(slope))
        for h in product:
            h /= self._size
        if not all(h.isfinite().all() for h in product):
            raise FloatingPointError("a product with the Hessian is not finite")
        return product

    def _derivative(self, scalar: Tensor, create_graph: bool = False) -> Sequence[Tensor]:
        return torch.autograd.grad(
            scalar, self.params, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )

    @property
    def _size(self) -> int:
        assert self._examples is not None  # after a pass
        return self._examples

    def _losses(self, where: str) -> Iterator[tuple[Tensor, int]]:
        """Yield each batch's mean loss and number of examples."""
        device, examples = self.params[0].device, 0
        with torch.random.fork_rng(devices=[]):
            for x, y in self.loader:
                loss = self.loss_fn(self.model(_to(x, device)), _to(y, device))
                if loss.numel() != 1:
                    raise ValueError(f"loss_fn returned shape {tuple(loss.shape)}: it must be the batch's mean")
                if not loss.isfinite():
                    raise FloatingPointError(f"the loss at {where} is {loss.item()}")
                yield loss.reshape(()), len(y)
                examples += len(y)
        if self._examples is None and examples == 0:
            raise ValueError("the loader is empty")
        if self._examples not in (None, examples):
            raise ValueError(f"the loader gave {self._examples} examples, and now {examples}: it must repeat itself")
        self._examples = examples


@contextmanager
def measured(model: nn.Module, loss_fn: LossFunction, loader: Iterable[Any]) -> Iterator[MeanLoss]:
    """Yield `MeanLoss`, with the model in evaluation mode: no dropout, BatchNorm by its running statistics.

    However it ends, parameters, buffers and modes are then as they were, bit for bit; ``.grad`` is never touched.

    Args:
        model: as `MeanLoss` has it.
        loss_fn: as `MeanLoss` has it.
        loader: as `MeanLoss` has it.

    Raises:
        TypeError, ValueError: as `MeanLoss` has it.
    """
    loss = MeanLoss(model, loss_fn, loader)
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        model.eval()
        yield loss
    finally:
        loss.place()
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def dot(a: Direction, b: Direction) -> float:
    """Return a · b over all tensors, summed in float64."""
    return math.fsum((x.double() * y.double()).sum().item() for x, y in zip(a, b, strict=True))


def _add(to: list[Tensor], scale: float, tensors: Sequence[Tensor]) -> None:
    for total, tensor in zip(to, tensors, strict=True):
        total.add_(tensor.detach(), alpha=scale)


def _to(item: Any, device: torch.device) -> Any:
    return item.to(device) if hasattr(item, "to") else item
