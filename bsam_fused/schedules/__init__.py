"""Which steps are sharpness-aware, and how ρ and ρ_min go: stepped after the optimizer, as torch's LR schedulers are.

A radius schedule is a function of the number of steps taken: it resumes exactly, and `SequentialRadius` composes it.
"""

from bsam_fused.schedules.policies import EveryKth, LargeGradients, LatePhase, RandomSteps, StepPolicy
from bsam_fused.schedules.radii import (
    ConstantRadius,
    CosineRadius,
    ExponentialRadius,
    LambdaRadius,
    LinearRadius,
    ProportionalRadius,
    RadiusSchedule,
    SequentialRadius,
    decayed_radius,
)

__all__ = [
    "ConstantRadius",
    "CosineRadius",
    "EveryKth",
    "ExponentialRadius",
    "LambdaRadius",
    "LargeGradients",
    "LatePhase",
    "LinearRadius",
    "ProportionalRadius",
    "RadiusSchedule",
    "RandomSteps",
    "SequentialRadius",
    "StepPolicy",
    "decayed_radius",
]
