"""`bsam-fused rho`: its options, and what it does where they cannot be had."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bsam_fused.report import ctrl_c
from bsam_fused.report.command import MODELS, needs, positive, refuse

PICTURE = Path("report", "rho.png")
OF_RUNS = ("base", "lr", "epochs", "minibatch")
"""Options of --sweep alone."""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command, with its options."""
    rho = commands.add_parser(
        "rho", help="suggest a radius for a network, by how far a SAM step's ascent raises its loss, or by short runs"
    )
    add, said = rho.add_argument, " (default: %(default)s)"
    networks = f"{', '.join(MODELS)}, or module:function, which returns (model, (inputs, targets)){said}"
    add("--model", default="digits", help=networks)
    add("--batch-size", type=positive, metavar="N", help="examples in all (default: the network's own)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help=f"where it is measured{said}")
    add("--dtype", choices=["float32", "float64"], default="float32", help=f"of the weights{said}")
    add("--threads", type=positive, default=1, metavar="N", help=f"of torch on the CPU{said}")
    add("--out", type=Path, metavar="FILE", help=f"picture of the rises (default: {PICTURE})")
    add("--sweep", action="store_true", help="short training runs instead, a radius each, judged by held-out examples")
    about = "Three quarters of the examples train, by SAM; the last quarter judges. No picture."
    runs = rho.add_argument_group("with --sweep", about)
    runs.add_argument("--base", choices=["sgd", "adamw"], help="base optimizer; sgd has momentum (default: sgd)")
    runs.add_argument("--lr", type=_positive_number, metavar="X", help="(default: 0.05 of sgd, 0.001 of adamw)")
    runs.add_argument("--epochs", type=positive, metavar="N", help="of each run (default: 10)")
    minibatch = "examples a step (default: 32, or all that train)"
    runs.add_argument("--minibatch", type=positive, metavar="N", help=minibatch)
    rho.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Suggest a radius; return the exit status.

    Raises:
        KeyboardInterrupt: Ctrl-C came.
        Exception: whatever the user's own network raises.
    """
    given = {name: getattr(options, name) for name in OF_RUNS if getattr(options, name) is not None}
    if given and not options.sweep:
        return refuse("rho", f"--{next(iter(given))} is of the short runs: add --sweep, or leave it out")
    if options.out and options.sweep:
        return refuse("rho", f"--out {options.out}: there is no picture of short runs; leave out --out or --sweep")
    with ctrl_c.noted():
        return _suggest(options, given)


def _suggest(options: argparse.Namespace, given: dict[str, Any]) -> int:
    import torch

    try:
        from bsam_fused.report import radius, radius_runs
        from bsam_fused.report.models import Refused
    except ModuleNotFoundError as error:
        return refuse("rho", needs(error))
    torch.set_num_threads(options.threads)
    wanted = radius.Network(options.model, options.batch_size, options.device, options.dtype)
    try:
        if options.sweep:
            radius_runs.suggest(wanted, radius_runs.Recipe(**given))
        else:
            radius.suggest(wanted, options.out or PICTURE)
    except Refused as refused:
        return refuse("rho", str(refused))
    return 0


def _positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("must be a number > 0")
    return number
