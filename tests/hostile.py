"""What no caller should do to the C++ object: each case must raise, and leave the weights; run by test_hostile.py.

In a program of its own, since a case that crashes takes its process along. ``python hostile_mixing.py FIRST`` runs the
cases of both files from the FIRST-th on: a line before each, and one with what came of it.
"""

import copy
import math
import pickle
import threading
from functools import partial

import torch
from torch import nn

from bsam_fused.ops import native_flat

MODULE = native_flat.load()[0]
CASES = {}
RADII = [(0.05, 0.0, 0.0, 0.05, math.inf)]
KEPT, ALONE = (1, [(0.0, 0.0, 0.0)]), (0, [])  # BSAM's rule, and SAM's
FRIENDLY = (8, [(1.0, 1.0, 0.9)])
RULE, ADAM = [(0.1, 0.9, 0.0, 0.0, 0.0, 0.0)], [(0.1, 0.9, 0.999, 1e-8, 0.0, 0.0, 0.0)]
STAGES = ("rest", "read", "ascended", "read at w_max", "descended", "read at w_min", "plain")
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError)


def case(function):
    return CASES.setdefault(function.__name__, function)


def cases(name, **variants):
    """Make a case of every variant, of the function given it."""

    def add(function):
        for label, variant in variants.items():
            CASES[f"{name}: {label}"] = lambda variant=variant: function(variant)
        return function

    return add


class Step:
    """A FlatParams, walked through BSAM's step up to a stage."""

    def __init__(self, stage="rest", numel=2000, tensors=3, mixing=KEPT):
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(numel)) for _ in range(tensors)]
        self.flat = MODULE.CpuFlatParams(self.params, [(0, i) for i in range(tensors)], None, False)
        self.walk(stage, mixing)

    def walk(self, stage, mixing):
        walk = {
            "read": self.read,
            "ascended": lambda: self.flat.ascend(self.measured(0), RADII, 1e-12, mixing),
            "read at w_max": self.read,
            "descended": lambda: self.flat.descend(self.flat.sums, RADII, 1e-12),
            "read at w_min": self.read,
        }
        if stage == "plain":
            self.read()
            self.flat.begin_plain(ALONE)
        elif stage != "rest":
            for name, call in walk.items():
                call()
                if name == stage:
                    break

    def read(self):
        for p in self.params:
            p.grad = torch.randn_like(p)
        self.flat.read_gradients()

    def measured(self, slot):
        self.flat.square_norm(slot, RADII)
        return self.flat.sums

    def next_phases(self, stage):
        """The phases that may come next at a stage."""
        flat, sums = self.flat, self.flat.sums

        def norm():
            flat.square_norm(0, RADII)

        return {
            "read": [norm, lambda: flat.ascend(sums, RADII, 1e-12, KEPT)],
            "read at w_max": [norm, lambda: flat.descend(sums, RADII, 1e-12)],
            "read at w_min": [
                norm,
                flat.direction_sums,
                lambda: flat.merge(sums, 1.0),
                lambda: flat.combine(sums, True, math.inf),
                lambda: flat.update_sgd(sums, RULE, True, math.inf),
                lambda: flat.update_adam(sums, ADAM, True, math.inf),
            ],
            "plain": [norm, lambda: flat.update_sgd(sums, RULE, True, math.inf)],
        }[stage]


def refused(call):
    try:
        call()
    except REFUSALS:
        return
    raise AssertionError("no error")


# ---- construction


def build(params, places=None, seed=None):
    MODULE.CpuFlatParams(params, [(0, i) for i in range(len(params))] if places is None else places, seed, False)


cases(
    "construction",
    no_parameters=([],),
    no_places=([torch.zeros(3)], []),
    more_places=([torch.zeros(3)], [(0, 0), (0, 1)]),
    negative_group=([torch.zeros(3)], [(-1, 0)]),
    huge_group=([torch.zeros(3)], [(1 << 40, 0)]),
    group_beyond_int64=([torch.zeros(3)], [(1 << 70, 0)]),
    negative_index=([torch.zeros(3)], [(0, -1)]),
    none=([None],),
    a_number=([3.0],),
    an_array=([torch.zeros(3).numpy()],),
    two_dtypes=([torch.zeros(3), torch.zeros(3).double()],),
    integers=([torch.zeros(3, dtype=torch.int64)],),
    complex_numbers=([torch.zeros(3, dtype=torch.complex64)],),
    meta=([torch.zeros(3, device="meta")],),
    meta_among_others=([torch.zeros(3), torch.zeros(3, device="meta")],),
    sparse=([torch.eye(3).to_sparse()],),
    sparse_rows=([torch.eye(3).to_sparse_csr()],),
    expanded=([torch.zeros(1).expand(5)],),
    nested=([torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])],),
    negative_seed=([torch.zeros(3)], [(0, 0)], -1),
)(lambda arguments: build(*arguments))


