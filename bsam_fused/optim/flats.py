"""All FlatParams of an optimizer: built when they are needed, summed over, updated all or none."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

from bsam_fused import distributed
from bsam_fused.distributed import Exchange
from bsam_fused.ops import contract, dispatch
from bsam_fused.ops.contract import CHECKED, MAX, NORMS, SCALE, SQUARE, AdamScalars, FlatParams, Mixing, SGDScalars
from bsam_fused.ops.identity import same_items
from bsam_fused.ops.one_go import in_one_go
from bsam_fused.ops.sharded_flat import ShardedFlatParams
from bsam_fused.optim import merging
from bsam_fused.optim.captured import Captured
from bsam_fused.optim.fused import FusedRule
from bsam_fused.optim.groups import check_parameters, takes_part
from bsam_fused.optim.kinds import Groups, Kind, by_kind, check_memory
from bsam_fused.optim.scaling import Scaled
from bsam_fused.optim.skips import Skips
from bsam_fused.optim.state import Kept, State, StateViews

_GRADIENTS = "on which parameters have gradients; every rank must use the same ones in a pass, with zeros if need be"
_NOT_REDUCED = "on the last pass's gradient; it must be outside DDP's no_sync(): `with optimizer.one_pass():` for all"


class Flats:
    """A FlatParams a device, dtype and sharding of what takes part; frozen parameters are in none until thawed.

    Built once; where parameters have changed, another one takes its place.

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
        self._backends: dict[torch.device, dispatch.Choice] = {}  # of each device, chosen once
        self._shards: list[tuple[Any, ...]] = []  # of each, the process groups that hold its shards
        self._lists: list[list[Tensor]] = []  # the param groups' parameters, when built
        self._exempt: list[bool] = []  # whether a param group is left out of the perturbations, when built
        self._left_out: list[Tensor] = []  # frozen, and in no FlatParams
        self._exchanges: dict[Any, Exchange] = {}
        self.slots: tuple[int, ...] = ()  # of the sums: where the norms of the step's passes are
        self._skips = Skips(rounded_steps or 0, skipped)
        self._fingerprint = 0  # of which parameters had gradients in the passes of this step
        self._latest: list[Tensor] = []  # totals
        self._state = StateViews()
        self._history: str | None = None  # the key of what steps remember, once one has
        self._scaled = False  # the sums hold a loss's scale
        self._updates: Sequence[tuple[FlatParams, Callable[[], Any]]] = ()  # of this step, with who knows if it is made
        self._stepped: list[bool] = []  # the base optimizer has made its own step

    def __iter__(self) -> Iterator[FlatParams]:
        """Every FlatParams there is."""
        return iter(self._built or [])

    def __len__(self) -> int:
        return len(self._built or [])

    @property
    def rounded_steps(self) -> int | None:
        """Steps so far, None where nothing was rounded stochastically; reading it waits for a GPU."""
        if self._seed is not None:
            for flat in self:
                if flat.dtype.itemsize == 2:
                    return int(flat.step_count)
        return self._rounded_before

    def anew(self, rounded_steps: int | None = None) -> Flats:
        """Return what takes this one's place, unbuilt, with the random bits of the step after ``rounded_steps``.

        None: of the next step.
        """
        self._state.retract()
        rounded_steps = self.rounded_steps if rounded_steps is None else rounded_steps
        skipped = int(self.counts[1])
        return Flats(self._seed, self.masters, self.local_passes, skipped, rounded_steps)

    @property
    def some_exempt(self) -> bool:
        """Whether some param group is left out of the perturbations, as they were when all this was built."""
        return any(self._exempt)

    # ---- steps so far

    @property
    def counts(self) -> tuple[Tensor, Tensor]:
        """Steps so far, and the skipped ones, those of FlatParams that are gone included: int64 (), on a device."""
        if not self._built:
            before = self._rounded_before or 0, self._skipped_before
            return torch.tensor(before, device="cpu").unbind()  # type: ignore[return-value]
        first = self._built[0]
        return first.step_count, first.skipped + self._skipped_before

    def hear(self, steps: int, skipped: int) -> None:
        """Hear of the `counts`, as they were read: warn of many skipped steps in a row."""
        self._skips.hear(steps, skipped)

    def hear_of_all(self) -> int:
        """Read and hear of the `counts`, which waits for a GPU; return the skipped steps."""
        steps, skipped = torch.stack(self.counts).tolist()
        self.hear(steps, skipped)
        return skipped

    def end_step(self, slots: tuple[int, ...], made: bool | None = None) -> None:
        """Hear of the step that is over, where that waits for nobody.

        Args:
            slots: where the sums have the norms of its passes.
            made: whether it was, or skipped; None: only its FlatParams know.
        """
        self.slots = slots
        if made is None and self._built and (skipped := self._built[0].skipped).is_cpu:
            made = self._skipped_before + int(skipped) == self._skips.skipped
        if made is not None:
            self._skips.hear(self._skips.steps + 1, self._skips.skipped + (not made))

    # ---- parameters

    def fit(self, groups: Groups, exempt: Sequence[bool]) -> bool:
        """Return whether all that takes part, and nothing else, is here: at rest, else see `thaw`."""
        return self._built is not None and self._exempt == exempt and self._same_lists(groups) and not self._thawed()

    def _same_lists(self, groups: Groups) -> bool:
        lists = [params if isinstance(params := group["params"], list) else list(params) for group in groups]
        return len(lists) == len(self._lists) and all(map(same_items, lists, self._lists))

    def _thawed(self) -> bool:
        return bool(self._left_out) and any(map(takes_part, self._left_out))

    def build(self, groups: Groups, exempt: list[bool], backend: str) -> None:
        """Build a FlatParams of each kind of parameters; ``exempt``: which groups are left out of the perturbations.

        Raises:
            RuntimeError: a parameter is uninitialized or on meta, or a backend cannot be had.
            TypeError, ValueError: a parameter that cannot be optimized, or not together with another; by name.
        """
        self._exempt = exempt
        self._add(groups, backend, known=[])
        self._lists = [list(group["params"]) for group in groups]

    def thaw(self, groups: Groups, backend: str) -> list[FlatParams]:
        """Within a step, add FlatParams for parameters that take part from this pass on.

        Returns:
            Those added.

        Raises:
            RuntimeError: others than in the first pass are in the param groups.
            TypeError: one that takes part now cannot be optimized, by name.
        """
        if not self._same_lists(groups):
            raise RuntimeError(
                "the parameters in param_groups were changed within a step: do it between steps; restore() gives up "
                "this step"
            )
        if not self._thawed():
            return []
        known = list(self)
        self.hand_over()
        self._add(groups, backend, known)
        return list(self)[len(known) :]

    def _add(self, groups: Groups, backend: str, known: list[FlatParams]) -> None:
        seen: list[Tensor] = []
        for i, group in enumerate(groups):
            check_parameters(group, i, seen)
            seen += group["params"]
        kinds, left_out = by_kind(groups, self._exempt, {id(p) for flat in known for p in flat.params})
        check_memory([*((flat.params, flat.places) for flat in known), *kinds.values()])
        built = [self._flat(kind, params, places, backend) for kind, (params, places) in kinds.items()]
        count = known[0].step_count if known else torch.tensor(self._rounded_before or 0, device="cpu")
        for flat in built:
            flat.step_count.copy_(count)
        limit = min((flat.limit for flat in (*known, *built)), default=math.inf)
        for flat in (*known, *built):
            flat.limit = limit
        shards = [*self._shards, *(groups for *_, groups, _ in kinds)]
        self._built, self._shards, self._left_out = [*known, *built], shards, left_out

    def _flat(self, kind: Kind, params: list[Tensor], places: list[tuple[int, int]], backend: str) -> FlatParams:
        device, _, sharded, _, exempt = kind
        if device not in self._backends:
            self._backends[device] = dispatch.choose(backend, device)
        build = self._backends[device].build
        if not sharded:
            return build(params, places, self._seed, exempt)
        if self.local_passes:
            raise ValueError(f'{contract.describe(params[0], places[0])} is a DTensor, with sync="last": use "every"')
        return cast(FlatParams, ShardedFlatParams(params, places, self._seed, exempt, build))

    @property
    def sharded(self) -> bool:
        """Whether there are DTensors."""
        return any(self._shards)

    def read_gradients(self, *, first: bool) -> None:
        """Read the gradients of a pass, the first one of a step or a later one."""
        dispatch.read_gradients(list(self))
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
        for flat, groups in zip(flats, self._shards, strict=True):
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

    def averaged(self, group: Any, mixing: Mixing, summed: bool, give: Callable[..., None]) -> list[Tensor]:
        """Make the direction the mean over the ranks of ``group``; return the sums for the update.

        One of these is not finite where one is not on any rank.

        Args:
            group: of the ranks whose passes were local.
            mixing: of d, which is reduced here unless it is the last gradient alone, which DDP has reduced.
            summed: whether the sums are by `direction_sums`.
            give: has what a user's own rule makes of this rank's sums join them.

        Raises:
            RuntimeError: as `distributed.Exchange` has it.
        """
        sums = [total.clone() for total in self.totals()]
        if not sums:
            return sums
        exchange, mixed = self._exchange(group), mixing.rule.mixes
        if mixed:
            give(sums)
        alike: list[Tensor | float] = [self._fingerprint] if mixed else [self._fingerprint, sums[0][MAX]]
        rows = exchange(sums[0], alike, [_GRADIENTS, _NOT_REDUCED][: len(alike)])
        if mixed:
            lowered = merging.average(list(self), sums, mixing, summed, rows, group)
            if lowered is not None:
                self.note(MAX, Scaled(lowered, None))
            self._latest, sums = sums, self.totals()
        failed = 0 * rows[:, :CHECKED].sum()
        return [total + failed.to(total.device) for total in sums]

    @property
    def squared_norms(self) -> Tensor:
        """Of the latest passes, 0 at first; where ranks have to talk for them, of the latest phase."""
        told = self._latest if self.local_passes or self.sharded else self.totals()
        return told[0][:NORMS] if told else torch.zeros(NORMS, dtype=torch.float64, device="cpu")

    def _heard(self) -> bool:
        """Whether all ranks hear of what joins the first FlatParams' sums."""
        ranks = distributed.world_size()
        return self.local_passes or ranks == 1 or math.prod(self._exchange(g).ranks for g in self._shards[0]) == ranks

    def poison(self, slot: int, loss: Any) -> None:
        """Make the sum in ``slot`` non-finite if ``loss`` is: 0 · loss is 0 or NaN, without asking the device.

        But not where other ranks would not hear of it: they would make a step that this one skips.
        """
        if loss is None or not self._built or not self._heard():
            return
        sums = self._built[0].sums
        if isinstance(loss, Tensor):
            total = (0 * loss.detach()).sum() if loss.dim() else loss.detach()
            sums[slot].add_(total if total.is_cpu else total.to(sums.device), alpha=0)
        elif isinstance(loss, Real):
            sums[slot].add_(0 * float(loss))

    def note(self, slot: int, scaled: Scaled) -> None:
        """Let what a GradScaler says join the sums: the loss's scale, and in ``slot`` that it found an inf."""
        if not self._built:
            return
        sums = self._built[0].sums
        if scaled.scale is not None:
            self._scaled = True
            sums[SCALE].copy_(scaled.scale)
        elif self._scaled:
            sums[SCALE].zero_()
            self._scaled = False
        if scaled.found_inf is not None:
            sums[slot].masked_fill_(scaled.found_inf.to(sums.device) > 0, math.nan)

    def failed(self, passes: int, *, kept: bool = False) -> Tensor:
        """Return whether one of the first ``passes`` sums is not finite: bool (), on the first one's device.

        ``kept``: or that of what the direction keeps, which is in.
        """
        if passes > MAX or kept:
            sums = self.totals()
        else:  # of the ascent alone nothing has changed since, but for what it found itself
            sums = [total + 0 * flat.sums for total, flat in zip(self._latest[:1], self, strict=False)]
        if not sums:  # nothing has trained in these passes
            return torch.zeros((), dtype=torch.bool, device="cpu")
        return _failed(sums[0].unsqueeze(0), passes, kept)

    def failed_anywhere(self, group: Any, passes: int, *, kept: bool) -> Tensor:
        """Return the same, of any rank of ``group``.

        Raises:
            RuntimeError: as `distributed.Exchange` has it.
        """
        return _failed(self._exchange(group)(self.totals()[0], [self._fingerprint], [_GRADIENTS]), passes, kept)

    def write_options(self, tables: Sequence[Sequence[Sequence[float]]]) -> None:
        """Write the groups' options to where captured phases read them."""
        for flat in self:
            flat.write_options(tables)

    def captured(self) -> Captured:
        """Return what the step that was just captured reads and writes here."""
        return Captured(list(self), self._state)

    def disregard(self, before: tuple[int, int]) -> None:
        """Count no step since the `counts` were those ``before``; waits for a GPU."""
        steps, skipped = (int(now) - then for now, then in zip(self.counts, before, strict=True))
        self._skipped_before -= skipped
        self.draw_again(steps)

    def draw_again(self, steps: int = 1) -> None:
        """Give the next steps the random bits of the last ``steps``."""
        for flat in self:
            flat.step_count.sub_(steps)

    @property
    def made(self) -> bool:
        """Whether the step whose gradients were read last was made, or skipped; else none of it was."""
        return bool(self._stepped) or any(flat.updated for flat in self)

    # ---- the history

    def have_history(self, key: str, rule: FusedRule | None, groups: Groups, state: State) -> None:
        """Have what steps remember, ``state``'s ``key``, in the flat buffers; from now on.

        Raises:
            ValueError: a state has another shape than its parameter, by name.
        """
        self._history = key
        if rule is None and self._state.kept is not None and self._state.kept.rule is not None:
            self.hand_over()
        scalars = [rule.scalars(group) for group in groups] if rule else []
        self._state.have(self._built or [], state, self._kept(rule, scalars or [None] * len(groups)))

    def keep_history(self) -> None:
        """Go on showing a history of zeros."""
        self._state.keep_history()

    def _kept(self, rule: FusedRule | None, scalars: Sequence[SGDScalars | AdamScalars | None]) -> Kept:
        stateful = [options is not None and options.stateful for options in scalars]
        return Kept(rule, stateful, self.masters, self._history)

    # ---- updates

    def update(
        self,
        rule: FusedRule,
        state: State,
        scalars: Sequence[SGDScalars | AdamScalars],
        totals: Sequence[Tensor],
        from_saved: bool,
        max_norm: float,
    ) -> None:
        """Make the fused update of every FlatParams, its state under torch's keys.

        All that can raise comes before the first of them. Interrupted between two, `finish` makes the others.
        """
        flats = self._built or []
        self._state.prepare(flats, state, self._kept(rule, scalars))
        self._updates = dispatch.updates(rule.operator, flats, totals, (scalars, from_saved, max_norm))
        for _, update in self._updates:
            update()

    def general_update(
        self, state: State, totals: Sequence[Tensor], from_saved: bool, max_norm: float, base_step: Any
    ) -> bool:
        """Leave the update to the base optimizer: d in .grad, the weights at w, then its own step, then the history.

        The history, and nothing else, stays in the flat buffers, and only where ``state`` shows it: what the base
        changes is no edit, but what others have changed before is one, which a step without a history has not seen.

        Returns:
            Whether it was made, or else skipped.
        """
        combined = [flat.combine(sums, from_saved, max_norm) for flat, sums in zip(self, totals, strict=True)]
        if not all(combined):
            for flat in [flat for flat, went in zip(self, combined, strict=True) if went]:
                flat.restore()
                for count in (flat.skipped, flat.step_count):
                    count.add_(1)
            return False
        kept = self._state.kept
        if (kept and kept.rule) or not self._state.shows(state):
            self.hand_over()
        calls: list[Callable[[], Any]] = [call for flat in self for call in flat.remembering()]
        calls += [partial(flat.step_count.add_, 1) for flat in self]
        in_one_go(base_step, *calls, partial(self._stepped.append, True))
        return True

    def finish(self) -> bool:
        """Make what is left of an update that was interrupted between two FlatParams.

        Returns:
            Whether the update of this step is made now; else none of it is, and `restore` is right.
        """
        if self._stepped:
            return True
        if not any(flat.updated for flat, _ in self._updates):
            return False
        for flat, update in self._updates:
            if not flat.updated:
                update()
        return True

    def restore(self) -> None:
        """Saved w back into the weights, everywhere."""
        for flat in self:
            flat.restore()

    def end(self) -> None:
        """Forget the step, whose weights are as they shall be."""
        if self._stepped:
            if self._state.kept is not None:
                self._state.show_history(self._built or [])
            for flat in self:
                flat.release()
            self._stepped = []
        self._state.settle()
        self._updates = ()

    def retract(self) -> None:
        """Take state back whose every update was skipped; waits for a GPU."""
        self._state.retract()

    def hand_over(self) -> None:
        """Leave the base optimizer's state to the base optimizer; it is brought in again when needed."""
        if self._state.hand_over():
            for flat in self:
                flat.drop_state()


def _failed(rows: Tensor, passes: int, kept: bool) -> Tensor:
    failed = ~rows[:, :passes].isfinite().all()
    return failed | ~rows[:, SQUARE].isfinite().all() if kept else failed
