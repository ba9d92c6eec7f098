"""Ctrl-C ends `bsam-fused report` wherever it comes, with a report of what there is; a second one ends it at once."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import processes
import pytest
import torch
from torch import nn

from bsam_fused import cli
from bsam_fused.report import ctrl_c, timing

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
# The first of all, those of SAM's five implementations, and of those and the base's in turns.
WARM_UP_PASSES = 1 + 10 + timing.WARM_UP * 11
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _as_in_a_terminal():
    """A shell's background jobs, such as these tests may be, ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


# ---- where Python drops the exception


def press(*_):
    """Ctrl-C, which Python handles before the last line: there it raises, if it does."""
    os.kill(os.getpid(), signal.SIGINT)
    end = time.monotonic() + 0.01
    while time.monotonic() < end:
        pass


class PressedAsItEnds:
    """An object, as packages have them, at whose end Ctrl-C comes."""

    def __del__(self):
        press()


def in_a_finalizer():
    PressedAsItEnds()


def in_a_weak_references_callback():
    dies = nn.Module()
    reference = weakref.ref(dies, press)
    del dies
    assert reference() is None


def in_the_garbage_collectors_callback():
    def begins(phase, _):
        if phase == "start":
            press()

    gc.callbacks.append(begins)
    try:
        gc.collect(0)
    finally:
        gc.callbacks.remove(begins)


class Pressed(nn.Linear):
    """A network during whose n-th pass Ctrl-C comes where Python drops the exception."""

    def __init__(self, at, where):
        super().__init__(2, 2)
        self.left, self.where, self.passes_after = at, where, 0

    def forward(self, x):
        self.passes_after += self.left <= 0
        self.left -= 1
        if self.left == 0:
            self.where()
        return super().forward(x)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("rounds", [None, 0, 3])  # that all have taken
@pytest.mark.parametrize(
    "where",
    [in_a_finalizer, in_a_weak_references_callback, in_the_garbage_collectors_callback],
    ids=lambda it: it.__name__,
)
def test_it_ends_where_python_drops_the_exception(tmp_path, monkeypatch, capsys, where, rounds):
    """In the very first pass, and in the first of a timed round: what only raises there would run on to the end."""
    network = Pressed(1 if rounds is None else WARM_UP_PASSES + 11 * rounds + 1, where)
    batch = torch.rand(4, 2), torch.zeros(4, dtype=torch.long)
    monkeypatch.setattr(sys.modules[__name__], "build", lambda: (network, batch), raising=False)
    options = ["--model", f"{__name__}:build", "--optimizer", "sam", "--out", str(tmp_path), "--steps", "8"]
    assert cli.main(["report", *options]) == ctrl_c.STATUS
    assert network.passes_after == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["partial"] is True
    assert [row["steps"] for row in found["rows"]] == [rounds] * (6 if rounds else 0)
    assert "partial" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("where", [press, in_a_finalizer], ids=lambda it: it.__name__)
def test_it_ends_before_anything_is_measured(tmp_path, monkeypatch, where):
    """A user's function may take long: it is interrupted, where Python can."""
    network = Pressed(0, None)

    def build():
        where()
        assert where is not press
        return network, (torch.rand(4, 2), torch.zeros(4, dtype=torch.long))

    monkeypatch.setattr(sys.modules[__name__], "build", build, raising=False)
    command = ["report", "--model", f"{__name__}:build", "--steps", "1", "--out", str(tmp_path)]
    assert cli.main(command) == ctrl_c.STATUS
    assert network.passes_after == 0


# ---- from outside


def command(out, model):
    return [sys.executable, "-m", "bsam_fused", "report", "--model", model, "--steps", "100000", "--out", str(out)]


def test_from_outside(tmp_path):
    """As a user does it: whenever it comes once the work has begun, both files are whole."""
    with processes.started(command(tmp_path, "tiny500"), stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert b"Ctrl-C" in process.stderr.readline()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == ctrl_c.STATUS, said
    assert json.loads((tmp_path / "report.json").read_text())["partial"] is True
    page = (tmp_path / "index.html").read_text()
    assert "This report is partial" in page
    assert page.rstrip().endswith("</html>")


HANGS = """
import ctypes, sys, torch

class Hangs(torch.nn.Linear):
    passes = 0

    def forward(self, x):
        self.passes += 1
        if self.passes == {at}:
            print("hangs", file=sys.stderr, flush=True)
            mutex = ctypes.create_string_buffer(64)
            for _ in range(2):  # the second waits for the first, in C, for ever
                ctypes.CDLL(None).pthread_mutex_lock(mutex)
        return super().forward(x)

def build():
    return Hangs(2, 2), (torch.rand(4, 2), torch.zeros(4, dtype=torch.long))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a mutex of zeros is glibc's")
def test_a_second_one_ends_at_once(tmp_path):
    """While C code runs, Python handles neither."""
    (tmp_path / "hangs.py").write_text(HANGS.format(at=WARM_UP_PASSES + 20))
    options = {"cwd": tmp_path, "stderr": subprocess.PIPE, "env": ENVIRONMENT}
    with processes.started(command(tmp_path, "hangs:build"), **options) as process:
        assert any(b"hangs" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == ctrl_c.STATUS
    assert not (tmp_path / "report.json").exists()


# ---- whose it is


def handlers():
    wakes = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakes)
    return signal.getsignal(signal.SIGINT), wakes


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_the_handler_before_is_put_back(error):
    before = handlers()
    try:
        with ctrl_c.noted():
            assert handlers() != before
            if error:
                raise error
    except (KeyboardInterrupt, ValueError):
        pass
    assert handlers() == before
    assert "second Ctrl-C" not in [thread.name for thread in threading.enumerate()]


def test_it_is_forgotten_afterwards():
    with ctrl_c.noted():
        ctrl_c.defer()
        press()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c.look()
    ctrl_c.look()
    with ctrl_c.noted():
        ctrl_c.look()


def test_who_ignores_it_goes_on():
    """A shell's background job, which a Ctrl-C typed for others must not end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ctrl_c.noted():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            press()
            ctrl_c.look()
    finally:
        assert signal.signal(signal.SIGINT, signal.default_int_handler) == signal.SIG_IGN


def test_another_thread_leaves_it_alone():
    """Python would refuse a handler there."""
    found = []

    def elsewhere():
        with ctrl_c.noted():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


FORKS = """
import os, signal, sys
from bsam_fused.report import ctrl_c
with ctrl_c.noted():
    ctrl_c.defer()
    for _ in range(3):
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                os._exit(1)
            except KeyboardInterrupt:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    ctrl_c.look()
print("goes on")
"""


def test_what_forked_children_receive_is_theirs():
    """A terminal sends Ctrl-C to all of them: theirs, such as a data loader's, must not count as the second."""
    done = processes.run([sys.executable, "-c", FORKS], env=ENVIRONMENT)
    assert done.stdout == "goes on\n", done.stderr
