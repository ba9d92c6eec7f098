"""`bsam-fused info`: what is installed, which backends work here, and if not, why."""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from bsam_fused.ops import dispatch, native_flat
from bsam_fused.report.machine import this_machine

_DEVICE_TYPES = {"cuda": "cuda", "triton": "cuda", "cpp": "cpu", "torch": "cpu"}


def run(*, as_json: bool) -> int:
    """Print what is known, for people or for programs; return the exit status, 0."""
    known = known_here()
    print(json.dumps(known, indent=2) if as_json else "\n".join(_lines(known)))
    return 0


def known_here() -> dict[str, Any]:
    """Return versions, backends and choices, in the order in which people read them."""
    machine = this_machine()
    return {
        "versions": {
            "bsam_fused": machine.bsam_fused,
            "python": machine.python,
            "torch": machine.torch,
            "cuda": torch.version.cuda,
        },
        "machine": {"cpu": machine.cpu, "threads": machine.threads, "gpus": _gpus()},
        "extension": _extension(),
        "backends": {backend: dispatch.unavailable(backend, _DEVICE_TYPES[backend]) for backend in dispatch.BACKENDS},
        "chosen": {device: _choice(device) for device in (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])},
        dispatch.VARIABLE: os.environ.get(dispatch.VARIABLE),
    }


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _extension() -> dict[str, Any] | None:
    module, _ = native_flat.load()
    if module is None:
        return None
    return {
        "file": module.__file__,
        "torch": module.torch_version,
        "instruction_set": module.instruction_set(),
        "cuda_kernels": hasattr(module, "CudaFlatParams"),
    }


def _choice(device: str) -> str:
    """Return the backend that runs for tensors on a device, or why none does."""
    try:
        choice = dispatch.choose("auto", torch.device(device))
    except (RuntimeError, ValueError) as error:
        return f"none: {error}"
    return f"{choice.backend} ({choice.why})" if os.environ.get(dispatch.VARIABLE) else choice.backend


# ---- for people


def _lines(known: dict[str, Any]) -> list[str]:
    versions, machine = known["versions"], known["machine"]
    cuda = f"{versions['cuda']}; {', '.join(machine['gpus']) or 'no GPU'}" if versions["cuda"] else "none"
    requested = known[dispatch.VARIABLE] or "not set"
    sections = {
        "Versions": {
            "bsam_fused": versions["bsam_fused"],
            "Python": versions["python"],
            "torch": versions["torch"],
            "CUDA": cuda,
            "CPU": f"{machine['cpu']}; torch threads: {machine['threads']}",
        },
        "Backends": _backends(known),
        "Chosen by backend='auto'": {
            **{f"{device} tensors": choice for device, choice in known["chosen"].items()},
            dispatch.VARIABLE: requested,
        },
    }
    return [
        line
        for title, rows in sections.items()
        for line in (title, *(f"  {name:<19} {text}" for name, text in rows.items()))
    ]


def _backends(known: dict[str, Any]) -> dict[str, str]:
    """Return a row a backend; a reason that two of them have is told once."""
    rows: dict[str, str] = {}
    told: dict[str | None, str] = {}
    for backend, reason in known["backends"].items():
        same = told.setdefault(reason, backend)
        rows[backend] = f"not available: {reason if same == backend else f'as {same}'}" if reason else "available"
    if known["extension"]:
        extension = known["extension"]
        rows["cpp"] += f"; {extension['instruction_set']}, built for torch {extension['torch']}: {extension['file']}"
    return rows
