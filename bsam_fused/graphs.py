"""Whole sharpness-aware steps, all passes and the update, as CUDA graphs: one of each kind of step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from bsam_fused import distributed
from bsam_fused.buffers import Snapshot
from bsam_fused.ops.copies import places
from bsam_fused.optim.base import SharpnessAware
from bsam_fused.optim.captured import Captured
from bsam_fused.optim.sharpness import Sharpness

_WARM_UP = 3


class _Kind(NamedTuple):
    """What a step's capture depends on, and may be otherwise in the next step."""

    active: bool
    passes: int
    still: bool
    """A step of one pass moves nothing, as every lr is 0: it counts for nothing then."""


class _Capture(NamedTuple):
    """A captured step."""

    graph: torch.cuda.CUDAGraph
    loss: Tensor
    memory: Captured
    slots: tuple[int, ...]
    """Where the sums have the norms of its passes."""
    sharpness: Sharpness | None
    snapshots: Any
    """What it copies buffers to and from."""


class GraphedStep:
    """Replays one step of ``optimizer`` on new data: what the host had to do for it was done once.

    A step of hundreds of launches is replayed by one call. Learning rates, radii and the other numbers in the param
    groups are read from the device, so schedules go on; everything else stays as it was when this was built. Building
    trains nothing: the warm-up's steps are skipped ones, and running statistics and random generators are put back.
    Steps of another number of passes, as ``active`` or `LookSAM` has them, are captured when the first of them comes,
    which waits for the device.
    Replays and ``optimizer.step(closure)`` may follow each other, on the same state; what gives the optimizer or the
    model other memory (a state dict loaded, state edited, a model moved) ends it, and the next call says so.

    Args:
        model: in the mode, training or evaluation, in which it is to stay; on one GPU, as the optimizer's parameters.
        loss_fn: of (model's output, target): a scalar Tensor. Nothing in model and loss may wait for the device.
        optimizer: at rest, with a fused base on the "cuda" or the "triton" backend; its closures are made here.
        sample_inputs: the model's inputs (at least one), then the target: tensors on the model's device, of the shapes
            and dtypes of all that will come; they are copied.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a shape, dtype or device that cannot be captured.
        RuntimeError: the step cannot be captured: why, and what to do.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Tensor], Tensor],
        optimizer: SharpnessAware,
        sample_inputs: Sequence[Tensor],
    ) -> None:
        _check(model, optimizer, sample_inputs)
        self._model, self._loss_fn, self._optimizer = model, loss_fn, optimizer
        self._inputs = [sample.detach().clone() for sample in sample_inputs]
        self._device = self._inputs[0].device
        self._buffers = Snapshot(model)
        self._named = _named(model, optimizer)
        self._parameters = list(self._named)
        self._captures: dict[_Kind, _Capture] = {}
        before = {_path(name): (module, module.training) for name, module in model.named_modules()}
        self._make(self._kind())
        # What has another mode now has it of the model's own forward, in every step.
        self._modules = {name: module for name, (module, mode) in before.items() if module.training == mode}
        self._fixed = self._structure()
        self._places = _places(self._parameters)
        self._alive = [*map(_storage, self._parameters)]  # replays use it, whoever else lets go of it

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Make a step; does not wait for the device.

        Args:
            *inputs: as ``sample_inputs``, on any device.

        Returns:
            The loss at w: 0-dim, a copy.

        Raises:
            ValueError: an input of another shape or dtype than the sample, or another number of them.
            RuntimeError: within a step; or what the graph has fixed was changed since, or has other memory: what, and
                what to do.
        """
        self._optimizer._require_rest("a captured step")
        self._check_inputs(inputs)
        self._check_memory()
        self._check_structure()
        kind = self._kind()
        if kind not in self._captures:
            self._make(kind)
        captured = self._captures[kind]
        with torch.cuda.device(self._device):
            for here, given in zip(self._inputs, inputs, strict=True):
                here.copy_(given, non_blocking=True)
            self._optimizer.write_options()
            captured.memory.begin()
            captured.graph.replay()
            self._count(kind, 1)
            self._optimizer._flats.slots, self._optimizer.sharpness = captured.slots, captured.sharpness
            return captured.loss.clone()

    def _kind(self) -> _Kind:
        """Return of which kind the coming step is.

        Raises:
            RuntimeError: the host has a part in it.
        """
        optimizer = self._optimizer
        if optimizer.same_randomness:
            raise RuntimeError(
                "optimizer.same_randomness is True: a captured step draws anew in every pass; use "
                "optimizer.step(closure)"
            )
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            raise RuntimeError(
                "optimizer has hooks on its step, which no replay calls: remove them, or use optimizer.step(closure)"
            )
        if optimizer.decide is not None:
            raise RuntimeError(
                "optimizer.decide is set: the gradient of the first pass decides whether there are others, which a "
                "graph cannot; use optimizer.step(closure)"
            )
        passes = optimizer.passes
        return _Kind(optimizer._active, passes, passes == 1 and optimizer._moves_nothing())

    def _count(self, kind: _Kind, steps: int) -> None:
        if kind.active and not kind.still:
            self._optimizer._count(steps)

    def _make(self, kind: _Kind) -> None:
        """Capture the coming step."""
        optimizer = self._optimizer
        with _putting_back(optimizer.param_groups):  # BSAM notes the largest lr there
            self._warm_up(kind)
            optimizer.write_options()
            try:
                graph = _capture(lambda: self._step(kind), self._device)
                flats, snapshots = optimizer._flats, optimizer._passes.snapshots
                made = _Capture(graph, self._loss, flats.captured(), flats.slots, optimizer.sharpness, snapshots)
            finally:  # nothing of a step was done, however far it was captured
                for flat in optimizer._flats:
                    flat.release()
                optimizer.restore()
                optimizer.zero_grad()
        # The first step with a history gives all state other memory.
        same = {kind: one for kind, one in self._captures.items() if self._fits(one)}
        self._captures = {**same, kind: made}

    def _fits(self, captured: _Capture) -> bool:
        return captured.memory.is_of(list(self._optimizer._flats), self._optimizer.state)

    def _step(self, kind: _Kind, factor: float = 1.0) -> None:
        def closure() -> Tensor:
            *inputs, target = self._inputs
            loss = self._loss_fn(self._model(*inputs), target)
            loss.backward()
            return loss.detach() * factor

        self._loss = self._optimizer.step(closure)
        self._count(kind, -1)

    def _warm_up(self, kind: _Kind) -> None:
        """Allocate, compile and write all that a capture cannot: in steps that are skipped, as their loss is NaN.

        The first one allocates what stays, on the caller's stream: to which it is given back when it is let go of.
        """
        steps, skipped = map(int, self._optimizer._flats.counts)
        self._buffers = Snapshot(self._model, self._buffers)
        try:
            with torch.random.fork_rng(_devices(self._inputs)), torch.cuda.device(self._device):
                self._step(kind, math.nan)
                with _side_stream(self._device):
                    for _ in range(_WARM_UP - 1):
                        self._step(kind, math.nan)
        finally:
            self._buffers.write_back()
            self._optimizer._flats.disregard((steps, skipped))
            self._optimizer._flats.retract()  # a capture that fails could not look whether there is state

    def _structure(self) -> dict[str, Any]:
        """Return what replays have fixed, by the name under which the user knows it."""
        groups, key = self._optimizer.param_groups, self._optimizer._key
        return {
            "norm_eps": self._optimizer.norm_eps,
            "max_grad_norm": self._optimizer.max_grad_norm,
            "training": [module.training for module in self._modules.values()],
            "requires_grad": [p.requires_grad for p in self._parameters],
            "adaptive": [bool(group[key("adaptive")]) for group in groups],
            "perturb": [bool(group[key("perturb")]) for group in groups],
            "mix": getattr(self._optimizer, "mix", None),
            "whether there is momentum": [group.get("momentum", 0) != 0 for group in groups],
        }

    def _check_memory(self) -> None:
        optimizer = self._optimizer
        optimizer._notice()
        if not self._buffers.is_in_place:
            self._refuse("the model's buffers were exchanged or moved")
        if (
            not optimizer._flats.fit(optimizer.param_groups, optimizer._exempt())
            or _places(self._parameters) != self._places
        ):
            self._refuse("parameters were moved, thawed, or exchanged in param_groups")
        if not all(map(self._fits, self._captures.values())):
            self._refuse("optimizer.state was loaded, edited or left to another update")

    def _refuse(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"{what} since this step was captured, which reads and writes the memory of then: build another GraphedStep"
        )

    def _check_structure(self) -> None:
        now = self._structure()
        for name, then in self._fixed.items():
            if now[name] != then:
                raise RuntimeError(
                    f"{self._said(name, then, now[name])}: use optimizer.step(closure) meanwhile, or build another "
                    "GraphedStep"
                )

    def _said(self, name: str, then: Any, now: Any) -> str:
        """Return what was and what is; of modules and parameters the first one, by its name."""
        owners = {"training": self._modules, "requires_grad": self._named.values()}
        if name in owners:
            name, then, now = next(
                (f"{owner}.{name}", *values)
                for owner, *values in zip(owners[name], then, now, strict=True)
                if values[0] != values[1]
            )
        return f"{name} was {then} when this step was captured and is {now}"

    def _check_inputs(self, inputs: Sequence[Tensor]) -> None:
        if len(inputs) != len(self._inputs):
            raise ValueError(f"{len(inputs)} inputs, but sample_inputs had {len(self._inputs)}")
        for i, (here, given) in enumerate(zip(self._inputs, inputs, strict=True)):
            if (given.shape, given.dtype) != (here.shape, here.dtype):
                raise ValueError(
                    f"input {i} has shape {tuple(given.shape)} and {given.dtype}, but the step was captured with "
                    f"{tuple(here.shape)} and {here.dtype}: pad it, or use optimizer.step(closure) for it"
                )


