"""The loss along a direction and on a plane through the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bsam_fused.sharpness.mean_loss import Direction, LossFunction, measured


def random_direction(model: nn.Module, seed: int = 0) -> list[Tensor]:
    """Return a random direction, filter-normalised: each filter has the norm of the model's own.

    d_ij ← d_ij ‖w_ij‖ / ‖d_ij‖, from a normal distribution; zero for biases and normalisation layers, all parameters of
    fewer than two dimensions (Li et al., "Visualizing the Loss Landscape of Neural Nets", arXiv 1712.09913, §4).

    Args:
        model: whose trainable parameters give shapes and norms.
        seed: of the random numbers.

    Returns:
        A tensor for each trainable parameter.
    """
    random = torch.Generator().manual_seed(seed)
    return [_filter_normalised(p.detach(), random) for p in model.parameters() if p.requires_grad]


def _filter_normalised(w: Tensor, random: torch.Generator) -> Tensor:
    d = torch.randn(w.shape, generator=random, dtype=torch.float64, device="cpu")
    if w.dim() < 2:
        return torch.zeros_like(w)
    filters = tuple(range(1, w.dim()))
    scale = torch.linalg.vector_norm(w.double().cpu(), dim=filters, keepdim=True)
    return (d * scale / torch.linalg.vector_norm(d, dim=filters, keepdim=True)).to(w.device, w.dtype)


def direction_to(model: nn.Module, state_dict: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the direction from the model's weights to those of ``state_dict``: 0 is here and 1 is there.

    Only trainable parameters move; buffers (BatchNorm's statistics) stay the model's.

    Args:
        model: where to start.
        state_dict: where to go, of the same model.

    Raises:
        KeyError: a parameter is not in it.
        ValueError: a parameter has another shape there.
    """
    direction = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        there = state_dict[name]
        if there.shape != p.shape:
            raise ValueError(f"{name} has shape {tuple(there.shape)} there, and {tuple(p.shape)} here")
        direction.append(there.detach().to(p.device, p.dtype) - p.detach())
    return direction


def loss_along(
    model: nn.Module, loss_fn: LossFunction, loader: Iterable[Any], direction: Direction, steps: Iterable[float]
) -> Tensor:
    """Return L(w + a d) for each a of ``steps``, L the mean over the whole loader in evaluation mode.

    The model is left as it was, bit for bit.

    Args:
        model: as `measure` has it.
        loss_fn: as `measure` has it.
        loader: as `measure` has it.
        direction: d, of `random_direction` or `direction_to`, or any tensor for each trainable parameter.
        steps: the multiples a.

    Returns:
        float64 (len(steps),), on the CPU.

    Raises:
        ValueError: a direction of other shapes than the parameters', or a loader that is empty.
        TypeError: a loader that is an iterator.
        FloatingPointError: a loss that is not finite.
    """
    return _losses(model, loss_fn, loader, [direction], [(a,) for a in steps])


def loss_on_plane(
    model: nn.Module,
    loss_fn: LossFunction,
    loader: Iterable[Any],
    directions: tuple[Direction, Direction],
    steps: tuple[Sequence[float], Sequence[float]],
) -> Tensor:
    """Return L(w + a d_1 + b d_2) on a grid, L the mean over the whole loader in evaluation mode.

    The model is left as it was, bit for bit.

    Args:
        model: as `loss_along` has it.
        loss_fn: as `loss_along` has it.
        loader: as `loss_along` has it.
        directions: d_1 and d_2, each as `loss_along` has it.
        steps: the multiples a, and the multiples b.

    Returns:
        float64 (len(b), len(a)), on the CPU: a row for each b, as matplotlib's contour has it.

    Raises:
        ValueError, TypeError, FloatingPointError: as `loss_along`.
    """
    along, across = steps
    losses = _losses(model, loss_fn, loader, directions, [(a, b) for b in across for a in along])
    return losses.view(len(across), len(along))


def _losses(
    model: nn.Module,
    loss_fn: LossFunction,
    loader: Iterable[Any],
    directions: Sequence[Direction],
    places: Sequence[tuple[float, ...]],
) -> Tensor:
    with measured(model, loss_fn, loader) as loss:
        for direction in directions:
            if [d.shape for d in direction] != [p.shape for p in loss.params]:
                raise ValueError("a direction must have a tensor for each trainable parameter, of its shape")
        losses = []
        for place in places:
            loss.place(*zip(place, directions, strict=True))
            losses.append(loss.value(f"w + {' + '.join(f'{a:g} d' for a in place)}"))
    return torch.tensor(losses, dtype=torch.float64, device="cpu")
