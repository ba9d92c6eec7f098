"""What all tests share."""

import host_cuda
import pytest
import torch

from bsam_fused.ops import dispatch

BACKENDS = ["torch", "cpp", "cuda-on-host", pytest.param("cuda", marks=pytest.mark.cuda)]


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def _seeded(request):
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Every backend. A missing one fails: the suite must not pass without it.

    "cuda-on-host" is the CUDA backend's own source on CPU tensors (tests/shim); "cuda" makes the GPU the device of
    all tensors that the test makes.
    """
    if request.param == "cuda-on-host":
        monkeypatch.setitem(dispatch._FACTORIES, "cuda", host_cuda.flat_params)
        unavailable = dispatch.unavailable
        monkeypatch.setattr(
            dispatch, "unavailable", lambda name, device: None if name == "cuda" else unavailable(name, device)
        )
        yield "cuda"
        return
    device = "cuda" if request.param == "cuda" else "cpu"
    assert dispatch.unavailable(request.param, device) is None
    if device == "cpu":
        yield request.param
        return
    with torch.device(device), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield request.param


@pytest.fixture
def one_thread():
    """For small networks: threads would wait for each other, the longer the busier the machine is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
