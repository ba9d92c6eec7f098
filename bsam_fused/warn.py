"""Warnings that point at the user's line: not at this package's, nor at torch's, which wraps and calls optimizers."""

from __future__ import annotations

import os
import sys
import warnings

import torch

_INSIDE = tuple(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__))


def warn(message: str) -> None:
    """Warn of ``message``, at the innermost line that is neither in this package nor in torch."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
