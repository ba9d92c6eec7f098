"""The report's content, whatever shows it."""

from __future__ import annotations

from dataclasses import dataclass

from bsam_fused.report.benefit import Benefit
from bsam_fused.report.learning import Learning
from bsam_fused.report.machine import Machine
from bsam_fused.report.rows import Row
from bsam_fused.report.sweep import Point


@dataclass(frozen=True)
class Report:
    """All there is to show."""

    date: str
    machine: Machine
    device: str
    model: str
    parameters: int
    tensors: int
    batch: str
    """The shape of the inputs."""
    dtype: str
    compiled: bool
    base: str
    base_pass_ms: float
    """One forward and backward, with the base optimizer alone."""
    rows: list[Row]
    absent: dict[str, str]
    """Implementation -> why it was not measured."""
    copy_gb_per_s: float | None
    points: list[Point]
    benefit: Benefit | None
    learning: Learning | None
    partial: bool
    """Whether the run was interrupted."""

    @property
    def agree(self) -> bool:
        """Whether fused and plain training gave the same losses, where that was looked at."""
        return self.learning is None or self.learning.agree
