"""More of hostile.py's cases: rules that mix two gradients, what is exempt from the perturbations, several objects."""

import math
import sys
from functools import partial

import torch
from hostile import (
    ALONE,
    CASES,
    FRIENDLY,
    KEPT,
    MEANWHILE,
    MODULE,
    RADII,
    RULE,
    SPOILED,
    STAGES,
    Step,
    case,
    cases,
    main,
    refused,
    touch,
)

GSAM, EXTRAPOLATED = (3, [(0.4, 0.4, 0.0)]), (2, [(0.5, 0.5, 0.0)])
ORTHOGONAL, REUSED = ((rule, [(0.7, 0.7, 0.0)]) for rule in (6, 7))
LAST = ("update_sgd", "update_adam", "combine", "merge", "direction_sums")


class Exempt(Step):
    """A FlatParams that no ascent moves."""

    def __init__(self, stage="rest", mixing=KEPT):
        super().__init__()
        self.flat = MODULE.CpuFlatParams(self.params, [(0, i) for i in range(3)], None, True)
        self.walk(stage, mixing)


@cases(
    "mixing",
    minus_one=(-1, [(0.0, 0.0, 0.0)]),
    nine=(9, [(0.0, 0.0, 0.0)]),
    huge=(1 << 62, [(0.0, 0.0, 0.0)]),
    beyond_int64=(1 << 70, [(0.0, 0.0, 0.0)]),
    fraction=(0.5, [(0.0, 0.0, 0.0)]),
    none=None,
    no_numbers=(3, None),
    for_no_group=(3, []),
    of_one_number=(3, [(0.4,)]),
    of_four_numbers=(3, [(0.4, 0.4, 0.4, 0.4)]),
    of_words=(3, [("a", "b", "c")]),
    a_list_alone=[3],
)
def mixing(wrong):
    refused(lambda: Step("read").flat.join(wrong, False))
    refused(lambda: Step("read").flat.begin_plain(wrong))
    refused(lambda: Step("read").flat.mix(RADII, wrong))
    Step("read").flat.ascend(torch.zeros(8, dtype=torch.float64), RADII, 1e-12, wrong)


@cases("mixing for too few groups", gsam=GSAM, of_no_use=(ALONE[0], GSAM[1]))
def mixing_for_too_few_groups(wrong):
    flat = MODULE.CpuFlatParams([torch.zeros(3), torch.zeros(3)], [(0, 0), (1, 0)], None, False)
    flat.read_gradients()
    flat.ascend(flat.sums, RADII * 2, 1e-12, wrong)


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


# ---- what steps remember

for name, stages in {"mix": [stage for stage in STAGES if stage != "read"], "remember": STAGES}.items():
    cases(f"{name} when", **{stage: (stage, name) for stage in stages})(lambda it: touch(Step(it[0]).flat, it[1]))


@cases("of several passes, a plain step's rule is", kept=KEPT, gsam=GSAM, orthogonal=ORTHOGONAL, friendly=FRIENDLY)
def plain_step_of_several_passes(rule):
    Step("read").flat.begin_plain(rule)


@case
def ascent_with_the_rule_of_one_pass():
    Step("read").flat.ascend(torch.zeros(8, dtype=torch.float64), RADII, 1e-12, REUSED)


@cases("a mix for", kept=KEPT, gsam=GSAM, orthogonal=ORTHOGONAL, reused=REUSED)
def mix_for_what_goes_along_g(rule):
    Step("read").flat.mix(RADII, rule)


@case
def a_mix_of_what_was_mixed():
    flat = Step("read").flat
    flat.mix(RADII, FRIENDLY)
    flat.mix(RADII, FRIENDLY)


@case
def state_dropped_while_it_is_read():
    flat = Step("read").flat
    flat.begin_plain(REUSED)
    flat.drop_state()


@case
def remembered_after_state_was_dropped():
    flat = Step("read at w_max", mixing=ORTHOGONAL).flat
    flat.direction_sums()
    assert flat.combine(flat.sums, True, math.inf)
    flat.drop_state()
    flat.remember()


@cases("its history is", **{name: SPOILED[name] for name in ("freed", "shrunk")})
def its_history(spoil):
    for key, call in {
        "gradient_average": lambda flat: flat.mix(RADII, FRIENDLY),
        "orthogonal_gradient": lambda flat: flat.begin_plain(REUSED),
    }.items():
        step = Step("read")
        spoil(step.flat.state(key)[0])
        refused(partial(call, step.flat))
    step = Step("read at w_max", mixing=ORTHOGONAL)
    step.flat.direction_sums()
    spoil(step.flat.state("orthogonal_gradient")[0])
    before = step.params[0].detach().clone()
    refused(partial(step.flat.update_sgd, step.flat.sums, RULE, True, math.inf))
    assert torch.equal(step.params[0], before), "weights moved"
    raise ValueError("all refused")


# ---- several objects

cases(
    "beside", none=None, number=3, numbers=[3], nothing=[None], unbuilt=[MODULE.FlatParams.__new__(MODULE.FlatParams)]
)(lambda beside: Step("read").flat.copy_shared(beside))


@case
def beside_itself():
    step = Step("read")
    step.flat.copy_shared([step.flat])


@cases("several at once", twice_the_same=lambda step: [step.flat] * 2, none=lambda step: [None], fewer=lambda step: [])
def several_at_once(flats):
    step = Step("plain")
    MODULE.update_sgd(flats(step), [step.flat.sums] * (len(flats(step)) or 1), RULE, True, math.inf)


@case
def one_of_several_is_not_ready():
    """Then the others stay as they were, too."""
    ready, other = Step("plain"), Step("rest")
    before = ready.params[0].detach().clone()
    try:
        sums = [ready.flat.sums, other.flat.sums]
        MODULE.update_sgd([ready.flat, other.flat], sums, RULE, True, math.inf)
    finally:
        assert torch.equal(ready.params[0], before)
        assert int(ready.flat.step_count) == 0


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0, CASES)
