"""`bsam-fused report`: its options, and what it does where they cannot be had."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bsam_fused.report import ctrl_c

MODELS = ("digits", "resnet18", "resnet50", "wrn28_10", "pyramidnet110", "vit_b_16", "gpt2", "tiny500")


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command, with its options."""
    report = commands.add_parser(
        "report",
        help="show what sharpness-aware training is for and what it costs, on digits, a built-in network or your own",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = report.add_argument
    add("--model", default="digits", help=f"{', '.join(MODELS)}, or module:function, which returns (model, batch)")
    add("--optimizer", choices=["sam", "asam", "bsam"], action="append", help="may be repeated (default: sam and bsam)")
    add("--base", choices=["sgd", "adamw"], default="sgd", help="base optimizer; sgd has momentum")
    add("--device", default="cpu", help="cpu or cuda")
    add("--batch-size", type=_positive, metavar="N", help="examples a batch (default: the network's own)")
    add("--dtype", choices=["float32", "float64", "bfloat16", "float16"], default="float32", help="of the weights")
    add("--compile", action="store_true", help="the network under torch.compile")
    add("--graph", action="store_true", help="also whole steps captured in a CUDA graph")
    add("--steps", type=_positive, default=20, metavar="N", help="timed steps of each implementation")
    add(
        "--epochs",
        type=_positive,
        metavar="N",
        help="of the training on noisy labels, with --model digits (default: 40)",
    )
    add("--seeds", type=_positive, default=3, metavar="N", help="runs of each optimizer there")
    add("--threads", type=_positive, default=1, metavar="N", help="of torch on the CPU, where steps are timed")
    add("--out", type=Path, default=Path("report"), metavar="DIR", help="for index.html and report.json")
    report.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Make the report; return the exit status.

    Raises:
        KeyboardInterrupt: Ctrl-C came.
        Exception: whatever the user's own network raises.
    """
    with ctrl_c.noted():
        return _make(options)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _make(options: argparse.Namespace) -> int:
    import torch

    try:
        from bsam_fused.report.make import Options, make
        from bsam_fused.report.models import Refused
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
        seeds=options.seeds,
    )
    try:
        return 0 if make(options.out, wanted) else 1
    except Refused as refused:
        return _refuse(str(refused))


def _refuse(why: str) -> int:
    print(f"bsam-fused report: {why}", file=sys.stderr)
    return 1
