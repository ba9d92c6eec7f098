"""What all tests share."""

import collections
import zlib

import host_cuda
import host_graphs
import pytest
import ranks
import torch

if not torch.cuda.is_available():
    import interpreted  # noqa: F401  before anything imports triton

from bsam_fused.ops import dispatch

ON_GPU = [pytest.param(name, marks=pytest.mark.cuda) for name in ("cuda", "triton")]
INTERPRETED = pytest.param("triton-interpreted", marks=pytest.mark.interpreter)
ON_HOST = ["torch", "cpp", "cuda-on-host", INTERPRETED]
BACKENDS = [*ON_HOST, *ON_GPU]


def pytest_addoption(parser):
    parser.addoption(
        "--whole", action="store_true", help="all combinations of arguments, also of those marked to be few"
    )


def pytest_collection_modifyitems(config, items):
    """Leave out what would take too long.

    Of a test marked `pairwise` the interpreter, which is slow, runs a part in which all pairs of three arguments meet,
    or all values of two; of one marked `part(n)` one in n combinations runs, always the same ones, others on each
    backend; of those that remain and are marked `every(n)`, as an argument may be, every n-th of a test; all of both
    with --whole.
    """
    whole, extra = config.getoption("whole"), {*_extra(items)}
    kept = [item for item in items if item not in extra and (whole or not _is_left_out(item))]
    kept = kept if whole else [*_every_nth(kept)]
    config.hook.pytest_deselected(items=[*set(items).difference(kept)])
    items[:] = kept


def _extra(items):
    """Yield what the interpreter leaves out of the tests marked `pairwise`.

    A combination stays where the sum of its values' numbers is a multiple of the fewest values that an argument has:
    whatever values two arguments have, one of a third's fits. The numbers are counted here, as pytest's indices are
    those of combinations.
    """
    numbers = collections.defaultdict(dict)
    slow = [item for item in items if item.get_closest_marker("pairwise") and item.get_closest_marker("interpreter")]
    for item in slow:
        for argument, value in _arguments(item):
            numbers[argument].setdefault(id(value), len(numbers[argument]))
    for item in slow:
        arguments = [*_arguments(item)]
        fewest = min(len(numbers[argument]) for argument, _ in arguments)
        if sum(numbers[argument][id(value)] for argument, value in arguments) % fewest:
            yield item


def _arguments(item):
    return (((item.function, name), value) for name, value in item.callspec.params.items() if name != "backend")


def _is_left_out(item):
    part = item.get_closest_marker("part")
    return part is not None and hasattr(item, "callspec") and zlib.crc32(item.nodeid.encode()) % part.args[0] != 0


def _every_nth(items):
    seen = collections.Counter()
    for item in items:
        every = item.get_closest_marker("every")
        if every is None or seen[item.function] % every.args[0] == 0:
            yield item
        seen[item.function] += every is not None


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def _seeded(request):
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pair():
    """Two ranks; they start with the first test that needs them."""
    pair = ranks.Ranks(2)
    yield pair
    pair.stop()


@pytest.fixture(scope="session")
def quartet():
    """Likewise four."""
    quartet = ranks.Ranks(4)
    yield quartet
    quartet.stop()


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
        host_cuda.stand_in(monkeypatch)
        yield "cuda"
        return
    device = "cuda" if request.param in {"cuda", "triton"} else "cpu"
    assert dispatch.unavailable(request.param, device) is None
    if device == "cpu":
        yield request.param
        return
    with torch.device(device), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield request.param


@pytest.fixture
def captures(backend, monkeypatch):
    """Have the stand-in where there is no GPU; returns it."""
    return None if torch.get_default_device().type == "cuda" else host_graphs.stand_in(monkeypatch)


@pytest.fixture
def one_thread():
    """For small networks: threads would wait for each other, the longer the busier the machine is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
