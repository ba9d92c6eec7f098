"""All FlatParams of an optimizer: built when they are needed, summed over, and the base optimizer's state in them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, MutableMapping, Sequence
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

from bsam_fused import distributed
from bsam_fused.distributed import Exchange
from bsam_fused.ops import contract, dispatch
from bsam_fused.ops.contract import (
    CHECKED,
    MASTER_WEIGHT,
    MAX,
    NORMS,
    SCALE,
    AdamScalars,
    FlatParams,
    Radius,
    SGDScalars,
)
from bsam_fused.ops.sharded_flat import ShardedFlatParams
from bsam_fused.optim import fused
from bsam_fused.optim.fused import FusedRule
from bsam_fused.optim.scaling import Scaled

State = MutableMapping[Tensor, dict[str, Any]]
Groups = Sequence[dict[str, Any]]

_GRADIENTS = "on which parameters have gradients; every rank must use the same ones in a pass, with zeros if need be"
_NOT_REDUCED = "on the last pass's gradient; it must be outside DDP's no_sync(): use `with optimizer.no_sync()` for all"


class Flats:
    """A FlatParams a device, dtype and sharding of what takes part; frozen parameters are in none until thawed.

    Args:
        seed: of stochastic rounding, for 16-bit parameters; None: to nearest.
        masters: whether these have float32 master weights.
        local_passes: whether gradients are this rank's alone until the direction is averaged.
        skipped: updates skipped so far.
        rounded_steps: steps so far, where stochastic rounding has counted them.
    """

    def __init__(
        self,
        seed: int | None,
        masters: bool,
        local_passes: bool = False,
        skipped: int = 0,
        rounded_steps: int | None = None,
    ) -> None:
        self._seed, self.masters, self.local_passes = seed, masters, local_passes
        self._skipped_before, self._rounded_before = skipped, rounded_steps
        self._built: list[FlatParams] | None = None
        self._groups: list[tuple[Any, ...]] = []  # of each, the process groups that hold its shards
        self._exchanges: dict[Any, Exchange] = {}
        self._fingerprint = 0  # of which parameters had gradients in the passes of this step
        self._latest: list[Tensor] = []  # totals
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
        return Flats(self._seed, self.masters, self.local_passes, self.skipped, self.rounded_steps)

    def forget(self, rounded_steps: int | None = None) -> None:
        """Build anew next time, with the random bits of the step after ``rounded_steps`` (None: the next one)."""
        self.retract()
        rounded_steps = self.rounded_steps if rounded_steps is None else rounded_steps
        self.__init__(self._seed, self.masters, self.local_passes, self.skipped, rounded_steps)  # type: ignore[misc]

    def gather(self, groups: Groups, backend: str, *, at_rest: bool) -> list[FlatParams]:
        """Bring in parameters that are new: at rest by building all anew, within a step by adding FlatParams.

        Returns:
            Those added within a step.
        """
        thawed = any(p.requires_grad or p.grad is not None for p in self._left_out)
        if self._built is None or (at_rest and (thawed or self._sizes != _sizes(groups))):
            self.forget()
            self._built, self._sizes = [], _sizes(groups)
            self._build(groups, backend, known=set())
        elif thawed:
            self.hand_over()
            return self._build(groups, backend, known={id(p) for flat in self._built for p in flat.params})
        return []

    def _build(self, groups: Groups, backend: str, known: set[int]) -> list[FlatParams]:
        kinds: dict[tuple[Any, ...], tuple[list[Tensor], list[tuple[int, int]]]] = {}
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
                kind = (param.device, param.dtype, distributed.shard_groups(param))
                params, places = kinds.setdefault(kind, ([], []))
                params.append(param)
                places.append((i, j))
        for params, places in kinds.values():
            contract.check_memory([distributed.local(p) for p in params], places)
        built: list[FlatParams] = []
        for (device, *_), (params, places) in kinds.items():
            build = dispatch.choose(backend, device).build
            if distributed.is_dtensor(params[0]):
                if self.local_passes:
                    raise ValueError(
                        f'{contract.describe(params[0], places[0])} is a DTensor, with sync="last": use "every"'
                    )
                built.append(cast(FlatParams, ShardedFlatParams(params, places, self._seed, build)))
            else:
                built.append(build(params, places, self._seed))
        count = self._built[0].step_count if self._built else torch.tensor(self._rounded_before or 0)
        for flat in built:
            flat.step_count.copy_(count)
        self._built = [*self, *built]
        self._groups += [groups for _, _, groups in kinds]
        return built

    @property
    def sharded(self) -> bool:
        """Whether there are DTensors."""
        return any(self._groups)

    def read_gradients(self, *, first: bool) -> None:
        """Read the gradients of a pass, the first one of a step or a later one."""
        for flat in self:
            flat.read_gradients()
        if self.local_passes or self.sharded:
            present = bytes(p.grad is not None for flat in self for p in flat.params)
            self._fingerprint = zlib.crc32(present, 0 if first else self._fingerprint)

    def clear_gradients(self) -> None:
        """Set every .grad to None."""
        for flat in self:
            flat.clear_gradients()
        for param in self._left_out:
            param.grad = None

    # ---- sums

    def totals(self) -> list[Tensor]:
        """Return the sums over all FlatParams and their shards, on the device of each.

        Raises:
            RuntimeError: where there are shards, as `distributed.Exchange` has it.
        """
        flats = list(self)
        if len(flats) <= 1 and not self.sharded:
            self._latest = [flat.sums for flat in flats]
            return self._latest
        home = flats[0].sums.device
        parts: dict[tuple[Any, ...], list[Tensor]] = {}
        for flat, groups in zip(flats, self._groups, strict=True):
            parts.setdefault(groups, []).append(flat.sums.to(home))
        totals = [self._over_shards(torch.stack(sums).sum(0), groups) for groups, sums in parts.items()]
        total = torch.stack(totals).sum(0)
        self._latest = [total.to(flat.sums.device) for flat in flats]
        return self._latest

    def _over_shards(self, sums: Tensor, groups: tuple[Any, ...]) -> Tensor:
        scale = sums[SCALE]
        for group in groups:
            sums = self._exchange(group)(sums, [self._fingerprint], [_GRADIENTS]).sum(0)
            sums[SCALE] = scale  # not a sum, and the same on all ranks
        return sums

    def _exchange(self, group: Any) -> Exchange:
        return self._exchanges.setdefault(group, Exchange(group))

    def averaged(self, group: Any, *, mixed: bool) -> list[Tensor]:
        """Make the direction the mean over the ranks of ``group``; return the sums for the update.

        One of these is not finite where one is not on any rank.

        Args:
            group: of the ranks whose passes were local.
            mixed: whether d, g + g_max − c g_min, has to be reduced; else the last gradient, which is, is d.

        Raises:
            RuntimeError: as `distributed.Exchange` has it.
        """
        sums = [total.clone() for total in self.totals()]
        exchange = self._exchange(group)
        alike = [self._fingerprint] if mixed else [self._fingerprint, sums[0][MAX]]
        rows = exchange(sums[0], alike, [_GRADIENTS, _NOT_REDUCED][: len(alike)])
        if mixed:
            for flat, own in zip(self, sums, strict=True):
                distributed.average(flat.merge(own, 1 / exchange.ranks), group)
                flat.read_gradients()
                flat.square_norm(MAX, [Radius(0.0)] * len(self._sizes))
            own, sums = sums, self.totals()
            self._latest = own
        failed = 0 * rows[:, :CHECKED].sum()
        return [total + failed.to(total.device) for total in sums]

    @property
    def squared_norms(self) -> Tensor:
        """Of the latest passes; where ranks have to talk for them, of the latest phase."""
        told = self._latest if self.local_passes or self.sharded else self.totals()
        return told[0][:NORMS]

    def _heard(self) -> bool:
        """Whether all ranks hear of what joins the first FlatParams' sums."""
        ranks = distributed.world_size()
        return self.local_passes or ranks == 1 or math.prod(self._exchange(g).ranks for g in self._groups[0]) == ranks

    def poison(self, slot: int, loss: Any) -> None:
        """Make the sum in ``slot`` non-finite if ``loss`` is: 0 · loss is 0 or NaN, without asking the device.

        But not where other ranks would not hear of it: they would make a step that this one skips.
        """
        if loss is None or not self._built or not self._heard():
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
            found_inf = distributed.local(scaled.found_inf)
            sums[slot].masked_fill_(torch.as_tensor(found_inf, device=sums.device) > 0, math.nan)

    def failed(self, passes: int) -> Tensor:
        """Return whether one of the first ``passes`` sums is not finite: bool (), on the first one's device."""
        sums = self._latest if passes == MAX else self.totals()  # of the ascent alone nothing has changed since
        return ~sums[0][:passes].isfinite().all()

    def failed_anywhere(self, group: Any, passes: int) -> Tensor:
        """Return the same, of any rank of ``group``.

        Raises:
            RuntimeError: as `distributed.Exchange` has it.
        """
        return ~self._exchange(group)(self.totals()[0], [self._fingerprint], [_GRADIENTS])[:, :passes].isfinite().all()

    def write_options(self, tables: Sequence[Sequence[Sequence[float]]]) -> None:
        """Write the groups' options to where captured phases read them."""
        for flat in self:
            flat.write_options(tables)

    def disregard(self, steps: int) -> None:
        """Do not count the last ``steps`` steps, all skipped."""
        self._skipped_before -= steps
        for flat in self:
            flat.step_count.sub_(steps)

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