def _check(model: nn.Module, optimizer: SharpnessAware, samples: Sequence[Tensor]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass the nn.Module")
    if not isinstance(optimizer, SharpnessAware):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}: pass one of bsam_fused, such as SAM")
    if isinstance(samples, Tensor) or len(samples) < 2 or not all(isinstance(x, Tensor) for x in samples):
        raise TypeError("sample_inputs: pass a sequence of tensors, the model's inputs and then the target")
    if distributed.world_size() > 1:
        raise RuntimeError(f"there are {distributed.world_size()} ranks: steps that communicate are not captured")
    _check_devices(model, optimizer, samples)


def _check_devices(model: nn.Module, optimizer: SharpnessAware, samples: Sequence[Tensor]) -> None:
    where = {
        "model": {str(t.device) for t in [*model.parameters(), *model.buffers()]},
        "optimizer": {str(p.device) for p in optimizer._parameters()},
        "sample_inputs": {str(x.device) for x in samples},
    }
    devices = set().union(*where.values())
    said = ", ".join(f"{name} on {' and '.join(sorted(on)) or 'none'}" for name, on in where.items())
    if len(devices) != 1 or not all(device.startswith("cuda") for device in devices):
        missing = "" if torch.cuda.is_available() else "; torch sees no NVIDIA GPU"
        raise ValueError(f"a CUDA graph needs all tensors on one GPU, but there is {said}{missing}")


