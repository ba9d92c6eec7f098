"""Whether the kernels compute what they should, in seconds; what compute-sanitizer watches.

python -m bench.gpu.smoke [--backend cuda|triton] [--dtypes NAME,...] [--eager]

Every operator, base optimizer and dtype beside the torch backend in float64 on the CPU, on awkward shapes, of SAM and
BSAM, and each relative of theirs on some; then captured steps beside eager ones. Each step begins with the same weights
and state on both sides, so that tolerances can be those of one step's rounding.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import bsam_fused
from bench.gpu.cases import SUBJECT
from bench.gpu.device import current
from bsam_fused.graphs import GraphedStep
from bsam_fused.ops.contract import DTYPES, HISTORY_KEYS
from bsam_fused.report.contestant import Shapes

SHAPES: Shapes = ((), (0,), (1,), (3,), (33, 5), (127,), (1023,), (2047,), (2049,), (16384,), (16385,), (3,))
"""Most no multiple of a vector, a warp, a chunk or a block; a scalar, and a tensor without elements."""
MANY: Shapes = ((5,),) * 900
"""More tensors than one launch takes."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 1.7e-2, torch.float16: 2.2e-3}
"""Of one rounding (of 16 bits stochastic: to either neighbour), and a few more before it."""
OF_UPDATE = 3
"""Times that: g + g_max, momentum and weights are rounded."""
STEPS = 2
"""The second finds state."""


ADAM = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 0.1}
"""Such that 16 bits hold the moments, and what rounding leaves of a d near 0 is not made a whole step."""


class Base(NamedTuple):
    """A base optimizer."""

    kind: type[torch.optim.Optimizer]
    options: dict[str, Any]


BASES = {
    "plain SGD": Base(torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.02}),
    "SGD": Base(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.02}),
    "nesterov": Base(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "Adam": Base(torch.optim.Adam, {**ADAM, "weight_decay": 0.02}),
    "AdamW": Base(torch.optim.AdamW, {**ADAM, "weight_decay": 0.1}),
    "not fused": Base(type("Own", (torch.optim.SGD,), {}), {"lr": 0.1, "momentum": 0.9}),  # restore and combine
}