cases("without __init__", **{name: name for name in dir(MODULE.CpuFlatParams) if not name.startswith("_")})(
    lambda name: touch(MODULE.CpuFlatParams.__new__(MODULE.CpuFlatParams), name)
)


def touch(flat, name):
    """Call a method, with arguments that fit it, or read a property."""
    sums = torch.zeros(8, dtype=torch.float64)
    arguments = {
        "square_norm": (0, RADII),
        "mix": (RADII, FRIENDLY),
        "begin_plain": (ALONE,),
        "ascend": (sums, RADII, 1e-12, KEPT),
        "descend": (sums, RADII, 1e-12),
        "update_sgd": (sums, RULE, True, math.inf),
        "update_adam": (sums, ADAM, True, math.inf),
        "combine": (sums, True, math.inf),
        "merge": (sums, 1.0),
        "write_options": ([],),
        "show_w": (True,),
        "state": ("step",),
        "retract_state": (0,),
        "beginning": ([True],),
        "begin_state": ([],),
    }.get(name, ())
    attribute = getattr(flat, name)
    attribute(*arguments)


@case
def a_subclass_without_init():
    class Forgetful(MODULE.CpuFlatParams):
        def __init__(self):
            pass

    Forgetful().read_gradients()


@case
def the_base_class():
    MODULE.FlatParams()


@case
def a_base_class_that_was_never_built():
    MODULE.FlatParams.__new__(MODULE.FlatParams).read_gradients()


cases("self is", none=None, number=3, a_tensor=torch.zeros(3))(lambda it: MODULE.CpuFlatParams.read_gradients(it))
cases("copied by", copy=copy.copy, deepcopy=copy.deepcopy, pickle=pickle.dumps)(
    lambda copied: copied(Step().flat).read_gradients()
)

# ---- arguments

cases("slot of a norm", minus_one=-1, three=3, six=6, huge=1 << 62, beyond_int64=1 << 70, fraction=0.5)(
    lambda slot: Step("read").flat.square_norm(slot, RADII)
)
cases("state to retract", minus_one=-1, three=3, huge=1 << 62)(lambda i: Step().flat.retract_state(i))
cases("state that begins", minus_one=[0, -1], three=[0, 3], none=None, huge=[1 << 62])(
    lambda members: Step().flat.begin_state(members)
)
cases("groups that keep state", none=[], not_a_list=3)(lambda stateful: Step("read").flat.beginning(stateful))

BAD_SUMS = {
    "none": None,
    "a list": [0.0] * 8,
    "short": torch.zeros(7, dtype=torch.float64),
    "long": torch.zeros(9, dtype=torch.float64),
    "empty": torch.zeros(0, dtype=torch.float64),
    "float32": torch.zeros(8),
    "integers": torch.zeros(8, dtype=torch.int64),
    "on meta": torch.zeros(8, dtype=torch.float64, device="meta"),
    "with gaps": torch.zeros(16, dtype=torch.float64)[::2],
    "expanded": torch.zeros(1, dtype=torch.float64).expand(8),
    "sparse": torch.zeros(8, dtype=torch.float64).to_sparse(),
}
BAD_OPTIONS = {"for no group": [], "of one number": [(0.1,)], "of ten numbers": [(0.1,) * 10], "none": None}


@cases("sums", **BAD_SUMS)
def every_phase_refuses_the_sums(sums):
    for stage, call in {
        "read": lambda flat: flat.ascend(sums, RADII, 1e-12, KEPT),
        "read at w_max": lambda flat: flat.descend(sums, RADII, 1e-12),
        "read at w_min": lambda flat: flat.update_sgd(sums, RULE, True, math.inf),
        "plain": lambda flat: flat.update_adam(sums, ADAM, True, math.inf),
    }.items():
        refused(lambda stage=stage, call=call: call(Step(stage).flat))
    refused(lambda: Step("read at w_min").flat.combine(sums, True, math.inf))
    Step("read at w_min").flat.merge(sums, 1.0)


@cases("options", **BAD_OPTIONS)
def every_phase_refuses_the_options(options):
    for stage, call in {
        "read": lambda flat: flat.square_norm(0, options),
        "read at w_max": lambda flat: flat.descend(flat.sums, options, 1e-12),
        "read at w_min": lambda flat: flat.update_sgd(flat.sums, options, True, math.inf),
        "plain": lambda flat: flat.update_adam(flat.sums, options, True, math.inf),
    }.items():
        refused(lambda stage=stage, call=call: call(Step(stage).flat))
    Step("read").flat.ascend(torch.zeros(8, dtype=torch.float64), options, 1e-12, KEPT)


