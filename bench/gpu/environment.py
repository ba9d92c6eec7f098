"""What a machine with a GPU has, printed for the log and, in short, added to a run's record.

python -m bench.gpu.environment --record FILE.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.record import Record
from bench.gpu.tools import find, headers

COMMANDS = {
    "driver": ["nvidia-smi", "--query-gpu=driver_version,pcie.link.gen.current,power.limit", "--format=csv,noheader"],
    "nvcc": ["nvcc", "--version"],
    "c++": [os.environ.get("CXX", "c++"), "--version"],
    "ncu": ["ncu", "--version"],
    "compute-sanitizer": ["compute-sanitizer", "--version"],
    "kernel": ["uname", "-r"],
}
PRINTED = (["nvidia-smi", "-q"], ["nproc"], ["free", "-g"])
ASK_SECONDS = 5


def ask(command: Sequence[str]) -> str:
    """Return what a command prints, or that it is not there or does not answer."""
    try:
        done = subprocess.run([find(command[0]), *command[1:]], capture_output=True, text=True, timeout=ASK_SECONDS)
    except OSError:
        return "not there"
    except subprocess.TimeoutExpired:
        return "no answer"
    return (done.stdout or done.stderr).strip()


def _version_in(said: str) -> str:
    """Return the line with the version."""
    lines = said.splitlines() or ["no answer"]
    return next((line for line in lines if re.search(r"\d\.\d", line)), lines[0])


def python_header() -> str:
    """Return where Python.h is."""
    own = Path(sysconfig.get_path("include"), "Python.h")
    if own.exists():
        return str(own)
    return "carried along" if headers() else "not there: make gpu-carry"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.environment", description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, required=True, help="the JSON file to write, or to add to")
    options = parser.parse_args(arguments)
    record = Record(options.record)
    tools = {name: _version_in(ask(command)) for name, command in COMMANDS.items()}
    record.content["about"] |= {**tools, "Python.h": python_header()}
    record.save()
    for name, said in record.content["about"].items():
        print(f"{name}: {said}")
    for command in PRINTED:
        print(f"$ {' '.join(command)}\n{ask(command)}", flush=True)
    print(*sorted(f"{it.name}=={it.version}" for it in importlib.metadata.distributions()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
