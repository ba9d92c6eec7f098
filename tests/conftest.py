"""What all tests share."""

import pytest
import torch

from bsam_fused.ops import dispatch

BACKENDS = ["torch", "cpp"]


@pytest.fixture(autouse=True)
def _seeded(request):
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Every backend on CPU tensors. A missing one fails: the suite must not pass without it."""
    assert dispatch.unavailable(request.param, "cpu") is None
    return request.param
