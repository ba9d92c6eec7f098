"""What only a GPU can show: no waiting, few launches, graphs, streams, the same bits every time, several devices.

That the numbers are right there, too, the other tests show: their fixture `backend` has "cuda".
"""

import contextlib

import pytest
import reference as ref
import torch
from samples import assign, gradients, parameters
from torch import nn
from torch.profiler import DeviceType, ProfilerActivity, profile

import bsam_fused

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("on_gpu")]

KINDS = {"SAM": (bsam_fused.SAM, 4), "BSAM": (bsam_fused.BSAM, 5)}
"""And the launches of a step: a norm and a move a phase, but that descend's norm comes with its move."""
every_kind = pytest.mark.parametrize("name", KINDS)
every_base = pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])


@pytest.fixture
def on_gpu():
    with torch.device("cuda"):
        yield


def optimizer(name, params, base=torch.optim.SGD, **options):
    momentum = {"momentum": 0.9} if base is torch.optim.SGD else {}
    return KINDS[name][0](params, base, lr=0.05, backend="cuda", **{**momentum, **options})


def walk(opt, params, seed=0):
    for k, call in enumerate(opt._calls):
        assign(params, gradients(params, seed + k))
        getattr(opt, call)()


@contextlib.contextmanager
def waiting_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_kind
@every_base
@pytest.mark.parametrize("adaptive", [False, True])
def test_no_phase_waits_for_the_device(name, base, adaptive):
    params = parameters("odd") + parameters("odd", torch.bfloat16)  # two FlatParams, whose sums meet
    opt = optimizer(name, params, base, adaptive=adaptive)
    walk(opt, params)
    for step in range(2):
        opt.param_groups[0]["lr"] *= 0.5  # written to the device anew
        for k, call in enumerate(opt._calls):
            assign(params, gradients(params, 10 * step + k))
            with waiting_is_an_error():
                getattr(opt, call)()
    assert opt.skipped_steps == 0


@every_kind
@pytest.mark.parametrize("returns", ["a tensor", "a float"])
def test_no_closure_step_waits_for_the_device(name, returns):
    w = nn.Parameter(torch.ones(1000))
    opt = optimizer(name, [w])

    def closure():
        loss = w.square().sum()
        loss.backward()
        return loss if returns == "a tensor" else 1.5

    opt.step(closure)
    with waiting_is_an_error():
        opt.step(closure)
    assert opt.skipped_steps == 0


