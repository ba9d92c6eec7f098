"""The compiled object, called in any order with whatever may come: a call returns or raises, and stays in its memory.

python -m tests.reliability.arguments [--sequences N] [--seed S]   `make arguments`
"""

import argparse
import collections
import math
import sys

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from bsam_fused.ops import native_flat
from bsam_fused.ops.contract import Mixing, Rule, RuleNumber

from . import records

GUARD, NUMEL, SUMS = 64, 40, 8
QUIET = 7.0
"""What lies before and after every parameter, and must stay."""
RADII, SGD = [(0.05, 0.0, 0.0, 0.05, math.inf)], [(0.1, 0.9, 0.0, 0.0, 0.0, 0.0)]
ADAM = [(0.1, 0.9, 0.99, 1e-8, 0.0, 1.0, 0.0)]
SUM_TENSORS = {
    "short": lambda: torch.zeros(SUMS - 1, dtype=torch.float64),
    "long": lambda: torch.zeros(SUMS + 1, dtype=torch.float64),
    "float32": lambda: torch.zeros(SUMS),
    "strided": lambda: torch.zeros(2 * SUMS, dtype=torch.float64)[::2],
    "matrix": lambda: torch.zeros(2, SUMS // 2, dtype=torch.float64),
    "scalar": lambda: torch.tensor(0.0, dtype=torch.float64),
    "expanded": lambda: torch.zeros(1, dtype=torch.float64).expand(SUMS),
    "meta": lambda: torch.zeros(SUMS, dtype=torch.float64, device="meta"),
    "sparse": lambda: torch.zeros(SUMS, dtype=torch.float64).to_sparse(),
    "negated": lambda: torch._neg_view(torch.ones(SUMS, dtype=torch.float64)),
    "none of it": lambda: torch.zeros(0, dtype=torch.float64),
    "nan": lambda: torch.full((SUMS,), math.nan, dtype=torch.float64),
    "infinite": lambda: torch.full((SUMS,), math.inf, dtype=torch.float64),
    "negative": lambda: torch.full((SUMS,), -1.0, dtype=torch.float64),
}
"""None whose memory was taken away: pybind11's TypeError shows the arguments, and torch crashes where it prints one."""
ENDINGS = {
    "sgd": ["beginning", "begin_state", "update_sgd"],
    "adam": ["begin_state", "update_adam", "state", "retract_state"],
    "another base": ["combine", "remember", "release"],
    "ranks": ["merge", "read_gradients", "update_sgd"],
    "given up": ["show_w", "restore", "drop_state"],
}
"""What a last pass may end with."""
GRADIENTS = {
    "none": lambda p: None,
    "strided": lambda p: torch.ones(2 * p.numel(), dtype=p.dtype)[::2].view(p.shape),
    "expanded": lambda p: torch.ones((), dtype=p.dtype).expand(p.shape),
    "nan": lambda p: torch.full_like(p, math.nan),
    "itself": lambda p: p.detach(),
    "sparse": lambda p: torch.ones(p.shape, dtype=p.dtype).to_sparse(),
    "freed": lambda p: freed(torch.ones_like(p)),
    "negated": lambda p: torch._neg_view(torch.ones(p.shape, dtype=p.dtype)),
    "zero": lambda p: torch._efficientzerotensor(tuple(p.shape), dtype=p.dtype),
    "of others": lambda p: torch.from_numpy(torch.ones(p.shape).numpy()).to(p.dtype),
}
DATA = {
    "larger": lambda p: torch.ones(p.numel() + 9, dtype=p.dtype),
    "smaller": lambda p: torch.ones(3, dtype=p.dtype),
    "none of it": lambda p: torch.ones(0, dtype=p.dtype),
    "double": lambda p: torch.ones(p.shape, dtype=torch.float64),
    "strided": lambda p: torch.ones(2 * p.numel(), dtype=p.dtype)[::2].view(p.shape),
    "expanded": lambda p: torch.ones((), dtype=p.dtype).expand(p.shape),
    "freed": lambda p: freed(torch.ones(p.shape, dtype=p.dtype)),
    "another": lambda p: torch.ones(p.shape, dtype=p.dtype),
}


def freed(t):
    """A tensor whose memory was taken away, as FSDP and offloading do."""
    t.untyped_storage().resize_(0)
    return t


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.integers(-(2**65), 2**65), st.floats(), st.text(max_size=3)
)
anything = st.recursive(
    st.one_of(scalars, st.sampled_from(sorted(SUM_TENSORS)).map(lambda name: SUM_TENSORS[name]())),
    lambda inner: st.lists(inner, max_size=7),
    max_leaves=12,
)


