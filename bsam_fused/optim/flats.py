"""All FlatParams of an optimizer: built when they are needed, summed over, and the base optimizer's state in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from bsam_fused.ops import contract, dispatch
from bsam_fused.ops.contract import MASTER_WEIGHT, SCALE, AdamScalars, FlatParams, SGDScalars
from bsam_fused.optim import fused
from bsam_fused.optim.fused import FusedRule
from bsam_fused.optim.scaling import Scaled

State = MutableMapping[Tensor, dict[str, Any]]
Groups = Sequence[dict[str, Any]]


class Flats:
    """A FlatParams a device and dtype of what takes part; frozen parameters are in none until they are thawed.

    Args:
        seed: of stochastic rounding, for 16-bit parameters; None: to nearest.
        masters: whether these have float32 master weights.
        skipped: updates skipped so far.
        rounded_steps: steps so far, where stochastic rounding has counted them.
    """

    def __init__(self, seed: int | None, masters: bool, skipped: int = 0, rounded_steps: int | None = None) -> None:
        self._seed, self.masters = seed, masters
        self._skipped_before, self._rounded_before = skipped, rounded_steps
        self._built: list[FlatParams] | None = None
        self._sizes: list[int] = []  # of the param groups, when built
        self._left_out: list[Tensor] = []  # frozen, and in no FlatParams
        self._adopted: tuple[FusedRule, State] | None = None  # the base's state, if it is views of the flat buffers
        self._states = 0  # parameters with state, when last seen
        self._scaled = False  # the sums hold a loss's scale

    def __iter__(self) -> Iterator[FlatParams]:
        """Every FlatParams there is."""
        return iter(self._built or [])

    def __len__(self) -> int:
        return len(self._built or [])

    @property
    def skipped(self) -> int:
        """Updates skipped, also by FlatParams that are gone; reading it waits for a GPU."""
        return self._skipped_before + (self._built[0].skipped if self._built else 0)

    @property
    def rounded_steps(self) -> int | None:
        """Steps so far, None where nothing was rounded stochastically; reading it waits for a GPU."""
        if self._seed is not None:
            for flat in self:
                if flat.dtype.itemsize == 2:
                    return int(flat.step_count)
        return self._rounded_before

    def unbuilt(self) -> Flats:
        """Return what a copy of the optimizer begins with."""
        return Flats(self._seed, self.masters, self.skipped, self.rounded_steps)

    def forget(self, rounded_steps: int | None = None) -> None:
        """Build anew next time, with the random bits of the step after ``rounded_steps`` (None: the next one)."""
        self.retract()
        rounded_steps = self.rounded_steps if rounded_steps is None else rounded_steps
        self.__init__(self._seed, self.masters, self.skipped, rounded_steps)  # type: ignore[misc]

    def gather(self, groups: Groups, backend: str, *, at_rest: bool) -> list[FlatParams]:
        """Bring in parameters that are new: at rest by building all anew, within a step by adding FlatParams.

        Returns:
            Those added within a step.
        """
        thawed = any(p.requires_grad or p.grad is not None for p in self._left_out)
        if self._built is None or (at_rest and (thawed or self._sizes != _sizes(groups))):
            self.forget()
            self._built, self._sizes = self._build(groups, backend, known=set()), _sizes(groups)
        elif thawed:
            self.hand_over()
            added = self._build(groups, backend, known={id(p) for flat in self._built for p in flat.params})
            self._built += added
            return added
        return []

    def _build(self, groups: Groups, backend: str, known: set[int]) -> list[FlatParams]:
        kinds: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[tuple[int, int]]]] = {}
        self._left_out = []
        for i, group in enumerate(groups):
            for j, param in enumerate(group["params"]):
                if id(param) in known:
                    continue
                if not param.requires_grad and param.grad is None:
                    self._left_out.append(param)
                    continue
                if torch.nn.parameter.is_lazy(param):
                    raise RuntimeError(f"{contract.describe(param, (i, j))}: run a forward pass before the first step")
                params, places = kinds.setdefault((param.device, param.dtype), ([], []))
                params.append(param)
                places.append((i, j))
        for params, places in kinds.values():
            contract.check_memory(params, places)
        built = [
            dispatch.choose(backend, device).build(params, places, self._seed)
            for (device, _), (params, places) in kinds.items()
        ]
        count = self._built[0].step_count if self._built else torch.tensor(self._rounded_before or 0)
        for flat in built:
            flat.step_count.copy_(count)
        return built

    def clear_gradients(self) -> None:
        """Set every .grad to None."""
        for flat in self:
            flat.clear_gradients()
        for param in self._left_out:
            param.grad = None

    # ---- sums

    def totals(self) -> list[Tensor]:
        """Return the sums over all FlatParams, on the device of each."""
        if len(self) <= 1:
            return [flat.sums for flat in self]
        flats = list(self)
        home = flats[0].sums.device
        total = torch.stack([flat.sums.to(home) for flat in flats]).sum(0)
        return [total.to(flat.sums.device) for flat in flats]

    def poison(self, slot: int, loss: Any) -> None:
        """Make the sum in ``slot`` non-finite if ``loss`` is: 0 · loss is 0 or NaN, without asking the device."""
        if not self._built:
            return
        sums = self._built[0].sums
        if isinstance(loss, Tensor):
            total = loss.detach().sum() if loss.dim() else loss.detach()
            sums[slot].add_(total if total.is_cpu else total.to(sums.device), alpha=0)
        elif isinstance(loss, Real):
            sums[slot].add_(0 * float(loss))

    def note(self, slot: int, scaled: Scaled) -> None:
        """Let what a GradScaler says join the sums: the loss's scale, and in ``slot`` that it found an inf."""
        if not self._built:
            return
        sums = self._built[0].sums
        if scaled.scale is not None:
            sums[SCALE].copy_(scaled.scale)
        elif self._scaled:
            sums[SCALE].zero_()
        self._scaled = scaled.scale is not None
        if scaled.found_inf is not None:
            sums[slot].masked_fill_(torch.as_tensor(scaled.found_inf, device=sums.device) > 0, math.nan)

    def failed(self, passes: int) -> Tensor:
        """Return whether one of the first ``passes`` sums is not finite: bool (), on the first one's device."""
        return ~self.totals()[0][:passes].isfinite().all()

    # ---- the base optimizer's state

    def update(
        self,
        rule: FusedRule,
        state: State,
        scalars: Sequence[SGDScalars | AdamScalars],
        totals: Sequence[Tensor],
        from_saved: bool,
        max_norm: float,
    ) -> None:
        """Make the fused update of every FlatParams, its state under torch's keys."""
        cleared = len(state) < self._states
        if not self._adopted or cleared:
            for flat in self:
                fused.adopt(flat, state, rule, cleared=cleared)
                if any(options.stateful for options in scalars):
                    for key in rule.keys:  # all there is to allocate, before any weights are written
                        flat.state(key)
                if self._mastered(flat):
                    fused.adopt_masters(flat, state, rule)
            self._adopted = rule, state
        for flat, sums in zip(self, totals, strict=True):
            begun = getattr(flat, rule.operator)(sums, scalars, from_saved, max_norm)
            fused.publish(flat, state, (*rule.keys, MASTER_WEIGHT) if self._mastered(flat) else rule.keys, begun)
        self._states = len(state)

    def _mastered(self, flat: FlatParams) -> bool:
        return self.masters and flat.dtype.itemsize == 2

    def retract(self) -> None:
        """Take state back whose every update was skipped; waits for a GPU."""
        if self._adopted:
            rule, state = self._adopted
            for flat in self:
                fused.retract(flat, state, rule)
            self._states = len(state)

    def hand_over(self) -> None:
        """Leave the base optimizer's state to the base optimizer; it is adopted again when needed."""
        if self._adopted:
            self.retract()
            _, state = self._adopted
            state.update(fused.with_steps_on_host(dict(state)))
            self._adopted = None


def _sizes(groups: Groups) -> list[int]:
    return [len(group["params"]) for group in groups]
