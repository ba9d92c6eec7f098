"""Every example's picture is there, and shown on the page that says which optimizer to use."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT = {"training", "three_steps"}
SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem not in WITHOUT)


@pytest.mark.parametrize("script", SCRIPTS)
def test_picture(script):
    assert (ROOT / "docs" / f"{script}.png").stat().st_size < 150_000
    assert f"({script}.png)" in (ROOT / "docs" / "which.md").read_text()