@case
def options_that_are_nan_for_too_few_groups():
    flat = MODULE.CpuFlatParams([torch.zeros(3), torch.zeros(3)], [(0, 0), (1, 0)], None, False)
    flat.read_gradients()
    flat.square_norm(0, [(math.nan, math.nan, math.nan)])


# ---- its own tensors, changed by Python

SPOILED = {
    "resized": lambda t: t.resize_(0),
    "grown": lambda t: t.resize_(1000),
    "set to others": lambda t: t.set_(torch.zeros(1, dtype=t.dtype)),
    "freed": lambda t: t.untyped_storage().resize_(0),
    "shrunk": lambda t: t.untyped_storage().resize_(1),
}


@cases("its sums are", **SPOILED)
def its_own_sums(spoil):
    for stage in ("read", "read at w_max", "read at w_min", "plain"):
        step = Step(stage)
        spoil(step.flat.sums)
        for phase in step.next_phases(stage):
            refused(phase)
    refused(partial(step.flat.begin_plain, ALONE))
    raise ValueError("all refused")


@cases("its counts are", **{name: SPOILED[name] for name in ("resized", "grown", "freed", "shrunk")})
def its_own_counts(spoil):
    for count in ("step_count", "skipped"):
        step = Step("read at w_min")
        spoil(getattr(step.flat, count))
        refused(partial(step.flat.update_sgd, step.flat.sums, RULE, True, math.inf))
    raise ValueError("all refused")


@cases("its state is", **{name: SPOILED[name] for name in ("freed", "shrunk")})
def its_own_state(spoil):
    for key in ("momentum_buffer", "step"):
        step = Step("read at w_min")
        spoil(step.flat.state(key)[0])
        refused(partial(step.flat.update_sgd, step.flat.sums, RULE, True, math.inf))
    raise ValueError("all refused")


# ---- calls out of order

OUT_OF_ORDER = {
    "ascend": ("rest", "ascended", "read at w_max", "descended", "read at w_min", "plain"),
    "descend": ("rest", "read", "ascended", "descended", "read at w_min", "plain"),
    "update_sgd": ("rest", "read", "ascended", "read at w_max", "descended"),
    "update_adam": ("rest", "read", "ascended", "read at w_max", "descended"),
    "combine": ("rest", "read", "ascended", "read at w_max", "descended"),
    "merge": ("rest", "read", "ascended", "read at w_max", "descended", "plain"),
    "direction_sums": ("rest", "read", "ascended", "read at w_max", "descended", "plain"),
    "square_norm": ("rest", "ascended", "descended"),
    "begin_plain": ("rest", "ascended", "read at w_max", "descended", "read at w_min", "plain"),
}
for name, stages in OUT_OF_ORDER.items():
    cases(f"{name} when", **{stage: (stage, name) for stage in stages})(lambda it: touch(Step(it[0]).flat, it[1]))


@case
def descend_after_an_ascent_that_kept_nothing():
    step = Step("read at w_max", mixing=ALONE)
    step.flat.descend(step.flat.sums, RADII, 1e-12)


@cases("twice", update="update_sgd", combine="combine", merge="merge")
def twice(name):
    flat = Step("read at w_min").flat
    touch(flat, name)
    touch(flat, name)


@cases("while w is shown", **{stage: stage for stage in ("read at w_max", "read at w_min")})
def while_w_is_shown(stage):
    step = Step(stage)
    step.flat.show_w(True)
    for phase in step.next_phases(stage):
        refused(phase)
    raise ValueError("all refused")


# ---- weights and gradients, changed between read_gradients and the phase


def _swap(p):
    grad, p.grad = p.grad, None
    torch.utils.swap_tensors(p, nn.Parameter(torch.zeros_like(p)))
    p.grad = grad


