"""The command line: `bsam-fused info`, `build`, `report`, `rho`; also `python -m bsam_fused`. torch waits for one."""

from __future__ import annotations

import argparse
import sys

from bsam_fused._version import __version__
from bsam_fused.report import command, ctrl_c, rho_command


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
        return options.run(options)
    except KeyboardInterrupt:
        print("bsam-fused: interrupted", file=sys.stderr)
        return ctrl_c.STATUS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bsam-fused", description="Fused sharpness-aware optimizers.")
    parser.add_argument("--version", action="version", version=f"bsam_fused {__version__}")
    commands = parser.add_subparsers(required=True)
    info = commands.add_parser("info", help="say what is installed, which backends work here, and if not, why")
    info.add_argument("--json", action="store_true", help="for programs")
    info.set_defaults(run=_info)
    _add_build(commands.add_parser("build", help="compile the fused kernels for the torch that is installed"))
    command.add_to(commands)
    rho_command.add_to(commands)
    return parser


def _add_build(build: argparse.ArgumentParser) -> None:
    kernels = build.add_mutually_exclusive_group()
    kernels.add_argument("--cpu", action="store_const", const="cpu", dest="kernels", help="without CUDA kernels")
    kernels.add_argument(
        "--cuda", action="store_const", const="cuda", dest="kernels", help="with CUDA kernels, or fail"
    )
    every = "CUDA kernels for all GPUs, not for this machine's alone (TORCH_CUDA_ARCH_LIST names others)"
    build.add_argument("--all-architectures", action="store_true", help=every)
    build.set_defaults(run=_build, kernels="auto")


def _info(options: argparse.Namespace) -> int:
    from bsam_fused.commands import info

    return info.run(as_json=options.json)


def _build(options: argparse.Namespace) -> int:
    from bsam_fused.commands import build

    return build.run(options.kernels, all_architectures=options.all_architectures)
