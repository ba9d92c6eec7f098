"""The questions, each answered yes, no or not decided by intervals of paired differences, with its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from scipy import stats

from bench.evidence.results import Found, Gain, Length, Verdict
from bsam_fused.report.training.methods import BASE
from bsam_fused.report.training.runs import Row

Answer = str
YES, NO, OPEN = "yes", "no", "not decided"
MARGIN = 1.0
"""Points of percent: what is nowhere below by more is as good."""
SHARPNESS = ("MaxS", "MinS", "BilS", "eigenvalue")


@dataclass(frozen=True)
class Comparison:
    """A question of whether one thing is above another, and what it was on each task."""

    asked: str
    gains: dict[str, Gain]
    as_good: bool = False
    """Whether being nowhere below is enough."""

    @property
    def answer(self) -> Answer:
        """Yes where it is above on at least half of the tasks and below on none; no the other way round.

        Of being as good: yes where no interval reaches below −`MARGIN`; else no where one lies below 0.
        """
        verdicts = [gain.verdict for gain in self.gains.values()]
        if self.as_good:
            if all(gain.value - gain.reach > -MARGIN for gain in self.gains.values()):
                return YES
            return NO if "less" in verdicts else OPEN
        sides: tuple[tuple[Answer, Verdict, Verdict], ...] = ((YES, "more", "less"), (NO, "less", "more"))
        for answer, wanted, other in sides:
            if verdicts.count(wanted) >= len(verdicts) / 2 and other not in verdicts:
                return answer
        return OPEN


@dataclass(frozen=True)
class Question:
    """Whether a method is above another, each trained so long; ``as_good``: or not below."""

    asked: str
    method: str
    over: str
    length: Length = "epochs"
    over_length: Length = "epochs"
    as_good: bool = False
    bits: int | None = None
    """Of weights that are rounded; None: as they were trained."""

    def accuracy(self, row: Row) -> float:
        """Return what is compared."""
        return row.accuracy_percent if self.bits is None else row.quantized_percent[str(self.bits)]


def _equal_passes(asked: str, method: str, over: str) -> Question:
    return Question(asked, method, over, "passes", "passes")


def _better(asked: str, method: str, over: str) -> Question:
    return Question(asked, method, over, "better", "better")


LATE = "Is BSAM in the last {} of training as good as BSAM throughout?"
QUESTIONS = (
    Question("Does SAM beat the base optimizer, at equal epochs?", "SAM", BASE),
    Question("Does BSAM beat SAM, at equal epochs?", "BSAM", "SAM"),
    _equal_passes("Does SAM beat the base optimizer, at equal passes?", "SAM", BASE),
    _equal_passes("Does BSAM beat the base optimizer, at equal passes?", "BSAM", BASE),
    _equal_passes("Does BSAM beat SAM, at equal passes?", "BSAM", "SAM"),
    _better("Does SAM beat the base optimizer, each by its better length?", "SAM", BASE),
    _better("Does BSAM beat SAM, each by its better length?", "BSAM", "SAM"),
    _better("Does extrapolated BSAM beat SAM, each by its better length?", "BSAM extrapolated", "SAM"),
    Question("Is extrapolated BSAM as good as exact BSAM, at equal epochs?", "BSAM extrapolated", "BSAM", as_good=True),
    _equal_passes("Does extrapolated BSAM beat exact BSAM, at equal passes?", "BSAM extrapolated", "BSAM"),
    _equal_passes("Does extrapolated BSAM beat SAM, at equal passes?", "BSAM extrapolated", "SAM"),
    _equal_passes("Does WSAM (γ = ⅔) beat SAM, at equal passes?", "WSAM", "SAM"),
    Question("Does c buy anything, in extrapolated BSAM?", "BSAM extrapolated", "BSAM extrapolated, c = 1"),
    Question("Does the decay of ρ_min buy anything?", "BSAM", "BSAM, ρ_min stays"),
    Question(
        "Is the authors' released code, which updates from w_min, as good?", "BSAM from w_min", "BSAM", as_good=True
    ),
    Question("Does SAM beat the base optimizer when weights are rounded to 4 bits?", "SAM", BASE, bits=4),
    Question("To 3 bits?", "SAM", BASE, bits=3),
    Question("Does BSAM beat SAM when weights are rounded to 4 bits?", "BSAM", "SAM", bits=4),
    Question("To 3 bits?", "BSAM", "SAM", bits=3),
    Question(LATE.format("50 %"), "BSAM, last 50 %", "BSAM", as_good=True),
    Question(LATE.format("25 %"), "BSAM, last 25 %", "BSAM", as_good=True),
    Question(LATE.format("10 %"), "BSAM, last 10 %", "BSAM", as_good=True),
)


def comparisons(found: Sequence[Found]) -> list[Comparison]:
    """Return all questions that a task has the rows for."""
    result = []
    for it in QUESTIONS:
        both = [each for each in found if each.has(it.method, it.length) and each.has(it.over, it.over_length)]
        gains = {each.task: each.gain(it.method, it.over, it.length, it.over_length, it.accuracy) for each in both}
        result += [Comparison(it.asked, gains, it.as_good)] if gains else []
    return result


@dataclass(frozen=True)
class Order:
    """How far a measure of sharpness orders methods as test accuracy does, on a task."""

    measure: str
    correlation: float
    """Spearman's: −1 where the flattest is the best."""
    p: float
    methods: int


def orders(found: Found) -> list[Order]:
    """Return Spearman's rank correlation between a task's mean accuracies and the median of each measure.

    The median, as a network that ends in a ravine may have thousands of times the sharpness of all others.
    """
    methods = [name for name in found.tuned if all(row.sharpness for row in found.of(name))]
    accuracies = [found.mean(name).value for name in methods]
    result = []
    for measure in SHARPNESS:
        sharp = [median(row.sharpness[measure] for row in found.of(name)) for name in methods]
        correlation = stats.spearmanr(accuracies, sharp)
        result.append(Order(measure, float(correlation.statistic), float(correlation.pvalue), len(methods)))
    return result


def prices(found: Found) -> list[tuple[str, list[Gain]]]:
    """Return, of a task, each method with its gains over SAM, the best at equal epochs first.

    At equal epochs, at equal passes, and each by its better length.
    """
    both = [name for name in found.tuned if name not in ("SAM", BASE) and found.has(name, "better")]
    lengths: tuple[Length, ...] = ("epochs", "passes", "better")
    rows = [(name, [found.gain(name, "SAM", length) for length in lengths]) for name in both]
    return sorted(rows, key=lambda row: -row[1][0].value)
