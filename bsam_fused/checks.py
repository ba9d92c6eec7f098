"""Values that users give, checked, in one wording: the error names the option, the value and what it must be."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, NoReturn

from torch import Tensor


def non_negative(name: str, value: Any, group: int | None = None, when: str = "") -> float:
    """Return a finite number ≥ 0 as a float.

    Args:
        name: of the option.
        value: a number, or what holds one (a Tensor, a NumPy scalar); no bool, no text.
        group: the param group that it is of.
        when: said after the value.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is float and 0.0 <= value < math.inf:  # nearly always, and this is on the way of every phase
        return value
    number = _real(value)
    if not (math.isfinite(number) and number >= 0):
        _refuse(name, value, f"a finite number ≥ 0{_not(value)}", group, when)
    return number


def positive(name: str, value: Any, also: str = "") -> float:
    """Return a finite number > 0 as a float.

    Args:
        name: of the option.
        value: as `non_negative` has it.
        also: what the error says may be given, too.

    Raises:
        ValueError: it is something else.
    """
    number = _real(value)
    if not (math.isfinite(number) and number > 0):
        _refuse(name, value, f"a finite number > 0{also}{_not(value)}")
    return number


def finite(name: str, value: Any) -> float:
    """Return a finite number as a float.

    Raises:
        ValueError: it is something else.
    """
    number = _real(value)
    if not math.isfinite(number):
        _refuse(name, value, f"a finite number{_not(value)}")
    return number


def share(name: str, value: Any) -> float:
    """Return a number in [0, 1] as a float.

    Raises:
        ValueError: it is something else.
    """
    number = _real(value)
    if not 0 <= number <= 1:
        _refuse(name, value, f"a number in [0, 1]{_not(value)}")
    return number


def below_one(name: str, value: Any, group: int | None = None) -> float:
    """Return a number in [0, 1) as a float.

    Raises:
        ValueError: it is something else.
    """
    number = _real(value)
    if not 0 <= number < 1:
        _refuse(name, value, f"a number in [0, 1){_not(value)}", group)
    return number


def integer(name: str, value: Any, least: int, below: float = math.inf, group: int | None = None) -> int:
    """Return an integer in [``least``, ``below``).

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) < below:
        must = f"an integer ≥ {least}" if below == math.inf else f"an integer in [{least}, {below})"
        _refuse(name, value, must, group)
    return int(value)


def flag(name: str, value: Any, group: int | None = None) -> bool:
    """Return True or False, which may also be said as 1 or 0.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is bool:
        return value
    if _real(value, bools=True) not in {0.0, 1.0}:
        _refuse(name, value, f"True or False{_not(value)}", group)
    return bool(value)


def choice(name: str, value: Any, choices: Any, group: int | None = None) -> Any:
    """Return one of the strings of ``choices``, a Literal.

    Raises:
        ValueError: it is none of them.
    """
    if not (isinstance(value, str) and value in choices.__args__):  # get_args is some calls, on the way of every phase
        *others, last = (f'"{one}"' for one in choices.__args__)
        _refuse(name, value, f"{', '.join(others)} or {last}", group)
    return value


def _real(value: Any, bools: bool = False) -> float:
    """Return a real number as a float, NaN for anything else."""
    if isinstance(value, Tensor) and (value.numel() != 1 or value.is_meta):
        return math.nan
    try:
        number = value.item() if hasattr(value, "item") else value
        return float(number) if isinstance(number, Real) and (bools or not isinstance(number, bool)) else math.nan
    except (ValueError, OverflowError):  # a NumPy array, or an int beyond every float
        return math.nan


def _not(value: Any) -> str:
    return f", not a {type(value).__name__}" if isinstance(value, str | bool) else ""


def _refuse(name: str, value: Any, must: str, group: int | None = None, when: str = "") -> NoReturn:
    where = "" if group is None else f" in group {group}"
    raise ValueError(f"{name}={value!r}{when}{where}: must be {must}")
