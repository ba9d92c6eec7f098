"""Build, check, measure and test on a machine with an NVIDIA GPU: `make gpu`; bench/gpu/README.md has the calls.

python -m bench.gpu [--stages NAME,...] [--seconds N] [--out FOLDER] [--commit HASH]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # they need torch
    from bench.gpu.stages import Outcome, Stage

SHOWN = 15
"""Lines of a failed stage's log that are printed."""


def obstacle() -> str | None:
    """Return why nothing can be run here, None where it can."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch; PYTHON=... names another Python"
    import torch

    from bench.gpu.device import REHEARSAL

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a missing driver: said below
        if not torch.cuda.is_available() and not os.environ.get(REHEARSAL):
            return f"torch {torch.__version__} sees no NVIDIA GPU"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run stages; returns the exit status: 1 where one failed, or where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--stages", default="call1", help="names of stages and calls; default: %(default)s")
    parser.add_argument("--seconds", type=float, help="for all of them together; default: 570")
    parser.add_argument("--out", type=Path, help="where record, page and logs go; default: build/gpu")
    parser.add_argument("--commit", help="of the source, where this is no git checkout")
    options = parser.parse_args(arguments)
    why = obstacle()
    if why:
        print(f"make gpu: {why}: nothing was run, nothing was written", file=sys.stderr)
        return 1

    from bench.gpu import plan, record, tools
    from bench.gpu.stages import ROOT

    os.environ.update({**tools.toolkit(), **tools.headers(), **tools.packages()})  # of all stages: Triton compiles, too

    try:
        names = plan.names(options.stages)
    except ValueError as error:
        parser.error(str(error))
    name, build = record.new_name(), ROOT / "build" / "gpu"
    path, logs = (options.out or build).resolve() / f"{name}.json", build / f"{name}-logs"
    stages = plan.stages(path, logs)
    return run([stages[it] for it in names], path, logs, options.seconds or plan.SECONDS, options.commit)


def run(stages: Sequence[Stage], path: Path, logs: Path, seconds: float, commit: str | None = None) -> int:
    """Run stages into a record that begins at ``path``, and an archive of the logs beside it; returns the status."""
    from bench.gpu import files, page, plan, record
    from bench.gpu.stages import run_all

    record.Record(path, commit).save()
    logs.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        files.archive(logs, path.with_name(f"{logs.name}.tar.gz"))

    def note(stage: Stage, outcome: Outcome, took: float) -> None:
        results = record.Record(path)  # read again: the stages add to it
        results.content["stages"][stage.name] = {**outcome._asdict(), "seconds": took}
        results.save()
        keep()
        print(_line(stage.name, **results.content["stages"][stage.name]), flush=True)
        log = logs / f"{stage.name}.log"
        if outcome.how == "failed" and log.exists():
            print(*log.read_text().splitlines()[-SHOWN:], sep="\n", flush=True)

    well = run_all(stages, seconds - plan.CLOSING, logs, note, keep)
    content = record.Record(path).content
    met, missed = page.targets_met(content)
    print(f"\nmake gpu: {content['about']['device']}; {path}")
    print(*(_line(name, **stage) for name, stage in content["stages"].items()), sep="\n")
    print(f"bars: {met} met, {len(missed)} missed", *missed, sep="\n  ")
    return 0 if well else 1


def _line(name: str, how: str, said: str, seconds: float) -> str:
    return f"  {how.upper() if how == 'failed' else how:<9} {name:<18} {seconds:4.0f} s  {said}"


if __name__ == "__main__":
    sys.exit(main())
