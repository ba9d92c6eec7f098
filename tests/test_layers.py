"""Imports go down only, and formulas know no torch: docs/design.md, "The house"."""

import ast
import re
import sys
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bsam_fused"

# What each part may import of the package. Backends never know each other.
MEMBER = {"distributed", "ops.contract", "ops.dispatch", "optim.mixing", "optim.options", "optim.sam"}  # of the family
REMEMBERS = MEMBER - {"optim.mixing"} | {"optim.remembering"}
MAY_IMPORT = {
    "_version": set(),
    "commands": set(),
    "commands.build": {
        "_version",
        "extension.compiling",
        "extension.obstacles",
        "extension.places",
        "ops.native_flat",
    },
    "commands.info": {"ops.dispatch", "ops.native_flat", "report.machine"},
    "extension": set(),
    "extension.compiling": {"extension.flags", "extension.obstacles", "extension.places"},
    "extension.flags": set(),
    "extension.obstacles": set(),
    "extension.places": {"_version"},
    "ops.copies": {"ops.native_flat"},
    "buffers": {"distributed", "ops.copies", "ops.identity"},
    "batchnorm": {"buffers"},
    "callers": set(),
    "checks": set(),
    "distributed": {"checks"},
    "losses": {"checks"},
    "schedules": {"schedules.policies", "schedules.radii"},
    "schedules.policies": {"checks", "schedules.stepped"},
    "schedules.radii": {"checks", "schedules.stepped"},
    "schedules.stepped": set(),
    "integrations": set(),
    "integrations.lightning": set(),
    "integrations.transformers": set(),
    "ops.contract": {"distributed"},
    "ops.directions": {"ops.contract"},
    "ops.memory": set(),
    "ops.flat_buffers": {"ops.contract", "ops.memory"},
    "ops.flat_params": {
        "ops.contract",
        "ops.directions",
        "ops.flat_buffers",
        "ops.memory",
        "ops.one_go",
        "ops.rounding",
    },
    "ops.rounding": set(),
    "ops.holders": set(),
    "ops.triton_math": set(),
    "ops.triton_rounding": {"ops.rounding"},
    "ops.triton_pieces": set(),
    "ops.triton_directions": {"ops.contract", "ops.triton_math", "ops.triton_pieces"},
    "ops.triton_kernels": {"ops.triton_directions", "ops.triton_math", "ops.triton_pieces", "ops.triton_rounding"},
    "ops.triton_updates": {"ops.triton_directions", "ops.triton_math", "ops.triton_pieces", "ops.triton_rounding"},
    "ops.triton_flat": {
        "ops.contract",
        "ops.flat_buffers",
        "ops.flat_params",
        "ops.holders",
        "ops.one_go",
        "ops.triton_kernels",
        "ops.triton_updates",
    },
    "ops.torch_flat": {"ops.contract", "ops.directions", "ops.flat_params", "ops.rounding"},
    "ops.torch_lists": {"ops.contract", "ops.directions", "ops.flat_params", "ops.holders", "ops.torch_flat"},
    "ops.native_flat": {"extension.obstacles", "extension.places", "ops.contract"},
    "ops.sharded_flat": {"ops.contract", "distributed"},
    "ops.identity": {"ops.native_flat"},
    "ops.one_go": set(),
    "ops.dispatch": {"ops.contract", "ops.torch_lists", "ops.triton_flat", "ops.native_flat"},
    "ops": set(),
    "optim": set(),
    "optim.fused": {"ops.contract"},
    "optim.state": {"ops.contract", "ops.identity", "optim.fused"},
    "optim.captured": {"ops.contract", "ops.identity", "optim.state"},
    "optim.names": set(),
    "optim.options": {"checks", "distributed"},
    "optim.groups": {"checks", "ops.contract", "optim.names", "optim.trainers", "schedules.radii"},
    "optim.around": {
        "checks",
        "ops.contract",
        "ops.identity",
        "optim.flats",
        "optim.groups",
        "optim.names",
        "optim.options_read",
        "optim.scaling",
    },
    "optim.options_read": {"ops.identity"},
    "optim.hooks": set(),
    "optim.sharpness": set(),
    "optim.metrics": {"ops.contract", "optim.sharpness"},
    "optim.others": {"callers"},
    "optim.shown": set(),
    "optim.skips": {"callers"},
    "optim.scaling": {"distributed"},
    "optim.trainers": {"distributed"},
    "optim.flats": {
        "distributed",
        "ops.contract",
        "ops.dispatch",
        "ops.identity",
        "ops.one_go",
        "ops.sharded_flat",
        "optim.captured",
        "optim.fused",
        "optim.groups",
        "optim.kinds",
        "optim.merging",
        "optim.scaling",
        "optim.skips",
        "optim.state",
    },
    "optim.merging": {"distributed", "ops.contract", "ops.directions"},
    "optim.kinds": {"distributed", "ops.contract", "ops.memory", "optim.groups"},
    "optim.persistence": {"ops.contract", "optim.around", "optim.options_read", "optim.others", "optim.state"},
    "optim.passes": {"buffers"},
    "optim.phases": {"checks", "ops.contract", "optim.passes", "optim.persistence", "optim.trainers", "distributed"},
    "optim.gradients": {"ops.contract", "ops.dispatch", "optim.fused", "optim.phases", "optim.scaling"},
    "optim.base": {
        "callers",
        "checks",
        "ops.contract",
        "ops.dispatch",
        "ops.identity",
        "optim.flats",
        "optim.fused",
        "optim.gradients",
        "optim.groups",
        "optim.hooks",
        "optim.metrics",
        "optim.options",
        "optim.options_read",
        "optim.phases",
        "optim.scaling",
        "optim.sharpness",
        "optim.shown",
        "optim.trainers",
        "distributed",
    },
    "optim.mixing": {"ops.contract", "optim.base"},
    "optim.sam": {"distributed", "ops.dispatch", "optim.base", "optim.options"},
    "optim.gsam": MEMBER,
    "optim.wsam": MEMBER | {"checks"},
    "optim.mixed": MEMBER,
    "optim.remembering": {"optim.mixing"},
    "optim.looksam": REMEMBERS | {"checks", "optim.phases"},
    "optim.friendly": REMEMBERS | {"checks", "optim.scaling"},
    "optim.bsam": {
        "callers",
        "checks",
        "distributed",
        "ops.contract",
        "ops.dispatch",
        "optim.mixing",
        "optim.options",
        "optim.phases",
        "optim.sam",
        "schedules.radii",
    },
    "graphs": {"buffers", "distributed", "ops.copies", "optim.base", "optim.captured", "optim.sharpness"},
    "sharpness.extras": set(),
    "sharpness.mean_loss": set(),
    "sharpness.neighbourhood": {"checks", "optim.sharpness", "sharpness.mean_loss"},
    "sharpness.hessian": {"sharpness.extras", "sharpness.mean_loss"},
    "sharpness.landscape": {"sharpness.mean_loss"},
    "sharpness.plots": {"optim.sharpness", "sharpness.extras", "sharpness.radius"},
    "sharpness.radius": {"checks", "sharpness.mean_loss", "sharpness.neighbourhood"},
    "sharpness": {
        "optim.sharpness",
        "sharpness.hessian",
        "sharpness.landscape",
        "sharpness.neighbourhood",
        "sharpness.plots",
        "sharpness.radius",
    },
    "": {
        "_version",
        "batchnorm",
        "graphs",
        "losses",
        "schedules",
        "sharpness",
        "optim.base",
        "optim.sam",
        "optim.bsam",
        "optim.friendly",
        "optim.gsam",
        "optim.looksam",
        "optim.mixed",
        "optim.wsam",
        "optim.sharpness",
    },
}
ABOVE = {"cli", "__main__"}  # and report: they may import anything below


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules():
    return {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "bsam_fused"}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module.split(".")[0] == "bsam_fused":
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                known = {f"bsam_fused.{name}" for name in modules()}
                found |= {name if name in known else node.module for name in inside}
    return {name.removeprefix("bsam_fused").removeprefix(".") for name in found}


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_down(name):
    imported = imports(modules()[name])
    if name in ABOVE:
        return
    if name.split(".")[0] == "report":
        assert not imported & ABOVE
        return
    assert imported <= MAY_IMPORT[name]


