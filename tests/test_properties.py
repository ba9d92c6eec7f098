"""Any shapes, groups and missing gradients: the compiled backend and the readable one go the same way."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import BLOCK, TOLERANCE, assign, gradients

import bsam_fused

# Around the sizes where tiles, lanes and blocks end, and anything small between.
EDGES = [n + d for n in (16, 64, 1024, BLOCK) for d in (-1, 0, 1)]
NUMELS = st.one_of(st.integers(0, 200), st.sampled_from(EDGES))
General = type("General", (torch.optim.SGD,), {})  # a subclass takes the general path
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    numels=st.lists(NUMELS, min_size=1, max_size=12),
    dtype=DTYPES,
    kind=st.sampled_from([bsam_fused.SAM, bsam_fused.BSAM]),
    base=st.sampled_from([torch.optim.SGD, torch.optim.AdamW, General]),
    adaptive=st.booleans(),
    data=st.data(),
)
def test_backends_agree(numels, dtype, kind, base, adaptive, data):
    indices = st.sets(st.integers(0, len(numels) - 1), max_size=len(numels) - 1)  # a pass has some gradient
    without = [data.draw(indices, label="without") for _ in range(3)]
    groups = data.draw(st.lists(st.integers(0, 2), min_size=len(numels), max_size=len(numels)), label="groups")
    torch.manual_seed(0)
    values = [torch.randn(n).to(dtype) for n in numels]
    sides = []
    for backend in ("cpp", "torch"):
        params = [torch.nn.Parameter(v.clone()) for v in values]
        cut = [[p for p, g in zip(params, groups) if g == k] for k in range(3)]
        options = [{"params": ps, "rho": 0.1 * (k + 1), "lr": 0.1 / (k + 1)} for k, ps in enumerate(cut)]
        sides.append((params, kind(options, base, adaptive=adaptive, eta=0.1, backend=backend, lr=0.1)))
    for t in range(2 * len(sides[0][1]._calls)):
        call = sides[0][1]._calls[t % len(sides[0][1]._calls)]
        grads = gradients(values, t, without[t % 3])
        for params, opt in sides:
            assign(params, grads)
            getattr(opt, call)()
        for p, q in zip(sides[0][0], sides[1][0]):
            tol = 4 * TOLERANCE[dtype]
            torch.testing.assert_close(p, q, rtol=tol, atol=tol)
