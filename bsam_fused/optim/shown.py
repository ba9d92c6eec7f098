"""How an optimizer is printed."""

from __future__ import annotations

from typing import Any


def shown(optimizer: Any, groups: str) -> str:
    """Return torch's picture of an optimizer and its ``groups``, with what makes its update, and what runs it."""
    name, rest = groups.split("(", 1)
    base = type(optimizer.base_optimizer).__name__
    return f"{name}(\nbase_optimizer: {base}\nbackend: {_running(optimizer)}{rest}"


def _running(optimizer: Any) -> str:
    """Return which backend runs on each device; where the one asked for cannot be had, why."""
    try:
        chosen = optimizer.backends
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ", ".join(f"{why.split()[0]} on {device}" for device, why in chosen.items())
