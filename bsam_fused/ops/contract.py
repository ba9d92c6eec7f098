"""What every backend offers: the FlatParams protocol, and the words for what it cannot work with.

Symbols as in the papers: w, g, ρ, ρ_min, η, T (1, or |w| + η where adaptive), d the direction. Sums are
``[Σ (T g)², Σ g_max², Σ g_min², scale, Σ x², Σ x y, a, b]``; n = √sums[0]; scale is what the loss was multiplied by, 0
if it was not; d = a x + b y, x what was kept of the passes before the last one, or the history, y the last gradient
(see `Rule`). The history is what steps before this one remembered: one buffer a parameter, zeros at first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from bsam_fused import distributed

ASCENT, MAX, MIN, SCALE, SQUARE, PRODUCT, GIVEN_KEPT, GIVEN_LAST = range(8)
"""Slots of the sums: of T g at w, of g_max, of g_min; the loss's scale; of x, and of x with y; a and b, if given."""

NORMS, CHECKED, SLOTS = 3, 4, 8
"""How many there are: of norms; that must be finite, or the step is skipped; in all."""

MASTER_WEIGHT = "master_weight"
"""The state that is no base optimizer's: float32 weights, from and to which 16-bit parameters are updated."""

HISTORY_KEYS = ("orthogonal_gradient", "gradient_average")
"""The state of what remembers: LookSAM's v, Friendly SAM's m."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Radius(NamedTuple):
    """How a param group is perturbed: by ``radius`` T² g / (n + norm_eps), T = |w| + ``eta`` if ``adaptive``."""

    radius: float
    adaptive: bool = False
    eta: float = 0.0
    largest: float = 0.0
    """The largest |radius| of all groups, by which all FlatParams decide alike whether w is within reach."""
    budget: float = math.inf
    """What the loss may rise by to first order: the radius is at most budget / n."""


class Rule(IntEnum):
    """How the direction is mixed: d = a x + b y, of what was kept, x, and the last gradient, y.

    a and b are functions of the sums and a param group's number: csrc/math.h, triton_math.py, directions.py.
    """

    LAST_ALONE = 0
    """(0, 1), and nothing is kept: SAM, and plain steps."""
    BILATERAL = 1
    """Of g + g_max and g_min (1, −c), c = ‖g_max‖ / ‖g_min‖. BSAM."""
    EXTRAPOLATED = 2
    """Of g and g_max (1 − c (1 + r), 1 + c r), c = ‖g_max‖ / ‖ĝ_min‖, ĝ_min = g − r (g_max − g); r is the number. Of a
    parameter that lacks one of the two ĝ_min is 0. BSAM in two passes."""
    SURROGATE_GAP = 3
    """Of g and g_max (−α, 1 + α ⟨g, g_max⟩ / ‖g_max‖²), (0, 1) where g_max = 0; α is the number. GSAM."""
    WEIGHTED = 4
    """Of g and g_max ((1 − 2γ)/(1 − γ), γ/(1 − γ)); γ is the number. WSAM."""
    GIVEN = 5
    """Of g and g_max what ``sums[GIVEN_KEPT]`` and ``sums[GIVEN_LAST]`` say, set from outside."""
    ORTHOGONAL = 6
    """(0, 1); g is kept, as v = g_max − (⟨g, g_max⟩ / ‖g‖²) g is remembered. LookSAM, every k-th step."""
    REUSED = 7
    """Of the remembered v and g, in one pass: (α ‖g‖ / ‖v‖, 1), (0, 1) where v = 0; α: the number. LookSAM, between."""
    FRIENDLY = 8
    """(0, 1), of a perturbation along q = g − σ m, which is kept (`mix`), as m = λ m + (1 − λ) g is remembered, g where
    m = 0; σ is the number, λ its `decay`. Friendly SAM."""

    @property
    def keeps(self) -> bool:
        """Whether `ascend` keeps g for it."""
        return self not in {Rule.LAST_ALONE, Rule.REUSED, Rule.FRIENDLY}

    @property
    def mixes(self) -> bool:
        """Whether d is not the last gradient alone."""
        return self not in {Rule.LAST_ALONE, Rule.ORTHOGONAL, Rule.FRIENDLY}

    @property
    def history(self) -> str | None:
        """The key of the state that it uses, or remembers."""
        looks = self in {Rule.ORTHOGONAL, Rule.REUSED}
        return HISTORY_KEYS[0] if looks else HISTORY_KEYS[1] if self is Rule.FRIENDLY else None

    @property
    def remembers(self) -> bool:
        """Whether its step writes the history."""
        return self in {Rule.ORTHOGONAL, Rule.FRIENDLY}

    @property
    def last_slot(self) -> int:
        """Where the sum of the last gradient's squares is."""
        return MIN if self is Rule.BILATERAL else MAX

    @property
    def slots(self) -> tuple[int, ...]:
        """Where the norms of a step's gradients are, g_min's where there is one."""
        has_min = self is Rule.BILATERAL or self is Rule.EXTRAPOLATED
        return (ASCENT, MAX, MIN) if has_min else (ASCENT, MAX)


