"""Kill trainings at random moments, and resume each from its last whole checkpoint: `make kills`.

Every training (`kills_training`) is beside one that nobody killed, and that wrote no checkpoint: after each signal new
processes must begin with its state of the checkpoint's step, and go on with its states, bit for bit, on every rank.
"""

import argparse
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from .kills_training import CASES, CHECKPOINT, HALF, train
from .lives import INTERRUPTED, RAISED, seconds_until_all_end, started
from .records import run

SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
RANKS = 1, 2
RANGE = 10
"""A signal comes within so many steps after a training was taken up, or its first checkpoint was written."""


@dataclass
class Figures:
    """What was done to the trainings, and what came of it."""

    kills: Counter = field(default_factory=Counter)
    """By signal and ranks."""
    resumes: int = 0
    """From a checkpoint, in new processes, each with the right state; so were all steps that they went on by."""
    killed_again_before_a_step: int = 0
    ranks_that_raised: int = 0
    """As the other one had been killed."""
    trainings: int = 0
    """Brought to their end, through kills."""
    steps: int = 0
    half_written_checkpoints: int = 0
    slowest_end_seconds: float = 0.0
    """From a signal until the last rank had ended."""

    def by_name(self):
        kills = {f"{name}, {ranks} rank{'s' if ranks > 1 else ''}": n for (name, ranks), n in self.kills.items()}
        return {**vars(self), "kills": kills, "slowest_end_seconds": round(self.slowest_end_seconds, 2)}


class Killed:
    """One training after the other of one case, each killed and resumed until its end.

    Args:
        case: its name.
        ranks: how many.
        steps: of a training.
        rng: when signals come, and to which rank.
        folder: for the checkpoint.
        figures: to be added to.
    """

    def __init__(self, case, ranks, steps, rng, folder, figures):
        self.case, self.ranks, self.steps = case, ranks, steps
        self.rng, self.folder, self.figures = rng, Path(folder), figures
        self.lives, self.left = 0, set()
        self.truth, _ = self._uninterrupted(saves=False)
        seen, self.a_step = self._uninterrupted(saves=True)
        assert seen == self.truth, "writing checkpoints changes the training"
        self._begin_anew()

    def _begin_anew(self):
        self.last = 0, 0
        (self.folder / CHECKPOINT).unlink(missing_ok=True)

    def _arguments(self, saves):
        """Of each rank; the store is a new one, as a dead rank is still in the old one."""
        self.lives += 1
        store = str(self.folder / f"store{self.lives}")
        rows = range(self.ranks)
        return [(str(self.folder), self.case, rank, self.ranks, store, self.steps, saves) for rank in rows]

    def _uninterrupted(self, saves):
        """Return every rank's states, and the seconds that a step takes."""
        with started(train, self._arguments(saves)) as ranks:
            said = [rank.hear_until("state") for rank in ranks]
            begin = time.monotonic()
            for rank, one in zip(ranks, said):
                one.extend(rank.hear_all())
            assert [rank.end() for rank in ranks] == [0] * self.ranks, said
        return [states(one) for one in said], (time.monotonic() - begin) / self.steps

    def live(self, number=None):
        """Resume, send a signal if there is one, and return whether it ended the training before its end."""
        resumes = (self.folder / CHECKPOINT).exists()
        with started(train, self._arguments(saves=True)) as ranks:
            said = [rank.hear_until("state") for rank in ranks]
            if not resumes:
                said[0].extend(ranks[0].hear_until("saved"))
            if number is not None:
                self._strike(ranks, number)
            for rank, one in zip(ranks, said):
                one.extend(rank.hear_all())
            ended = [rank.end() for rank in ranks]
        self._check(said)
        self._count(said, resumes)
        if number is not None and killed_by(number) in ended:
            assert {*ended} <= {killed_by(number), 0, *([RAISED] if self.ranks > 1 else [])}, said
            self.figures.kills[number.name, self.ranks] += 1
            self.figures.ranks_that_raised += ended.count(RAISED)
            return True
        assert ended == [0] * self.ranks, said
        assert states(said[0])[-1][0] == self.steps, said
        self.figures.trainings += 1
        self._begin_anew()
        return False

    def _strike(self, ranks, number):
        """Send it to one of them, or to all, and wait for the end of all."""
        struck = ranks if self.rng.random() < 0.5 else [self.rng.choice(ranks)]
        time.sleep(self.rng.uniform(0, RANGE * self.a_step))
        for rank in struck:
            rank.send(number)
        took = seconds_until_all_end(ranks)
        self.figures.slowest_end_seconds = max(took, self.figures.slowest_end_seconds)

    def _check(self, said):
        """The states are those of the training that nobody killed, from the last whole checkpoint on."""
        saved, stated = self.last
        for one, truth in zip(said, self.truth):
            mine = states(one)
            assert mine, one
            first = mine[0][0]
            assert saved <= first <= stated, f"resumed at step {first}: {saved} was saved, {stated} reached"
            assert mine == truth[first : first + len(mine)], f"other bits: {self.differing(mine, truth)}"
        reached = states(said[0])[-1][0]
        self.last = max([saved, *(step for what, step, *_ in said[0] if what == "saved")]), max(stated, reached)

    @staticmethod
    def differing(mine, truth):
        return f"of the steps {mine[0][0]} to {mine[-1][0]} those of {[s for s, d in mine if truth[s][1] != d]}"

    def _count(self, said, resumes):
        steps = len(states(said[0])) - 1
        self.figures.steps += steps
        self.figures.resumes += resumes
        self.figures.killed_again_before_a_step += resumes and not steps
        half = self.folder / HALF
        if half.exists() and half.stat().st_mtime_ns not in self.left:
            self.left.add(half.stat().st_mtime_ns)
            self.figures.half_written_checkpoints += 1


def killed_by(number):
    """Return what a process that a signal has killed ends with."""
    return INTERRUPTED if number == signal.SIGINT else -number


def states(said):
    """Return the steps that a rank spoke of, each with the hash of its state."""
    return [(step, *digest) for what, step, *digest in said if what == "state"]


def kill(case, ranks, signals, steps, rng, figures):
    """Send a case all signals, in turn, and then let it come to its end."""
    with TemporaryDirectory() as folder:
        killed = Killed(case, ranks, steps, rng, folder, figures)
        for number in signals:
            while not killed.live(number):
                pass  # it came too late: the training had ended
        killed.live()


def kill_all(kills, steps, rng, cases=tuple(CASES)):
    """So many times by each signal, on one rank and again on two, shared by the cases."""
    figures = Figures()
    for ranks in RANKS:
        signals = [number for number in SIGNALS for _ in range(kills)]  # so that every case gets all
        for i, case in enumerate(cases):
            kill(case, ranks, signals[i :: len(cases)], steps, rng, figures)
            print(f"{case}, {ranks} rank(s): {figures.by_name()}", flush=True)
    return figures


def find(options):
    """Return the figures of so many kills."""
    return kill_all(options.kills, options.steps, random.Random(options.seed)).by_name()


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="by each signal, on each number of ranks (default 200)")
    parser.add_argument("--steps", type=int, default=40, help="of a training (default 40)")
    return run("kills", parser, find)


if __name__ == "__main__":
    sys.exit(main())
