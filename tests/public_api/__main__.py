"""Fail where the package breaks what users of its last release have: `make api`.

released.txt is the public API of that release; allowed.txt are the breaking changes since, a line each, which the
changelog names, too. `--release` makes today's API that of the last release, and empties the list.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from bsam_fused._version import __version__

from . import ROOT, broken, stub

HERE = Path(__file__).parent
RELEASED = HERE / "released.txt"
ALLOWED = HERE / "allowed.txt"


def wrong(released: str, today: str, allowed: list[str], changelog: str) -> list[str]:
    """Return what is to be mended, a line each: in the package, the list or the changelog."""
    found = broken(released, today)
    names = {line: line.partition(":")[0].partition("(")[0] for line in allowed}
    return [
        *(f"breaks the last release: {line}" for line in found if line not in allowed),
        *(f"allowed, but not so: {line}" for line in allowed if line not in found),
        *(f"not in the changelog: `{name}`" for line, name in names.items() if f"`{name}" not in changelog),
    ]


def release() -> None:
    """Keep today's API as the last release's."""
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename=released.pyi", "-"]
    said = f"# bsam_fused {__version__}: its public API, as `python -m tests.public_api --release` wrote it\n{stub()}"
    RELEASED.write_text(subprocess.run(command, input=said, stdout=subprocess.PIPE, text=True, check=True).stdout)
    ALLOWED.write_text("")


def main() -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="python -m tests.public_api", description=__doc__)
    parser.add_argument("--release", action="store_true", help="today's API is that of the last release")
    if parser.parse_args().release:
        release()
        return 0
    released = RELEASED.read_text()
    version = re.match(r"# bsam_fused (\S+):", released)[1]
    since = (ROOT / "CHANGELOG.md").read_text().partition(f"## {version}")[0]
    faults = wrong(released, stub(), ALLOWED.read_text().splitlines(), since)
    print("\n".join(faults) or f"api: what {version} had works, but for what the changelog names")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
