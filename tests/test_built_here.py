"""`bsam-fused build`: into the cache, found from there, whatever lies in the package; failures give their reason."""

import contextlib
import shlex
import shutil
import sys
import sysconfig
import threading
import types
import warnings
from pathlib import Path

import pytest
import torch

import bsam_fused
from bsam_fused import cli
from bsam_fused.extension import compiling, obstacles, places
from bsam_fused.ops import dispatch, native_flat

REAL = Path(native_flat.load()[0].__file__)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of our own, an empty package, and a loader that looks anew; returns this torch's folder in it."""
    monkeypatch.setenv(places.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("MAX_JOBS", "2")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(places, "PACKAGE", tmp_path / "site-packages" / "bsam_fused")
    monkeypatch.setattr(places, "sources_folder", lambda: Path(__file__).parents[1] / "csrc")
    places.PACKAGE.mkdir(parents=True)
    name = f"bsam_fused.{places.module_name(torch.__version__)}"
    monkeypatch.setitem(sys.modules, name, sys.modules[name])
    load = native_flat.load
    load.cache_clear()
    yield places.cached(torch.__version__, torch.version.cuda)
    load.cache_clear()


@pytest.fixture
def package():
    return places.PACKAGE


def library(folder, source=REAL, torch_version=torch.__version__):
    """Put a library into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return shutil.copy(source, folder / places.file_name(torch_version))


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A stand-in that "links" the library that was built before, or fails with what a file says."""
    script, fault = tmp_path / "compiler", tmp_path / "fault"
    script.write_text(
        f"""#!/bin/sh
        for last; do :; done
        if [ -f {fault} ]; then cat {fault}; exit 1; fi
        case "$*" in *-shared*|*-bundle*) cp {shlex.quote(str(REAL))} "$last" ;; *) : >"$last" ;; esac
        """
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return fault


def build(*options):
    native_flat.load.cache_clear()
    return cli.main(["build", *options])


def reason():
    native_flat.load.cache_clear()
    module, why = native_flat.load()
    assert module is None
    return why


def loaded_from():
    """The folder of the library that is found first, and loads: one copy more in this process."""
    native_flat.load.cache_clear()
    assert native_flat.load()[0] is not None
    return native_flat.libraries()[0].parent


# ---- built, and found


def test_what_is_built_is_found(compiler, cache, capsys):
    assert "is not built; run: bsam-fused build" in reason()
    assert build("--cpu") == 0
    out = capsys.readouterr().out
    files = len(compiling.sources(with_cuda=False))
    assert [f"{n}/{files}" for n in range(1, files + 1)] == [line.split()[0] for line in out.splitlines()[1:-1]]
    assert out.splitlines()[-1].endswith(f"s: {cache / places.file_name(torch.__version__)}")
    assert loaded_from() == cache
    assert dispatch.choose("auto", torch.device("cpu")).backend == "cpp"
    assert sorted(path.name for path in cache.iterdir()) == [places.file_name(torch.__version__), "left_out.json"]
    assert places.left_out(cache) == places.LeftOut(cuda="bsam-fused build --cpu")


def test_builds_at_once_leave_one_whole_library(compiler, cache):
    codes = []
    threads = [threading.Thread(target=lambda: codes.append(build("--cpu"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0, 0]
    assert loaded_from() == cache
    assert [path.name for path in cache.glob("*.so")] == [REAL.name]
    assert not list(cache.glob(".building*"))


def test_the_cache_comes_before_the_package(cache, package):
    """There lies what was built last for exactly this torch, maybe with CUDA kernels that the package lacks."""
    library(package)
    assert loaded_from() == package
    library(cache)
    assert loaded_from() == cache


def test_a_library_that_does_not_load_gives_way(cache, package, tmp_path):
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF nothing that loads")
    library(cache, broken)
    assert "the C++ extension does not load" in reason()
    assert "; run: bsam-fused build" in reason()
    library(package)
    native_flat.load.cache_clear()
    assert native_flat.load()[0] is not None


def test_a_library_of_other_sources_is_never_used(cache, package, monkeypatch):
    """Not even in the package, as after an edit of csrc/, nor of a cache that others share."""
    library(package), library(cache)
    monkeypatch.setattr(places, "digest", lambda: "others")
    assert (
        "is built for another Python, or of other sources than this bsam_fused has; run: bsam-fused build" in reason()
    )
    library(package)  # under the name of these
    assert [path.parent for path in native_flat.libraries()] == [package]


def test_sources_are_told_by_content(monkeypatch, tmp_path):
    ours = places.digest.__wrapped__()
    csrc = shutil.copytree(places.sources_folder(), tmp_path / "csrc")
    monkeypatch.setattr(places, "sources_folder", lambda: csrc)
    assert places.digest.__wrapped__() == ours
    with (csrc / "math.h").open("a") as file:
        file.write("\n")
    assert places.digest.__wrapped__() != ours


def test_an_installed_package_has_its_sources_within(monkeypatch, package):
    monkeypatch.undo()
    monkeypatch.setattr(places, "PACKAGE", package)
    assert places.sources_folder() == package.parent / "csrc"
    (package / "csrc").mkdir()
    assert places.sources_folder() == package / "csrc"


@pytest.mark.parametrize(("torch_version", "cuda"), [("2.9.1+cu126", "12.6"), (torch.__version__, "99.9")])
def test_after_an_upgrade_of_torch_the_way_on_is_told(cache, torch_version, cuda, compiler):
    """A build for another release, and for the same one with another CUDA."""
    library(places.cached(torch_version, cuda), torch_version=torch_version)
    of_cuda = f" with CUDA {cuda}" if cuda else ""
    expected = (
        f"is built for torch {torch_version}{of_cuda}, but torch {torch.__version__} is running; run: bsam-fused build"
    )
    assert expected in reason()
    assert build("--cpu") == 0
    assert loaded_from() == cache


def test_a_package_for_another_torch_or_python_is_told(package):
    (package / "_native_torch2_9_abc.cpython-311.so").touch()
    assert f"is built for torch 2.9, but torch {torch.__version__} is running; run: bsam-fused build" in reason()
    (package / "_native_torch2_9_abc.cpython-311.so").unlink()
    (package / f"{places.module_name(torch.__version__)}.cpython-39.so").touch()
    assert "is built for another Python, or of other sources" in reason()


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv(places.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = places.cached("2.13.0+cu130", "13.0")
    assert folder.is_relative_to(tmp_path / "bsam_fused" / places.digest())
    assert folder.parts[-2:] == (sysconfig.get_config_var("SOABI"), "torch-2.13.0+cu130-cuda-13.0")


# ---- what fails


def test_a_failing_compiler_leaves_a_log_and_its_reason(compiler, cache, capsys):
    compiler.write_text("In file included\nmath.h:7:1: error: no such thing\nnote: more\n")
    assert build("--cpu") == 1
    err = capsys.readouterr().err
    log = cache / places.LOG
    assert "bsam-fused build: math.h:7:1: error: no such thing" in err
    assert "note: more" in err
    assert err.splitlines()[-1] == f"The whole log: {log}"
    assert shlex.join([str(compiler.with_name("compiler")), "-O3"]) in log.read_text()
    assert f"is not built (math.h:7:1: error: no such thing; log: {log}, at the last `bsam-fused build`)" in reason()
    assert reason().endswith("; once that is mended, run: bsam-fused build")
    compiler.unlink()
    assert build("--cpu") == 0
    assert places.left_out(cache).extension is None


def test_a_failing_build_keeps_the_library_that_there_is(compiler, cache):
    library(cache)
    places.LeftOut(cuda="no nvcc").write(cache)
    compiler.write_text("error: no such thing")
    assert build("--cpu") == 1
    assert loaded_from() == cache
    assert places.left_out(cache).cuda == "no nvcc"


def test_a_library_that_does_not_load_is_a_failed_build(compiler, cache, capsys, monkeypatch):
    def fail(library):
        raise ImportError("undefined symbol")

    monkeypatch.setattr(native_flat, "opened", fail)
    assert build("--cpu") == 1
    assert "bsam-fused build: undefined symbol" in capsys.readouterr().err
    assert not list(cache.glob("*.so"))


def test_without_a_compiler_the_reason_is_told_and_kept(monkeypatch, package, capsys):
    """Never the advice to run what has just failed, before what it needs is there."""
    monkeypatch.setenv("CXX", "/no/compiler")
    places.LeftOut(extension="no C++ compiler (c++) on PATH").write(package)
    install = "install one (Debian, Ubuntu: apt install g++)"
    then = f"; {install}, then run: bsam-fused build"
    now = "no C++ compiler (/no/compiler) on PATH: "
    then_now = f"; {now}{install}, then run: bsam-fused build"
    assert reason().endswith(f"is not built (no C++ compiler (c++) on PATH, when bsam_fused was installed){then_now}")
    assert build() == 1
    assert f"no C++ compiler (/no/compiler) on PATH: {install}" in capsys.readouterr().err
    assert f"(no C++ compiler (/no/compiler) on PATH, at the last `bsam-fused build`){then}" in reason()
    monkeypatch.delenv("CXX")
    assert reason().endswith("; once that is mended, run: bsam-fused build")


def test_where_nothing_can_be_built_nothing_is_advised(monkeypatch):
    monkeypatch.setattr(obstacles, "cpu_obstacle", lambda: obstacles.Obstacle("not on this system"))
    assert reason() == "the C++ extension is not built; not on this system"


def test_a_cache_that_cannot_be_written_is_told(monkeypatch, compiler, capsys, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv(places.CACHE_VARIABLE, str(tmp_path / "file"))
    assert build("--cpu") == 1
    assert "BSAM_FUSED_CACHE names another folder to build in" in capsys.readouterr().err


def test_cuda_kernels_that_are_asked_for_are_there_or_it_fails(monkeypatch, compiler, cache, capsys):
    why = obstacles.Obstacle("no nvcc", "install the CUDA toolkit")
    monkeypatch.setattr(obstacles, "find_toolkit", lambda: why)
    assert build("--cuda") == 1
    assert "no CUDA kernels: no nvcc: install the CUDA toolkit" in capsys.readouterr().err
    assert not cache.exists()
    assert build() == 0
    assert "none for CUDA (no nvcc)" in capsys.readouterr().out
    assert places.left_out(cache).cuda == "no nvcc"


def test_what_is_in_the_way_now_is_told_beside_the_reason_of_then(monkeypatch, package):
    """Of an isolated pip: `install one` of what?"""
    places.LeftOut(extension="no torch to build with").write(package)
    monkeypatch.setenv("CXX", "nope")
    assert (
        "(no torch to build with, when bsam_fused was installed); no C++ compiler (nope) on PATH: install" in reason()
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"later": 1}', "\0"])
def test_what_nobody_can_read_is_as_nothing(package, cache, text):
    for folder in (package, cache):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "left_out.json").write_text(text)
    assert "is not built; run: bsam-fused build" in reason()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("MAX_JOBS", "abc", "MAX_JOBS=abc: must be a number"),
        ("CXX", '"', 'CXX=": No closing quotation'),
        ("CXX", "ccache nope -m64", "no C++ compiler"),
    ],
)
def test_a_variable_that_makes_no_sense_is_named(monkeypatch, compiler, capsys, name, value, says):
    monkeypatch.setenv(name, value)
    assert build("--cpu") == 1
    assert says in capsys.readouterr().err
    reason()


def test_the_compiler_of_kernels_is_the_compiler_itself(monkeypatch):
    monkeypatch.setenv("CXX", "ccache /usr/bin/g++ -m64")
    command = compiling.nvcc_command(Path("cuda.cu"), Path("cuda.o"), compiling.Cuda(Path("toolkit"), ["9.0"]))
    assert "-ccbin=/usr/bin/g++" in command


@pytest.mark.parametrize("how", ["fails", "is no program"])
def test_a_broken_nvcc_is_an_obstacle(monkeypatch, tmp_path, how):
    nvcc = tmp_path / "bin" / "nvcc"
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 3\n")
    nvcc.chmod(0o755 if how == "fails" else 0o644)
    assert f"nvcc in {tmp_path}/bin does not run" in str(obstacles.toolkit_obstacle(tmp_path, "13.0"))


def test_without_cuda_kernels_where_only_these_fail(monkeypatch, cache, capsys):
    def fail_with_cuda(library_, objects, cuda, tell):
        if cuda:
            (objects / places.LOG).touch()
            raise compiling.BuildError("ptxas error")
        library(library_.parent)

    monkeypatch.setattr(obstacles, "find_toolkit", lambda: Path("toolkit"))
    monkeypatch.setattr(compiling, "architectures", lambda toolkit: ["9.0"])
    monkeypatch.setattr(compiling, "build", fail_with_cuda)
    assert build("--cuda") == 1
    assert build() == 0
    assert "ptxas error" in capsys.readouterr().out
    assert loaded_from() == cache
    assert places.left_out(cache) == places.LeftOut(cuda="compiling failed: ptxas error")


@pytest.mark.parametrize(
    ("gpus", "options", "named", "wanted"),
    [
        ([(9, 0)], [], "", ["9.0"]),
        ([(9, 0)], ["--all-architectures"], "", ["all"]),
        ([], [], "", ["all"]),
        ([(9, 0)], [], "8.6", ["all"]),  # `architectures` has those that are named
    ],
)
def test_cuda_kernels_are_for_this_machines_gpu(monkeypatch, gpus, options, named, wanted):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
    built_for = []
    monkeypatch.setattr(obstacles, "find_toolkit", lambda: Path("toolkit"))
    monkeypatch.setattr(compiling, "architectures", lambda toolkit: ["all"])
    monkeypatch.setattr(compiling, "_knows", lambda toolkit, number: True)
    monkeypatch.setattr(
        compiling, "build", lambda lib, objects, cuda, tell: built_for.extend(cuda.architectures) or 1 / 0
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", gpus.__getitem__)
    with pytest.raises(ZeroDivisionError):
        build(*options)
    assert built_for == wanted


# ---- what users are told


def test_without_a_gpu_nothing_about_cuda_kernels_is_advised(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert native_flat.why_no_cuda.__wrapped__(torch.device("cuda")) == "torch sees no NVIDIA GPU"


@pytest.mark.parametrize(
    ("kernels", "toolkit", "why"),
    [
        (False, Path("cuda"), r"is built without CUDA kernels \(no nvcc\); run: bsam-fused build"),
        (False, obstacles.Obstacle("no nvcc", "install it"), r"\(no nvcc\); install it, then run: bsam-fused build"),
        (True, Path("cuda"), r"do not run on a GPU \(no kernel image\); run: bsam-fused build"),
    ],
)
def test_with_a_gpu_the_way_to_cuda_kernels_is_told(monkeypatch, cache, kernels, toolkit, why):
    module = types.SimpleNamespace(__file__=str(cache / "native.so"), cuda_obstacle=lambda: "no kernel image")
    if kernels:
        module.CudaFlatParams = object
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    places.LeftOut(cuda="no nvcc").write(cache)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(native_flat, "load", lambda: (module, ""))
    monkeypatch.setattr(obstacles, "find_toolkit", lambda: toolkit)
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(native_flat.why_no_cuda.__wrapped__(torch.device("cuda")))


def test_without_the_extension_training_runs_and_says_once_why(package):
    places.LeftOut(extension="no C++ compiler (c++) on PATH").write(package)
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
    assert "no C++ compiler (c++) on PATH" in ours[0]
    assert ours[0].endswith("run: bsam-fused build")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert opt.backends["cpu"].startswith("torch (auto's choice for cpu tensors; without cpp: ")
    with pytest.raises(RuntimeError, match=r"backend='cpp' for tensors on cpu: the C\+\+ extension is not built"):
        bsam_fused.BSAM([p], lr=0.1, backend="cpp")
