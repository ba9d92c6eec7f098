"""What a run has driven, counted: sequences, their steps, kinds of optimizers, calls of rules."""

from collections import Counter
from dataclasses import dataclass, field
from functools import wraps

from hypothesis import stateful


@dataclass
class Tally:
    """Counts, of all sequences of a process."""

    sequences: int = 0
    steps: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)

    def figures(self):
        """For a record."""
        return {name: dict(sorted(x.items())) if isinstance(x, Counter) else x for name, x in vars(self).items()}


DRIVEN = Tally()


def rule(**arguments):
    """Make a rule as hypothesis has it, whose calls are counted: those that other rules make, too."""

    def decorated(function):
        @wraps(function)
        def counted(*args, **kwargs):
            DRIVEN.rules[function.__name__] += 1
            return function(*args, **kwargs)

        return stateful.rule(**arguments)(counted)

    return decorated
