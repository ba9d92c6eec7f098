"""The command line: `bsam-fused info`, `bsam-fused report`; also `python -m bsam_fused`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from bsam_fused.ops import dispatch, native_flat
from bsam_fused.report import ctrl_c

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
        return _report(options) if options.command == "report" else _info()
    except KeyboardInterrupt:
        print("bsam-fused: interrupted", file=sys.stderr)
        return ctrl_c.STATUS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bsam-fused", description="Fused sharpness-aware optimizers.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="say what is installed, which backends work here, and if not, why")
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
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


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


# ---- report


def _report(options: argparse.Namespace) -> int:
    with ctrl_c.noted():
        return _make(options)


def _make(options: argparse.Namespace) -> int:
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