def test_nothing_imports_report_but_the_command_line():
    for name, path in modules().items():
        if name.split(".")[0] not in {"cli", "commands", "report"}:
            assert not any(imported.split(".")[0] == "report" for imported in imports(path)), name


FORMULAS = ["math.h", "scalar.h", "rounding.h"]
CUDA = ["cuda.h", "cuda_pieces.cuh", "cuda_scalars.cuh", "cuda_rounding.cuh", "cuda_launch.cuh", "cuda.cu"]


def includes(name):
    return set(re.findall(r'#include ["<]([^">]+)', (ROOT / "csrc" / name).read_text()))


@pytest.mark.parametrize(
    "name", ["math.h", "scalar.h", "rounding.h", "flat.h", "groups.h", "cpu.h", "cpu_loops.h", "cpu.cpp", *CUDA]
)
def test_formulas_and_indexing_know_no_torch(name):
    assert not any(header.startswith(("ATen", "torch", "c10", "pybind11")) for header in includes(name))


def test_formulas_know_no_indexing_and_indexing_no_formulas():
    assert includes("math.h") == {"cmath"}
    for name in ("flat.h", "cuda_pieces.cuh", "cuda_launch.cuh"):
        assert "math.h" not in includes(name)
    assert not re.search(r"\[\w*\]|for \(", (ROOT / "csrc" / "math.h").read_text())


def test_torch_alone_is_needed_at_run_time():
    """The extras must not be imported by the package, nor by `info`."""
    extras = [
        "numpy",
        "scipy",
        "matplotlib",
        "jinja2",
        "rich",
        "sklearn",
        "triton",
        "pytest",
        "lightning",
        "transformers",
        "accelerate",
    ]
    hidden = "; ".join(f"sys.modules[{name!r}] = None" for name in extras if name != "numpy")
    mixins = "import bsam_fused.integrations.lightning, bsam_fused.integrations.transformers"
    code = f"import sys; {hidden}; {mixins}; import bsam_fused.cli; raise SystemExit(bsam_fused.cli.main(['info']))"
    result = processes.run([sys.executable, "-c", code], cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_no_file_is_long():
    for path in [
        *PACKAGE.rglob("*.py"),
        *(ROOT / "csrc").iterdir(),
        *(ROOT / "tests").glob("*.py"),
        *(ROOT / "bench").glob("*.py"),
    ]:
        assert len(path.read_text().splitlines()) <= 500, path
