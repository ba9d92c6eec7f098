"""Warnings at the line of the user's that led to them."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

_NOT_USERS = tuple(f"{folder}{os.sep}" for folder in (Path(__file__).parent, *torch.__path__))


def warn(message: str) -> None:
    """Warn at the innermost line that is neither the package's nor torch's, however many calls lie between."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
