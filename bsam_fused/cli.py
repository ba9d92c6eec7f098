"""The command line: `bsam-fused info`, `bsam-fused report`; also `python -m bsam_fused`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

import torch

from bsam_fused.ops import dispatch, native_flat
from bsam_fused.report import command, ctrl_c

_DEVICE_TYPES = {"cuda": "cuda", "triton": "cuda", "cpp": "cpu", "torch": "cpu"}


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit status: 0; 1 where the command could not do its work, or found that fused and plain training
        differ; 130 where the user interrupted it.

    Raises:
        SystemExit: wrong usage (status 2), or ``--help`` (status 0).
    """
    options = _parser().parse_args(argv)
    try:
        return command.run(options) if options.command == "report" else _info()
    except KeyboardInterrupt:
        print("bsam-fused: interrupted", file=sys.stderr)
        return ctrl_c.STATUS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bsam-fused", description="Fused sharpness-aware optimizers.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="say what is installed, which backends work here, and if not, why")
    command.add_to(commands)
    return parser


# ---- info


def _info() -> int:
    from bsam_fused.report.machine import this_machine

    machine = this_machine()
    versions = [
        ("bsam_fused", machine.bsam_fused),
        ("Python", machine.python),
        ("torch", machine.torch),
        ("CPU", f"{machine.cpu}; torch threads: {machine.threads}"),
        ("CUDA", _cuda()),
    ]
    backends = [(backend, _availability(backend)) for backend in dispatch.BACKENDS]
    requested = os.environ.get(dispatch.VARIABLE)
    for title, lines in [
        ("Versions", versions),
        ("Backends", backends),
        ("Chosen by backend='auto'", [*_choices(), (dispatch.VARIABLE, requested or "not set")]),
    ]:
        print(title)
        for name, text in lines:
            print(f"  {name:<19} {text}")
    return 0


def _cuda() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}; {', '.join(names) or 'no device'}"


def _availability(backend: str) -> str:
    reason = dispatch.unavailable(backend, _DEVICE_TYPES[backend])
    if reason:
        return f"not available: {reason}"
    module = native_flat.load()[0]
    if backend == "cpp" and module is not None:
        return f"available; {module.instruction_set()}, built for torch {module.torch_version}"
    return "available"


def _choices() -> Iterator[tuple[str, str]]:
    """Yield what runs for tensors on each kind of device there is, and why; or why nothing does."""
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        try:
            choice = dispatch.choose("auto", torch.device(device))
            yield f"{device} tensors", f"{choice.backend} ({choice.why})"
        except (RuntimeError, ValueError) as error:
            yield f"{device} tensors", f"none: {error}"