class Object:
    """A CpuFlatParams of a few parameters, each within a memory whose ends are watched."""

    def __init__(self, dtype, seed, exempt):
        self.memory = [torch.full((2 * GUARD + n,), QUIET, dtype=dtype) for n in (NUMEL, 1, 5000)]
        self.params = [nn.Parameter(m[GUARD:-GUARD].fill_(0.5)) for m in self.memory]
        module, reason = native_flat.load()
        assert module is not None, reason
        self.module, places = module, [(0, i) for i in range(len(self.params))]
        self.flat = module.CpuFlatParams(self.params, places, seed, exempt)
        self.beside = module.CpuFlatParams([nn.Parameter(torch.ones(NUMEL))], [(0, 0)], None, False)
        self.returned = collections.Counter()

    def assert_quiet(self):
        """Nothing was written beside the parameters."""
        for memory in self.memory:
            assert (memory[:GUARD] == QUIET).all() and (memory[-GUARD:] == QUIET).all()  # noqa: PT018

    def arguments(self, mixing):
        """{method: arguments as they should be}"""
        sums = self.flat.sums
        right = {
            "copy_shared": ([self.beside],),
            "square_norm": (mixing.rule.last_slot, RADII),
            "mix": (RADII, mixing),
            "begin_plain": (mixing,),
            "join": (mixing, False),
            "ascend": (sums, RADII, 1e-12, mixing),
            "descend": (sums, RADII, 1e-12),
            "beginning": ([True],),
            "begin_state": ([0, 1],),
            "update_sgd": (sums, SGD, True, math.inf),
            "update_adam": (sums, ADAM, True, math.inf),
            "combine": (sums, True, math.inf),
            "merge": (sums, 0.5),
            "write_options": ([RADII],),
            "show_w": (True,),
            "state": ("momentum_buffer",),
            "retract_state": (0,),
        }
        return {name: right.get(name, ()) for name in self.methods()}

    def methods(self):
        """All of them, whichever there are."""
        kind = type(self.flat)
        return sorted(name for name in dir(kind) if name[0] != "_" and callable(getattr(kind, name)))

    def call(self, function, arguments):
        """It returns, or raises what can be caught; a SystemError would be a mistake in how it is bound."""
        try:
            function(*arguments)
        except SystemError:
            raise
        except Exception:
            pass
        else:
            self.returned[function.__name__] += 1


def spoilt(data, arguments):
    """Some of the arguments are others, or are missing, or too many."""
    arguments = list(arguments)
    for i in range(len(arguments)):
        if data.draw(st.integers(0, 3)) == 0:
            arguments[i] = data.draw(anything)
    if data.draw(st.integers(0, 9)) == 0:
        arguments.append(data.draw(anything))
    if arguments and data.draw(st.integers(0, 9)) == 0:
        arguments.pop()
    return arguments


def phases(rule, ending):
    """The calls of a step, a list a pass."""
    if rule in {Rule.LAST_ALONE, Rule.REUSED}:
        first = ["begin_plain"]
    else:
        first = ["mix" if rule == Rule.FRIENDLY else "square_norm", "ascend"]
    passes = [first, *([["descend"]] if rule == Rule.BILATERAL else [])]
    last = ["square_norm", "direction_sums", *ENDINGS[ending]]
    together = rule == Rule.REUSED  # whose only pass is the last one, too
    return [[*first, *last]] if together else [*passes, last]


def one_call(data, it, name, mixing, spoil):
    """A method of the object or, of an update, the module's."""
    right = it.arguments(mixing)[name]
    function = getattr(it.flat, name)
    if name.startswith("update") and data.draw(st.booleans()):
        function, right = getattr(it.module, name), ([it.flat], [right[0]], *right[1:])
    it.call(function, spoilt(data, right) if spoil else right)


def one_change(data, it):
    """A parameter, its gradient or the limit are no longer what they were."""
    p = data.draw(st.sampled_from(it.params))
    what = data.draw(st.sampled_from(["gradient", "gradient", "data", "limit"]))
    if what == "limit":
        it.flat.limit = data.draw(st.floats())
        return
    p.grad = None
    if what == "data":
        p.data = DATA[data.draw(st.sampled_from(sorted(DATA)))](p)
    else:
        p.grad = GRADIENTS[data.draw(st.sampled_from(sorted(GRADIENTS)))](p.detach())


def disturb(data, it, mixing):
    """Now and then something comes between."""
    what = data.draw(st.sampled_from([*["nothing"] * 7, "change", "call", "spoilt"]))
    if what == "change":
        one_change(data, it)
    elif what != "nothing":
        one_call(data, it, data.draw(st.sampled_from(it.methods())), mixing, what == "spoilt")
    it.assert_quiet()


@given(st.data())
def any_calls(data):
    """Steps, with calls and changes between theirs."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    it = Object(dtype, data.draw(st.sampled_from([None, 1])), data.draw(st.booleans()))
    for _ in range(data.draw(st.integers(1, 3))):
        mixing = Mixing(data.draw(st.sampled_from(list(Rule))), [RuleNumber()])
        for calls in phases(mixing.rule, data.draw(st.sampled_from(sorted(ENDINGS)))):
            for p in it.params:
                p.grad = torch.ones_like(p)
            for name in ("read_gradients", "copy_shared", *calls):
                disturb(data, it, mixing)
                one_call(data, it, name, mixing, spoil=data.draw(st.integers(0, 19)) == 0)
                it.assert_quiet()
    RETURNED.update(it.returned)


RETURNED = collections.Counter()
"""How often each method did its work: a fuzzer whose calls are all refused sees nothing."""


def run(sequences, seed=None):
    """Call so many sequences, always the same ones where no seed is given."""
    profile = settings(
        max_examples=sequences,
        deadline=None,
        database=None,
        derandomize=seed is None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    RETURNED.clear()
    calls = profile(any_calls)
    (calls if seed is None else hypothesis.seed(seed)(calls))()
    return RETURNED


def find(options):
    """Return how often which method did its work."""
    return {"sequences": options.sequences, "returned": dict(sorted(run(options.sequences, options.seed).items()))}


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.arguments", description=__doc__)
    parser.add_argument("--sequences", type=int, default=20_000, metavar="N", help="(default: %(default)s)")
    return records.run("arguments", parser, find)


if __name__ == "__main__":
    sys.exit(main())
