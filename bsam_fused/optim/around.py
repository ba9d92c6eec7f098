"""The base optimizer, and param groups that have its options and ours."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from bsam_fused import checks
from bsam_fused.ops.contract import Radius
from bsam_fused.ops.identity import same_items
from bsam_fused.optim import groups, names, scaling
from bsam_fused.optim.flats import Flats
from bsam_fused.optim.options_read import OptionsRead

T = TypeVar("T")


class Around(torch.optim.Optimizer):
    """An optimizer around a base optimizer, whose param groups and state are its own."""

    base_optimizer: torch.optim.Optimizer
    radius_factor: float = 1.0
    """What all radii are multiplied by; see `schedules.EveryKth`."""
    _flats: Flats
    _known: list[dict[str, Any]]
    """The param groups that were checked, and have all options."""
    _completed: list[dict[str, Any]]
    """Those that have all options, checked or not: what comes in their place keeps of them what it lacks."""
    _read: OptionsRead

    def _hear_of_unscaling(self) -> None:
        """Hear that a GradScaler's ``unscale_`` is about to look at the gradients there are."""
        raise NotImplementedError

    @property
    def _at_rest(self) -> bool:
        """Whether no step is under way."""
        raise NotImplementedError

    def _require_rest(self, call: str) -> None:
        """Raise within a step."""
        raise NotImplementedError

    def _key(self, option: str) -> str:
        """Return where param groups keep ``option``: elsewhere if the base has one of that name (Adadelta's rho)."""
        return f"sharpness_{option}" if option in self.base_optimizer.defaults else option

    # ---- what the base optimizer owns

    @property
    def _groups(self) -> list[dict[str, Any]]:
        """`param_groups`, for readers of our own, which are no GradScaler."""
        return self.base_optimizer.param_groups

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's own param groups, with the sharpness-aware options in them."""
        self._complete()
        if scaling.is_unscaling(sys._getframe(1)):
            self._hear_of_unscaling()
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's own state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise TypeError(f"state is a {type(state).__name__}: assign a dict of dicts, one a parameter")
        self.base_optimizer.state = state  # type: ignore[assignment]

    # ---- options

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as torch.optim has it, with options of its own.

        Raises:
            RuntimeError: within a step.
            TypeError, ValueError: a parameter or an option that cannot be used; nothing was added.
        """
        self._require_rest("add_param_group()")
        self._notice()
        index = len(self._groups)
        if isinstance(param_group, dict):  # else torch says so
            groups.check_source(groups.params_of(param_group, index), index)
            ours = self.defaults.keys() - self.base_optimizer.defaults.keys()
            names.refuse_slips(param_group.keys() - self.defaults.keys(), ours, index)
        super().add_param_group(param_group)
        try:
            others = [p for group in self._groups[:-1] for p in group["params"]]
            groups.check_parameters(self._groups[-1], index, others)
            self._check_options(self._groups[-1], index)
        except Exception:
            self._groups.pop()
            raise

    def _complete(self) -> None:
        """Give param groups that others added or loaded into the base optimizer the options that they lack."""
        completed = {id(group) for group in self._completed}
        new = [group for group in self._groups if id(group) not in completed]
        if not new or not all(isinstance(group, dict) for group in new):
            return  # a slip of the user's is still his to take back
        for i, group in enumerate(self._groups):
            before = self._completed[i] if i < len(self._completed) else {}
            self._rename(group)
            self._fill(group, {**self.defaults, **{key: before[key] for key in self._kept_options & before.keys()}})
        self._completed = list(self._groups)

    def _fill(self, group: dict[str, Any], options: dict[str, Any]) -> None:
        """Give a group the options that it lacks."""
        for option, value in options.items():
            group.setdefault(option, value)

    def _notice(self) -> None:
        """Complete and check param groups that others added or loaded into the base optimizer.

        Raises:
            ValueError: an option that cannot be used.
        """
        if same_items(self._groups, self._known):
            return
        self._complete()
        for i, group in enumerate(self._groups):
            self._check_options(group, i)
        count = self._groups[0]["rounded_steps"]
        if count is not None:  # a state dict of ours
            if not self._at_rest:
                return  # the FlatParams have this step's w
            self._flats = self._flats.anew(count)
            for group in self._groups:
                group["rounded_steps"] = None
        self._known = self._completed = list(self._groups)

    def _rename(self, group: dict[str, Any]) -> None:
        """Give what an older version saved in a group its name of today."""

    @property
    def _kept_options(self) -> set[str]:
        """What a group that is loaded keeps of the group in its place, where it lacks it."""
        return set(self.defaults)

    def _non_negative(self, group: dict[str, Any], option: str, index: int) -> float:
        return checks.non_negative(option, group[self._key(option)], index)

    def _flag(self, group: dict[str, Any], option: str, index: int) -> bool:
        return checks.flag(option, group[self._key(option)], index)

    def _check_options(self, group: dict[str, Any], index: int) -> None:
        """Raise ValueError for an option of a param group that cannot be used, or is of a later version."""
        groups.check_saved(group, index)
        for option in ("rho", "eta"):
            self._non_negative(group, option, index)
        for option in ("adaptive", "perturb"):
            self._flag(group, option, index)
        self._budget(group, index)

    def _budget(self, group: dict[str, Any], index: int) -> float:
        return math.inf if group[self._key("loss_budget")] is None else self._non_negative(group, "loss_budget", index)

    def _once(self, make: Callable[..., T], *how: Any) -> T:
        """Return ``make(*how)``, anew only where an option of the param groups has changed."""
        return self._read.once(self._groups, make, *how)

    # ---- radii

    def _radii(self, option: str, sign: float) -> list[Radius]:
        """Return a radius a group: ``option``, with ``sign`` the other way under maximize."""
        factor = checks.non_negative("radius_factor", self.radius_factor)
        return self._once(self._read_radii, option, sign, factor)

    def _read_radii(self, option: str, sign: float, factor: float) -> list[Radius]:
        radii = [factor * self._radius(group, option, i) for i, group in enumerate(self._groups)]
        largest, budget = max(radii), self._key("loss_budget")
        return [
            Radius(
                (-sign if group.get("maximize") else sign) * radius,
                self._flag(group, "adaptive", i),
                self._non_negative(group, "eta", i),
                largest,
                math.inf if group[budget] is None else self._budget_of(group, option, i),
            )
            for i, (group, radius) in enumerate(zip(self._groups, radii, strict=True))
        ]

    def _budget_of(self, group: dict[str, Any], option: str, index: int) -> float:
        """Return what cuts a radius: ρ by the loss budget, the others in the same ratio."""
        budget = self._budget(group, index)
        if option == "rho":
            return budget
        rho = self._radius(group, "rho", index)
        return budget * self._radius(group, option, index) / rho if rho else math.inf

    def _exempt(self) -> list[bool]:
        """Return which param groups are left out of the perturbations."""
        perturb = self._key("perturb")
        return [not checks.flag("perturb", group[perturb], i) for i, group in enumerate(self._groups)]

    def _radius(self, group: dict[str, Any], option: str, index: int) -> float:
        return self._non_negative(group, option, index)
