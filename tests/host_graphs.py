"""CUDA's devices, streams and graphs on the host: a stand-in for what graphs.py uses of torch.cuda.

A capture records the device work: each operation of torch below autograd, and each launch of the CUDA backend's own
kernels with its parameters (tests/shim). A replay runs these, in order, over the memory of the capture; none of our
Python runs. As on a GPU, the capture leaves all memory as it was and gives no number to the host.

There are two devices. The tensors, which torch has on the CPU, count as on the second one, and the first one is the
current one. Only what goes to the stream of a capture is captured; else it runs. `torch.cuda.graph` itself is torch's.

What it does not show: order between streams; memory of the capture used twice, or freed (the record holds all of it,
so gradients have other holders and are copied, not taken); the Triton backend; what else CUDA refuses to capture.
"""

import ctypes
import functools

import host_cuda
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from bsam_fused import graphs
from bsam_fused.ops import copies
from bsam_fused.optim.flats import Flats
from bsam_fused.optim.state import StateViews

HOME = 1  # the tensors' device


@functools.cache
def shim():
    return ctypes.CDLL(host_cuda.module().__file__)


class Record(TorchDispatchMode):
    """The device work of a capture."""

    def __init__(self):
        super().__init__()
        self.work = []
        self._launched = shim().shim_captured()
        self._before = {}  # storages as the capture found them
        self._drawn = torch.get_rng_state()
        self.failed = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.failed = True
            raise RuntimeError("operation not permitted when stream is capturing")
        self._note_launches()
        call = func, tree_map_only(torch.Tensor, _alias, args), tree_map_only(torch.Tensor, _alias, kwargs or {})
        for tensor in _tensors(call):
            storage = tensor.untyped_storage()
            self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **(kwargs or {}))
        self.work.append((*call, [*map(_alias, _tensors(result))]))
        return result

    def _note_launches(self):
        now = shim().shim_captured()
        self.work += range(self._launched, now)
        self._launched = now

    def end(self):
        """Note the last launches; make memory what it was."""
        self._note_launches()
        for storage, value in self._before.values():
            storage.copy_(value)
        torch.set_rng_state(self._drawn)

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():
            for one in self.work:
                if isinstance(one, int):
                    shim().shim_launch(one)
                else:
                    func, args, kwargs, results = one
                    for result, place in zip(_tensors(func(*args, **kwargs)), results, strict=True):
                        if result.data_ptr() != place.data_ptr():
                            place.copy_(result)


def _tensors(tree):
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def _alias(tensor):
    """Return a tensor over the same memory that nobody else can exchange or lay out anew."""
    return tensor.data


class Stream:
    """A stream of the current device."""

    def __init__(self, cuda):
        self.device = cuda.device

    def wait_stream(self, other):
        """Nothing: work runs as it is called."""


class Cuda:
    """torch.cuda, as graphs.py uses it."""

    def __init__(self):
        self.device = 0
        self.streams = [None, None]
        self.streams = [Stream(self), Stream(self)]
        self.error_modes = []
        self.draws_are_captured = False  # told by the begin of a capture, and by its end if that is a good one

    def current_stream(self):
        return self.streams[self.device]

    def graph(self):
        """torch.cuda.CUDAGraph."""
        return Graph(self)


class On:
    """torch.cuda.device and torch.cuda.stream; like these no generator, which would go back when it is freed."""

    def __init__(self, cuda, device, stream=None):
        self._cuda, self._device, self._stream = cuda, device, stream

    def __enter__(self):
        cuda = self._cuda
        self._before = cuda.device, cuda.streams[self._device]
        cuda.device, cuda.streams[self._device] = self._device, self._stream or cuda.streams[self._device]

    def __exit__(self, *_):
        if self._stream is not None:
            self._cuda.streams[self._device] = self._before[1]
        self._cuda.device = self._before[0]


class Graph:
    """A graph of what was captured, perhaps nothing."""

    def __init__(self, cuda):
        self._cuda = cuda
        self._record = None

    def capture_begin(self, *, capture_error_mode, **_):
        self._cuda.error_modes.append(capture_error_mode)
        self._cuda.draws_are_captured = True
        if self._cuda.device == HOME:
            self._record = Record()
            self._record.__enter__()
            shim().shim_capture(True)

    def capture_end(self):
        if self._record is not None:
            shim().shim_capture(False)
            self._record.__exit__(None, None, None)
            self._record.end()
            if self._record.failed:
                raise RuntimeError("operation failed due to a previous error during capture")
        self._cuda.draws_are_captured = False

    def replay(self):
        if self._record is not None:
            self._record.replay()


def stand_in(monkeypatch):
    """Have graphs.py find this in the place of torch.cuda; return it."""
    cuda = Cuda()
    monkeypatch.setattr(graphs, "_check_devices", lambda *_: None)
    monkeypatch.setattr(graphs, "_devices", lambda _: [])
    for name, value in {
        "device": lambda device: On(cuda, HOME if device == torch.device("cpu") else device),
        "Stream": lambda: Stream(cuda),
        "stream": lambda stream: On(cuda, stream.device, stream),
        "current_stream": cuda.current_stream,
        "CUDAGraph": cuda.graph,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    # As on a GPU: torch copies, and the host does not look.
    monkeypatch.setattr(copies, "_on_cpu", torch._foreach_copy_)
    monkeypatch.setattr(StateViews, "settle", lambda self: None)
    monkeypatch.setattr(Flats, "end_step", lambda self, slots, made=None: setattr(self, "slots", slots))
    return cuda
