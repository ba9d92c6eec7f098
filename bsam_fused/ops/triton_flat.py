"""The Triton backend: FlatParams whose operators are a launch each, on NVIDIA and AMD GPUs, without nvcc.

Nothing of Triton is imported before this backend is asked for. Kernels find the tensors in tables on the device, which
are written only where they changed: of pointers one a launch (gradients return to the same addresses), of options one
a kind of launch.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bsam_fused.ops import holders
from bsam_fused.ops.contract import ASCENT, MASTER_WEIGHT, SQUARE, AdamScalars, Radius, SGDScalars
from bsam_fused.ops.flat_buffers import is_capturing
from bsam_fused.ops.flat_params import SMALL_BYTES, Call, PythonFlatParams, Update
from bsam_fused.ops.one_go import in_one_go

OLDEST = "3.4"
CHUNK = {2: 2048, 4: 2048, 8: 512}  # elements of so many bytes: more spill
THREADS = 256  # of a program
PROGRAMS = 8  # of a launch, a multiprocessor
TERMS = 4  # sums that a launch makes, at most
WANTED, PERTURBED, COUNTED, ASCENDED = 1, 2, 4, 8  # as triton_pieces.py has them

Rows = list[tuple[Any, ...]]
Pointers = tuple[int, int, int, int]
"""Of a tensor: w, g, this pass's gradient, flags; 0 for what is not there."""


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on CPU tensors: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def why_not(device: torch.device) -> str:
    """Return why the Triton kernels cannot work on tensors on ``device``, "" if they can; it uses no other one."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"triton works on CUDA tensors, not on {device.type}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed{_triton_of_torch()}"
    import triton

    if _older(triton.__version__):
        return f"triton {triton.__version__} is older than {OLDEST}{_triton_of_torch()}"
    if device.type == "cpu":
        return ""
    try:
        with torch.cuda.device(device):
            triton.runtime.driver.active.get_current_target()
    except Exception as error:  # no C compiler for its launchers, a driver too old, ...: all have other types
        return f"triton finds no way to launch kernels here ({error})"
    return ""


def _older(version: str) -> bool:
    return [*map(int, version.split(".")[:2])] < [*map(int, OLDEST.split("."))]


def _triton_of_torch() -> str:
    """Return what to install: the triton that torch asks for, as any other would break its pin."""
    requirements = "\n".join(importlib.metadata.requires("torch") or ())
    pin = re.search(r"^([\w-]*triton[\w-]*)==([\w.+]+)", requirements, re.MULTILINE)
    if pin is None:
        return f": pip install 'triton>={OLDEST}'"
    if _older(pin[2]):
        return f", and torch {torch.__version__} needs triton {pin[2]}: a newer torch brings a newer one"
    return f": pip install {pin[0]}"


class _Table:
    """Rows of numbers on the device, written without waiting, and only where they changed."""

    def __init__(self, rows: Rows, dtype: torch.dtype, device: torch.device) -> None:
        self.rows: Rows = []
        self._on_device = torch.empty(len(rows), len(rows[0]), dtype=dtype, device=device)

    def write(self, rows: Rows) -> Tensor:
        """Return the tensor on the device, with these rows.

        Raises:
            RuntimeError: they changed, within a graph's capture: its replays would write them again.
        """
        if rows != self.rows:
            if is_capturing(self._on_device.device):
                raise RuntimeError(
                    "options of the param groups changed since they were last written to the device, which a capture "
                    "cannot do: call optimizer.write_options() before it"
                )
            self.rows = []  # an interrupt leaves the device with either
            self._copy(self._on_host(rows))
            self.rows = rows
        return self._on_device

    def _on_host(self, rows: Rows) -> Tensor:
        return torch.tensor(rows, dtype=self._on_device.dtype, device="cpu", pin_memory=self._on_device.is_cuda)

    def _copy(self, host: Tensor) -> None:
        self._on_device.copy_(host, non_blocking=True)


class _Pointers(_Table):
    """A table that a capture always writes, from host memory that then stays as it is: a graph has its own tensors.

    Within a capture no pinned memory can be had, so every step before leaves some. After a capture nobody here knows
    what is on the device, and every step writes.
    """

    def __init__(self, rows: Rows, device: torch.device) -> None:
        super().__init__(rows, torch.int64, device)
        self._spare: Tensor | None = None
        self._captured: list[Tensor] = []

    def write(self, rows: Rows) -> Tensor:
        """Return the tensor on the device, with these rows."""
        if is_capturing(self._on_device.device):
            self._captured.append(self._take_spare().copy_(torch.tensor(rows, device="cpu")))
            self._copy(self._captured[-1])
            return self._on_device
        if self._spare is None:
            self._spare = self._on_host(rows)
        if self._captured:
            self.rows = []
        return super().write(rows)

    def _take_spare(self) -> Tensor:
        if self._spare is None:
            raise RuntimeError(
                "a second step was captured without one that is not captured between them: a capture cannot pin the "
                "host memory that it needs; take a step before each"
            )
        spare, self._spare = self._spare, None
        return spare


class TritonFlatParams(PythonFlatParams):
    """`contract.FlatParams` with Triton kernels."""

    @torch.no_grad()
    def __init__(
        self, params: Sequence[Tensor], places: Sequence[tuple[int, int]], seed: int | None, exempt: bool
    ) -> None:
        super().__init__(params, places, seed, exempt)
        import triton.language as tl

        from bsam_fused.ops import triton_kernels, triton_updates

        self._kernels = {**vars(triton_kernels), **vars(triton_updates)}
        chunk = CHUNK[self.dtype.itemsize]
        self._map = _chunks(self._numels, chunk).to(self.device)
        groups, keys = [group for group, _ in places], self._keys or [0] * len(self.params)
        columns = [self._offsets[:-1], self._numels, groups, keys]
        self._tensors = torch.tensor(columns, dtype=torch.int64, device="cpu").t().contiguous().to(self.device)
        processors, warp = _processors(self.device)
        self._grid = (max(1, min(len(self._map), PROGRAMS * processors)),)
        partials = torch.zeros(TERMS * self._grid[0], dtype=torch.float64, device=self.device)
        ticket = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._reduction = {"partials": partials, "ticket": ticket}
        self._rounding = {"step_count": self.step_count, "STOCHASTIC": bool(self._keys)}
        self._perturbing = {**self._rounding, "MOST": torch.finfo(self.dtype).max}
        self._copying: set[int] = set()  # whose gradient of this pass is taken by copying it into g
        self._tables: dict[str, _Table] = {}
        self._pointers: dict[str, _Pointers] = {}
        names = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}
        self._how = {
            "S": names.get(self.dtype, tl.float32),
            "T": tl.float64 if self.dtype == torch.float64 else tl.float32,
            "CHUNK": chunk,
            "num_warps": THREADS // warp,
            "enable_fp_fusion": False,
        }

    # ---- launches

    def _table(self, name: str, rows: Rows) -> Tensor:
        """Return options, on the device."""
        if name not in self._tables:
            self._refuse_capture()
            self._tables[name] = _Table(rows, torch.float64, self.device)
        return self._tables[name].write(rows)

    def write_options(self, tables: Sequence[Sequence[Sequence[float]]]) -> None:
        """Write what captured phases read."""
        self._norm_options(ASCENT, [Radius(*row) for row in tables[0]])  # type: ignore[arg-type]
        *phases, numbers = tables
        for name, rows in zip(("ascend", "descend", "update"), phases, strict=True):
            if rows and name in self._tables:
                (*_, last, _), *_ = self._tables[name].rows  # norm_eps or max_norm
                self._table(name, [(*row, last, self.limit) for row in rows])
        if numbers and "mixing" in self._tables:
            self._write_numbers(numbers)

    def _launch(self, name: str, wanted: Iterable[int], pointers: Callable[[int], Pointers], **arguments: Any) -> None:
        """Launch a kernel over the ``wanted`` parameters."""
        launch = self._prepared(name, wanted, pointers, **arguments)
        with torch.cuda.device_of(self._tensors):
            launch()

    def _prepared(
        self, name: str, wanted: Iterable[int], pointers: Callable[[int], Pointers], **arguments: Any
    ) -> Call:
        """Return what launches a kernel over the ``wanted`` parameters."""
        rows: list[Pointers] = [(0, 0, 0, 0)] * len(self.params)
        for i in wanted:
            rows[i] = pointers(i)
        launch = f"{name} {arguments.get('slot', '')}"
        if launch not in self._pointers:
            self._refuse_capture()
            self._pointers[launch] = _Pointers(rows, self.device)
        table = self._pointers[launch].write(rows)
        kernel = self._kernels[name][self._grid]
        return partial(kernel, self._tensors, table, self._map, len(self._map), **arguments, **self._how)

    def _at(self, key: str) -> int:
        return self._buffer(key).data_ptr()

    def _at_if_any(self, key: str) -> int:
        return self._at(key) if key in self._buffers else 0

    def _reach(self, name: str, radii: Sequence[Radius], norm_eps: float) -> Tensor:
        return self._table(name, [(*radius, norm_eps, self.limit) for radius in radii])

    def _norm_options(self, slot: int, radii: Sequence[Radius]) -> Tensor:
        return self._reach(f"square_norm {slot}", [Radius(0.0, r.adaptive, r.eta) for r in radii], 0.0)

    def _numbers(self) -> Tensor:
        """Return the rule's numbers, on the device; what is not read, where it has none."""
        return self._write_numbers(self._mixing.numbers) if self._mixing.numbers else self.sums

    def _write_numbers(self, numbers: Sequence[Sequence[float]]) -> Tensor:
        return self._table("mixing", [(*row, 0.0) for row in numbers])

    def _history_at(self) -> int:
        """Return where the history of the rule is, if it has one."""
        key = self._mixing.rule.history
        return self._at(key) if key else 0

    def _flags(self, i: int) -> int:
        return WANTED | (ASCENDED if i in self._ascended else 0)

    def _run_square_norm(self, slot: int, radii: Sequence[Radius]) -> None:
        """Σ (T g)²."""
        adaptive = any(radius.adaptive for radius in radii)
        options = self._norm_options(slot, radii)

        def pointers(i: int) -> Pointers:
            return self._weights(i).data_ptr() if adaptive else 0, 0, self._now[i].data_ptr(), WANTED

        self._launch("square_norm", self._now, pointers, rows=options, sums=self.sums, slot=slot, **self._reduction)

    def _run_mix(self, radii: Sequence[Radius]) -> None:
        """q = g − σ m, into g; Σ (T q)², Σ m², Σ q²."""
        adaptive = any(radius.adaptive for radius in radii)
        how = {"rows": self._norm_options(ASCENT, radii), "numbers": self._numbers(), "history": self._history_at()}

        def pointers(i: int) -> Pointers:
            return (
                self._weights(i).data_ptr() if adaptive else 0,
                self._g[i].data_ptr(),
                self._now[i].data_ptr(),
                WANTED,
            )

        most = self._perturbing["MOST"]
        self._launch("mix", self._now, pointers, sums=self.sums, MOST=most, **how, **self._reduction)

    def _run_direction_sums(self) -> None:
        """Σ y², Σ x², Σ x y of d = a x + b y; of g_max and ĝ_min, where that is extrapolated."""

        def pointers(i: int) -> Pointers:
            return 0, _address(self._g.get(i)), _address(self._now.get(i)), self._flags(i)

        self._launch(
            "direction_sums",
            self._members(),
            pointers,
            sums=self.sums,
            numbers=self._numbers(),
            RULE=self._mixing.rule.value,
            **self._reduction,
        )

    def _written(self, members: Iterable[int]) -> list[Call]:
        """Return what makes the parameters what was written; of a kernel's writes torch does not know."""
        moved = [self.params[i] for i in members]
        return [*super()._written(members), partial(torch._C._increment_version, moved)]

    def _take(self) -> None:
        """Take gradients that nobody else holds; copy the others, and small ones, where the phase's kernel runs."""
        self._copying = set()
        for i in self._now:
            if i in self._g:
                continue
            small = self._numels[i] * self.dtype.itemsize <= SMALL_BYTES
            grad = self.params[i].grad
            staged = grad is not self._now[i] or grad.requires_grad
            del grad  # it would count as a holder
            if small or staged or holders.held_elsewhere(self._now, i):
                self._copying.add(i)
                self._g[i] = self._kept(i)
            else:
                self._g[i] = self._now[i]
        if self._exempt and self._copying:  # no kernel of `ascend` runs
            torch._foreach_copy_([self._g[i] for i in self._copying], [self._now[i] for i in self._copying])
            self._copying = set()

    def _end_pass(self) -> None:
        super()._end_pass()
        self._copying = set()

    def _run_ascend(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float) -> None:
        def pointers(i: int) -> Pointers:
            copy = self._g[i].data_ptr() if i in self._copying else 0
            return self._weights(i).data_ptr(), copy, self._now[i].data_ptr(), WANTED

        options = self._reach("ascend", radii, norm_eps)
        launch = self._prepared(
            "ascend",
            self._now,
            pointers,
            rows=options,
            sums=sums,
            own_sums=self.sums,
            saved=self._at("saved"),
            **self._perturbing,
        )
        with torch.cuda.device_of(self._tensors):
            in_one_go(launch, partial(self._perturbed.extend, list(self._now)))

    def _run_descend(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float) -> None:
        perturbed = set(self._perturbed)

        def pointers(i: int) -> Pointers:
            now = _address(self._now.get(i))
            if i in perturbed:
                return self._weights(i).data_ptr(), self._g[i].data_ptr(), now, self._flags(i) | PERTURBED
            written = i in self._ascended or i in self._copying
            return 0, self._g[i].data_ptr() if written else 0, now, self._flags(i)

        options = self._reach("descend", radii, norm_eps)
        self._launch(
            "descend",
            self._ascended.union(self._now),
            pointers,
            rows=options,
            sums=sums,
            own_sums=self.sums,
            saved=self._at_if_any("saved"),
            **self._perturbing,
            **self._reduction,
        )

    def _run_update(
        self, name: str, update: Update, options: Tensor, members: list[int], counted: set[int], **state: int
    ) -> None:
        perturbed = set(self._perturbed)

        def pointers(i: int) -> Pointers:
            flags = self._flags(i) | (PERTURBED if i in perturbed else 0) | (COUNTED if i in counted else 0)
            return self._weights(i).data_ptr(), _address(self._g.get(i)), _address(self._now.get(i)), flags

        launch = self._prepared(
            name,
            members,
            pointers,
            rows=options,
            numbers=self._numbers(),
            sums=update.sums,
            square_slot=SQUARE if self._summed else ASCENT,
            saved=self._at_if_any("saved"),
            master=self._at_if_any(MASTER_WEIGHT),
            MASTER=MASTER_WEIGHT in self._buffers,
            steps=self._steps,
            skipped=self.skipped,
            ticket=self._reduction["ticket"],
            count=len(self.params),
            RULE=self._mixing.rule.value,
            FROM_SAVED=update.from_saved,
            **self._rounding,
            **state,
        )
        launches = [launch]
        if remembering := self._remembering():
            history = self._history()
            to, limits = {i: history[i] for i in remembering}, options[0, -2:]
            launches.append(self._prepared_history(to, update.sums, limits, self.step_count))
        with torch.cuda.device_of(self._tensors):
            self._commit(*launches, *self._written(members))

    def _run_sgd(self, update: Update, groups: Sequence[SGDScalars], members: list[int]) -> None:
        options = self._table("update", [(*o, update.max_norm, self.limit) for o in groups])
        counted = {i for i in members if groups[self.places[i][0]].stateful}
        momentum_buffer = self._at("momentum_buffer") if counted else 0
        self._run_update("update_sgd", update, options, members, counted, momentum_buffer=momentum_buffer)

    def _run_adam(self, update: Update, groups: Sequence[AdamScalars], members: list[int]) -> None:
        options = self._table("update", [(*o, update.max_norm, self.limit) for o in groups])
        state = {key: self._at(key) for key in ("exp_avg", "exp_avg_sq")}
        self._run_update("update_adam", update, options, members, set(members), **state)

    def _run_direction(self, sums: Tensor, max_norm: float) -> dict[int, Tensor]:
        directions = {i: self._empty(i) for i in self._members()}

        def pointers(i: int) -> Pointers:
            return directions[i].data_ptr(), _address(self._g.get(i)), _address(self._now.get(i)), self._flags(i)

        how = {"rows": self._limits(max_norm), "numbers": self._numbers()}
        self._launch("direction", directions, pointers, sums=sums, RULE=self._mixing.rule.value, **how)
        return directions

    def _limits(self, max_norm: float) -> Tensor:
        return self._table("direction", [(max_norm, self.limit)])

    def _prepared_history(self, to: Mapping[int, Tensor], sums: Tensor, limits: Tensor, step_count: Tensor) -> Call:
        """Return what launches the writing of what the history becomes; ``step_count``: with this step."""

        def pointers(i: int) -> Pointers:
            return to[i].data_ptr(), _address(self._g.get(i)), _address(self._now.get(i)), self._flags(i)

        return self._prepared(
            "remember",
            to,
            pointers,
            rows=limits,
            numbers=self._numbers(),
            sums=sums,
            square_slot=SQUARE if self._summed else ASCENT,
            history=self._history_at(),
            **{**self._perturbing, "step_count": step_count},
            RULE=self._mixing.rule.value,
        )

    def _run_remember(self, sums: Tensor, max_norm: float) -> dict[int, Tensor]:
        """Return what the history becomes, of those `_remembering`, beside it."""
        new = {i: self._empty(i) for i in self._remembering()}
        launch = self._prepared_history(new, sums, self._limits(max_norm), self.step_count + 1)
        with torch.cuda.device_of(self._tensors):
            launch()
        return new


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _chunks(numels: Sequence[int], chunk: int) -> Tensor:
    """Return int32 (chunks, 2): of each chunk, the tensor and which of its chunks it is."""
    counts = torch.tensor([-(-numel // chunk) for numel in numels], device="cpu")
    tensor = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), counts)
    first = (counts.cumsum(0) - counts)[tensor]
    return torch.stack([tensor, torch.arange(len(tensor), device="cpu") - first], 1).to(torch.int32)


def _processors(device: torch.device) -> tuple[int, int]:
    """Return how many multiprocessors a device has, and the threads of a warp."""
    if device.type == "cpu":
        return 1, 32
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, getattr(properties, "warp_size", 32)
