"""Processes that tests start: they and what they start end with the test, on Ctrl-C, and where pytest is killed."""

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress

SECONDS = 300
"""More than any of them takes, on a busy machine."""
PATIENCE = 10
"""Seconds for a process to end others, which may have groups of their own, as those of torchrun have."""
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def run(command, *, timeout=SECONDS, check=False, **options):
    """As `subprocess.run`, with the output as text; no process outlives it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with started(command, **pipes, **options) as process:
        done = subprocess.CompletedProcess(command, None, *process.communicate(timeout=timeout))
        done.returncode = process.returncode
    assert not check or done.returncode == 0, done.stderr
    return done


@contextmanager
def started(command, **options):
    """A process, as `subprocess.Popen` gives it, that ends with the block."""
    with subprocess.Popen(command, preexec_fn=_begin, **options) as process:
        try:
            yield process
        finally:
            _end(process)


def _begin():
    """A group of its own, an end with pytest's, and Ctrl-C as in a terminal: a shell's background jobs ignore it."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()


def end_with_parent():
    """Have this process killed as soon as the one that started it has ended, where the system can."""
    if sys.platform == "linux":
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(process):
    for ending in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # nobody is left
            os.killpg(process.pid, ending)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
