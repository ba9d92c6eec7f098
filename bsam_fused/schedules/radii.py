"""How ρ and ρ_min go: functions of the number of steps taken, which resume exactly; and BSAM's eq. 12."""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from bsam_fused import checks
from bsam_fused.schedules.stepped import Stepped

RadiusName = Literal["rho", "rho_min"]
Each = float | Sequence[float]
"""One number for all param groups, or one a group."""
Factor = Callable[[int], float]

GIVEN_LR, LARGEST_LR = "given_lr", "largest_lr"
"""Where param groups keep the learning rate that they began with, and the largest one of their steps so far."""


class RadiusSchedule(Stepped):
    """A radius as a function of t, the number of steps taken, and ρ_0, the one a group had to begin with.

    ρ_0 is the group's ``initial_rho`` (``initial_rho_min``), which is its ρ now unless an earlier schedule left one
    there, as ``initial_lr`` is for torch's schedulers. A schedule of ρ_min replaces BSAM's own decay.

    Args:
        optimizer: a sharpness-aware optimizer.
        radius: "rho" or "rho_min".

    Raises:
        TypeError: the optimizer is not sharpness-aware.
        ValueError: it has no such radius, or an option is out of range. From ``step()``: a radius that is negative
            or not finite, with no group changed.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, radius: RadiusName = "rho") -> None:
        super().__init__(optimizer)
        groups = optimizer.param_groups
        if checks.choice("radius", radius, RadiusName) not in groups[0]:
            raise ValueError(f"radius={radius!r}: {type(optimizer).__name__} has no such radius")
        # where the base optimizer has an option of its own called rho (Adadelta), ours has a longer name
        self.key = f"sharpness_{radius}" if f"sharpness_{radius}" in groups[0] else radius
        initial = f"initial_{radius}"
        for i, group in enumerate(groups):
            group.setdefault(initial, checks.non_negative(self.key, group[self.key], i))
        self.initial = [checks.non_negative(initial, group[initial], i) for i, group in enumerate(groups)]

    @abstractmethod
    def _radius(self, t: int, rho_0: float, i: int) -> float:
        """Return ρ_t of group ``i``."""

    def radii(self, t: int) -> list[float]:
        """Return ρ_t of each group."""
        return [self._radius(t, rho_0, i) for i, rho_0 in enumerate(self.initial)]

    def get_last_radius(self) -> list[float]:
        """Return the radius that each group has now."""
        return [float(group[self.key]) for group in self.optimizer.param_groups]

    def _apply(self, t: int) -> None:
        groups = self.optimizer.param_groups
        if len(groups) != len(self.initial):
            raise ValueError(f"{len(groups)} param groups, but the schedule was made for {len(self.initial)}")
        radii = [
            checks.non_negative(self.key, radius, i, f" at step {t} of {type(self).__name__}")
            for i, radius in enumerate(self.radii(t))
        ]
        for group, radius in zip(groups, radii, strict=True):
            if isinstance(group[self.key], Tensor):
                group[self.key].fill_(radius)
            else:
                group[self.key] = radius
            if self.key == "rho_min":
                group["rho_min_decay"] = "none"

    def _each(self, name: str, values: Each) -> list[float]:
        given = (
            list(values)
            if isinstance(values, Sequence) and not isinstance(values, str)
            else [values] * len(self.initial)
        )
        if len(given) != len(self.initial):
            raise ValueError(f"{name} has {len(given)} values, but there are {len(self.initial)} param groups")
        return [checks.non_negative(name, value) for value in given]


class ConstantRadius(RadiusSchedule):
    """ρ_t = ρ_0.

    Args:
        optimizer: as `RadiusSchedule` has it.
        radius: as `RadiusSchedule` has it.

    Raises:
        TypeError, ValueError: as `RadiusSchedule` has it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, radius: RadiusName = "rho") -> None:
        super().__init__(optimizer, radius)
        self._apply(0)

    def _radius(self, t: int, rho_0: float, i: int) -> float:
        return rho_0


