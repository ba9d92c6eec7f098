"""Several calls with no moment between them at which Python could raise KeyboardInterrupt."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any


def in_one_go(*calls: Callable[[], Any]) -> None:
    """Call them one after the other, so that what a call has done is noted by the next one, or neither.

    Python looks for signals between its own instructions. Here it runs none: what takes the calls in turns is C code.
    Of a call that is Python code itself its last return counts.
    """
    deque(map(functools.partial.__call__, map(functools.partial, calls)), maxlen=0)
