"""A few of `make kills`'s: trainings that are killed go on from their last checkpoint as if nobody had killed them."""

import random
import signal

import pytest

from tests.reliability import kills

CASES = {1: ["SAM, bfloat16"], 2: ["BSAM"]}


@pytest.mark.parametrize("ranks", CASES)
def test_killed_and_resumed(ranks):
    figures = kills.Figures()
    for case in CASES[ranks]:
        kills.kill(case, ranks, kills.SIGNALS, 12, random.Random(0), figures)
    names = {(number.name, ranks) for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)}
    assert figures.kills == dict.fromkeys(names, 1)
    assert figures.resumes >= len(figures.kills)
    assert figures.trainings >= 1
