"""The names of options: a misspelt one is told with the one that was meant."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
from difflib import SequenceMatcher, get_close_matches

import torch


def refuse_unknown(owner: type, base: type[torch.optim.Optimizer], given: Iterable[str]) -> None:
    """Raise for an option that neither a sharpness-aware optimizer nor its base has.

    A base that takes any option (``**kwargs``) decides itself, but for what is a slip of ours.

    Args:
        owner: the sharpness-aware class.
        base: the base optimizer's.
        given: the names that were given for the base.

    Raises:
        TypeError: a name that is unknown, with the one that was meant, or all of them.
    """
    ours = [
        parameter.name
        for kind in owner.__mro__
        if "__init__" in vars(kind)
        for parameter in inspect.signature(vars(kind)["__init__"]).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    _, *theirs = inspect.signature(base).parameters.values()  # the first are the parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in theirs)
    known = [*dict.fromkeys(ours), *(p.name for p in theirs if p.kind is not inspect.Parameter.VAR_KEYWORD)]
    for name in given:
        if name in known or (takes_any and slip_of(name, ours) is None):
            continue
        close = get_close_matches(name.lower(), known, n=1)
        meant = f"did you mean {close[0]}?" if close else f"their options are {', '.join(known)}"
        raise TypeError(f"{owner.__name__} has no option {name}, nor has its base optimizer {base.__name__}: {meant}")


def refuse_slips(keys: Iterable[object], options: Collection[str], index: int) -> None:
    """Raise for a key of a param group that is a slip of one of ``options``; others are the user's own, as in torch.

    Raises:
        TypeError: such a key, with the one that was meant.
    """
    for key in keys:
        meant = slip_of(str(key), options)
        if meant is not None:
            raise TypeError(
                f"group {index} has a key {key}, which nothing reads: did you mean {meant}? (Keys of your own may have "
                "any name that is less like an option's.)"
            )


def slip_of(name: str, options: Iterable[str]) -> str | None:
    """Return the option that ``name`` is but for one letter, not the first, or for case: what can hardly be meant."""
    for option in options:
        alike = sum(block.size for block in SequenceMatcher(None, name.lower(), option).get_matching_blocks())
        if name[:1].lower() == option[0] and alike >= max(len(name), len(option)) - 1:
            return option
    return None
