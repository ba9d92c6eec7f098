"""What is imported only when needed, and how to get it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def load(name: str, extra: str = "sharpness") -> ModuleType:
    """Return a module of an extra.

    Args:
        name: such as "scipy.sparse.linalg".
        extra: which of this package's.

    Raises:
        ModuleNotFoundError: it is not installed, with the command that installs it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        needed = name.split(".")[0]
        raise ModuleNotFoundError(f"this needs {needed}: pip install 'bsam_fused[{extra}]'", name=error.name) from error
