"""A few of `make ranks`'s: where one rank fails, the others raise or go on right."""

import random

import pytest

from tests.reliability.failing_ranks import Group
from tests.reliability.failing_ranks_training import Fault

TIMEOUT = 20
"""Nobody waits for it here: a rank that is killed is heard of at once where there are two."""
FEW = {
    (2, "DDP, last", "killed"): "raise",
    (2, "DDP, last", "other gradients"): "raise",
    (2, "by hand", "NaN"): "skip",
    (2, "DDP, last, BSAM", "other gradients"): "stay together",
    (4, "FSDP2", "a missing gradient"): "raise",
}


@pytest.mark.parametrize(("ranks", "setup", "name"), FEW)
def test_the_others_raise_or_go_on_right(ranks, setup, name):
    fault = Fault.at_random(name, setup, ranks, random.Random(0))
    outcome, seconds = Group(setup, ranks, TIMEOUT).check(fault)
    assert outcome == FEW[ranks, setup, name]
    assert seconds < TIMEOUT
