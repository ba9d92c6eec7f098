"""The build decides what it can do, and a machine without the extension is told what adds it."""

import os
import re
import shutil
import sys
import sysconfig
import types
import warnings
from pathlib import Path

import processes
import pytest
import torch
from setuptools import Distribution, Extension
from torch.utils import cpp_extension

sys.path.insert(0, str(Path(__file__).parents[1]))

import bsam_fused
import setup as build_script
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
    return processes.run([sys.executable, "-c", code], timeout=900, cwd=source, env={**os.environ, **env})


def test_headers_may_lie_where_the_compiler_looks_for_them(tmp_path, monkeypatch):
    """As `make gpu-carry` brings them to a machine that has none of its own."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    monkeypatch.delenv("CPATH", raising=False)
    assert "Python.h is missing" in build_script.cpu_obstacle()
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CPATH", os.pathsep.join(["", "/nowhere", str(tmp_path)]))
    assert build_script.cpu_obstacle() is None


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
        ("cuda", {}, True, "torch cannot be imported"),
        ("cuda", {"CUDA_HOME": "/no/toolkit"}, False, "(built without CUDA|no nvcc in /no/toolkit/bin): install"),
        ("fast", {}, False, "must be none, cpu, cuda or auto"),
    ],
)
@pytest.mark.parametrize("command", [["build", "--build-base"], ["build_ext", "--build-temp"]], ids=lambda c: c[0])
def test_what_cannot_be_built_fails_with_the_reason(source, tmp_path, command, build, env, without_torch, reason):
    result = run_setup(
        source,
        *command,
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


def test_without_cuda_auto_builds_for_the_cpu_and_says_why(source, tmp_path):
    result = run_setup(source, "build_py", "--build-lib", str(tmp_path), CUDA_HOME="/no/toolkit")
    assert result.returncode == 0, result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("bsam_fused: ")]
    assert re.search("C\\+\\+ extension without CUDA kernels: .*(built without CUDA|no nvcc)", line)


def test_with_a_failing_compiler_auto_builds_pure_python(source, tmp_path):
    result = run_setup(source, "build", "--build-base", str(tmp_path), BSAM_FUSED_BUILD="auto", CXX="false")
    assert result.returncode == 0, result.stderr
    assert "the cpu build failed, going on without" in result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_when_cuda_fails_to_compile_auto_goes_on_with_less(monkeypatch):
    tried = []

    def fail(self):
        tried.append(self.extensions[0].sources)
        raise RuntimeError("does not compile")

    monkeypatch.setattr(cpp_extension.BuildExtension, "build_extensions", fail)
    monkeypatch.setattr(build_script, "BUILD", "auto")
    monkeypatch.setattr(build_script, "KIND", "cuda")
    monkeypatch.setattr(build_script, "extension", lambda kind: Extension("native", [kind]))
    command = build_script.build_ext_command()(Distribution())
    command.extensions = [Extension("native", ["cuda"])]
    command.build_extensions()
    assert tried == [["cuda"], ["cpu"]]
    assert command.extensions == []


@pytest.mark.parametrize(
    ("build", "no_cpu", "no_cuda", "decision"),
    [
        ("none", "no torch", "no nvcc", ("none", None)),
        ("cpu", None, "no nvcc", ("cpu", None)),
        ("cpu", "no torch", None, ("none", "no torch")),
        ("cuda", None, None, ("cuda", None)),
        ("cuda", None, "no nvcc", ("none", "no nvcc")),
        ("cuda", "no torch", None, ("none", "no torch")),
        ("auto", None, None, ("cuda", None)),
        ("auto", None, "no nvcc", ("cpu", "no nvcc")),
        ("auto", "no torch", "no nvcc", ("none", "no torch")),
    ],
)
def test_what_is_built(monkeypatch, build, no_cpu, no_cuda, decision):
    monkeypatch.setattr(build_script, "cpu_obstacle", lambda: no_cpu)
    monkeypatch.setattr(build_script, "cuda_obstacle", lambda: no_cuda)
    assert build_script.decide(build) == decision


@pytest.mark.parametrize(
    ("cuda", "hip", "reason"),
    [(None, None, "is built without CUDA: install a CUDA build"), (None, "6.4", "is built for ROCm")],
)
def test_a_torch_that_no_cuda_kernel_can_serve_is_named(monkeypatch, cuda, hip, reason):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert f"torch {torch.__version__} {reason}" in build_script.cuda_obstacle()


@pytest.fixture
def toolkit(tmp_path):
    """A CUDA toolkit of which nothing works but the version that its nvcc reports, 13.0."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    return tmp_path