class ProportionalRadius(RadiusSchedule):
    """ρ_t follows the learning rate: `decayed_radius` (BSAM eq. 12). Step it after the LR scheduler.

    lr_max is as `largest_lr` has it.

    Args:
        optimizer: as `RadiusSchedule` has it.
        radius: as `RadiusSchedule` has it.
        end: ρ_end ≥ 0, one or one a group.
        lr_end: lr_end ≥ 0, the learning rate that ρ_end is reached at, one or one a group.

    Raises:
        TypeError, ValueError: as `RadiusSchedule` has it.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, radius: RadiusName = "rho", end: Each = 0.0, lr_end: Each = 0.0
    ) -> None:
        super().__init__(optimizer, radius)
        self.end, self.lr_end = self._each("end", end), self._each("lr_end", lr_end)
        for group in optimizer.param_groups:
            group.setdefault(GIVEN_LR, float(group["lr"]))
            group.setdefault(LARGEST_LR, 0.0)
        self._apply(0)

    def _radius(self, t: int, rho_0: float, i: int) -> float:
        group = self.optimizer.param_groups[i]
        note_lr(group)
        lr_max = largest_lr(group)
        return decayed_radius(rho_0, scheduled_lr(group), lr_max, rho_min_end=self.end[i], lr_end=self.lr_end[i])


class LinearRadius(RadiusSchedule):
    """ρ_t = ρ_end + (ρ_0 − ρ_end)(1 − t/T), ρ_end from T on.

    Args:
        optimizer: as `RadiusSchedule` has it.
        total_steps: T > 0.
        radius: as `RadiusSchedule` has it.
        end: ρ_end ≥ 0, one or one a group.

    Raises:
        TypeError, ValueError: as `RadiusSchedule` has it.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, total_steps: int, *, radius: RadiusName = "rho", end: Each = 0.0
    ) -> None:
        super().__init__(optimizer, radius)
        self.total_steps, self.end = checks.integer("total_steps", total_steps, 1), self._each("end", end)
        self._apply(0)

    def _radius(self, t: int, rho_0: float, i: int) -> float:
        return self.end[i] + (rho_0 - self.end[i]) * (1 - min(t / self.total_steps, 1))


class CosineRadius(LinearRadius):
    """ρ_t = ρ_end + (ρ_0 − ρ_end)(1 + cos(π t/T))/2, ρ_end from T on.

    Args:
        optimizer: as `RadiusSchedule` has it.
        total_steps: T > 0.
        radius: as `RadiusSchedule` has it.
        end: ρ_end ≥ 0, one or one a group.

    Raises:
        TypeError, ValueError: as `RadiusSchedule` has it.
    """

    def _radius(self, t: int, rho_0: float, i: int) -> float:
        return self.end[i] + (rho_0 - self.end[i]) * (1 + math.cos(math.pi * min(t / self.total_steps, 1))) / 2


