"""Whether the fuzzer finds bugs: each of `planted/` in a copy of the package, hunted by the same sequences every time.

`python -m tests.fuzz.self_test`. It fails where a bug of a kind that was once real is missed, or more than 3 others; or
where it finds something in the package as it is.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from types import SimpleNamespace

from tests.reliability.records import recorded

from .planting import ONCE_REAL, OTHERS, ROOT, DoesNotApplyError, planted

MISSES = 3  # that are allowed, of the others
NO_BUG = "no bug"
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)  # a finding, too: memory that is not there


def hunted(patch, sequences, seconds):
    """What `hunt` says of the package with a bug; "broken", where the bug is none that anybody would overlook."""
    limits = "--sequences", str(sequences), "--seconds", str(seconds)
    try:
        with planted(patch) as folder:
            path = os.pathsep.join([str(folder), str(ROOT)])
            done = subprocess.run(
                [sys.executable, "-m", "tests.fuzz.hunt", *limits],
                cwd=folder,  # which `python -m` looks into first
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=2 * seconds + 60,  # it looks at the time between batches
            )
            if -done.returncode in CRASHES:
                return {"found": f"Python ended by {signal.Signals(-done.returncode).name}"}
            if done.returncode:
                return {"broken": done.stderr.strip().rpartition("\n")[2] or f"it ended with {done.returncode}"}
            said = json.loads(done.stdout.splitlines()[-1])
            package = said.pop("package")
            return said if package.startswith(str(folder)) else {"broken": f"it was {package} that ran"}
    except DoesNotApplyError as error:
        return {"broken": str(error)}
    except subprocess.TimeoutExpired:
        return {"found": "it hangs"}


def line(name, said):
    if "broken" in said:
        return f"{name}: BROKEN, {said['broken']}"
    spent = ", ".join(f"{said[unit]} {unit}" for unit in ("sequences", "seconds") if unit in said)
    if said["found"] is None:
        return f"{name}: NOT FOUND in {spent}"
    return ": ".join(filter(None, (name, spent, said["found"][:150])))


def wrong(control, once_real, others):
    """What fails the self-test, in sentences."""
    sentences = [f"{name} is broken" for name, said in {**control, **once_real, **others}.items() if "broken" in said]
    missed, of_others = ([n for n, s in each.items() if s.get("found", "") is None] for each in (once_real, others))
    sentences += [f"{name} was once real, and is missed" for name in missed]
    sentences += [f"more than {MISSES} others are missed: {', '.join(of_others)}"] if len(of_others) > MISSES else []
    return sentences + [f"without a bug: {said['found']}" for said in control.values() if said.get("found")]


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.self_test", description=__doc__)
    parser.add_argument("--sequences", type=int, default=20_000, help="in which to look for each bug (default 20000)")
    parser.add_argument("--seconds", type=float, default=3600, help="begin no more batches of 200 after (default 3600)")
    parser.add_argument("--only", default=None, metavar="NAME", help="those whose names begin so; nothing is recorded")
    arguments = parser.parse_args()
    kinds = {NO_BUG: (None,), "once real": ONCE_REAL, "others": OTHERS}  # the longest first
    found = {kind: {} for kind in kinds}
    todo = [(kind, patch.stem if patch else NO_BUG, patch) for kind, patches in kinds.items() for patch in patches]
    todo = [each for each in todo if each[1].startswith(arguments.only or "")]
    whole = recorded("planted bugs") if arguments.only is None else nullcontext(SimpleNamespace(figures={}))
    with whole as record, ThreadPoolExecutor(os.cpu_count()) as pool:
        hunts = {pool.submit(hunted, patch, arguments.sequences, arguments.seconds): each for *each, patch in todo}
        for done in as_completed(hunts):
            (kind, name), said = hunts[done], done.result()
            found[kind][name] = said
            print(line(f"{kind}: {name}" if name != kind else kind, said), flush=True)
        record.figures.update({kind: dict(sorted(bugs.items())) for kind, bugs in found.items()})
    sentences = wrong(*found.values())
    print(*sentences, sep="\n", end="\n" if sentences else "")
    return bool(sentences)


if __name__ == "__main__":
    sys.exit(main())