def kernels_of(work):
    """The kernels, and the copies and fillings of memory, that ``work()`` launches."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    names = [event.name for event in events if not event.is_user_annotation]  # such as "Optimizer.step"
    memory = [name for name in names if name.startswith(("Memcpy", "Memset"))]
    return [name for name in names if name not in memory], memory


@every_kind
@every_base
@pytest.mark.parametrize("groups", [1, 50])
def test_launches(name, base, groups):
    params = [nn.Parameter(torch.randn(100 + i)) for i in range(60)]
    opt = optimizer(name, [{"params": params[i::groups], "rho": 0.1 + i} for i in range(groups)], base)
    walk(opt, params)
    kernels = []
    for k, call in enumerate(opt._calls):
        assign(params, gradients(params, k))
        found, memory = kernels_of(getattr(opt, call))
        assert memory == []
        kernels += found
    assert len(kernels) == KINDS[name][1], kernels


@every_kind
def test_more_tensors_than_a_launch_carries(name):
    """As many launches as parts of 812 tensors; the options of 400 groups cost none."""
    params = [nn.Parameter(torch.randn(3)) for _ in range(1500)]
    opt = optimizer(name, [{"params": params[i::400]} for i in range(400)])
    walk(opt, params)
    kernels = []
    for k, call in enumerate(opt._calls):
        assign(params, gradients(params, k))
        kernels += kernels_of(getattr(opt, call))[0]
    assert len(kernels) == 2 * KINDS[name][1]


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 5))  # a gradient to copy, and ones to take


@every_kind
@every_base
def test_a_captured_step_is_replayed(name, base):
    """All phases in one CUDA graph: replays train as eager steps do."""
    nets = [network(), network()]
    opts = [optimizer(name, net.parameters(), base, weight_decay=0.01) for net in nets]
    batches = torch.randn(6, 16, 20)
    x = batches[0].clone()

    def step(net, opt):
        for call in opt._calls:
            net(x).square().mean().backward()
            getattr(opt, call)()
        opt.zero_grad()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for net, opt in zip(nets, opts, strict=True):
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(net, opt)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(nets[0], opts[0])
    for batch in batches[1:]:
        x.copy_(batch)
        graph.replay()
        step(nets[1], opts[1])
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert opts[0].skipped_steps == 0


def test_a_graph_replays_the_options_written_last():
    """By an eager step or `write_options`; a capture writes none, and says so where it would have to."""
    params, twins = ([nn.Parameter(torch.ones(100))] for _ in range(2))
    opt, twin = optimizer("SAM", params), optimizer("SAM", twins)
    graph = torch.cuda.CUDAGraph()

    def step(o, ps, lr):
        o.param_groups[0]["lr"] = lr
        for call in o._calls:
            ps[0].grad = torch.ones_like(ps[0])
            getattr(o, call)()

    step(opt, params, 0.05)
    step(twin, twins, 0.05)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step(opt, params, 0.05)
    for lr in (0.05, 0.01):
        opt.param_groups[0]["lr"] = lr
        opt.write_options()
        graph.replay()
        step(twin, twins, lr)
        assert torch.equal(params[0], twins[0])
    with pytest.raises(RuntimeError, match=r"write_options\(\) before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        step(opt, params, 0.02)


def test_a_first_step_is_not_captured():
    """Its buffers would be zeroed by every replay."""
    p = nn.Parameter(torch.ones(100))
    opt = optimizer("SAM", [p])
    p.grad = torch.ones_like(p)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="take one before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.ascend()


@every_kind
@every_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_every_time(name, base, dtype):
    torch.manual_seed(0)
    start = [torch.randn(n).to(dtype) for n in (3_000_000, 7, 100_000, 2049)]
    grads = [[torch.randn(w.shape).to(dtype) for w in start] for _ in range(3)]
    runs = []
    for _ in range(10):
        params = [nn.Parameter(w.clone()) for w in start]
        opt = optimizer(name, params, base, adaptive=True, eta=0.1)
        for _ in range(2):
            for k, call in enumerate(opt._calls):
                assign(params, grads[k])
                getattr(opt, call)()
        runs.append([*(p.detach() for p in params), opt.norms])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@every_kind
def test_side_stream(name):
    """Phases go to the current stream: on another one they wait for what that one does before, and only that."""
    results = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(1_000_000))]
        opt = optimizer(name, params)
        walk(opt, params)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # what comes next on the wrong stream would be early
            for k, call in enumerate(opt._calls):
                params[0].grad = torch.randn_like(params[0]) + k
                getattr(opt, call)()
        torch.cuda.synchronize()
        results.append(params[0].detach())
    assert torch.equal(*results)


@every_kind
def test_two_devices(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    params = [nn.Parameter(torch.randn(1000, device=f"cuda:{i % 2}")) for i in range(4)]
    copies = [nn.Parameter(p.detach().cpu()) for p in params]
    opt = optimizer(name, params)
    other = KINDS[name][0](copies, lr=0.05, momentum=0.9, backend="torch")
    for t in range(2):
        walk(opt, params, t)
        walk(other, copies, t)
    for p, q in zip(params, copies, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "most"), [("SAM", 1), ("BSAM", 2)])
def test_extra_memory(name, most):
    """N for `saved`, and for BSAM another for g, which is taken and not copied."""

    def requested(which):  # of the allocator, before it rounds
        return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]

    before = requested("current")
    params = [nn.Parameter(torch.randn(n)) for n in (4_000_000, 1_000_000, 3)]
    n = sum(p.numel() * p.element_size() for p in params)
    opt = optimizer(name, params)
    walk(opt, params)
    opt.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    for call in opt._calls:
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        getattr(opt, call)()
    extra = requested("peak") - before - 3 * n  # without parameters, gradients and momentum
    assert extra <= (most + 0.02) * n


def test_more_elements_than_int32():
    numel = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 20 * numel:
        pytest.skip("needs 40 GB of free memory")
    p = nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16))
    opt = bsam_fused.SAM([p], lr=1.0, rho=3.0, backend="cuda")
    tail = torch.tensor([3.0, 4.0], dtype=torch.bfloat16)
    for w_max in (True, False):
        p.grad = torch.zeros_like(p)
        p.grad[-2:] = tail
        opt.ascend() if w_max else opt.step()
        expected = 3.0 * tail / 5 if w_max else -tail
        torch.testing.assert_close(p.detach()[-2:], expected)
        assert not p.detach()[:-2].any()
    assert opt.norms[0].item() == pytest.approx(ref.norm([tail.double()]))
