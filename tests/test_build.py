"""The build decides what it can do, and a machine without the extension is told what adds it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import types
import warnings
from pathlib import Path

import pytest
import torch

import bsam_fused
from bsam_fused.ops import dispatch, native_flat

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what an sdist holds, without built files."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("bsam_fused", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def run_setup(source, *command, without_torch=False, **env):
    hide = "sys.modules['torch'] = None; " if without_torch else ""
    arguments = f"sys.argv = ['setup.py', *{list(command)}]"
    code = f"import sys, runpy; {hide}{arguments}; runpy.run_path('setup.py', run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("build", ["auto", "cpu", "cuda", "none"])
def test_metadata_needs_no_torch(source, build):
    result = run_setup(source, "egg_info", without_torch=True, BSAM_FUSED_BUILD=build)
    assert result.returncode == 0, result.stderr
    assert "Requires-Dist: torch>=2.6" in (source / "bsam_fused.egg-info" / "PKG-INFO").read_text()


def test_without_torch_auto_builds_pure_python(source, tmp_path):
    result = run_setup(source, "build", "--build-base", str(tmp_path), without_torch=True, BSAM_FUSED_BUILD="auto")
    assert result.returncode == 0, result.stderr
    assert "pure-Python package" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr
    assert (tmp_path / "lib" / "bsam_fused" / "py.typed").exists()
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(
    ("build", "env", "without_torch", "reason"),
    [
        ("cpu", {}, True, "torch cannot be imported"),
        ("cpu", {"CXX": "/no/compiler"}, False, "no C\\+\\+ compiler \\(/no/compiler\\)"),
        ("cuda", {}, False, "cuda.cu"),
        ("fast", {}, False, "must be none, cpu, cuda or auto"),
    ],
)
def test_what_cannot_be_built_fails_with_the_reason(source, tmp_path, build, env, without_torch, reason):
    result = run_setup(
        source,
        "build",
        "--build-base",
        str(tmp_path),
        without_torch=without_torch,
        BSAM_FUSED_BUILD=build,
        **env,
    )
    assert result.returncode != 0
    assert re.search(f"BSAM_FUSED_BUILD={build}: .*{reason}", result.stderr), result.stderr


def test_without_a_compiler_auto_builds_pure_python(source, tmp_path):
    result = run_setup(source, "build", "--build-base", str(tmp_path), BSAM_FUSED_BUILD="auto", CXX="/no/compiler")
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler" in result.stderr


def test_jobs_are_capped_by_memory(monkeypatch):
    monkeypatch.setenv("BSAM_FUSED_BUILD", "none")
    monkeypatch.chdir(ROOT)
    setup = {"__file__": str(ROOT / "setup.py"), "__name__": "setup_under_test"}
    code = (ROOT / "setup.py").read_text().split("\nsetup(\n")[0]
    exec(compile(code, "setup.py", "exec"), setup)
    pages = {"SC_AVPHYS_PAGES": 0, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert setup["jobs"]() == 1
    pages["SC_AVPHYS_PAGES"] = 2**40
    assert setup["jobs"]() == len(os.sched_getaffinity(0))


@pytest.fixture
def another_name(monkeypatch, tmp_path):
    """The loader, looking for a module of another name, in a folder of ours too."""
    monkeypatch.setattr(bsam_fused, "__path__", [*bsam_fused.__path__, str(tmp_path)])
    monkeypatch.setattr(native_flat, "module_name", lambda: "_native_torch9_9")
    native_flat.load.cache_clear()
    yield tmp_path
    native_flat.load.cache_clear()


def test_a_library_for_another_torch_is_named_with_the_mend(another_name):
    module, reason = native_flat.load()
    assert module is None
    major, minor = torch.__version__.split(".")[:2]
    assert f"built for torch {major}.{minor}, but torch {torch.__version__} is running" in reason
    assert native_flat.COMMAND in reason


def test_a_library_that_does_not_load_is_no_undefined_symbol_in_the_face(another_name):
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (another_name / f"_native_torch9_9{suffix}").write_bytes(b"\x7fELF nothing that loads")
    module, reason = native_flat.load()
    assert module is None
    assert "does not load" in reason
    assert native_flat.COMMAND in reason


def test_a_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(native_flat.importlib, "import_module", lambda name: types.SimpleNamespace(version="0.0.0"))
    module, reason = native_flat.load.__wrapped__()
    assert module is None
    assert "of bsam_fused 0.0.0" in reason


def test_without_the_extension_training_runs_and_says_once_why(another_name):
    p = torch.nn.Parameter(torch.ones(3))

    def train():
        opt = bsam_fused.BSAM([p], lr=0.1)
        for call in opt._calls:
            p.grad = torch.ones(3)
            getattr(opt, call)()
        return opt

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        opt = train()
        train()
    assert not torch.equal(p, torch.ones(3))
    ours = [str(w.message) for w in caught if "bsam_fused" in str(w.message)]
    assert len(ours) == 1
    assert native_flat.COMMAND in ours[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert opt.backends["cpu"].startswith("torch (auto's choice for cpu tensors; without cpp: ")
    with pytest.raises(RuntimeError, match=r"backend='cpp' for tensors on cpu: the C\+\+ extension is built for torch"):
        bsam_fused.BSAM([p], lr=0.1, backend="cpp")


def test_dispatch_prefers_the_compiled_one():
    choice = dispatch.choose("auto", torch.device("cpu"))
    assert choice.backend == "cpp"
    assert dispatch.choose("auto", torch.device("meta")).backend == "torch"
    assert "not on meta" in dispatch.unavailable("cpp", "meta")


STEP = """
import sys; sys.path.insert(0, "tests")
import torch, bsam_fused
from bsam_fused.ops import native_flat
from samples import DTYPES, TOLERANCE, assign, gradients, parameters
print(native_flat.load()[0].instruction_set())
for dtype in DTYPES:
    for base in (torch.optim.SGD, torch.optim.AdamW):
        torch.manual_seed(0)
        params = parameters("block_edges", dtype) + parameters("odd", dtype)
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        opts = [bsam_fused.BSAM(ps, base, lr=0.1, weight_decay=0.1, adaptive=True, backend=b)
                for ps, b in ((params, "cpp"), (twins, "torch"))]
        for t, call in enumerate(2 * opts[0]._calls):
            grads = gradients(params, t)
            for ps, opt in zip((params, twins), opts):
                assign(ps, grads)
                getattr(opt, call)()
            for p, q in zip(params, twins):
                torch.testing.assert_close(p, q, rtol=4 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
"""


@pytest.mark.parametrize(("capability", "name"), [("default", "baseline"), ("avx2", "AVX2"), ("avx512", "AVX-512")])
def test_loops_of_every_instruction_set(capability, name):
    """Each compiled variant beside the torch backend; one that this CPU lacks runs as the next lower one."""
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    result = subprocess.run(
        [sys.executable, "-c", STEP], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    order = ["baseline", "AVX2", "AVX-512"]
    assert order.index(result.stdout.strip()) <= order.index(name)
    if capability == "default":
        assert result.stdout.strip() == "baseline"
