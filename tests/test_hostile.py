"""The C++ object refuses hostile arguments, calls out of order and memory changed under it, and does not crash."""

import functools
import subprocess
import sys
from pathlib import Path

import hostile_mixing
import pytest


@functools.cache
def outcomes():
    """What came of each case, in as few processes as crashes allow."""
    found, names = {}, list(hostile_mixing.CASES)
    while len(found) < len(names):
        command = [sys.executable, Path(hostile_mixing.__file__), str(len(found))]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        lines = [line.split("\t") for line in ran.stdout.splitlines()]
        found.update({name: outcome[0].strip() for kind, name, *outcome in lines if kind == "end"})
        if ran.returncode:
            assert lines, ran.stderr
            found[lines[-1][1]] = f"died of {ran.returncode}: {ran.stderr}"
    return found


@pytest.mark.parametrize("name", hostile_mixing.CASES)
def test_is_refused(name):
    assert outcomes()[name] == "refused"
