"""More of hostile.py's cases: rules that mix two gradients, and parameters that are left out of the perturbations."""

import math
import sys
from functools import partial

import torch
from hostile import CASES, KEPT, MEANWHILE, MODULE, RADII, RULE, Step, case, cases, main, refused, touch

GSAM, EXTRAPOLATED = (3, [(0.4, 0.4)]), (2, [(0.5, 0.5)])
LAST = ("update_sgd", "update_adam", "combine", "merge", "direction_sums")


class Exempt(Step):
    """A FlatParams that no ascent moves."""

    def __init__(self, stage="rest", mixing=KEPT):
        super().__init__()
        self.flat = MODULE.CpuFlatParams(self.params, [(0, i) for i in range(3)], None, True)
        self.walk(stage, mixing)


@cases(
    "mixing",
    minus_one=(-1, [(0.0, 0.0)]),
    six=(6, [(0.0, 0.0)]),
    huge=(1 << 62, [(0.0, 0.0)]),
    beyond_int64=(1 << 70, [(0.0, 0.0)]),
    fraction=(0.5, [(0.0, 0.0)]),
    none=None,
    no_numbers=(3, None),
    for_no_group=(3, []),
    of_one_number=(3, [(0.4,)]),
    of_three_numbers=(3, [(0.4, 0.4, 0.4)]),
    of_words=(3, [("a", "b")]),
    a_list_alone=[3],
)
def mixing(wrong):
    refused(lambda: Step("read").flat.join(wrong, False))
    Step("read").flat.ascend(torch.zeros(8, dtype=torch.float64), RADII, 1e-12, wrong)


@case
def mixing_for_too_few_groups():
    flat = MODULE.CpuFlatParams([torch.zeros(3), torch.zeros(3)], [(0, 0), (1, 0)], None, False)
    flat.read_gradients()
    flat.ascend(flat.sums, RADII * 2, 1e-12, GSAM)


@cases("a descent after the ascent of", gsam=GSAM, extrapolated_bsam=EXTRAPOLATED)
def descent_of_two_passes(rule):
    step = Step("read at w_max", mixing=rule)
    step.flat.descend(step.flat.sums, RADII, 1e-12)


@cases("before the last gradients are read", **{name: name for name in LAST})
def before_the_last_pass(name):
    for kind in (Step, Exempt):
        refused(lambda kind=kind: touch(kind("ascended", mixing=GSAM).flat, name))
    raise ValueError("all refused")


@cases("meanwhile, with two gradients", **MEANWHILE)
def meanwhile(change):
    """Whatever the last phase is, nothing is read or written that is not what it was."""
    for kind in (Step, Exempt):
        for rule in (GSAM, EXTRAPOLATED):
            for name in LAST:
                step = kind("read at w_max", mixing=rule)
                change(step.params[1])
                before = step.params[0].detach().clone()
                refused(partial(touch, step.flat, name))
                assert torch.equal(step.params[0], before), f"weights moved: {name}"
    raise ValueError("all refused")


@cases("exempt, meanwhile", **MEANWHILE)
def exempt_meanwhile(change):
    for stage, phases in {
        "read": [lambda flat: flat.square_norm(1, RADII), lambda flat: flat.ascend(flat.sums, RADII, 1e-12, KEPT)],
        "read at w_max": [lambda flat: flat.descend(flat.sums, RADII, 1e-12)],
        "read at w_min": [lambda flat: flat.update_sgd(flat.sums, RULE, True, math.inf)],
    }.items():
        for phase in phases:
            step = Exempt(stage)
            change(step.params[1])
            before = step.params[0].detach().clone()
            refused(partial(phase, step.flat))
            assert torch.equal(step.params[0], before), f"weights moved: {stage}"
    raise ValueError("all refused")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0, CASES)
