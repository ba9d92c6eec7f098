"""A pytest plugin for tests on a GPU: every outcome is kept at once, a test that hangs ends alone.

python -m pytest -p bench.gpu.outcomes --outcomes FILE [--a-test SECONDS] ...

A line of JSON a test, [id, outcome], is added to the file; tests that it has already are left out. A test that takes
too long, by a watchdog thread's clock, which runs whatever the test waits for, ends the process; so it is noted as
"begun" first, and what comes after it runs when the same command is given again.
"""

from __future__ import annotations

import faulthandler
import json
from pathlib import Path
from typing import Any

import pytest


def read(path: Path) -> dict[str, str]:
    """Return the outcome of each test so far: passed, failed, skipped, or begun where its process ended in it."""
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(map(json.loads, lines))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    parser.addoption("--outcomes", type=Path, required=True)
    parser.addoption("--a-test", type=float, default=60.0)


def pytest_configure(config: pytest.Config) -> None:
    """Begin to keep outcomes."""
    config.pluginmanager.register(Outcomes(config.getoption("outcomes"), config.getoption("a_test")))


class Outcomes:
    """Keeps them. Args: path: the file; seconds: of a test, at the most."""

    def __init__(self, path: Path, seconds: float) -> None:
        self._path, self._seconds = path, seconds
        self._how = "passed"

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out the tests that have run."""
        done = read(self._path)
        left_out = [item for item in items if item.nodeid in done]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in done]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note that a test begins."""
        self._how = "passed"
        self._note(nodeid, "begun")
        faulthandler.dump_traceback_later(self._seconds, exit=True)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note what of it is not as it should be."""
        if report.outcome != "passed" and self._how != "failed":
            self._how = report.outcome

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Note how it ended."""
        faulthandler.cancel_dump_traceback_later()
        self._note(nodeid, self._how)

    def _note(self, nodeid: str, outcome: str) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps([nodeid, outcome]) + "\n")