def test_a_toolkit_of_torchs_major_version_will_do(toolkit):
    assert build_script.toolkit_obstacle(str(toolkit), "13.0") is None
    assert build_script.toolkit_obstacle(str(toolkit), "13.2") is None


def test_a_toolkit_of_another_major_version_is_named(toolkit):
    assert "is of CUDA 13.0, torch of CUDA 12.8" in build_script.toolkit_obstacle(str(toolkit), "12.8")


def test_a_toolkit_that_lacks_a_part_is_told(toolkit):
    assert "no nvcc: install the CUDA 13.0 toolkit" in build_script.toolkit_obstacle(None, "13.0")
    (toolkit / "include" / "cuda_runtime.h").unlink()
    assert f"no cuda_runtime.h under {toolkit}: set CUDA_HOME" in build_script.toolkit_obstacle(str(toolkit), "13.0")
    (toolkit / "bin" / "nvcc").unlink()
    assert f"no nvcc in {toolkit}/bin: install" in build_script.toolkit_obstacle(str(toolkit), "13.0")


def test_each_kind_of_build_has_its_sources():
    cpu, cuda = (set(build_script.sources(kind)) for kind in ("cpu", "cuda"))
    assert cuda == {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir() if path.suffix in {".cpp", ".cu"}}
    assert cuda - cpu == {"csrc/cuda.cu", "csrc/cuda_flat_params.cpp"}


@pytest.mark.parametrize(
    ("supported", "codes"),
    [
        ("sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", ["sm_80", "sm_90", "sm_100", "compute_100"]),
        ("sm_50 sm_80 sm_90", ["sm_80", "sm_90", "compute_90"]),
    ],
)
def test_architectures_are_those_that_nvcc_knows(supported, codes):
    flags = build_script.architecture_flags(supported.replace(" ", "\n"))
    assert [flag.partition(",code=")[2] for flag in flags] == codes
    assert all(re.fullmatch(r"-gencode=arch=compute_(\d+),code=(sm|compute)_\1", flag) for flag in flags)


def test_torchs_own_list_of_architectures_comes_first(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    assert build_script.nvcc_flags() == build_script.NVCC_FLAGS
    assert not any("arch" in flag for flag in build_script.NVCC_FLAGS)  # torch would then add none


def test_no_fast_math():
    assert "-ffp-contract=off" in build_script.CXX_FLAGS
    assert "-fmad=false" in build_script.NVCC_FLAGS
    assert not any("fast" in flag for flag in build_script.CXX_FLAGS + build_script.NVCC_FLAGS)


def test_jobs_are_capped_by_memory(monkeypatch):
    pages = {"SC_AVPHYS_PAGES": 0, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert build_script.jobs() == 1
    pages["SC_AVPHYS_PAGES"] = 2**40
    assert build_script.jobs() == len(os.sched_getaffinity(0))


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


def test_dispatch_on_a_gpu(monkeypatch):
    monkeypatch.setattr(native_flat, "why_no_cuda", lambda _: "")
    assert dispatch.choose("auto", torch.device("cuda")).backend == "cuda"
    assert "not on cpu" in dispatch.unavailable("cuda", "cpu")
    monkeypatch.setattr(native_flat, "why_no_cuda", lambda _: "there is no nvcc")
    choice = dispatch.choose("auto", torch.device("cuda"))
    assert choice.backend == "torch"
    assert "slower torch backend; cuda: there is no nvcc" in choice.slower
    with pytest.raises(RuntimeError, match="backend='cuda' for tensors on cuda: there is no nvcc"):
        dispatch.choose("cuda", torch.device("cuda"))


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
    result = processes.run([sys.executable, "-c", STEP], cwd=ROOT, env=env)
    assert result.returncode == 0, result.stderr
    order = ["baseline", "AVX2", "AVX-512"]
    assert order.index(result.stdout.strip()) <= order.index(name)
    if capability == "default":
        assert result.stdout.strip() == "baseline"
