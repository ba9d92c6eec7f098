"""Many skipped steps in a row are told: once a run, at the user's line, when the host hears of them anyway."""

import inspect
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

import bsam_fused
from bsam_fused import BSAM, SAM, WSAM

pytestmark = pytest.mark.usefixtures("one_thread")


def setup(kind=SAM, base=torch.optim.SGD, **options):
    param = nn.Parameter(torch.ones(3))
    return kind([param], base, lr=0.01, **options), param


def step(opt, param, factor=1.0):
    """A step whose gradients are ``factor``; all of the optimizer's own is called here, two lines below."""
    param.grad = None
    opt.step(lambda: (param * factor).sum().backward())


def told(opt, param, factors):
    """In which of the steps there was a warning."""
    when = []
    for i, factor in enumerate(factors):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(opt, param, factor)
        when += [i] * len(caught)
    return when


@pytest.mark.parametrize("active", [True, False], ids=["active", "plain"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("kind", [SAM, BSAM])
def test_the_twentieth_in_a_row(kind, base, active, backend):
    """19 are no reason; the 20th is one, the 21st is not told again, a step that is made begins another run."""
    opt, param = setup(kind, base, backend=backend)
    opt.active = active
    if param.is_cuda:
        pytest.skip("the host hears of it only where somebody reads")
    steps = [1, *[math.nan] * 19, 1, *[math.inf] * 45, 1, *[math.nan] * 20]
    own = base is torch.optim.RMSprop and not active  # torch's own step skips none
    assert told(opt, param, steps) == ([] if own else [1 + 19 + 1 + 19, len(steps) - 1])


def test_it_points_at_the_users_line_and_says_how_many():
    """Through torch's wrappers of step as well: an LR scheduler's, a hook's, and GradScaler."""
    opt, param = setup()
    scaler = torch.amp.GradScaler("cpu")
    torch.optim.lr_scheduler.ConstantLR(opt)
    opt.register_step_pre_hook(lambda *_: None)
    assert not told(opt, param, [1, *[math.nan] * 19])
    (param * math.nan).sum().backward()
    opt.ascend()
    scaler.scale((param * math.nan).sum()).backward()
    with pytest.warns(UserWarning, match=r"20 steps in a row were skipped \(20 in all\)") as caught:
        scaler.step(opt), (line := inspect.currentframe().f_lineno)
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)


def test_as_an_error_it_leaves_a_step_that_is_over():
    opt, param = setup(momentum=0.9)
    told(opt, param, [1, *[math.nan] * 19])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            step(opt, param, math.nan)
    assert opt.skipped_steps == 20
    before = param.detach().clone()
    step(opt, param)
    assert (param < before).all()


READERS = {"skipped_steps": lambda opt: opt.skipped_steps, "metrics": SAM.metrics, "state_dict": SAM.state_dict}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The host looks at no tensor that is not on a CPU."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False))


@pytest.mark.parametrize("reader", READERS)
def test_on_a_gpu_it_waits_for_a_reader(reader, as_on_a_gpu):
    """Of the steps between two readings only their numbers are known: a run is what was skipped altogether."""
    opt, param = setup()
    read = READERS[reader]
    assert not told(opt, param, [1, *[math.nan] * 30])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(opt)  # one was made, perhaps between them
    assert not told(opt, param, [math.nan] * 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(opt)
    assert not told(opt, param, [math.nan] * 10)
    with pytest.warns(UserWarning, match=r"20 steps in a row were skipped \(50 in all\)") as caught:
        read(opt), (line := inspect.currentframe().f_lineno)
    if reader == "skipped_steps":
        line = READERS[reader].__code__.co_firstlineno
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)


def test_replays_of_a_captured_step_count():
    """No Python ran for them: the counts on the device are all there is."""
    opt, param = setup()
    step(opt, param)
    for count in (opt._flats._built[0].step_count, opt._flats._built[0].skipped):
        count.add_(20)
    with pytest.warns(UserWarning, match="20 steps in a row"):
        opt.metrics()


def test_parameters_that_are_replaced_begin_another_run():
    """Their FlatParams count anew; the steps of the old ones stay in `skipped_steps`."""
    opt, param = setup()
    told(opt, param, [math.nan] * 15)
    other = nn.Parameter(torch.ones(3))
    opt.param_groups[0]["params"][0] = other
    assert told(opt, other, [math.nan] * 20) == [19]
    assert opt.skipped_steps == 35


# ---- printed


@pytest.mark.parametrize("kind", [SAM, BSAM])
def test_printed(kind, backend):
    """At any time: the class, whose update, on which backend, and every option of every group."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = kind([{"params": [params[0]], "rho": 0.25}, {"params": [params[1]]}], torch.optim.Adam, backend=backend)
    before = repr(opt)
    expected = [f"{kind.__name__} (", "base_optimizer: Adam", f"backend: {backend} on {params[0].device}"]
    assert before.splitlines()[:3] == expected
    assert before.splitlines()[3:] == torch.optim.Optimizer.__repr__(opt).splitlines()[1:]
    assert {"rho: 0.25", "rho: 0.05", "eps: 1e-08"} <= {line.strip() for line in before.splitlines()}
    for p in params:
        p.grad = torch.ones_like(p)
    opt.ascend()
    assert repr(opt) == before
    opt.restore()
    assert repr(pickle.loads(pickle.dumps(opt))) == before


def test_printed_where_a_backend_is_missing(monkeypatch):
    """Neither raises nor warns: a debugger prints, too."""
    opt, _ = setup(backend="cpp")
    slower, _ = setup()
    monkeypatch.setattr(bsam_fused.ops.dispatch, "unavailable", lambda name, _: None if name == "torch" else "no wheel")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "backend: torch on cpu" in repr(slower)
        assert "backend='cpp' for tensors on cpu: no wheel" in repr(opt)


@pytest.mark.parametrize("first", [torch.float16, torch.float32], ids=["narrow first", "wide first"])
def test_all_are_skipped_where_one_dtype_cannot_hold_the_direction(first, backend):
    """A base that is not fused gets no part of it: w everywhere, one count for all, and the next step goes on."""
    dtypes = [torch.float16, torch.float32]
    params = [nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in sorted(dtypes, key=lambda it: it is not first)]
    opt = WSAM(params, torch.optim.RMSprop, lr=1e-3, eps=1e-3, gamma=0.9, backend=backend)

    def passes(*factors):
        for call, factor in zip(("ascend", "step"), factors, strict=True):
            for p in params:
                p.grad = torch.full_like(p, factor if p.dtype is torch.float16 else 1.0)
            getattr(opt, call)()

    passes(-6e4, 6e4)
    assert all(torch.equal(p, torch.ones_like(p)) for p in params)
    assert [(int(flat.step_count), int(flat.skipped)) for flat in opt._flats] == [(1, 1)] * 2
    assert opt.skipped_steps == 1
    passes(1.0, 1.0)
    assert not any(torch.equal(p, torch.ones_like(p)) for p in params)
