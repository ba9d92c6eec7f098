"""`bsam-fused info` tells every user what to do next; `report` and `rho` refuse in one line."""

import json
import os
import re
import sys
from pathlib import Path

import processes
import pytest
import torch

import bsam_fused
from bsam_fused import cli
from bsam_fused.ops import dispatch, native_flat

ROOT = str(Path(__file__).parents[1])
EXTRAS = ("matplotlib", "jinja2", "rich", "sklearn")


@pytest.fixture(autouse=True)
def _no_backend_asked_for(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)


@pytest.fixture
def info(capsys):
    """Run `info`; return what it printed."""

    def run(*options):
        assert cli.main(["info", *options]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def no_extension(monkeypatch):
    """As after an installation without a compiler."""
    reason = "the C++ extension is not built; run: bsam-fused build"
    monkeypatch.setattr(native_flat, "load", lambda: (None, reason))
    return reason


def line(text, name):
    """The last line about ``name``: torch is a version and a backend."""
    return [entry for entry in text.splitlines() if entry.split()[:1] == [name]][-1]


def test_info_names_versions_and_every_backend(info):
    text = info()
    for version in (sys.version.split()[0], torch.__version__):
        assert version in text
    for backend in dispatch.BACKENDS:
        reason = dispatch.unavailable(backend, "cuda" if backend in {"cuda", "triton"} else "cpu")
        assert (reason or "available") in line(text, backend)


def test_info_tells_how_the_extension_was_built(info):
    module = native_flat.load()[0]
    text = info()
    assert f"{module.instruction_set()}, built for torch {module.torch_version}" in line(text, "cpp")
    assert f"built for torch {module.torch_version}: {module.__file__}" in line(text, "cpp")
    assert line(text, "cpu").endswith(" cpp")


def test_info_without_the_extension_gives_the_reason_and_the_command(info, no_extension, recwarn):
    text = info()
    assert f"not available: {no_extension}" in line(text, "cpp")
    assert line(text, "cpu").endswith(" torch")
    assert not recwarn.list


def test_info_gives_each_reason_once(info, no_extension, monkeypatch):
    """On a machine with a GPU two backends wait for the same build, and auto's choice tells of it, too."""
    monkeypatch.setattr(native_flat, "why_no_cuda", lambda _: no_extension)
    text = info()
    assert text.count(no_extension) == 1
    assert line(text, "cuda").endswith(no_extension)
    assert line(text, "cpp").endswith("not available: as cuda")


def test_info_for_programs(info):
    known = json.loads(info("--json"))
    assert known["versions"]["torch"] == torch.__version__
    assert known["backends"]["cpp"] is None
    assert known["backends"]["cuda"] == dispatch.unavailable("cuda", "cuda")
    assert known["extension"]["file"] == native_flat.load()[0].__file__
    assert known["chosen"]["cpu"] == "cpp"


@pytest.mark.parametrize(
    ("argument", "says"), [("--version", f"bsam_fused {bsam_fused.__version__}"), ("--help", "info,build,report,rho")]
)
def test_what_needs_no_torch_does_not_wait_for_it(argument, says):
    """torch takes seconds to import; `python -X importtime` shows the rest in a tenth of one."""
    code = f"import sys; sys.modules['torch'] = None; from bsam_fused.cli import main; main([{argument!r}])"
    done = processes.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ROOT})
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


def test_every_public_name_is_there():
    """They are imported when they are first asked for."""
    names = f"{{name: getattr(bsam_fused, name).__name__ for name in dir(bsam_fused) if name != {'__version__'!r}}}"
    done = processes.run(
        [sys.executable, "-c", f"import bsam_fused; print({names})"], env={**os.environ, "PYTHONPATH": ROOT}
    )
    assert done.returncode == 0, done.stderr
    found = eval(done.stdout)
    assert set(found) | {"__version__"} == set(bsam_fused.__all__)
    assert {full.rpartition(".")[2] for full in found.values()} == set(found)
    with pytest.raises(AttributeError, match="module 'bsam_fused' has no attribute 'SAMM'"):
        bsam_fused.SAMM  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'SAMM'"):
        from bsam_fused import SAMM  # noqa: F401


@pytest.mark.parametrize(
    ("value", "chosen"),
    [("torch", "torch (asked for by BSAM_FUSED_BACKEND=torch)"), ("fortran", "none: BSAM_FUSED_BACKEND=fortran")],
)
def test_info_tells_what_the_environment_asks_for(info, monkeypatch, value, chosen):
    assert line(info(), dispatch.VARIABLE).endswith("not set")
    monkeypatch.setenv(dispatch.VARIABLE, value)
    text = info()
    assert chosen in line(text, "cpu")
    assert line(text, dispatch.VARIABLE).endswith(value)


@pytest.mark.parametrize("command", ["report", "rho"])
def test_without_extras_info_works_and_others_name_the_command(tmp_path, command):
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in EXTRAS)
    code = f"import sys; {blocked}from bsam_fused.cli import main; sys.exit(main(['info']) or main([{command!r}]))"
    done = processes.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ROOT})
    assert done.returncode == 1
    assert "Backends" in done.stdout
    assert re.fullmatch(rf"bsam-fused {command}: needs \w+: pip install 'bsam_fused\[report\]'\n", done.stderr)
    assert not list(tmp_path.iterdir())


def test_report_refuses_a_backend_that_is_not_there(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    assert cli.main(["report", "--out", str(tmp_path)]) == 1
    assert "BSAM_FUSED_BACKEND=cuda" in capsys.readouterr().err


def test_report_refuses_a_directory_that_is_a_file(capsys, tmp_path):
    file = tmp_path / "report"
    file.touch()
    assert cli.main(["report", "--out", str(file)]) == 1
    assert str(file) in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [[], ["train"], ["report", "--epochs", "0"], ["report", "--threads", "x"], ["report", "--device", "tpu"]]
)
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    assert "usage: bsam-fused" in capsys.readouterr().err
