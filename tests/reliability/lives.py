"""Processes to be killed, and ranks: forked from one that imports torch and never uses it, so that they begin at once.

Each says what it has to say to the one that started it, and none outlives that one.
"""

import multiprocessing
import os
import select
import signal
import time
import traceback
from contextlib import contextmanager, suppress

from tests.processes import end_with_parent

PRELOADED = ["torch", "torch.distributed.fsdp", "torch._dynamo", "bsam_fused.schedules"]
"""What takes seconds to import; every torch optimizer imports the third when it is made."""
INTERRUPTED, RAISED = 130, 1
"""What a process ends with after a KeyboardInterrupt, as shells have it, and after an error."""
PATIENCE = 120
"""Seconds until a process counts as one that hangs, on a busy machine."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOADED)


class Life:
    """A new process that calls ``function(say, *arguments)``; whatever that says is heard here, in turn."""

    def __init__(self, function, arguments):
        self._ear, mouth = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(target=_live, args=(mouth, function, arguments), daemon=True)
        self._process.start()
        self._at = os.pidfd_open(self._process.pid)  # its number may be another's once it has ended
        mouth.close()

    def hear(self, patience=PATIENCE):
        """Return what it says next; None once it has ended."""
        assert self._ear.poll(patience), f"a process hangs: it said nothing for {patience} s"
        with suppress(EOFError):
            return self._ear.recv()

    def hear_until(self, word):
        """Return what it says up to the message of this name, which comes last; or until it ends."""
        heard = []
        for message in iter(self.hear, None):
            heard.append(message)
            if message[0] == word:
                break
        return heard

    def hear_all(self):
        """Return what else it says until it ends."""
        return [*iter(self.hear, None)]

    def send(self, number):
        """Send it a signal, if it lives."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._at, number)

    def ended(self, patience):
        """Return whether it has ended within so many seconds, and does no more."""
        return bool(select.select([self._at], [], [], max(patience, 0))[0])

    def end(self, patience=PATIENCE):
        """Wait until it ends by itself, and return how: an exit code, a signal's number below zero."""
        assert self.ended(patience), f"a process hangs: it has not ended within {patience} s"
        self._process.join()
        return self._process.exitcode

    def kill(self):
        self.send(signal.SIGKILL)
        self._process.join()
        os.close(self._at)
        self._ear.close()


@contextmanager
def started(function, arguments):
    """Lives of one function, one for each row of arguments; they end with the block."""
    lives = []
    try:
        for row in arguments:
            lives.append(Life(function, row))
        yield lives
    finally:
        for life in lives:
            life.kill()


def seconds_until_all_end(lives, patience=PATIENCE):
    """Wait for all, and return how long the last one took; fail where one hangs."""
    begin = time.monotonic()
    for life in lives:
        life.end(begin + patience - time.monotonic())
    return time.monotonic() - begin


def _live(mouth, function, arguments):
    import torch

    end_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    end = 0
    try:
        function(mouth.send, *arguments)
    except KeyboardInterrupt:
        end = INTERRUPTED
    except BaseException:
        mouth.send(("raised", traceback.format_exc()))
        end = RAISED
    os._exit(end)  # gloo's threads abort now and then where the interpreter ends
