"""Every example's picture is there, and shown on the page that says which optimizer to use; torchrun's run."""

import os
import re
import runpy
import subprocess
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
    assert f"({script}.png)" in (ROOT / "docs" / "flatness.md").read_text()


@pytest.mark.parametrize("script", [*SCRIPTS, *sorted(WITHOUT - {"training"})])
def test_help(script, monkeypatch, capsys, tmp_path, one_thread):
    """Before anything is trained or written."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "examples" / f"{script}.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert f"examples/{script}.py" in out
    assert ("--out DIR" in out) == (script in SCRIPTS)
    assert not list(tmp_path.iterdir())


def test_a_picture_goes_where_it_is_told_and_never_over_a_tracked_one(monkeypatch, capsys, tmp_path, one_thread):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from training import picture

    def path(*arguments):
        monkeypatch.setattr(sys, "argv", ["landscape.py", *arguments])
        return picture("examples/landscape.py", "about")

    monkeypatch.chdir(tmp_path)
    assert path() == Path("landscape.png")
    assert path("--out", "new/folder") == Path("new/folder/landscape.png")
    assert Path("new/folder").is_dir()
    for command in (["init", "-q"], ["add", "landscape.png"]):
        Path("landscape.png").touch()
        subprocess.run(["git", *command], check=True, cwd=tmp_path)
    with pytest.raises(SystemExit, match="2"):
        path()
    assert "landscape.png is tracked by git: choose another folder by --out" in capsys.readouterr().err
    assert path("--out", "new") == Path("new/landscape.png")


@pytest.mark.parametrize("script", ["ddp", "fsdp"])
def test_on_two_processes(script):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = processes.run([*command, f"examples/{script}.py"], cwd=ROOT, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    assert float(re.search(r"named rightly: ([\d.]+)%", result.stdout)[1]) > 80
