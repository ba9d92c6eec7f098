"""One rank fails, in each way there is, and the others raise within the group's timeout or go on right: `make ranks`.

Two and four processes on gloo train; in one step of one of them something is wrong. Where the others go on, weights and
state are those of a training without the fault, bit for bit; where they raise, those of before or after the step.
"""

import argparse
import random
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory

from .failing_ranks_training import FAULTS, SETUPS, STEPS, Fault, expected, train
from .lives import started
from .records import run

RANKS = 2, 4
SLACK = 5
"""Seconds beyond the timeout of the group, in which whoever waited gets to raise."""


@dataclass
class Figures:
    """How often each fault was made, how the other ranks took it, and how long the slowest of them needed to raise."""

    seconds: dict = field(default_factory=lambda: defaultdict(list))
    """By ranks, setup, fault and outcome: of each run."""
    wrong: list = field(default_factory=list)
    """Runs in which another rank hung, was left half-way, or went on otherwise than it should."""

    def by_name(self):
        rows = [
            {
                "ranks": ranks,
                "setup": setup,
                "fault": fault,
                "others": outcome,
                "runs": len(taken),
                "seconds_until_the_last_raised": round(max(taken), 2) if outcome == "raise" else None,
            }
            for (ranks, setup, fault, outcome), taken in self.seconds.items()
        ]
        runs = sum(row["runs"] for row in rows)
        parted = sum(row["runs"] for row in rows if row["others"] == "part")
        wrong = {"hangs_and_differences": len(self.wrong), "differences_as_documented": parted}
        return {"runs": runs, **wrong, "by_fault": rows}


class Group:
    """Ranks that train by one setup, and what they leave where nothing is wrong.

    Args:
        setup: its name.
        ranks: how many.
        timeout: of the process group, in seconds.
    """

    def __init__(self, setup, ranks, timeout):
        self.setup, self.ranks, self.timeout = setup, ranks, timeout
        self.right = self._states(self._run(None))

    def _run(self, fault):
        """Return what each rank says until it is done or has raised; nothing more of one that was killed."""
        with TemporaryDirectory() as folder:
            rows = [
                (self.setup, rank, self.ranks, f"{folder}/store", self.timeout, fault) for rank in range(self.ranks)
            ]
            with started(train, rows) as lives:
                return [life.hear_until("over") for life in lives]

    def _states(self, said):
        """Return every rank's hashes, before the first step and after each."""
        states = [[message[1] for message in one if message[0] == "state"] for one in said]
        assert all(len(one) == STEPS + 1 for one in states), said
        return states

    def check(self, fault):
        """Make a fault; return how the other ranks took it, and after how many seconds the last of them raised."""
        said = self._run(fault)
        outcome = expected(fault.name, self.setup)
        others = [rank for rank in range(self.ranks) if rank != fault.rank]
        if outcome == "raise":
            return outcome, self._raised(fault, said, others)
        states = self._states(said)
        if outcome == "go on":
            right = self.right
        elif outcome == "skip":
            right = self._states(self._run(fault._replace(name="left out")))
        else:
            right = [states[others[0]]] * self.ranks
            assert (states[fault.rank] == right[0]) == (outcome == "stay together"), said
        assert all(states[rank] == right[rank] for rank in others), f"others than without it: {said}"
        if outcome == "skip":
            assert [one[-1][1] for one in said] == [1] * self.ranks, f"not all have skipped one step: {said}"
            assert states[fault.rank] == right[fault.rank], said
        return outcome, 0.0

    def _raised(self, fault, said, others):
        """All others have, before the timeout was over, in the fault's step or the next, with whole weights."""
        begin = next((message[1] for message in said[fault.rank] if message[0] == "fault"), None)
        assert begin is not None, f"rank {fault.rank} did not come to its fault: {said}"
        seconds = []
        for rank in others:
            assert any(message[0] == "error" for message in said[rank]), f"rank {rank} did not raise: {said[rank]}"
            at, step, left, words = next(message[1:] for message in said[rank] if message[0] == "error")
            assert fault.step <= step <= fault.step + 1, said[rank]
            assert left in self.right[rank][step : step + 2], f"rank {rank} is left half-way: {words}"
            assert FAULTS[fault.name] in words, words
            seconds.append(at - begin)
        assert max(seconds) < self.timeout + SLACK, seconds
        return max(seconds)


def check_all(rounds, timeout, rng, setups=tuple(SETUPS), faults=tuple(FAULTS)):
    """Each fault so many times in each setup, on two ranks and four; at another rank, step and moment each time."""
    figures = Figures()
    for ranks in RANKS:
        for setup in setups:
            group = Group(setup, ranks, timeout)
            for name in faults:
                for _ in range(rounds if expected(name, setup) else 0):
                    fault = Fault.at_random(name, setup, ranks, rng)
                    _check_one(group, fault, figures)
    assert not figures.wrong, "\n".join(figures.wrong)
    return figures


def _check_one(group, fault, figures):
    where = f"{group.ranks} ranks, {group.setup}, {fault}"
    try:
        outcome, seconds = group.check(fault)
    except AssertionError as error:
        figures.wrong.append(f"{where}: {error}")
        print(figures.wrong[-1], flush=True)
        return
    figures.seconds[group.ranks, group.setup, fault.name, outcome].append(seconds)
    print(f"{where}: {outcome}, {seconds:.2f} s", flush=True)


def find(options):
    """Return the figures of every fault."""
    figures = check_all(options.rounds, options.timeout, random.Random(options.seed))
    return {"timeout_seconds": options.timeout, **figures.by_name()}


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.failing_ranks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of every fault in every setup (default 5)")
    parser.add_argument("--timeout", type=float, default=5, help="of the process groups, in seconds (default 5)")
    return run("ranks", parser, find)


if __name__ == "__main__":
    sys.exit(main())
