"""Triton's interpreter, for tests without a GPU: imported before triton is, with GPUs' bfloat16, and faster."""

import functools
import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from bsam_fused.ops import triton_flat

_cast = interpreter.InterpreterBuilder.cast_impl


def _cast_bfloat16(self, src, dst_type):
    """The interpreter keeps bfloat16 as its bits, and cuts float32 off where GPUs round to nearest even."""
    kinds = src.dtype.scalar, dst_type.scalar
    if kinds == (tl.bfloat16, tl.float32):
        bits = src.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
    if kinds == (tl.float32, tl.bfloat16):
        bits = src.data.view(np.uint32)
        rounded = (bits + (0x7FFF + (bits >> 16 & 1)).astype(np.uint32)) >> 16
        rounded = np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16)
        return interpreter.TensorHandle(rounded, tl.bfloat16)
    if tl.bfloat16 in kinds and kinds[0] != kinds[1] and src.data.any():  # 0 has the same bits everywhere
        raise NotImplementedError(f"{kinds[0]} to {kinds[1]}: go through float32, as the kernels do")
    return _cast(self, src, dst_type)


_of_scalar = functools.cache(interpreter._get_np_dtype)
_patch = interpreter._patch_lang
_run = interpreter.GridExecutor.__call__


def _np_dtype(dtype):
    """As the interpreter has it, which makes a table of all types at every call."""
    scalar = dtype.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _of_scalar(scalar)


@functools.cache
def _patch_for_good(fn):
    """Patch the language for a function, and never back: at each call it was a sixth of the time."""
    _patch(fn)
    return interpreter._LangPatchScope()  # with nothing to restore


def _run_quietly(self, *args, **kwargs):
    with np.errstate(all="ignore"):  # no GPU warns of a NaN
        return _run(self, *args, **kwargs)


triton_flat.CHUNK = dict.fromkeys(triton_flat.CHUNK, 8192)  # the fewer chunks, the faster
interpreter.InterpreterBuilder.cast_impl = _cast_bfloat16
interpreter._patch_lang = _patch_for_good
interpreter._get_np_dtype = _np_dtype
interpreter.GridExecutor.__call__ = _run_quietly
