"""The Triton backend's host side: what it imports, why it cannot be had, how often it launches and writes tables."""

import contextlib
import importlib.metadata
import importlib.util
import itertools
import math
import sys
import textwrap
from types import SimpleNamespace

import processes
import pytest
import torch
from cut_short import cut_short
from samples import assign, gradients

import bsam_fused
from bsam_fused.ops import triton_flat

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")


def steps(opt, params, count, seed=0):
    for t in range(count):
        for k, call in enumerate(opt._calls):
            assign(params, gradients(params, seed + 10 * t + k))
            getattr(opt, call)()


def test_no_kernels_are_imported_before_they_are_used():
    """torch's own Optimizer may import triton; that a missing one is no matter, test_layers.py tells."""
    code = """
        import sys, torch, bsam_fused
        bsam_fused.SAM([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        raise SystemExit("bsam_fused.ops.triton_kernels" in sys.modules)
    """
    assert processes.run([sys.executable, "-c", textwrap.dedent(code)]).returncode == 0


PINS = {"": [], "new": ['triton==3.7.1; platform_system == "Linux"'], "old": ["filelock", "triton==3.2.0; x"]}


@pytest.mark.parametrize(
    ("device", "gpu", "version", "pin", "why"),
    [
        ("cpu", True, "3.7.1", "", "triton works on CUDA tensors, not on cpu"),
        ("mps", True, "3.7.1", "", "triton works on CUDA tensors, not on mps"),
        ("cuda", False, "3.7.1", "", "torch sees no GPU"),
        ("cuda", False, None, "new", "torch sees no GPU"),  # where none of the advice would help
        ("cuda", True, None, "", "triton is not installed: pip install 'triton>=3.4'"),
        ("cuda", True, None, "new", "triton is not installed: pip install triton==3.7.1"),
        ("cuda", True, "3.3.1", "new", "triton 3.3.1 is older than 3.4: pip install triton==3.7.1"),
        (
            "cuda",
            True,
            "3.2.0",
            "old",
            f"triton 3.2.0 is older than 3.4, and torch {torch.__version__} needs triton 3.2.0",
        ),
    ],
)
def test_why_it_cannot_be_had(monkeypatch, device, gpu, version, pin, why):
    """The advice never breaks torch's pin, as torch's own metadata have it."""
    import triton

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(importlib.metadata, "requires", {"torch": PINS[pin]}.get)
    if version is None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton_flat.why_not.__wrapped__(torch.device(device)).split(": a newer")[0] == why


def test_a_missing_way_to_launch_is_told(monkeypatch):
    import triton

    class Active:
        def get_current_target(self):
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(triton.runtime.driver, "_active", Active(), raising=False)
    assert "Failed to find C compiler" in triton_flat.why_not.__wrapped__(torch.device("cuda", 1))


@pytest.mark.parametrize(("kind", "launches"), [(bsam_fused.SAM, 4), (bsam_fused.BSAM, 5)])
def test_launches_whatever_the_groups(monkeypatch, kind, launches):
    params = [torch.nn.Parameter(torch.randn(3 + i)) for i in range(6)]
    groups = [{"params": [p], "lr": 0.1 / (1 + i)} for i, p in enumerate(params)]
    opt = kind(groups, momentum=0.9, backend="triton")
    count = 0
    prepared = triton_flat.TritonFlatParams._prepared

    def counted(*args, **kwargs):
        launch = prepared(*args, **kwargs)

        def counts():
            nonlocal count
            count += 1
            return launch()

        return counts

    monkeypatch.setattr(triton_flat.TritonFlatParams, "_prepared", counted)
    steps(opt, params, 2)
    assert count == 2 * launches


def test_tables_are_written_only_where_they_changed(monkeypatch):
    """Gradients return to the same addresses; a new learning rate writes BSAM's radius and the update's options."""
    params = [torch.nn.Parameter(torch.randn(n)) for n in (3000, 5, 2000)]
    opt = bsam_fused.BSAM(params, lr=0.1, momentum=0.9, backend="triton")
    slots = [[torch.zeros_like(p) for p in params] for _ in opt._calls]

    def step():
        for call, slot in zip(opt._calls, slots, strict=True):
            for p, g in zip(params, slot, strict=True):
                p.grad = g.normal_()
            getattr(opt, call)()

    for _ in range(2):
        step()
    written = []
    on_host = triton_flat._Table._on_host
    monkeypatch.setattr(
        triton_flat._Table, "_on_host", lambda table, rows: written.append(rows) or on_host(table, rows)
    )
    step()
    assert written == []
    opt.param_groups[0]["lr"] = 0.05
    step()
    assert [len(rows[0]) for rows in written] == [7, 8]
    for g in slots[1]:
        g.data = g.clone()
    step()
    assert len(written) == 3


def test_a_table_whose_writing_is_cut_short_is_written_again():
    """The new rows may be on the device already when those of before are asked for."""
    old, new = [(1.0,)], [(2.0,)]
    for line in itertools.count(1):
        table = triton_flat._Table(old, torch.float64, torch.device("cpu"))
        table.write(old)
        cut = cut_short(SimpleNamespace(watched=True), lambda _: table.write(new), line, KeyboardInterrupt())  # noqa: B023
        if cut.where is None:
            break
        assert table.write(old).item() == 1, cut.where
    assert line > 3


@pytest.mark.parametrize("held", ["nobody", "python", "a view", "another tensor"])
def test_a_gradient_is_taken_where_nobody_else_holds_it(held):
    p = torch.nn.Parameter(torch.randn(5000))
    opt = bsam_fused.BSAM([p], lr=0.1, backend="triton")
    bucket = torch.randn(6000)
    p.grad = bucket[:5000] if held == "a view" else torch.randn(5000)
    keeper = {"python": p.grad, "another tensor": p.grad.detach()}.get(held)
    if held != "a view":
        del bucket
    address = p.grad.data_ptr()
    opt.ascend()
    (flat,) = opt._flats
    assert (flat._g[0].data_ptr() == address) == (held == "nobody")
    assert p.grad is None
    del keeper


def test_options_are_written_where_captured_phases_read_them():
    """Also η, of which the norm has a table of its own."""
    p = torch.nn.Parameter(torch.randn(9))
    opt = bsam_fused.BSAM([p], lr=0.1, momentum=0.9, adaptive=True, eta=0.1, backend="triton")
    steps(opt, [p], 1)
    opt.param_groups[0].update(lr=0.05, eta=0.3, rho=0.7)
    opt.write_options()
    (flat,) = opt._flats
    rows = {name: table.rows[0] for name, table in flat._tables.items()}
    assert rows["square_norm 0"] == (0.0, True, 0.3, 0.0, math.inf, 0.0, flat.limit)
    assert rows["ascend"] == (0.7, True, 0.3, 0.7, math.inf, opt.norm_eps, flat.limit)
    radius = rows["descend"][3]
    assert radius == pytest.approx(0.05 * 0.5)
    assert rows["descend"] == (-radius, True, 0.3, radius, math.inf, opt.norm_eps, flat.limit)
    assert rows["update"][0] == 0.05
