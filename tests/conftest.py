"""What all tests share."""

import host_cuda
import pytest
import torch

if not torch.cuda.is_available():
    import interpreted  # noqa: F401  before anything imports triton

from bsam_fused.ops import dispatch

ON_GPU = [pytest.param(name, marks=pytest.mark.cuda) for name in ("cuda", "triton")]
BACKENDS = ["torch", "cpp", "cuda-on-host", "triton-interpreted", *ON_GPU]


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def _seeded(request):
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Every backend. A missing one fails: the suite must not pass without it.

    "cuda-on-host" is the CUDA backend's own source on CPU tensors (tests/shim), "triton-interpreted" the Triton backend
    on CPU tensors; "cuda" and "triton" make the GPU the device of all tensors that the test makes.
    """
    if request.param == "triton-interpreted":
        if torch.cuda.is_available():
            pytest.skip("with a GPU the Triton kernels run there: a process has either them or the interpreter")
        yield "triton"
        return
    if request.param == "cuda-on-host":
        monkeypatch.setitem(dispatch._FACTORIES, "cuda", host_cuda.flat_params)
        unavailable = dispatch.unavailable
        monkeypatch.setattr(
            dispatch, "unavailable", lambda name, device: None if name == "cuda" else unavailable(name, device)
        )
        yield "cuda"
        return
    device = "cuda" if request.param in {"cuda", "triton"} else "cpu"
    assert dispatch.unavailable(request.param, device) is None
    if device == "cpu":
        yield request.param
        return
    with torch.device(device), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield request.param