class RuleNumber(NamedTuple):
    """A param group's number of a `Rule`, 0 where it has none."""

    number: float = 0.0
    largest: float = 0.0
    """The largest of all groups, by which all FlatParams decide alike whether a step can be made."""
    decay: float = 0.0
    """Friendly SAM's λ."""


class Mixing(NamedTuple):
    """How a step's direction is mixed."""

    rule: Rule = Rule.LAST_ALONE
    numbers: Sequence[RuleNumber] = ()
    """One a param group; none where the rule is that of the last gradient alone."""


class SGDScalars(NamedTuple):
    """A param group's options of torch.optim.SGD."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool

    @property
    def stateful(self) -> bool:
        """Whether the update keeps state."""
        return self.momentum != 0


class AdamScalars(NamedTuple):
    """A param group's options of torch.optim.Adam, or AdamW (``decoupled``)."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool

    @property
    def stateful(self) -> bool:
        """Whether the update keeps state."""
        return True


class FlatParams(Protocol):
    """The parameters of one device and dtype, and the flat buffers that belong to them.

    Constructed from ``params`` (float32, float64, bfloat16 or float16 tensors of any strides), ``places`` (of each,
    its param group and its index there), ``seed`` (int or None) and ``exempt`` (bool): whether these parameters are
    left out of the perturbations, neither in ``sums[ASCENT]`` nor saved nor moved; all else is alike. Arithmetic is in
    float32 (float64 for float64). With a seed w_max, w_min, updated weights and state of 16 bits are rounded
    stochastically (csrc/rounding.h; the bits depend on the seed, the place, the element and `step_count`), without to
    nearest. Methods that write weights bump their version counters. A parameter without a gradient in some pass has the
    gradient zero there; one without any in a whole step is left alone. Options come as one entry a param group.
    ``sums`` arguments are the sums over *all* FlatParams of the optimizer, on this one's device.

    Weights and state of a step that cannot be made stay as they were before it: one with a sum that is not finite, or
    where d, its coefficients or a step length may be beyond `limit`; phases note the latter as NaN in the sum of their
    pass. Where w_max or w_min is beyond the dtype, an element stays at w.

    What is read and decided comes before the first write, and what can raise before that, so an error leaves a phase
    as it was; an update is one call that Python cannot interrupt, and `updated` says whether it was made. ``saved``
    keeps the layout that the parameters had when this was built. Parameters are known by their Python objects, whose
    tensors others may exchange (torch.utils.swap_tensors): nothing here counts as a holder of one.

    A gradient is taken only where nobody else can see its memory, which torch itself must have allocated; else it is
    copied, and never written to. One that lies in the storage of one of these parameters, or of their state, is copied
    as it is read; one that lies in those of another FlatParams in the step, by `copy_shared`.
    """

    limit: float
    """What no number of a step may exceed: float32's largest, or float64's where that is all that there is; the same
    for all FlatParams of the optimizer, by which it is set."""

    @property
    def params(self) -> Sequence[Tensor]:
        """The parameters."""

    @property
    def places(self) -> Sequence[tuple[int, int]]:
        """Of each parameter, its param group and its index there."""

    @property
    def device(self) -> torch.device:
        """Where the parameters were when this was built."""

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype when this was built."""

    @property
    def sums(self) -> Tensor:
        """float64 (8,): this FlatParams' own sums, and the loss's scale, which is set from outside."""

    @property
    def step_count(self) -> Tensor:
        """int64 (): updates, made or skipped, so far; a base optimizer's own step is counted by whoever made it."""

    @property
    def skipped(self) -> Tensor:
        """int64 (): of these, those that were skipped."""

    @property
    def extra_bytes(self) -> int:
        """Bytes held beside parameters and gradients: saved, g while kept, the base optimizer's state."""

    @property
    def updated(self) -> bool:
        """Whether an update, or `combine` that gave the step up, was made of the gradients read last."""

    def read_gradients(self) -> None:
        """Note every ``.grad`` of this pass, before anything is written.

        Raises what `reject` and `reject_memory` raise, with nothing changed.
        """

    def copy_shared(self, beside: Sequence[FlatParams]) -> None:
        """Copy the gradients that lie in the memory of others, of this backend and device, which have read theirs, too.

        Raises what `reject_memory` raises.
        """

    def begin_plain(self, mixing: Mixing) -> None:
        """Begin a step without perturbations: all sums 0.

        To be followed by `square_norm` of g in ``MAX`` where d = g, and by `direction_sums` where ``mixing`` has the
        history: it takes then the place of what is kept, of all parameters that have a gradient.
        """

    def clear_gradients(self) -> None:
        """Set every ``.grad`` to None."""

    def join(self, mixing: Mixing, descended: bool) -> None:
        """Take part from this pass on in a step that began without these parameters, whose gradients so far are zero.

        The step's ascent had ``mixing``, and `descend` has been or not.
        """

    def square_norm(self, slot: int, radii: Sequence[Radius]) -> None:
        """Compute ``sums[slot] = Σ (T g)²`` of the gradients read, in float64. Reads N (adaptive: 2 N)."""

    def mix(self, radii: Sequence[Radius], mixing: Mixing) -> None:
        """With the friendly rule, in place of `square_norm`: q = g − σ m, which is kept, and along which `ascend` goes.

        Computes ``sums[ASCENT]`` = Σ (T q)², ``sums[SQUARE]`` = Σ m² and ``sums[PRODUCT]`` = Σ q². ``.grad`` stays as
        it is. Moves 3 N. What is exempt has no part in it.
        """

    def direction_sums(self) -> None:
        """In the last pass of a step with an x: ``sums[rule.last_slot]``, ``sums[SQUARE]``, ``sums[PRODUCT]``.

        They give ‖d‖² = a² Σ x² + 2 a b Σ x y + b² Σ y². With the extrapolated rule x is g + g_max and y ĝ_min, where
        a = 1 and b = −c, and ``sums[MIN]`` = Σ ĝ_min² comes with them. Reads 2 N.
        """

    def ascend(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float, mixing: Mixing) -> None:
        """Save w, then w = w_max = w + radius T² g / (n + norm_eps).

        Where n is not finite, or w_max out of reach, w stays. Leaves ``.grad`` None; if the rule keeps it, g is taken:
        the tensor itself where nobody else holds its storage, else a copy. Moves 4 N.
        """

    def descend(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float) -> None:
        """From the saved w, w = w_min = w + radius T² g / (n + norm_eps), radius = −ρ_min; and g = g + g_max.

        Computes ``sums[MAX] = Σ g_max²`` in the same pass. Where n is not finite, w stays; where g_max is not,
        w is what it was before the step (on a GPU possibly w_min, which is finite). Leaves ``.grad`` None.
        Moves 5 N.
        """

    def beginning(self, stateful: Sequence[bool]) -> list[int]:
        """Return the parameters with a gradient in some pass of this step whose state has not begun.

        Of groups that keep state alone: ``stateful``, one a param group.
        """

    def begin_state(self, members: Sequence[int]) -> None:
        """Note that the state of these parameters has begun: `beginning` leaves them out."""

    def retract_state(self, i: int) -> None:
        """Note that some state of the i-th parameter, all zeros, has not begun: `beginning` has it again."""

    def update_sgd(self, sums: Tensor, groups: Sequence[SGDScalars], from_saved: bool, max_norm: float) -> None:
        """torch.optim.SGD's rule with d = g (plain), or as the step's `Rule` has it.

        d is divided by the loss's scale, and then scaled down to a norm of ``max_norm``, as
        torch.nn.utils.clip_grad_norm_ does it: a finite one needs `direction_sums` where g is kept, and so do all rules
        of g and g_max, but for the weighted one where n = ‖g‖. From the saved w, or (``from_saved=False``) from the
        weights as they are. Then a rule that remembers writes the history, of the same step or not at all, from the
        gradients as they came: x kept + y g_last + z history, of which it reads what counts, and 16 bits are rounded
        by the count of steps with this one. Ends the step: saved and g are free again. Moves 6 N (SAM and plain 5 N);
        to remember 3 N.
        """

    def update_adam(self, sums: Tensor, groups: Sequence[AdamScalars], from_saved: bool, max_norm: float) -> None:
        """torch.optim.Adam's and AdamW's rule; otherwise as `update_sgd`. Moves 8 N (SAM 7 N)."""

    def combine(self, sums: Tensor, from_saved: bool, max_norm: float) -> bool:
        """Put d, as `update_sgd` has it, into ``.grad``, and the saved w into the weights (``from_saved``).

        For any base optimizer. Returns False, with the step given up, where a sum is not finite: waits for the
        sums. The step goes on until `release`: every parameter's w is saved now, with or without a gradient, so that
        `restore` can still undo whatever the base does to the weights. Where d is not the gradient as it is, it is
        another tensor: what lies in ``.grad`` is not written to. What is to be remembered is worked out beside the
        history: see `remembering`.
        """

    def remembering(self) -> Sequence[Callable[[], object]]:
        """Return what writes the history that `combine` has worked out, once the base optimizer's own step was made.

        Calls of C code, to be made in one go with that step.
        """

    def merge(self, sums: Tensor, share: float) -> Tensor:
        """In the last pass of a step that keeps g, put share · d into a flat buffer, each ``.grad`` a view of it.

        d is divided by ``sums[SCALE]``, if that is not 0: 0 there leaves it at the scale of the loss.
        The step then goes on as if that were its last gradient, g_max of SAM: with `read_gradients`, after the buffer
        was summed over ranks. Parameters without a gradient have zeros there, and no ``.grad``.

        Raises:
            RuntimeError: this step keeps no g, or does no more.
        """

    def write_options(self, tables: Sequence[Sequence[Sequence[float]]]) -> None:
        """Write what the phases of a captured step read from the device in its replays, where it is not there already.

        ``tables``: what `ascend`, `descend` (empty where there is none) and the update would be given, and the mixing's
        numbers (none where there are none).

        Raises:
            RuntimeError: the launches of this backend carry their options.
        """

    def restore(self) -> None:
        """Put the saved w back, bit for bit, and forget the step; where it is `updated`, only forget it.

        Right for parameters whose strides, dtype or device were changed meanwhile.

        Raises:
            RuntimeError: a parameter has another shape than when it was saved; then nothing was written, and saved
                is kept.
        """

    def release(self) -> None:
        """Forget the step: saved and g are free again, the weights stay."""

    def show_w(self, at_w: bool) -> None:
        """Exchange perturbed weights with the saved w (``at_w``), or back, if that is not so already.

        `restore` meanwhile keeps what the weights are. Raises as `restore` does, and where memory is short before
        anything is written.
        """

    def state(self, key: str) -> list[Tensor]:
        """Return the base optimizer's state ``key``, a view of its flat buffer (zero at first) a parameter.

        Each has its parameter's shape and strides; "step" (float32, 0-dim) counts the updates made. Where
        `MASTER_WEIGHT` (float32) of 16-bit parameters was once asked for, updates start from it, end in it, and
        the weights become its rounding to nearest. Weights that are not its rounding (at first, or set from
        outside) count themselves.
        """

    def drop_state(self) -> None:
        """Let go of the base optimizer's state, and begin with new buffers: old views stay as they are, others' now."""


