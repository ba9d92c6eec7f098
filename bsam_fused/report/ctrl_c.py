"""Ctrl-C, which ends the measuring wherever it comes. Needs nothing.

Python raises KeyboardInterrupt wherever the main thread happens to be, and drops it where nobody could catch it: in a
`__del__`, in callbacks of weak references, of the garbage collector, of ctypes. So that it came is noted, and looked at
before whatever takes long.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

STATUS = 130
"""The exit status of what Ctrl-C ended, by convention: 128 + SIGINT."""
_SHOW_CURSOR = b"\x1b[?25h"


@dataclass
class _Noted:
    """What is known of Ctrl-C in this process."""

    pressed: bool = False
    deferred: bool = False
    before: Any = None
    """Whoever handled it outside of `noted`; None there."""


_noted = _Noted()


@contextmanager
def noted() -> Iterator[None]:
    """Note in the block that Ctrl-C came, for `look`. It raises KeyboardInterrupt, too, until `defer` is called.

    A second one ends the process at once, with status 130, whatever it is in; C code that keeps Python's lock excepted.
    Nothing of this happens outside of the main thread, nor where SIGINT is ignored: a shell's background jobs ignore it
    so as not to be ended by what is typed for others.
    """
    before = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or before in (signal.SIG_IGN, None):
        yield
        return
    received, woken = socket.socketpair()
    woken.setblocking(False)
    second = threading.Thread(target=_end_at_the_second, args=(received,), daemon=True, name="second Ctrl-C")
    second.start()
    _noted.pressed, _noted.deferred, _noted.before = False, False, before
    woken_before = signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(woken_before)
        _noted.pressed, _noted.before = False, None
        woken.close()
        second.join()
        received.close()


def defer() -> None:
    """Have Ctrl-C raise from here on in `look` alone: what it could leave half done is to be written."""
    _noted.deferred = True


def look() -> None:
    """Raise KeyboardInterrupt if Ctrl-C came."""
    if _noted.pressed:
        raise KeyboardInterrupt


def _note(*_: object) -> None:
    _noted.pressed = True
    if not _noted.deferred:
        raise KeyboardInterrupt


def _end_at_the_second(received: socket.socket) -> None:
    """Wait for the numbers of signals, which Python's own handler in C sends even while the main thread is in C."""
    came = 0
    while numbers := received.recv(64):
        came += numbers.count(signal.SIGINT)
        if came > 1:
            if os.isatty(2):
                os.write(2, _SHOW_CURSOR)  # a progress bar hides it
            os._exit(STATUS)


def _leave_children_alone() -> None:
    """Have a forked process handle it as before: what it receives would be counted as this one's."""
    if _noted.before is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, _noted.before)
        _noted.before = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_children_alone)
