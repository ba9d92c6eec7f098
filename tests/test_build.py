"""The build decides what it can do, with which flags, and keeps the reason of what it leaves out."""

import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import processes
import pytest
import torch
from setuptools import Distribution, Extension

sys.path.insert(0, str(Path(__file__).parents[1]))

import setup as build_script
from bsam_fused.extension import compiling, flags, obstacles, places
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
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    monkeypatch.delenv("CPATH", raising=False)
    assert "Python.h is missing" in str(obstacles.cpu_obstacle())
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CPATH", os.pathsep.join(["", "/nowhere", str(tmp_path)]))
    assert obstacles.cpu_obstacle() is None


def built(folder):
    """The package as built: lib/, or where an extension was meant to be lib.<platform>/."""
    return next(folder.glob("lib*/bsam_fused"))


@pytest.mark.parametrize("build", ["auto", "cpu", "cuda", "none"])
def test_metadata_needs_no_torch(source, build):
    result = run_setup(source, "egg_info", without_torch=True, BSAM_FUSED_BUILD=build)
    assert result.returncode == 0, result.stderr
    assert "Requires-Dist: torch>=2.6" in (source / "bsam_fused.egg-info" / "PKG-INFO").read_text()


def test_without_torch_auto_builds_pure_python(source, tmp_path):
    result = run_setup(source, "build", "--build-base", str(tmp_path), without_torch=True, BSAM_FUSED_BUILD="auto")
    assert result.returncode == 0, result.stderr
    assert "pure-Python package" in result.stderr
    assert "run `bsam-fused build` once all is installed" in result.stderr
    assert (built(tmp_path) / "py.typed").exists()
    assert "no torch to build with" in places.left_out(built(tmp_path)).extension
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(
    ("build", "env", "without_torch", "reason"),
    [
        ("cpu", {}, True, "no torch to build with"),
        ("cpu", {"CXX": "/no/compiler"}, False, "no C\\+\\+ compiler \\(/no/compiler\\)"),
        ("cuda", {}, True, "no torch to build with"),
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
    assert places.left_out(built(tmp_path)).extension == "no C++ compiler (/no/compiler) on PATH"


def test_what_was_built_of_other_sources_is_deleted(tmp_path):
    """So that neither a checkout nor a wheel of it gathers them; what is for another torch or Python stays."""
    built = places.file_name("2.13.0")
    stay = [built, places.file_name("2.12.1"), built.replace(".so", ".pyd"), "left_out.json"]
    for name in [*stay, built.replace(places.digest(), "before")]:
        (tmp_path / name).touch()
    build_script.forget_other_sources(tmp_path, built)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stay)


def test_the_sources_travel_whole(source, tmp_path):
    """What the installed package builds from is told by its content, so a file of an earlier build would count."""
    stale = tmp_path / "lib" / "bsam_fused" / "csrc" / "stale.h"
    stale.parent.mkdir(parents=True)
    stale.touch()
    run_setup(source, "build", "--build-base", str(tmp_path), BSAM_FUSED_BUILD="none")
    ours, theirs = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (ROOT / "csrc", stale.parent)
    )
    assert ours == theirs
    assert places.left_out(built(tmp_path)).extension == "BSAM_FUSED_BUILD=none"


def test_without_cuda_auto_builds_for_the_cpu_and_says_why(source, tmp_path):
    result = run_setup(source, "build_py", "--build-lib", str(tmp_path), CUDA_HOME="/no/toolkit")
    assert result.returncode == 0, result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("bsam_fused: ")]
    assert re.search("C\\+\\+ extension without CUDA kernels: .*(built without CUDA|no nvcc)", line)


def test_with_a_failing_compiler_auto_builds_pure_python(source, tmp_path):
    folders = ["--build-base", str(tmp_path), "--build-temp", str(tmp_path / "temp")]
    result = run_setup(source, "build", *folders, BSAM_FUSED_BUILD="auto", CXX="false")
    assert result.returncode == 0, result.stderr
    assert "the cpu build failed, going on without: false ended with status 1; log: " in result.stderr
    assert not list(tmp_path.rglob("*.so"))
    assert places.left_out(built(tmp_path)).extension == "compiling failed: false ended with status 1"
    assert "$ false" in (tmp_path / "temp" / "build.log").read_text()


def test_when_cuda_fails_to_compile_auto_goes_on_with_less(monkeypatch, tmp_path):
    tried = []

    def fail(library, objects, cuda, tell):
        tried.append(cuda)
        raise compiling.BuildError("does not compile")

    monkeypatch.setattr(compiling, "build", fail)
    monkeypatch.setattr(build_script, "cuda", lambda: "the toolkit")
    monkeypatch.setattr(build_script, "BUILD", "auto")
    monkeypatch.setattr(build_script, "KIND", "cuda")
    command = build_script.BuildExt(Distribution())
    command.extensions = [Extension("native", [])]
    command.build_lib, command.build_temp, command.inplace = str(tmp_path), str(tmp_path), False
    command.left_out = places.LeftOut()
    command.build_extensions()
    assert tried == ["the toolkit", None]
    assert command.extensions == []
    assert command.left_out == places.LeftOut(*2 * ["compiling failed: does not compile"])


