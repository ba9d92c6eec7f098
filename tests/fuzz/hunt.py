"""Look for one failure, in the same sequences every time, and say in a line of JSON what it was: for `self_test`."""

import argparse
import json
import sys
import time
from itertools import count

import torch
from hypothesis import Phase, Verbosity, settings

import bsam_fused
from bsam_fused.ops.dispatch import choose

from .machine import LONG, batch
from .tally import DRIVEN

FIRST = settings(LONG, phases=[Phase.generate], verbosity=Verbosity.quiet)  # as it comes, and no shorter one
BROKEN = (ImportError, NameError, SyntaxError)  # no bug that anybody would overlook


def failure(seed):
    """What a batch fails with, in a line; None."""
    try:
        batch(seed, FIRST)
    except Exception as error:
        while inner := getattr(error, "exceptions", ()):  # where a second run of the sequence went otherwise
            error = inner[0]
        if isinstance(error, BROKEN):
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.hunt", description=__doc__)
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    arguments = parser.parse_args()
    choose("cpp", torch.device("cpu"))  # raises now where it is missing: that is no finding
    begin, said = time.monotonic(), None
    for seed in count(1):
        said = failure(seed)
        seconds = time.monotonic() - begin
        if said is not None or DRIVEN.sequences >= arguments.sequences or seconds >= arguments.seconds:
            break
    figures = {"found": said, "sequences": DRIVEN.sequences, "seconds": round(seconds, 1)}
    print(json.dumps({"package": bsam_fused.__file__, **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