def _path(name: str) -> str:
    return f"model.{name}" if name else "model"


def _named(model: nn.Module, optimizer: SharpnessAware) -> dict[Tensor, str]:
    """Return all parameters, the model's and others of the optimizer, and how they are called."""
    groups = enumerate(optimizer.param_groups)
    theirs = {p: f"parameter {i} of group {k}" for k, group in groups for i, p in enumerate(group["params"])}
    return theirs | {p: _path(name) for name, p in model.named_parameters()}


@contextmanager
def _putting_back(groups: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Give param groups the options back that they have now, come what may."""
    before = [(group, dict(group)) for group in groups]
    try:
        yield
    finally:
        for group, options in before:
            group.update(options)


def _devices(inputs: Sequence[Tensor]) -> list[torch.device]:
    return [inputs[0].device]


def _places(tensors: Sequence[Tensor]) -> object:
    # A Parameter is no DTensor: of hundreds each question that Python asks takes longer than the replay's launch.
    return places([t if type(t) is nn.Parameter else distributed.local(t) for t in tensors])


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return distributed.local(tensor).untyped_storage()


@contextmanager
def _side_stream(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """Be on another stream of ``device`` than the default one, where nothing is captured; and back, come what may."""
    with torch.cuda.device(device):
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        try:
            with torch.cuda.stream(aside):
                yield aside
        finally:
            here.wait_stream(aside)


def _capture(work: Callable[[], Any], device: torch.device) -> torch.cuda.CUDAGraph:
    """Return the graph of ``work``; other threads may go on meanwhile, such as a data loader's, which pin memory.

    torch's own stream for captures is on the device of the first one, and stays the current one where one fails.
    """
    with _side_stream(device) as stream:
        try:
            return _captured(work, stream)
        except BaseException:
            # torch's generator is in a capture until one ends well: until then nobody could draw from it.
            with suppress(Exception):  # where the device is beyond capturing, the first error is what says why
                _captured(lambda: torch.zeros((), device=device), stream)
            raise


def _captured(work: Callable[[], Any], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph
