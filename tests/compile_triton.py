"""Have Triton prepare launches of the kernels for GPUs that need not be there; in a process without the interpreter.

All that a first launch does is done, by Triton's own code: arguments bound by name, their types and alignment seen,
kernels compiled. Only the driver, which says which GPU it is, is none.

    python tests/compile_triton.py cuda:80 cuda:90 hip:gfx942

prints, as JSON, what came out of every kernel and dtype, in the variant that does most.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bsam_fused.ops import triton_flat, triton_kernels, triton_updates
from bsam_fused.ops.contract import Rule

DTYPES = {"float32": tl.float32, "float64": tl.float64, "bfloat16": tl.bfloat16, "float16": tl.float16}
CHUNK = {name: triton_flat.CHUNK[dtype.primitive_bitwidth // 8] for name, dtype in DTYPES.items()}
KERNELS = ("square_norm", "mix", "direction_sums", "ascend", "descend", "direction", "remember")
KERNELS += ("update_sgd", "update_adam")
ADDRESS, NUMBER = 1 << 40, 1001
ARGUMENTS = {
    torch.int64: ("tensors", "pointers", "step_count", "skipped"),
    torch.int32: ("map", "ticket"),
    torch.float64: ("rows", "numbers", "sums", "own_sums", "partials"),
    torch.float32: ("steps",),
    NUMBER: ("chunks", "count", "slot", "square_slot"),
    ADDRESS: ("saved", "master", "momentum_buffer", "exp_avg", "exp_avg_sq", "history"),
}
"""Tensors by their dtype, and numbers, by the names that the kernels give them."""
RULE = Rule.EXTRAPOLATED.value  # it takes the most scalars and sums
REMEMBERING = {"remember": Rule.FRIENDLY.value}
GIVEN = {
    name: torch.zeros(16, dtype=kind) if isinstance(kind, torch.dtype) else kind
    for kind, names in ARGUMENTS.items()
    for name in names
}
ACCESSES = {
    "ptx": (r"ld\.global\S*\.(v4\.b32|v2\.b64)", r"st\.global\S*\.(v4\.b32|v2\.b64)"),
    "amdgcn": (r"(global|buffer)_load_dwordx4", r"(global|buffer)_store_dwordx4"),
}


class Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)  # Triton keeps kernels by it

    def get_current_stream(self, device):
        return 0


def compiled(target, name, dtype):
    kernel = getattr(triton_kernels, name, None) or getattr(triton_updates, name)
    size = DTYPES[dtype].primitive_bitwidth // 8
    wide = {"S": DTYPES[dtype], "T": tl.float64 if dtype == "float64" else tl.float32}
    flags = {"STOCHASTIC": size == 2, "MASTER": size == 2, "RULE": REMEMBERING.get(name, RULE), "FROM_SAVED": True}
    constants = {**wide, "CHUNK": CHUNK[dtype], "MOST": torch.finfo(getattr(torch, dtype)).max, **flags}
    arguments = {key: {**GIVEN, **constants}[key] for key in kernel.arg_names}
    driver.set_active(Driver(target))
    how = {"num_warps": triton_flat.THREADS // target.warp_size, "enable_fp_fusion": False}
    return kernel.warmup(**arguments, **how, grid=(1,))


def spilled_by_ptxas(ptx):
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    arch = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", f"-arch={arch}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report)]


def summary(kernel):
    form = "ptx" if "ptx" in kernel.asm else "amdgcn"
    code = kernel.asm[form]
    loads, stores = (sum(1 for _ in re.finditer(pattern, code)) for pattern in ACCESSES[form])
    spills = spilled_by_ptxas(code) if form == "ptx" else [*map(int, re.findall(r"vgpr_spill_count:\s*(\d+)", code))]
    return {
        "loads": loads,
        "stores": stores,
        "spills": spills,
        "approximate": len(re.findall(r"\.(approx|full)\.f32", code)),
        "hashes": len(re.findall(r"mul\.lo\.\S+ .*(2146121005|-2073254261)", code)),  # triton_rounding.py's multipliers
    }


def main(targets):
    found = {}
    for text in targets:
        backend, arch = text.split(":")
        target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, 64 if backend == "hip" else 32)
        for name, dtype in itertools.product(KERNELS, DTYPES):
            shape = {"chunk": CHUNK[dtype], "threads": triton_flat.THREADS}
            found[f"{text} {name} {dtype}"] = {**shape, **summary(compiled(target, name, dtype))}
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
