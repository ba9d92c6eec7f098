"""Fuzz for a while: `python -m tests.fuzz --seconds 3600 --seed 1`. Every batch has its seed, and prints it."""

import argparse
import sys
import time

import hypothesis
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from .machine import PROFILE, Machine

LONG = settings(PROFILE, max_examples=200, stateful_step_count=30, print_blob=False)


def batch(seed):
    """200 sequences. The same seed makes the same ones."""
    machine = hypothesis.seed(seed)(type("Machine", (Machine,), {}))
    run_state_machine_as_test(machine, settings=LONG)


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600, help="begin no batch later than that (default 3600)")
    parser.add_argument("--seed", type=int, default=None, help="of the first batch (default: the time)")
    arguments = parser.parse_args()
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    end = time.monotonic() + arguments.seconds
    while True:
        print(f"again with: python -m tests.fuzz --seconds 0 --seed {seed}", flush=True)
        batch(seed)
        seed += 1
        if time.monotonic() >= end:
            return 0


if __name__ == "__main__":
    sys.exit(main())