@pytest.mark.parametrize(
    ("build", "no_cpu", "no_cuda", "decision"),
    [
        ("none", "no torch", "no nvcc", ("none", "BSAM_FUSED_BUILD=none")),
        ("cpu", None, "no nvcc", ("cpu", "BSAM_FUSED_BUILD=cpu")),
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
    monkeypatch.setattr(obstacles, "cpu_obstacle", lambda: no_cpu and obstacles.Obstacle(no_cpu))
    monkeypatch.setattr(obstacles, "find_toolkit", lambda: obstacles.Obstacle(no_cuda) if no_cuda else Path("toolkit"))
    kind, obstacle = build_script.decide(build)
    assert (kind, obstacle and obstacle.why) == decision


@pytest.mark.parametrize(
    ("cuda", "hip", "reason"),
    [(None, None, "is built without CUDA: install a CUDA build"), (None, "6.4", "is built for ROCm")],
)
def test_a_torch_that_no_cuda_kernel_can_serve_is_named(monkeypatch, cuda, hip, reason):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert f"torch {torch.__version__} {reason}" in str(obstacles.find_toolkit())


def make_toolkit(home, top=None, known="sm_80 sm_90 sm_100"):
    """A CUDA toolkit of which nothing works but what its nvcc says of itself: 13.0, its folder, what it knows."""
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    nvcc = home / "bin" / "nvcc"
    said = {
        "--version": "Cuda compilation tools, release 13.0, V13.0.88",
        "--list-gpu-code": known,
        "--dryrun": f"#$ TOP={top or home}/bin/..",
    }
    cases = "".join(
        f"{option}) echo '{text}' {'>&2' if option == '--dryrun' else ''};; " for option, text in said.items()
    )
    nvcc.write_text(f"#!/bin/sh\ncase $1 in {cases} esac\n")
    nvcc.chmod(0o755)
    return home


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A toolkit that CUDA_HOME names."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv(compiling.ARCHITECTURES_VARIABLE, raising=False)
    return make_toolkit(tmp_path / "cuda")


def test_a_toolkit_of_torchs_major_version_will_do(toolkit):
    assert obstacles.find_toolkit_for("13.0") == toolkit
    assert obstacles.find_toolkit_for("13.2") == toolkit


def test_a_toolkit_of_another_major_version_is_named(toolkit):
    assert "is of CUDA 13.0, torch of CUDA 12.8" in str(obstacles.find_toolkit_for("12.8"))


def test_a_toolkit_that_lacks_a_part_is_told(toolkit, monkeypatch):
    (toolkit / "include" / "cuda_runtime.h").unlink()
    assert f"no cuda_runtime.h under {toolkit}: set CUDA_HOME" in str(obstacles.find_toolkit_for("13.0"))
    (toolkit / "bin" / "nvcc").unlink()
    assert f"no nvcc in {toolkit}/bin: install the CUDA 13.0" in str(obstacles.find_toolkit_for("13.0"))
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(obstacles, "_compilers", lambda: iter([]))
    assert "no nvcc: install the CUDA 13.0 toolkit" in str(obstacles.find_toolkit_for("13.0"))


def test_an_nvcc_on_path_that_is_a_script_leads_to_its_toolkit(tmp_path, monkeypatch):
    """As /usr/local/bin/nvcc on CI's machine: the folder above it has no headers."""
    home = make_toolkit(tmp_path / "toolkit")
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    assert obstacles.find_toolkit_for("13.0") == home
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))  # nor need it be right
    assert obstacles.find_toolkit_for("13.0") == home


def test_the_usual_places_are_tried(tmp_path, monkeypatch):
    """A toolkit of pip's packages, and conda's, on a machine whose PATH has no nvcc."""
    pip, conda = make_toolkit(tmp_path / "nvidia" / "cu13"), make_toolkit(tmp_path / "conda")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CONDA_PREFIX", str(conda))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    found = list(obstacles.toolkits())
    assert found.index(conda) < found.index(pip)


def reads_torch(path):
    """Whether a file includes one of torch's headers, or one of ours that does."""
    included = re.findall(r'^#include [<"](.+)[>"]', path.read_text(), re.MULTILINE)
    ours = [path.parent / name for name in included if (path.parent / name).exists()]
    return any(re.match("(ATen|c10|torch|pybind11)/", name) for name in included) or any(map(reads_torch, ours))


