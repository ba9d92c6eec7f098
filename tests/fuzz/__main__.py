"""Fuzz for a while: `python -m tests.fuzz --seconds 3600 --seed 1`. Every batch has its seed, and prints it."""

import argparse
import sys
import time
from itertools import count

from tests.reliability.records import recorded

from .machine import batch
from .tally import DRIVEN


def fuzz(first_seed, is_enough):
    """Run batches until it is enough, one at the least."""
    for seed in count(first_seed):
        print(f"again with: python -m tests.fuzz --seconds 0 --seed {seed}", flush=True)
        batch(seed)
        if is_enough():
            return


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600, help="begin no batch later than that (default 3600)")
    parser.add_argument("--sequences", type=int, default=None, help="so many at the least, however long they take")
    parser.add_argument("--seed", type=int, default=None, help="of the first batch (default: the time)")
    parser.add_argument("--record", action="store_true", help="write what was driven to bench/results/reliability/")
    arguments = parser.parse_args()
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    end = time.monotonic() + arguments.seconds

    def is_enough():
        if arguments.sequences is None:
            return time.monotonic() >= end
        return DRIVEN.sequences >= arguments.sequences

    if not arguments.record:
        fuzz(seed, is_enough)
        return 0
    with recorded("fuzzer") as record:
        fuzz(seed, is_enough)
        record.figures.update(seed=seed, **DRIVEN.figures())
    return 0


if __name__ == "__main__":
    sys.exit(main())