class ExponentialRadius(RadiusSchedule):
    """ρ_t = ρ_0 γ^t.

    Args:
        optimizer: as `RadiusSchedule` has it.
        gamma: γ ≥ 0, one or one a group.
        radius: as `RadiusSchedule` has it.

    Raises:
        TypeError, ValueError: as `RadiusSchedule` has it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, gamma: Each, *, radius: RadiusName = "rho") -> None:
        super().__init__(optimizer, radius)
        self.gamma = self._each("gamma", gamma)
        self._apply(0)

    def _radius(self, t: int, rho_0: float, i: int) -> float:
        return rho_0 * self.gamma[i] ** t


class LambdaRadius(RadiusSchedule):
    """ρ_t = ρ_0 λ(t), for any function λ. The function is not in the state dict.

    Args:
        optimizer: as `RadiusSchedule` has it.
        factor: λ, of the number of steps taken; one or one a group.
        radius: as `RadiusSchedule` has it.

    Raises:
        TypeError, ValueError: as `RadiusSchedule` has it.
    """

    _unsaved = Stepped._unsaved | {"factors"}

    def __init__(
        self, optimizer: torch.optim.Optimizer, factor: Factor | Sequence[Factor], *, radius: RadiusName = "rho"
    ) -> None:
        super().__init__(optimizer, radius)
        self.factors = list(factor) if isinstance(factor, Sequence) else [factor] * len(self.initial)
        if not all(map(callable, self.factors)):
            raise TypeError(f"factor={factor!r}: pass a function of the number of steps taken, or one a group")
        if len(self.factors) != len(self.initial):
            raise ValueError(f"{len(self.factors)} functions, but there are {len(self.initial)} param groups")
        self._apply(0)

    def _radius(self, t: int, rho_0: float, i: int) -> float:
        return rho_0 * self.factors[i](t)


class SequentialRadius(RadiusSchedule):
    """One schedule after the other, each from ρ_0 and its own t = 0, as torch's SequentialLR has it.

    Args:
        schedules: of one radius of one optimizer; only this one is stepped.
        milestones: the steps at which the second, the third, … takes over, ascending.

    Raises:
        ValueError: schedules of different radii or optimizers, or milestones that do not fit.
    """

    _unsaved = Stepped._unsaved | {"schedules"}

    def __init__(self, schedules: Sequence[RadiusSchedule], milestones: Sequence[int]) -> None:
        self.schedules, self.milestones = list(schedules), list(milestones)
        if len(self.milestones) != len(self.schedules) - 1 or any(
            later <= earlier for earlier, later in zip([0, *self.milestones], self.milestones, strict=False)
        ):
            raise ValueError(
                f"milestones={self.milestones} for {len(self.schedules)} schedules: give the step, > 0 and ascending, "
                "at which each but the first takes over"
            )
        if len({(id(schedule.optimizer), schedule.key) for schedule in self.schedules}) != 1:
            raise ValueError("schedules are of different radii or optimizers: give a sequence for each")
        radius = self.schedules[0].key.removeprefix("sharpness_")
        super().__init__(self.schedules[0].optimizer, cast(RadiusName, radius))
        self._apply(0)

    def _radius(self, t: int, rho_0: float, i: int) -> float:
        current = bisect_right(self.milestones, t)
        return self.schedules[current]._radius(t - [0, *self.milestones][current], rho_0, i)

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the optimizer, and functions; with the state dicts of the schedules."""
        return {**super().state_dict(), "schedules": [schedule.state_dict() for schedule in self.schedules]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, and set the optimizer up as it was then."""
        for schedule, state in zip(self.schedules, state_dict["schedules"], strict=True):
            schedule.load_state_dict(state)
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "schedules"})


def decayed_radius(rho_min: float, lr: float, lr_max: float, *, rho_min_end: float = 0.0, lr_end: float = 0.0) -> float:
    """Return ρ_min,t = ρ_end + (ρ_min − ρ_end)(lr_t − lr_end)/(lr_max − lr_end), BSAM (arXiv 2409.13173) eq. 12.

    The fraction is kept in [0, 1], and is 1 where lr_max = lr_end.
    """
    share = 1.0 if lr_max == lr_end else (lr - lr_end) / (lr_max - lr_end)
    return rho_min_end + (rho_min - rho_min_end) * min(max(share, 0.0), 1.0)


def scheduled_lr(group: dict[str, Any]) -> float:
    """Return a group's lr without its ``lr_scale`` (layer decay, as timm has it): the schedule's own."""
    scale = group.get("lr_scale")
    return float(group["lr"]) / (1.0 if scale is None else checks.non_negative("lr_scale", scale) or 1.0)


def largest_lr(group: dict[str, Any]) -> float:
    """Return lr_max of eq. 12, without ``lr_scale``.

    The group's ``max_lr`` (OneCycle), else ``initial_lr``, else its lr to begin with; and at least the largest that was
    noted so far, and the one now.
    """
    named = (group.get(name) for name in ("max_lr", "initial_lr", GIVEN_LR))
    planned = next((checks.non_negative("max_lr", lr) for lr in named if lr is not None), 0.0)
    return max(planned, group.get(LARGEST_LR, 0.0), scheduled_lr(group))


def note_lr(group: dict[str, Any]) -> None:
    """Keep the largest learning rate that a group has had in a step."""
    group[LARGEST_LR] = max(group.get(LARGEST_LR, 0.0), scheduled_lr(group))
