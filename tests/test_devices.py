"""Devices and streams that are not the current ones: who is asked about, what waits for whom.

Without a GPU: stand-ins note which device was the current one at each question, and which stream a note was made on.
"""

import gc
import types
import weakref

import graphed
import host_cuda
import host_graphs
import pytest
import torch
from samples import assign, gradients
from torch import nn

from bsam_fused import SAM, distributed
from bsam_fused.graphs import GraphedStep
from bsam_fused.ops import dispatch, flat_buffers, native_flat, torch_flat, triton_flat

ELSEWHERE = torch.device("cuda", 1)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for GPUs")


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, of which the first is the current one."""
    gpus = host_graphs.Cuda()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: host_graphs.On(gpus, torch.device(device).index))
    return gpus


@without_gpu
def test_cuda_kernels_are_looked_for_on_the_tensors_device(gpus, monkeypatch):
    """A question about the current device makes a context there: of every rank on GPU 0, hundreds of MB each."""
    asked = []

    def obstacle():
        asked.append(gpus.device)
        return "no kernel image"

    module = types.SimpleNamespace(CudaFlatParams=None, cuda_obstacle=obstacle)
    monkeypatch.setattr(native_flat, "load", lambda: (module, ""))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(native_flat, "why_no_cuda", native_flat.why_no_cuda.__wrapped__)
    why = dispatch.unavailable("cuda", ELSEWHERE)
    assert "do not run on GPU 1 (no kernel image)" in why
    assert (asked, gpus.device) == ([1], 0)


@without_gpu
def test_triton_looks_for_the_tensors_device(gpus, monkeypatch):
    import triton

    asked = []
    active = types.SimpleNamespace(get_current_target=lambda: asked.append(gpus.device))
    monkeypatch.setattr(triton.runtime.driver, "_active", active, raising=False)
    assert triton_flat.why_not.__wrapped__(ELSEWHERE) == ""
    assert (asked, gpus.device) == ([1], 0)


@without_gpu
@pytest.mark.parametrize(("capturing", "refused"), [(1, True), (0, False)])
def test_a_capture_is_looked_for_on_the_tensors_device(gpus, monkeypatch, capturing, refused):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpus.device == capturing)
    assert flat_buffers.is_capturing(ELSEWHERE) is refused
    assert not flat_buffers.is_capturing(torch.device("cpu"))


class OnGpu(torch.Tensor):
    """Says of itself that it is on the second GPU, as what comes of it does."""

    device = ELSEWHERE
    is_cpu = False


@without_gpu
def test_ranks_notice_arrives_on_the_rows_stream(monkeypatch):
    """Recorded elsewhere, the event says at once that the notice has come, and the host reads what is not there yet."""
    recorded, ready = [], False

    class Event:
        def record(self, stream):
            recorded.append(stream)

        def query(self):
            return ready

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory, **how: empty(*shape, **how))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"of {device}")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    exchange = distributed.Exchange(None)
    monkeypatch.setattr(exchange, "_gather", lambda row: torch.stack([row, row + 1]))
    row = torch.ones(2, dtype=torch.float64).as_subclass(OnGpu)
    rows = exchange(row, [3.0], ["they differ"])
    assert recorded == [f"of {ELSEWHERE}"]
    assert torch.Tensor.isnan(rows).all()  # every rank skips
    ready = True
    with pytest.raises(RuntimeError, match="the 2 ranks disagree: they differ"):
        exchange(row, [3.0], ["they differ"])


def parameters():
    """A scalar, a small one, one whose gradient is taken as it is, one that is laid out otherwise than its gradient."""
    shapes = [(), (3,), (40, 41), (5, 4)]
    return [nn.Parameter(torch.full(shape, 0.5)) for shape in shapes]


def grads_of(params, k):
    assign(params, gradients(params, k))
    params[-1].grad = params[-1].grad.t().contiguous().t()
    return [p.grad for p in params]


def test_memory_of_gradients_waits_for_this_stream():
    """Every gradient that a phase reads, whatever becomes of it: taken, copied, staged, or left in .grad."""
    take_record = host_graphs.shim().shim_take_record
    params = parameters()
    flat = host_cuda.flat_params(params, [(0, i) for i in range(len(params))], None, False)
    for k in range(3):
        grads = grads_of(params, k)
        flat.read_gradients()
        memory = [g.untyped_storage().data_ptr() for g in grads]
        assert [bool(take_record(host_graphs.ctypes.c_void_p(address))) for address in memory] == [True] * len(params)


@without_gpu
def test_memory_of_gradients_waits_for_this_stream_in_python(monkeypatch):
    recorded = []
    params = parameters()
    flat = torch_flat.TorchFlatParams(params, [(0, i) for i in range(len(params))], None, False)
    flat.device = ELSEWHERE
    monkeypatch.setattr(flat, "_empty", lambda i: torch.empty_like(params[i]))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda grad, stream: recorded.append((grad, stream)))
    grads = grads_of(params, 1)
    flat.read_gradients()
    assert [stream for _, stream in recorded] == [f"of {ELSEWHERE}"] * len(params)
    assert all(grad is made for (grad, _), made in zip(recorded, grads))


@graphed.where
def test_what_stays_is_allocated_on_the_callers_stream(backend, captures):
    """Flat buffers of a stream that only the warm-up ran on would be given back to it, while others still use them."""
    model = graphed.network()
    opt = graphed.optimizer(SAM, model)
    streams, home = [], host_graphs.HOME

    def loss_fn(output, target):
        streams.append(torch.cuda.current_stream())
        return graphed.loss_fn(output, target)

    caller = captures.streams[home] if captures else torch.cuda.current_stream()
    GraphedStep(model, loss_fn, opt, graphed.data(0))
    here = [stream == caller for stream in streams]
    assert here[:2] == [True, True]  # both passes of the first step
    assert not any(here[2:])


@graphed.where
def test_a_graph_keeps_the_memory_that_it_reads(backend, captures):
    """Triton's launches in it read tables in pinned host memory, which FlatParams have."""
    model = graphed.network()
    opt = graphed.optimizer(SAM, model)
    step = GraphedStep(model, graphed.loss_fn, opt, graphed.data(0))
    flats = [weakref.ref(flat) for flat in opt._flats]
    opt.load_state_dict(opt.state_dict())
    del opt, step._optimizer
    gc.collect()
    assert flats
    assert all(flat() is not None for flat in flats)
