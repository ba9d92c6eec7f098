"""The guard of the public API, tests/public_api, sees what breaks users, and that alone."""

import shutil

import pytest
from public_api import PACKAGE, ROOT, broken, stub
from public_api.__main__ import wrong

GONE = "Public object was removed"
NO_PARAMETER = "Parameter was removed"
BREAKS = [
    ("optim/sam.py", "rho: float = 0.05", "rho: float = 0.1", "SAM.__init__(rho): Parameter default was changed"),
    ("optim/gsam.py", "alpha: float", "share: float", f"GSAM.__init__(alpha): {NO_PARAMETER}"),  # not base_kwargs
    ("optim/looksam.py", "k: int = 5", "k: int", "LookSAM.__init__(k): Parameter is now required"),
    ("optim/base.py", "def metrics(", "def figures(", f"WSAM.metrics: {GONE}"),  # inherited
    ("__init__.py", '    "BSAM",\n', "", f"BSAM: {GONE}"),
    ("__init__.py", '    "losses",\n', "", f"losses: {GONE}"),
    ("schedules/policies.py", "scale_radius", "scale", f"schedules.EveryKth.__init__(scale_radius): {NO_PARAMETER}"),
    ("sharpness/__init__.py", '    "measure",\n', "", f"sharpness.measure: {GONE}"),
    ("integrations/lightning.py", "def log(", "def tell(", f"integrations.lightning.SharpnessAwareMixin.log: {GONE}"),
]
BREAKS_NOBODY = [
    ("optim/sam.py", "rho: float = 0.05", "more: float = 1.0, rho: float = 0.05"),
    ("optim/base.py", "def _choices(", "def _chosen("),
    ("ops/dispatch.py", "def choose(", "def chosen("),
]


@pytest.fixture(scope="module")
def today():
    return stub()


def edited(folder, edits):
    """The public API of a copy of the package with other words in some files."""
    shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file, old, new in edits:
        path = folder / PACKAGE / file
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    return stub(folder)


@pytest.fixture(scope="module")
def told(today, tmp_path_factory):
    return broken(today, edited(tmp_path_factory.mktemp("broken"), [edit[:3] for edit in BREAKS]))


@pytest.mark.parametrize("says", [says for *_, says in BREAKS])
def test_what_breaks_users(told, says):
    assert any(line.startswith(says) for line in told)


def test_what_breaks_nobody(today, tmp_path):
    assert broken(today, edited(tmp_path, BREAKS_NOBODY)) == []


OLD = "def f(a, b=1): ...\ndef g(): ...\n"
NEW = "def f(a, b=2): ...\n"
F, G = "f(b): Parameter default was changed: 1 -> 2", f"g: {GONE}"


@pytest.mark.parametrize(
    ("allowed", "changelog", "faults"),
    [
        ([F, G], "`f` has b = 2; `g` is gone", []),
        ([F], "`f` has b = 2", [f"breaks the last release: {G}"]),
        ([F, G], "`f` has b = 2", ["not in the changelog: `g`"]),
        ([F, G, "h: gone"], "`f`, `g`, `h`", ["allowed, but not so: h: gone"]),
    ],
)
def test_what_the_changelog_names_is_allowed(allowed, changelog, faults):
    assert wrong(OLD, NEW, allowed, changelog) == faults
