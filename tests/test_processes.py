"""What tests start ends with them."""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import processes
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
PARENT = ["sh", "-c", "sleep 1000 & echo $!; wait"]


def assert_ends(pid):
    """Soon; a process that nobody has waited for is dead, too."""
    stat, end = Path(f"/proc/{pid}/stat"), time.monotonic() + 10
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX":
        assert time.monotonic() < end, stat.read_text()
        time.sleep(0.01)


def test_a_failure_ends_all_of_them():
    with suppress(ZeroDivisionError), processes.started(PARENT, stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        raise ZeroDivisionError
    assert process.returncode is not None
    assert_ends(child)


def test_one_that_takes_too_long_ends():
    with pytest.raises(subprocess.TimeoutExpired) as error:
        processes.run(["sh", "-c", "echo $$; exec sleep 1000"], timeout=1)
    assert_ends(int(error.value.stdout))


def test_one_whose_parent_is_killed_ends():
    code = "import processes\nwith processes.started(['sleep', '1000']) as it: print(it.pid, flush=True), it.wait()"
    command, folder = [sys.executable, "-c", code], Path(__file__).parent
    with processes.started(command, stdout=subprocess.PIPE, cwd=folder) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
        assert_ends(child)