def describe(param: Tensor, place: tuple[int, int]) -> str:
    """Return how messages name a parameter: its index, param group, shape and dtype."""
    group, index = place
    shape = "uninitialized" if torch.nn.parameter.is_lazy(param) else f"shape {tuple(param.shape)}"
    return f"parameter {index} of group {group} ({shape}, {param.dtype})"


class LayoutChangedError(RuntimeError):
    """A parameter was moved, cast or laid out anew since its FlatParams was built; at rest, build that anew."""


def reject(flat: FlatParams, i: int) -> NoReturn:
    """Raise the error that says why ``flat`` cannot work with its i-th parameter, and what to do.

    Raises:
        RuntimeError: the parameter's gradient is sparse, or on another device or of another dtype or shape;
            `LayoutChangedError` where the parameter itself was moved, cast or laid out anew.
    """
    param, grad = flat.params[i], flat.params[i].grad
    name = describe(param, flat.places[i])
    if param.device != flat.device or param.dtype != flat.dtype:
        raise LayoutChangedError(
            f"{name} is now on {param.device} as {param.dtype}, but was on {flat.device} as {flat.dtype} in the "
            "last phase: move or cast a model between steps, not within one; restore() first"
        )
    if grad is not None and grad.layout != torch.strided:
        raise RuntimeError(
            f"{name} has a sparse gradient ({grad.layout}), which sharpness-aware steps do not support: "
            "build its layer with sparse=False"
        )
    if grad is not None and (grad.dtype != param.dtype or grad.device != param.device):
        raise RuntimeError(
            f"{name} on {param.device} has a gradient of {grad.dtype} on {grad.device}: gradients must have "
            "their parameter's dtype and device"
        )
    if grad is not None and grad.shape != param.shape:
        raise RuntimeError(f"{name} has a gradient of shape {tuple(grad.shape)}: assign one of its own shape")
    raise LayoutChangedError(
        f"{name} has another shape or other strides {tuple(param.stride())} than in the last phase: do not "
        "change a parameter's layout within a step; restore() first"
    )


