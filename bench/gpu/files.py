"""Files that are whole at any moment, whenever their writer is killed."""

from __future__ import annotations

import tarfile
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Write a file at once."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def archive(folder: Path, path: Path) -> None:
    """Pack a folder into one file, likewise."""
    part = path.with_name(path.name + ".part")
    with tarfile.open(part, "w:gz") as packed:
        packed.add(folder, arcname=folder.name)
    part.replace(path)
