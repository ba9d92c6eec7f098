"""What is made of the options in param groups: once, as long as nobody has changed one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from bsam_fused.ops import identity

T = TypeVar("T")
Group = dict[str, Any]

_LISTS = {"params", "param_names"}  # which have no options in them
_FIXED = {float, int, bool, str, type(None)}


class OptionsRead:
    """What was made of param groups. What others write to them is noticed by identity, at every call.

    Reading a group takes some dozen calls of Python functions, whose code a backward pass leaves in no cache: that took
    longer than all that a phase does with hundreds of tensors.
    """

    def __init__(self) -> None:
        self._groups: list[Group] = []
        self._by_index: dict[int, Group] = {}
        self._seen: identity.Seen | None = None  # None: an option could change in place
        self._made: dict[tuple[str, Any], tuple[tuple[Any, ...], Any]] = {}

    def once(self, groups: list[Group], make: Callable[..., T], *how: Any) -> T:
        """Return ``make(*how)``, which reads options of ``groups`` and nothing else that changes, and writes nothing.

        Args:
            groups: the param groups.
            make: a method; its name and ``how`` say what it makes, to which nobody may write.
            *how: its arguments, which cannot change in place; of each first one the last result is kept.
        """
        if not self._are_as_read(groups):
            self._begin(groups)
        if self._seen is None:
            return make(*how)
        kind = (make.__name__, how[0])
        if kind not in self._made or self._made[kind][0] != how:
            self._made[kind] = how, make(*how)
        made: T = self._made[kind][1]
        return made

    def _are_as_read(self, groups: list[Group]) -> bool:
        return self._seen is not None and identity.same_items(groups, self._groups) and self._seen.same(self._by_index)

    def _begin(self, groups: list[Group]) -> None:
        self._seen, self._made = None, {}
        self._groups, self._by_index = list(groups), dict(enumerate(groups))
        if all(map(_is_fixed, groups)):
            self._seen = identity.seen(self._by_index)


def _is_fixed(group: Group) -> bool:
    """Return whether no option can change in place, as a tensor's or an array's value can."""
    return type(group) is dict and all(_cannot_change(x) for option, x in group.items() if option not in _LISTS)


def _cannot_change(value: Any) -> bool:
    return type(value) in _FIXED or (type(value) is tuple and all(map(_cannot_change, value)))