def check_param(param: Tensor, place: tuple[int, int]) -> None:
    """Raise where no backend can optimize ``param``.

    Raises:
        TypeError: for sparse, complex, integer and other unsupported parameters, for tensor subclasses that
            hold no storage of their own, but DTensors, for DTensors that are partial sums, and for shards of FSDP1.
    """
    name = describe(param, place)
    if distributed.is_fsdp1(param):
        raise TypeError(f"{name} is a shard of FullyShardedDataParallel (FSDP1): {distributed.OWN_NORM}")
    if param.layout != torch.strided:
        raise TypeError(f"{name} is sparse ({param.layout}): optimize a dense parameter")
    if param.is_complex():
        raise TypeError(f"{name} is complex: optimize torch.view_as_real of it, as a real parameter")
    if not param.is_floating_point():
        raise TypeError(f"{name} is not a floating point tensor: leave it out of params, or make it a buffer")
    if param.dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{name}: dtype must be one of {names}: cast it, or leave it out of params")
    if distributed.is_dtensor(param):
        if any(placement.is_partial() for placement in param.placements):  # type: ignore[attr-defined]
            raise TypeError(f"{name} is placed {param.placements}, a partial sum: redistribute it")  # type: ignore[attr-defined]
    elif hasattr(param, "__tensor_flatten__"):
        raise TypeError(
            f"{name} is a {type(param).__name__}, which has no storage of its own: of wrapped parameters only DTensors "
            "are supported"
        )


def reject_shape(flat: FlatParams, i: int) -> NoReturn:
    """Raise the error that says why the saved w of ``flat``'s i-th parameter cannot be put back.

    Raises:
        RuntimeError: the parameter has another shape, or no memory, now.
    """
    saved = tuple(flat.state("saved")[i].shape)
    raise RuntimeError(
        f"{describe(flat.params[i], flat.places[i])} had shape {saved} when its weights were saved, which nothing has "
        "written to: give it memory of that shape again (`.data = torch.empty(...)`), then restore()"
    )


def reject_memory(flat: FlatParams, i: int) -> NoReturn:
    """Raise the error that says that ``flat``'s i-th parameter is not what its gradients were read of.

    Raises:
        RuntimeError: it, its gradient, or their memory was exchanged, resized or freed meanwhile.
    """
    raise RuntimeError(
        f"{describe(flat.params[i], flat.places[i])}: its memory, or its gradient's, was freed, resized or exchanged: "
        "give both what they need before the phase, and change them between phases only; restore() gives up a step"
    )