MEANWHILE = {
    "a gradient is set to None": lambda p: setattr(p, "grad", None),
    "a gradient is exchanged": lambda p: setattr(p, "grad", torch.zeros_like(p)),
    "a gradient is shortened": lambda p: p.grad.resize_(0),
    "a gradient gets other data": lambda p: setattr(p.grad, "data", torch.zeros(1)),
    "a gradient is freed": lambda p: p.grad.untyped_storage().resize_(0),
    "a gradient is shrunk": lambda p: p.grad.untyped_storage().resize_(4),
    "a gradient is cast": lambda p: setattr(p.grad, "data", p.grad.data.half()),
    "weights get other data": lambda p: setattr(p, "data", torch.zeros(1)),
    "weights get no data": lambda p: setattr(p, "data", torch.zeros(0)),
    "weights are copied": lambda p: setattr(p, "data", p.data.clone()),
    "weights are cast": lambda p: setattr(p, "data", p.data.half()),
    "weights are shortened": lambda p: setattr(p, "data", p.data[:7]),
    "weights are freed": lambda p: p.untyped_storage().resize_(0),
    "weights are shrunk": lambda p: p.untyped_storage().resize_(4),
    "weights are on meta": lambda p: setattr(p, "data", torch.zeros_like(p, device="meta")),
    "the tensor is swapped": _swap,
}


@cases("meanwhile", **MEANWHILE)
def meanwhile(change):
    for stage in ("read", "read at w_max", "read at w_min", "plain"):
        for k in range(len(Step(stage).next_phases(stage))):
            step = Step(stage)
            phase = step.next_phases(stage)[k]
            change(step.params[1])
            before = step.params[0].detach().clone()
            refused(phase)
            assert torch.equal(step.params[0], before), f"weights moved: {stage}, {k}"
    raise ValueError("all refused")


@case
def a_gradient_appears_meanwhile():
    step = Step("read at w_min")
    step.params[1].grad = None
    step.flat.read_gradients()
    step.params[1].grad = torch.zeros_like(step.params[1])
    step.flat.update_sgd(step.flat.sums, RULE, True, math.inf)


BEFORE = {
    "a gradient is shrunk": lambda p: p.grad.untyped_storage().resize_(4),
    "a gradient with gaps is shrunk": lambda p: (
        setattr(p, "grad", torch.zeros(2 * p.numel())[::2]),
        p.grad.untyped_storage().resize_(p.numel() * 4),
    ),
    "weights are shrunk": lambda p: p.untyped_storage().resize_(4),
    "weights are freed": lambda p: p.untyped_storage().resize_(0),
    "weights are expanded": lambda p: setattr(p, "data", torch.zeros(1).expand(p.shape)),
    "weights are shortened": lambda p: setattr(p, "data", p.data[:7]),
}


@cases("before read_gradients", **BEFORE)
def before_gradients_are_read(change):
    step = Step()
    for p in step.params:
        p.grad = torch.zeros_like(p)
    change(step.params[1])
    step.flat.read_gradients()


@cases("at restore", **{name: BEFORE[name] for name in BEFORE if name.startswith("weights")})
def at_restore(change):
    """Refused with nothing written, and exact once the parameter is whole again."""
    step = Step("ascended")
    change(step.params[2])
    before = [p.detach().clone() for p in step.params[:2]]
    refused(lambda: step.flat.show_w(True))
    refused(step.flat.restore)
    assert all(torch.equal(p, x) for p, x in zip(step.params, before, strict=False)), "weights moved"
    step.params[2].data = torch.zeros(2000)
    step.flat.restore()
    assert all(torch.equal(p, x) for p, x in zip(step.params, Step().params, strict=True)), "not w"
    raise ValueError("refused")


# ---- in use already


@case
def re_entered_from_a_gradients_end():
    """What a tensor's end calls may call the object that let go of it."""
    step = Step()
    met = []

    class Noticed(torch.Tensor):
        def __del__(self):
            try:
                step.flat.read_gradients()
            except RuntimeError as error:
                met.append(error)

    for p in step.params:
        p.grad = torch.randn_like(p).as_subclass(Noticed)
    step.flat.read_gradients()
    step.flat.ascend(step.measured(0), RADII, 1e-12, ALONE)
    raise met[0]


@case
def called_from_another_thread():
    step = Step("read", numel=4_000_000)
    met, go = [], threading.Event()

    def other():
        go.wait()
        while not met and not done:
            try:
                step.flat.square_norm(1, RADII)
            except RuntimeError as error:
                met.append(error)

    done = []
    thread = threading.Thread(target=other)
    thread.start()
    go.set()
    for _ in range(500):
        if met:
            break
        try:
            step.flat.square_norm(0, RADII)
        except RuntimeError as error:
            met.append(error)
    done.append(True)
    thread.join()
    raise met[0]


def main(first, cases):
    for name, run in list(cases.items())[first:]:
        print(f"begin\t{name}", flush=True)
        try:
            run()
            outcome = "no error"
        except REFUSALS as error:
            outcome = "refused" if str(error) else "an error without words"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        print(f"end\t{name}\t{outcome}", flush=True)
