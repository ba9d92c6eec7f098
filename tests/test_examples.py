"""Every example's picture is there, and shown on the page that says which optimizer to use; torchrun's run."""

import os
import re
import sys
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[1]
WITHOUT = {"training", "three_steps", "ddp", "fsdp"}
SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem not in WITHOUT)


@pytest.mark.parametrize("script", SCRIPTS)
def test_picture(script):
    assert (ROOT / "docs" / f"{script}.png").stat().st_size < 150_000
    assert f"({script}.png)" in (ROOT / "docs" / "which.md").read_text()


@pytest.mark.parametrize("script", ["ddp", "fsdp"])
def test_on_two_processes(script):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = processes.run([*command, f"examples/{script}.py"], cwd=ROOT, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    assert float(re.search(r"named rightly: ([\d.]+)%", result.stdout)[1]) > 80
