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
    )
    add, said = report.add_argument, " (default: %(default)s)"
    add(
        "--model", default="digits", help=f"{', '.join(MODELS)}, or module:function, which returns (model, batch){said}"
    )
    add("--optimizer", choices=["sam", "asam", "bsam"], action="append", help="may be repeated (default: sam and bsam)")
    add("--base", choices=["sgd", "adamw"], default="sgd", help=f"base optimizer; sgd has momentum{said}")
    add("--device", choices=["cpu", "cuda"], default="cpu", help=f"where steps are timed{said}")
    add("--batch-size", type=positive, metavar="N", help="examples a batch (default: the network's own)")
    dtypes = ["float32", "float64", "bfloat16", "float16"]
    add("--dtype", choices=dtypes, default="float32", help=f"of the weights whose steps are timed{said}")
    add("--compile", action="store_true", help="the network under torch.compile")
    add("--graph", action="store_true", help="also whole steps captured in a CUDA graph")
    add("--steps", type=positive, default=20, metavar="N", help=f"timed steps of each implementation{said}")
    threads = f"of torch on the CPU, where steps are timed{said}"
    add("--threads", type=positive, default=1, metavar="N", help=threads)
    add("--out", type=Path, default=Path("report"), metavar="DIR", help=f"for index.html and report.json{said}")
    about = "With --model digits alone, and always by SGD, SAM and BSAM over SGD, in float32 on the CPU."
    training = report.add_argument_group("training on noisy labels", about)
    training.add_argument("--epochs", type=positive, metavar="N", help="of each run (default: 40)")
    training.add_argument("--seeds", type=positive, default=3, metavar="N", help=f"runs of each optimizer{said}")
    report.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Make the report; return the exit status.

    Raises:
        KeyboardInterrupt: Ctrl-C came.
        Exception: whatever the user's own network raises.
    """
    with ctrl_c.noted():
        return _make(options)


def positive(text: str) -> int:
    """Return a whole number of 1 or more.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def needs(error: ModuleNotFoundError) -> str:
    """Return what is missing, and the command that installs it."""
    return f"needs {str(error.name).split('.')[0]}: pip install 'bsam_fused[report]'"


def refuse(command: str, why: str) -> int:
    """Say why a command cannot do its work; return the exit status."""
    print(f"bsam-fused {command}: {why}", file=sys.stderr)
    return 1


def _make(options: argparse.Namespace) -> int:
    import torch

    try:
        from bsam_fused.report.make import Options, make
        from bsam_fused.report.models import Refused
    except ModuleNotFoundError as error:
        return refuse("report", needs(error))
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
        return refuse("report", str(refused))