def exempting(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Return what makes such an optimizer that perturbs every other parameter alone."""

    def build(params: list[Tensor], *arguments: Any, **options: Any) -> Any:
        return kind([{"params": params[::2]}, {"params": params[1::2], "perturb": False}], *arguments, **options)

    return build


KINDS: dict[str, Callable[..., Any]] = {
    "SAM": bsam_fused.SAM,
    "BSAM": bsam_fused.BSAM,
    "extrapolated": partial(bsam_fused.BSAM, descent="extrapolate"),
    "GSAM": bsam_fused.GSAM,
    "WSAM": partial(bsam_fused.WSAM, gamma=0.6),
    "LookSAM": partial(bsam_fused.LookSAM, k=2),  # of two steps one of each kind
    "Friendly SAM": bsam_fused.FriendlySAM,
    "exempting SAM": exempting(bsam_fused.SAM),
    "exempting BSAM": exempting(bsam_fused.BSAM),
}
CAPTURED = ("BSAM", "extrapolated", "GSAM", "LookSAM")
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "adaptive, clipped": {"adaptive": True, "max_grad_norm": 0.5},  # direction_sums, too
}
CHECKS = (
    *itertools.product(("SAM", "BSAM"), BASES, VARIANTS),
    *(("extrapolated", "SGD", "adaptive, clipped"), ("extrapolated", "Adam", ""), ("GSAM", "AdamW", "")),
    *(("GSAM", "not fused", "adaptive, clipped"), ("WSAM", "SGD", ""), ("WSAM", "Adam", "adaptive, clipped")),
    *(("LookSAM", "SGD", ""), ("LookSAM", "not fused", "adaptive, clipped")),
    *(("Friendly SAM", "SGD", ""), ("Friendly SAM", "Adam", "adaptive, clipped")),
    *(("exempting SAM", "SGD", ""), ("exempting BSAM", "AdamW", "adaptive, clipped")),
)
"""Kind, base and variant."""


class Pair:
    """An optimizer of a backend, and its twin of the torch backend in float64 on the CPU."""

    def __init__(
        self, kind: Callable[..., Any], base: Base, weights: Sequence[Tensor], device: torch.device, **options: Any
    ) -> None:
        self.params = [w.to(device).requires_grad_() for w in weights]
        if len(self.params) > 4:  # memory whose order is not the index's
            self.params[4] = self.params[4].detach().t().requires_grad_()
        self.twins = [p.detach().cpu().double().requires_grad_() for p in self.params]
        self.opt = kind(self.params, base.kind, rho=0.3, **base.options, **options)
        self.twin = kind(self.twins, base.kind, rho=0.3, **base.options, **{**options, "backend": "torch"})
        self.tolerance = TOLERANCE[self.params[0].dtype]

    def step(self) -> None:
        """Take a step on both sides, and compare after every phase; the last parameter lacks a gradient at w_max."""
        self._level()
        for phase, call in enumerate(self.opt._calls if self.opt.passes > 1 else ("step",)):
            self._backward(without_last=phase == 1)
            for optimizer in (self.opt, self.twin):
                getattr(optimizer, call)()
            self._compare(call)
        if self.opt.skipped_steps:
            raise ArithmeticError("a step was skipped")

    def restore(self) -> None:
        """Ascend and give up: w must come back bit for bit."""
        before = [p.detach().clone() for p in self.params]
        self._backward()
        self.opt.ascend()
        self.opt.restore()
        if not all(map(torch.equal, before, self.params)):
            raise ArithmeticError("restore: other weights than before")

    def plain_step(self) -> None:
        """Take a step of the base alone."""
        self._level()
        self._backward()
        for optimizer in (self.opt, self.twin):
            optimizer.active = False
            optimizer.step()
            optimizer.active = True
        self._compare("step")

    def _level(self) -> None:
        with torch.no_grad():
            for p, twin in zip(self.params, self.twins, strict=True):
                twin.copy_(p)
        self.twin.load_state_dict(tree_map_only(Tensor, lambda t: t.detach().cpu().clone(), self.opt.state_dict()))

    def _backward(self, *, without_last: bool = False) -> None:
        """Give every parameter a gradient, made on the CPU: other kernels than ours only cost the sanitizer time."""
        for p, twin in zip(self.params, self.twins, strict=True):
            gradient = torch.randn(p.shape).to(p.dtype)
            p.grad, twin.grad = torch.empty_like(p, requires_grad=False).copy_(gradient), gradient.double()
        if without_last:
            self.params[-1].grad = self.twins[-1].grad = None

    def _compare(self, call: str) -> None:
        tolerance = self.tolerance * (OF_UPDATE if call == "step" else 1)
        compared = {"weights": (self.params, self.twins)}
        for key in HISTORY_KEYS:  # which no weight of this step depends on
            if remembered := _state(self.opt, key):
                compared[key] = remembered, _state(self.twin, key)
        for name, sides in compared.items():
            found, expected = (torch.cat([t.detach().cpu().double().flatten() for t in each]) for each in sides)
            torch.testing.assert_close(
                found, expected, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name} after {call}: {m}"
            )


def _state(optimizer: Any, key: str) -> list[Tensor]:
    """Return a state of the parameters that have it."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p][key] for p in params if key in optimizer.state[p]]


def check(kind: str, base: str, variant: str, dtype: torch.dtype, backend: str, shapes: Shapes = SHAPES) -> None:
    """Compare one combination.

    Raises:
        AssertionError, ArithmeticError: other weights than they should be.
        RuntimeError: the backend cannot be had, with the reason.
    """
    torch.manual_seed(0)
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    pair = Pair(KINDS[kind], BASES[base], weights, current_device(), backend=backend, **VARIANTS[variant])
    for _ in range(STEPS):
        pair.step()
    pair.restore()
    pair.plain_step()


def check_captured(kind: str, backend: str) -> None:
    """Compare replays of a captured step with eager steps. Raises as `check` does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)).to(current_device())
    twin = copy.deepcopy(model)
    opt, eager = (
        KINDS[kind](list(net.parameters()), lr=0.05, momentum=0.9, rho=0.05, backend=backend) for net in (model, twin)
    )
    inputs, targets = torch.randn(8, 6).to(current_device()), torch.randint(3, (8,)).to(current_device())
    graphed = GraphedStep(model, nn.functional.cross_entropy, opt, (inputs, targets))

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(twin(inputs), targets)
        loss.backward()
        return loss

    for _ in range(3):
        graphed(inputs, targets)
        eager.step(closure)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda m: f"weights after replays: {m}")


def current_device() -> torch.device:
    """Return where tensors go."""
    return torch.device(current().worker[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Check everything and print how it went; returns the exit status: 1 where one failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.smoke", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default=SUBJECT)
    parser.add_argument("--dtypes", default=",".join(str(dtype).removeprefix("torch.") for dtype in DTYPES))
    parser.add_argument("--eager", action="store_true", help="no captured step: it needs torch's cache of memory")
    options = parser.parse_args(arguments)
    begin, failed = time.monotonic(), 0
    dtypes = [getattr(torch, name) for name in options.dtypes.split(",")]
    checks = [
        (" ".join(map(str, each)), lambda each=each: check(*each, options.backend))
        for each in ((*what, dtype) for what, dtype in itertools.product(CHECKS, dtypes))
    ]
    checks.append(("many tensors", lambda: check("BSAM", "SGD", "", torch.float32, options.backend, MANY)))
    if not options.eager:
        checks += [
            (f"captured step of {kind}", lambda kind=kind: check_captured(kind, options.backend)) for kind in CAPTURED
        ]
    for name, run in checks:
        try:
            run()
        except Exception as error:
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {error}", flush=True)
        else:
            print(f"right  {name}", flush=True)  # so that one who is stopped has said how far it came
    print(f"{len(checks) - failed} of {len(checks)} right, {time.monotonic() - begin:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
