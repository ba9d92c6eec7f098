"""FlatParams of the CUDA backend and of the CPU's loops over the same random parameters.

On the host (tests/shim) where there is no GPU. Tensors of more than a chunk and less, in two groups, with a gradient in
all passes, in some and in none: whoever mixes up groups, passes or ends of chunks is seen.
"""

import math

import host_cuda
import host_graphs
import torch
from samples import TOLERANCE
from torch import nn

from bsam_fused.ops import native_flat
from bsam_fused.ops.contract import (
    ASCENT,
    GIVEN_KEPT,
    GIVEN_LAST,
    HISTORY_KEYS,
    MAX,
    AdamScalars,
    Mixing,
    Radius,
    Rule,
    RuleNumber,
    SGDScalars,
)

NUMELS = [2500, 7, 33, 300, 5]
PLACES = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2)]
WITHOUT = [{1, 4}, {2, 4}, {3, 4}]
"""Of each pass, the parameters that have no gradient in it; the last pass is WITHOUT[1] but of three."""
RADII = [Radius(0.3, False, 0.0, 0.5), Radius(-0.5, True, 0.1, 0.5, 20.0)]
RADII_MIN = [Radius(-0.1, False, 0.0, 0.1), Radius(0.05, True, 0.1, 0.1)]
SGD = [SGDScalars(0.1, 0.9, 0.5, 0.01, True, False), SGDScalars(0.05, 0.0, 0.0, 0.0, False, True)]
ADAM = [AdamScalars(0.1, 0.9, 0.99, 0.1, 0.01, True, False), AdamScalars(0.05, 0.5, 0.9, 0.1, 0.0, False, True)]
NUMBERS = {
    Rule.EXTRAPOLATED: (0.5, 0.2),
    Rule.SURROGATE_GAP: (0.4, 0.7),
    Rule.WEIGHTED: (0.9, 0.3),
    Rule.REUSED: (0.7, 0.3),
    Rule.FRIENDLY: (1.0, 0.4),
}
DECAYS = 0.9, 0.6
GIVEN = -0.7, 1.9


def mixing(rule, numbers=None, decays=DECAYS):
    """How a step's direction is mixed; of the rule that has none, without numbers."""
    if rule is Rule.LAST_ALONE:
        return Mixing()
    numbers = numbers or NUMBERS.get(rule, (0.0, 0.0))
    pairs = zip(numbers, decays, strict=True)
    return Mixing(rule, [RuleNumber(number, max(numbers), decay) for number, decay in pairs])


class Flat:
    """A FlatParams of random parameters, the same ones on every device."""

    def __init__(self, kind, dtype=torch.float64, seed=None, exempt=False):
        self.device = "cpu" if kind == "cpp" else torch.get_default_device()
        self.params = [nn.Parameter(w.to(self.device, dtype)) for w in self._random(0)]
        self.held = []
        module = host_cuda.module() if kind == "cuda" and self.device.type == "cpu" else native_flat.load()[0]
        build = module.CpuFlatParams if kind == "cpp" else module.CudaFlatParams
        self.flat = build(self.params, PLACES, seed, exempt)
        self.flat.sums[GIVEN_KEPT], self.flat.sums[GIVEN_LAST] = GIVEN

    @staticmethod
    def _random(seed):
        generator = torch.Generator("cpu").manual_seed(seed)
        return [torch.randn(n, generator=generator, device="cpu", dtype=torch.float64) for n in NUMELS]

    def read(self, seed, without, scale=1.0):
        """Read the gradients of a pass; returns them, None where there is none."""
        grads = [scale * g.to(self.device, self.params[0].dtype) for g in self._random(seed)]
        grads = [None if i in without else g for i, g in enumerate(grads)]
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        self.held.append(grads)
        self.flat.read_gradients()
        return grads

    def history(self, rule):
        """The history of a rule, a view a parameter."""
        return [view.detach() for view in self.flat.state(rule.history)]

    def fill_histories(self, seed=99):
        """Put random numbers where histories are."""
        for rule in (Rule.ORTHOGONAL, Rule.FRIENDLY):
            for view, x in zip(self.history(rule), self._random(seed), strict=True):
                view.copy_(x)

    def come_to_update(self, how, seed=1):
        """Make the passes of a step, each with gradients of its own; returns these."""
        flat, rule = self.flat, how.rule
        if rule is Rule.REUSED:
            grads = [self.read(seed, WITHOUT[1])]
            flat.begin_plain(how)
            flat.direction_sums()
            return grads
        grads = [self.read(seed, WITHOUT[0])]
        if rule is Rule.FRIENDLY:
            flat.mix(RADII, how)
        else:
            flat.square_norm(ASCENT, RADII)
        flat.ascend(flat.sums, RADII, 1e-12, how)
        grads.append(self.read(seed + 1, WITHOUT[1]))
        if rule is Rule.BILATERAL:
            flat.descend(flat.sums, RADII_MIN, 1e-12)
            grads.append(self.read(seed + 2, WITHOUT[2]))
        if rule.keeps:
            flat.direction_sums()
        else:
            flat.square_norm(MAX, RADII)
        return grads

    def update(self, max_norm=math.inf, scalars=SGD):
        """End the step with SGD."""
        self.flat.update_sgd(self.flat.sums, scalars, True, max_norm)

    def numbers(self, *keys):
        """All that a step changes."""
        flat = self.flat
        state = [view.detach() for key in (*keys, *HISTORY_KEYS) for view in flat.state(key)]
        return [*(p.detach() for p in self.params), *state, flat.skipped, flat.step_count, flat.sums]


def pair(*args, **options):
    """One of the CUDA backend, and its twin of the CPU's; what they remember is random."""
    both = Flat("cuda", *args, **options), Flat("cpp", *args, **options)
    for one in both:
        one.fill_histories()
    return both


def assert_alike(found, expected, dtype):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        tolerance = TOLERANCE[dtype] * 10 ** (dtype is torch.float64)
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"{i}: {m}")


def zero_if_none(grads):
    """On the CPU, in float64."""
    zeros = [torch.zeros(n, dtype=torch.float64, device="cpu") for n in NUMELS]
    return [zero if g is None else g.cpu().double() for zero, g in zip(zeros, grads)]


def dot(some, others):
    return sum((a * b).sum().item() for a, b in zip(some, others, strict=True))


def replay(one, step, tables):
    """Capture the launches of ``step()`` and make them after other options are written."""
    shim = host_graphs.shim()
    first = shim.shim_captured()
    shim.shim_capture(True)
    try:
        step()
    finally:
        shim.shim_capture(False)
    last = shim.shim_captured()
    one.flat.write_options(tables)
    for i in range(first, last):
        shim.shim_launch(i)
