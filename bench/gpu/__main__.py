"""Build, tests, benchmarks and sanitizer on a machine with an NVIDIA GPU: `make gpu`.

python -m bench.gpu [--commit HASH]
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # they need torch
    from bench.gpu.stages import Outcome, Stage

SECONDS = 470
"""For all stages together."""
SHOWN = 15
"""Lines of a failed stage's log that are printed."""


def obstacle() -> str | None:
    """Return why nothing can be run here, None where it can."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch; PYTHON=... names another Python"
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a missing driver: said below
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} sees no NVIDIA GPU"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages; returns the exit status: 1 where one of them failed, or where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--commit", help="of the source, where this is no git checkout")
    options = parser.parse_args(arguments)
    why = obstacle()
    if why:
        print(f"make gpu: {why}: nothing was run, nothing was written", file=sys.stderr)
        return 1

    from bench.gpu import record, stages

    path = record.results_path()
    return run(stages.plan(path, record.logs()), path, options.commit)


def run(plan: Sequence[Stage], path: Path, commit: str | None = None) -> int:
    """Run the stages of a plan into the record at ``path``, which is begun anew; returns the exit status."""
    from bench.gpu import page, record, stages

    path.unlink(missing_ok=True)
    record.Record(path, commit).save()
    for stage in plan:
        stage.log.unlink(missing_ok=True)

    def note(stage: Stage, outcome: Outcome, seconds: float) -> None:
        results = record.Record(path)  # read again: the benchmarks add to it
        results.content["stages"][stage.name] = {**outcome._asdict(), "seconds": seconds}
        results.save()
        print(_line(stage.name, **results.content["stages"][stage.name]), flush=True)
        if not outcome.ok and stage.log.exists():
            print(*stage.log.read_text().splitlines()[-SHOWN:], sep="\n", flush=True)

    well = stages.run_all(plan, SECONDS, note)
    content = record.Record(path).content
    met, missed = page.targets_met(content)
    print(f"\nmake gpu: {content['about']['device']}; {path}; logs in {record.logs()}")
    print(*(_line(name, **stage) for name, stage in content["stages"].items()), sep="\n")
    print(f"targets: {met} met, {len(missed)} missed", *missed, sep="\n  ")
    return 0 if well else 1


def _line(name: str, ok: bool, said: str, seconds: float) -> str:
    return f"  {'ok' if ok else 'FAILED':<7} {name:<11} {seconds:4.0f} s  {said}"


if __name__ == "__main__":
    sys.exit(main())
