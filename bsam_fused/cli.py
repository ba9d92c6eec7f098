"""The command line: `bsam-fused info`, `build`, `report`; also `python -m bsam_fused`. torch waits for a command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bsam_fused._version import __version__
from bsam_fused.report import ctrl_c


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
    report = commands.add_parser(
        "report",
        help="measure what sharpness-aware steps cost, on a built-in network or your own",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = report.add_argument
    names = ("digits", "resnet18", "resnet50", "wrn28_10", "pyramidnet110", "vit_b_16", "gpt2", "tiny500")
    add("--model", default="digits", help=f"{', '.join(names)}, or module:function, which returns (model, batch)")
    add("--optimizer", choices=["sam", "asam", "bsam"], action="append", help="may be repeated (default: sam and bsam)")
    add("--base", choices=["sgd", "adamw"], default="sgd", help="base optimizer; sgd has momentum")
    add("--device", default="cpu", help="cpu or cuda")
    add("--batch-size", type=_positive, metavar="N", help="examples a batch (default: the network's own)")
    add("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32", help="of the weights")
    add("--compile", action="store_true", help="the network under torch.compile")
    add("--graph", action="store_true", help="also whole steps captured in a CUDA graph")
    add("--steps", type=_positive, default=20, metavar="N", help="timed steps of each implementation")
    add("--epochs", type=_positive, default=10, metavar="N", help="of the digits' training, with --model digits")
    add("--threads", type=_positive, default=1, metavar="N", help="of torch on the CPU")
    add("--out", type=Path, default=Path("report"), metavar="DIR", help="for index.html and report.json")
    report.set_defaults(run=_report)
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


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


# ---- report


def _report(options: argparse.Namespace) -> int:
    with ctrl_c.noted():
        return _make(options)


def _make(options: argparse.Namespace) -> int:
    import torch

    try:
        from bsam_fused.report.make import Options, make
    except ModuleNotFoundError as error:
        return _refuse(f"needs {str(error.name).split('.')[0]}: pip install 'bsam_fused[report]'")
    torch.set_num_threads(options.threads)
    wanted = Options(
        model=options.model,
        optimizers=tuple(dict.fromkeys(options.optimizer or ("sam", "bsam"))),
        base=options.base,
        device=options.device,
        batch_size=options.batch_size,
        dtype=options.dtype,
        compile=options.compile,
        graph=options.graph,
        steps=options.steps,
        epochs=options.epochs,
    )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        return 0 if make(options.out, wanted) else 1
    except (OSError, RuntimeError, ValueError) as error:
        return _refuse(str(error))


def _refuse(why: str) -> int:
    print(f"bsam-fused report: {why}", file=sys.stderr)
    return 1
