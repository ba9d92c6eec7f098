"""Bugs planted on purpose: patches of the package, applied to a copy of it."""

import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).with_name("planted")
ONCE_REAL, OTHERS = ((*sorted(FOLDER.joinpath(kind).glob("*.patch")),) for kind in ("once_real", "others"))


class DoesNotApplyError(Exception):
    """The sources have changed: the patch has to be made anew."""


def apply(patch, folder, *how):
    """Apply a patch to the sources in ``folder``.

    Raises:
        DoesNotApplyError: it does not, by name.
    """
    done = subprocess.run(["git", "apply", *how, str(patch)], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise DoesNotApplyError(f"{patch.stem} does not apply any more: {done.stderr.strip()}")


@contextmanager
def planted(patch):
    """A folder with a copy of the package, to be first on the path, that has the bug of ``patch``; None: as it is."""
    with tempfile.TemporaryDirectory(prefix="planted-") as name:
        folder = Path(name)
        shutil.copytree(ROOT / "bsam_fused", folder / "bsam_fused", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "csrc").symlink_to(ROOT / "csrc")  # the library is named for them
        if patch is not None:
            apply(patch, folder)
        yield folder