def test_each_kind_of_build_has_its_sources():
    """Every file is compiled, by itself or as a part of the only one that reads torch's headers."""
    cpu, cuda = ({path.name for path in compiling.sources(with_cuda)} for with_cuda in (False, True))
    assert cuda - cpu == {"cuda.cu"}
    files = [path for path in (ROOT / "csrc").iterdir() if path.suffix in {".cpp", ".cu"}]
    of_cpu, of_cuda = (ROOT / "csrc" / "with_torch.cpp").read_text().split("#ifdef BSAM_FUSED_CUDA")
    parts, more = (re.findall(r'#include "(.+)"', text) for text in (of_cpu, of_cuda))
    assert more == ["cuda_flat_params.cpp"]
    assert sorted([*parts, *more, *cuda]) == sorted(path.name for path in files)
    assert sorted(path.name for path in files if reads_torch(path)) == sorted([*parts, *more, "with_torch.cpp"])


@pytest.mark.parametrize(
    ("known", "wanted"),
    [
        ("sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", ["8.0", "9.0", "10.0+PTX"]),
        ("sm_50 sm_80 sm_90", ["8.0", "9.0+PTX"]),
    ],
)
def test_architectures_are_those_that_nvcc_knows(tmp_path, monkeypatch, known, wanted):
    monkeypatch.delenv(compiling.ARCHITECTURES_VARIABLE, raising=False)
    toolkit = make_toolkit(tmp_path / "cuda", known=known)
    assert compiling.architectures(toolkit) == wanted
    assert compiling.architectures_of(toolkit, [(9, 0), (9, 0)]) == ["9.0"]
    assert compiling.architectures_of(toolkit, [(9, 0), (12, 1)]) == wanted  # PTX serves what nvcc does not know yet


def test_architectures_as_nvcc_is_told():
    assert compiling.architecture_flags(["8.6", "9.0+PTX"]) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_torchs_own_list_of_architectures_comes_first(monkeypatch, toolkit):
    monkeypatch.setenv(compiling.ARCHITECTURES_VARIABLE, "8.6;9.0+PTX")
    assert compiling.architectures(toolkit) == ["8.6", "9.0+PTX"]
    monkeypatch.setenv(compiling.ARCHITECTURES_VARIABLE, "Hopper")
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST: Hopper is no compute capability"):
        compiling.architectures(toolkit)


def test_the_cuda_build_finds_toolkit_headers_and_runtime(toolkit):
    """In the layouts of NVIDIA's installer, of conda and of pip's packages, whose runtime has no plain .so."""
    (toolkit / "lib").mkdir()
    (toolkit / "lib" / "libcudart.so.13").touch()
    cuda = compiling.Cuda(toolkit, ["9.0"])
    compiled = compiling.cxx_command(Path("a.cpp"), Path("a.o"), cuda)
    assert f"-isystem{toolkit}/include" in compiled
    assert "-DBSAM_FUSED_CUDA=1" in compiled
    linked = compiling.link_command([Path("a.o")], Path("a.so"), cuda)
    assert {f"{toolkit}/lib/libcudart.so.13", "-ltorch_cuda", "-lc10_cuda"} <= set(linked)
    assert not any("cuda" in word for word in compiling.link_command([Path("a.o")], Path("a.so"), None))
    (toolkit / "targets").mkdir()
    (toolkit / "include").rename(toolkit / "targets" / "include")
    (toolkit / "targets").rename(toolkit / "x86_64-linux")
    (toolkit / "targets").mkdir()
    (toolkit / "x86_64-linux").rename(toolkit / "targets" / "x86_64-linux")
    assert f"-isystem{toolkit}/targets/x86_64-linux/include" in compiling.cxx_command(Path("a.cpp"), Path("a.o"), cuda)


def test_no_fast_math():
    assert "-ffp-contract=off" in flags.CXX_FLAGS
    assert "-fmad=false" in flags.NVCC_FLAGS
    assert not any("fast" in flag for flag in flags.CXX_FLAGS + flags.NVCC_FLAGS)


def test_jobs_are_capped_by_memory(monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    pages = {"SC_AVPHYS_PAGES": 0, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert compiling.jobs() == 1
    pages["SC_AVPHYS_PAGES"] = 2**40
    assert compiling.jobs() == len(os.sched_getaffinity(0))
    monkeypatch.setenv("MAX_JOBS", "3")
    assert compiling.jobs() == 3


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


def test_the_library_names_no_folder_of_this_machine():
    """torch's headers put their own paths into errors, and so the builder's folders into a wheel."""
    module, why = native_flat.load()
    assert module is not None, why
    assert os.fsencode(Path(torch.__file__).parent) not in Path(module.__file__).read_bytes()
