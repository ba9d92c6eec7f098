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


def test_every_case_gets_every_signal(monkeypatch):
    sent = {}
    monkeypatch.setattr(kills, "kill", lambda case, ranks, signals, *_: sent.update({(case, ranks): signals}))
    kills.kill_all(200, 40, random.Random(0))
    assert len(sent) == len(kills.CASES) * len(kills.RANKS)
    assert all({*signals} == {*kills.SIGNALS} for signals in sent.values())
    assert sum(map(len, sent.values())) == 1200
