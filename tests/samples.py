"""The sample inputs that feed every correctness test of every backend, and why each would expose a bug."""

import os

import torch

BLOCK = 16384  # csrc/flat.h's kBlock

SHAPES = {
    # One element: no vector, all tail.
    "one": [(1,)],
    # Scalars and tensors without elements between others: offsets, and no division by their count.
    "scalars_and_empty": [(), (0,), (3,), (0, 4), (1, 1, 1)],
    # No multiple of any vector width or of the 16 lanes of a sum; two of them in one block.
    "odd": [(7,), (33, 5), (127,), (1031,)],
    # One short of, at and one past the ends of blocks and tiles; one tensor over three blocks.
    "block_edges": [(BLOCK - 1,), (2,), (BLOCK,), (1024,), (1025,), (2 * BLOCK + 5,)],
    # The same of the chunks that a GPU's blocks of threads take at a time: 2048 elements, 1024 of float64.
    "chunk_edges": [(2047,), (2048,), (2049,), (4096,), (1023,), (6145,)],
    # More tensors than one block holds pieces of the same size, each its own cache line.
    "many": [(13,)] * 40,
}

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# Of a value, one rounding (of 16 bits stochastic: to either neighbour) and a few more of float32 arithmetic before it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8.5e-3, torch.float16: 1.1e-3}


def normal(*shape, dtype, drawn=torch.float32):
    """Random numbers on the default device: the CPU's, so that all devices have the same."""
    return torch.randn(shape, dtype=drawn, device="cpu").to(torch.get_default_device(), dtype)


def parameters(name, dtype=torch.float32, scale=1.0):
    return [torch.nn.Parameter((normal(*shape, dtype=torch.float32) * scale).to(dtype)) for shape in SHAPES[name]]


def strided(dtype=torch.float32):
    """Parameters whose memory order is not their index order, and one with gaps in its memory."""
    transposed = normal(9, 5, dtype=dtype, drawn=torch.float64).t()
    channels_last = normal(4, 3, 5, 2, dtype=dtype).to(memory_format=torch.channels_last)
    gaps = normal(6, 8, dtype=dtype)[:, ::2]
    return [torch.nn.Parameter(t) for t in (transposed, channels_last, gaps, normal(11, dtype=dtype))]


def misaligned(dtype=torch.float32):
    """Parameters that begin at no multiple of 16 bytes, each at another distance from one."""
    numels = (5, 1031, 2048, 63)
    return [torch.nn.Parameter(normal(n + 1 + i, dtype=dtype)[1 + i :]) for i, n in enumerate(numels)]


def gradients(params, seed, without=()):
    """Random gradients in each parameter's dtype and strides, None for the indices in ``without``."""
    generator = torch.Generator("cpu").manual_seed(seed)
    grads = []
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64, device="cpu").to(p.dtype)
        grads.append(None if i in without else torch.empty_like(p, requires_grad=False).copy_(g))
    return grads


def assign(params, grads):
    """Leave each gradient to its parameter alone, as autograd does."""
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone(memory_format=torch.preserve_format)


def interpreted(backend):
    """Whether Triton's interpreter runs the backend, at some milliseconds a tensor and launch."""
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
