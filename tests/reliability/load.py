"""Leaks and load: memory that stays flat, many tensors and large ones, and what runs side by side: `make load`.

Every part runs in a process of its own, which has no other part's memory.
"""

import argparse
import sys

from . import large, leaks, side_by_side
from .lives import PATIENCE, started
from .records import run

HOURS = 4 * 3600
"""Seconds until a part counts as one that hangs."""


def parts(steps, optimizers, tensors, layers, seed):
    """Return every part by name: its function and arguments."""
    names = leaks.OPTIMIZERS
    return {
        **{f"steps, {name}": (leaks.many_steps, steps, name) for name in names},
        **{f"changing gradients, {name}": (leaks.changing_gradients, steps, name, seed) for name in names},
        "optimizers that come and go": (leaks.come_and_go, optimizers),
        "many tensors": (large.many_tensors, tensors),
        "a large model, SGD": (large.large_model, layers, "SGD"),
        "a large model, SAM": (large.large_model, layers, "SAM"),
        "two optimizers": (side_by_side.two_optimizers, steps // 10),
        "threads": (side_by_side.threads, 4, steps // 10),
        "a checkpointing thread": (side_by_side.checkpointing_thread, steps // 10),
    }


def alone(function, *arguments, patience=PATIENCE):
    """Call a function in a new process, and return what it does, within so many seconds."""
    with started(_call, [(function, arguments)]) as (life,):
        said = life.hear(patience)
        assert said, f"{function.__name__} ended with status {life.end()}"
        word, found = said
        assert word == "found", found
    return found


def _call(say, function, arguments):
    say(("found", function(*arguments)))


def find(options):
    """Return every part's figures."""
    figures = {}
    every = parts(options.steps, options.optimizers, options.tensors, options.layers, options.seed)
    for name, (function, *arguments) in every.items():
        figures[name] = alone(function, *arguments, patience=HOURS)
        print(f"{name}: {figures[name]}", flush=True)
    return figures


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.load", description=__doc__)
    parser.add_argument("--steps", type=int, default=50_000, help="of a small model (default 50,000)")
    parser.add_argument("--optimizers", type=int, default=1000, help="that come and go (default 1,000)")
    parser.add_argument("--tensors", type=int, default=10_000, help="of one optimizer (default 10,000)")
    parser.add_argument("--layers", type=int, default=60, help="of 16.8 M bfloat16 weights (default 60: 1.007 B)")
    return run("load", parser, find)


if __name__ == "__main__":
    sys.exit(main())
