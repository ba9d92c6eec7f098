"""`bsam-fused rho`: how far a SAM step's ascent raises a network's loss, and the radius that speaks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bsam_fused.report import ctrl_c, models, write
from bsam_fused.report.models import Refused, Workload
from bsam_fused.report.terminal import say
from bsam_fused.sharpness import Suggestion, loss_rises, plot_rises, radius_at
from bsam_fused.sharpness.radius import LADDER

RANDOM = (
    "The batch is random numbers: this says nothing of real training. Name a network and data of yours: --model "
    "mymodule:build."
)
BEGIN = "It is where to begin a search, no more, and for a network that is not trained yet."


@dataclass(frozen=True)
class Network:
    """What a radius is wanted for; `bsam-fused rho --help` says it to users."""

    model: str = "digits"
    batch_size: int | None = None
    device: str = "cpu"
    dtype: str = "float32"

    def workload(self) -> Workload:
        """Return the network, in training mode, and its batch.

        Raises:
            Refused: they cannot be had.
        """
        return models.workload(self.model, self.batch_size, models.device(self.device), getattr(torch, self.dtype))

    @property
    def warning(self) -> list[str]:
        """What to say first of a built-in network; nothing of a user's."""
        return [] if ":" in self.model else [RANDOM]


def suggest(network: Network, out: Path) -> None:
    """Measure, print the ladder and the radius, and draw the picture.

    Args:
        network: what to measure on.
        out: the picture's file; an earlier one is replaced.

    Raises:
        Refused: an option that cannot be had, by name, or a loss of which there is no share; after all that is shown:
            ``out`` cannot be written to.
    """
    formats = Figure().canvas.get_supported_filetypes()
    if out.suffix[1:].lower() not in formats:
        raise Refused(f"--out {out}: must end in .{', .'.join(sorted(formats))}")
    workload = network.workload()
    write.folder(out.parent)
    suggestion = measure(network.model, workload)
    console = Console(markup=False, emoji=False)
    begin = (
        f"{network.model}: {workload.batch}, {network.dtype}, on {network.device}; the loss is {suggestion.loss:.4g}."
    )
    say(console, [begin, "How far the ascent of a SAM step raises it, in evaluation mode:"])
    console.print(_table(suggestion))
    say(console, [*in_words(suggestion), *network.warning])
    try:
        plot_rises(suggestion).figure.savefig(out)
    except OSError as error:
        raise Refused(f"--out {out}: {error}") from error
    say(console, [f"Written: {out}"])


def measure(name: str, workload: Workload) -> Suggestion:
    """Return what the batch's rises suggest.

    Args:
        name: of the network, for errors.
        workload: which is left as it was.

    Raises:
        Refused: a loss that is not finite, or not positive, so that there is no share of it.
    """

    def loss_fn(output: Any, targets: list[Any]) -> Tensor:
        ctrl_c.look()
        return workload.loss(output, *targets)

    # The targets may be anything, also of no length: as the only item of a list they are one example.
    batch = (workload.inputs, [workload.targets])
    try:
        loss, rises = loss_rises(workload.model, loss_fn, [batch])
    except FloatingPointError as error:
        raise Refused(f"--model {name}: {error}") from error
    if loss <= 0:
        raise Refused(f"--model {name}: its loss is {loss:.4g}; a rise can be a share of a positive loss alone")
    return radius_at(LADDER, rises, loss)


def in_words(suggestion: Suggestion) -> list[str]:
    """Return the radius, what it was chosen by, and what that is for BSAM."""
    rho, percent = suggestion.rho, f"{100 * suggestion.share:.3g} %"
    why = {
        None: f"there the loss rises by {percent} of itself ({suggestion.sought:.3g})",
        "smallest": f"the smallest that was tried, and it raises the loss by more than {percent} of itself",
        "largest": f"the largest that was tried, and it raises the loss by less than {percent} of itself",
    }[suggestion.end]
    return [f"Suggested: ρ = {rho:.2g}: {why}.", bsam(rho), BEGIN]


def bsam(rho: float) -> str:
    """Return what a radius of SAM's is for BSAM."""
    return f"For BSAM half of it: ρ = {rho / 2:.2g}."


def _table(suggestion: Suggestion) -> Table:
    table = Table("ρ", "rise of the loss", "of the loss")
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for rho, rise in zip(suggestion.radii, suggestion.rises, strict=True):
        table.add_row(f"{rho:.2g}", f"{rise:.3g}", f"{100 * rise / suggestion.loss:.3g} %")
    return table
