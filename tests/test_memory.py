"""Memory that is not ours: a gradient's that others can see is never written to, and read when its pass ends.

Every kind of such memory is lent in every pass of two steps, beside a twin with gradients of its own: the same backend,
so the same bits. After every phase the owner finds there what he put there, and writes the next pass's over it.
"""

import ctypes
import math
import mmap

import numpy as np
import pytest
import torch
from conftest import ON_HOST
from torch import nn

import bsam_fused

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.part(16)]
KINDS = [bsam_fused.SAM, bsam_fused.BSAM]
every_kind = pytest.mark.parametrize("kind", KINDS)
BASES = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {}),
    "unfused": (torch.optim.Adagrad, {}),
}
PAIRS = [(KINDS[0], "SGD"), (KINDS[1], "AdamW"), (KINDS[0], "unfused"), (KINDS[1], "unfused")]
every_pair = pytest.mark.parametrize(("kind", "base"), PAIRS, ids=[f"{kind.__name__}-{base}" for kind, base in PAIRS])
HOWS = {"fused": ["as it is", "inactive and clipped"], "unfused": ["clipped", "scaled", "inactive and clipped"]}
"""Only an unfused base takes d, divided and scaled down, out of .grad."""
ways = [(kind, base, how) for kind, base in PAIRS for how in HOWS.get(base, HOWS["fused"])]
every_way = pytest.mark.parametrize(("kind", "base", "how"), ways, ids=[f"{k.__name__}-{b}-{h}" for k, b, h in ways])
SIZES = 700, 5000
"""Of float32. Gradients up to 4096 bytes are copied because that is faster; a taken one shows in larger ones only."""


def make(kind, base, params, backend, **options):
    base_class, base_options = BASES[base]
    return kind(params, base_class, lr=0.1, rho=0.3, backend=backend, **base_options, **options)


def weights(n, count=1):
    return [nn.Parameter(torch.linspace(-1, 1 + i, n)) for i in range(count)]


def gradient(n, k, i=0):
    """Of pass ``k`` and parameter ``i``."""
    return torch.linspace(-1, 1, n) * (1 + k) + i + 0.5


# ---- lenders. Each makes, for n elements, a function that takes values, and returns a gradient over memory with these
# values and what reads that memory without it.


def over(new, seen):
    """Memory of others, the same in every pass, and ``new`` tensors over it, which nobody else has."""

    def lend(values):
        seen[:] = values.numpy()
        return new(), lambda: seen

    return lend


def numpys(n, folder):
    array = np.zeros(n, np.float32)
    return over(lambda: torch.from_numpy(array), array)


def part_of_numpys(n, folder):
    array = np.zeros(n + 64, np.float32)
    return over(lambda: torch.from_numpy(array)[64:], array[64:])


def dlpacks(n, folder):
    array = np.zeros(n, np.float32)
    return over(lambda: torch.from_dlpack(array), array)


def bytearrays(n, folder):
    owner = bytearray(4 * n)
    return over(lambda: torch.frombuffer(owner, dtype=torch.float32), np.frombuffer(owner, np.float32))


def ctypess(n, folder):
    owner = (ctypes.c_float * n)()
    return over(lambda: torch.frombuffer(owner, dtype=torch.float32), np.ctypeslib.as_array(owner))


def anonymous_mmaps(n, folder):
    owner = mmap.mmap(-1, 4 * n)
    return over(lambda: torch.frombuffer(owner, dtype=torch.float32), np.frombuffer(owner, np.float32))


def mapped_files(n, folder):
    path = str(folder / "gradients")
    seen = np.memmap(path, np.float32, "w+", shape=(n,))
    return over(lambda: torch.from_file(path, shared=True, size=n, dtype=torch.float32), seen)


def shared_memory(n, folder):
    """Another process's: each tensor maps it anew."""
    owner = torch.zeros(n).untyped_storage()
    name = owner._share_filename_cpu_()

    def new():
        storage = torch.UntypedStorage._new_shared_filename_cpu(*name)
        return torch.empty(0).set_(storage, 0, (n,), (1,))

    return over(new, torch.empty(0).set_(owner, 0, (n,), (1,)).numpy())


def alias(look_at):
    """A new tensor every pass, of torch's own memory, that ``look_at`` keeps in sight."""

    def lender(n, folder):
        def lend(values):
            grad = values.clone()
            seen = look_at(grad)
            return grad, lambda: seen() if callable(seen) else seen

        return lend

    return lender


def as_a_tensor(seen):
    """Over the same memory, whatever reads it."""
    return seen if isinstance(seen, torch.Tensor) else torch.from_numpy(np.asarray(seen))


def by_its_storage(grad):
    storage = grad.untyped_storage()
    return lambda: torch.empty(0, device=grad.device).set_(storage, 0, (storage.nbytes() // 4,), (1,))


OF_A_HOST = {
    **{
        lender.__name__: lender
        for lender in (
            *(numpys, part_of_numpys, dlpacks, bytearrays, ctypess, anonymous_mmaps, mapped_files, shared_memory),
        )
    },
    "seen by NumPy": alias(lambda grad: grad.numpy()),
    "seen by NumPy through DLPack": alias(np.from_dlpack),
    "a memoryview": alias(lambda grad: memoryview(grad.numpy())),
}
"""Memory that a host's code holds, or sees."""

LENDERS = {
    "seen by torch through DLPack": alias(torch.from_dlpack),
    "held": alias(lambda grad: grad),
    "held detached": alias(lambda grad: grad.detach()),
    "held as a view": alias(lambda grad: grad.view(-1, 10).view(-1)),
    "its storage held": alias(by_its_storage),
}
"""Memory of any device."""

on_host = pytest.mark.parametrize("backend", ON_HOST, indirect=True)


def finish(opt, call, scaler):
    """The call after a pass; the last one through the scaler, if there is one."""
    if scaler is None or call != "step":
        getattr(opt, call)()
        return
    scaler.scale(torch.ones(()))
    scaler.step(opt)
    scaler.update()


def train(opt, params, lend, scaler=None, steps=2):
    """By hand; ``lend(values, i)`` gives the gradient of parameter i, and what looks at its memory."""
    pass_ = 0
    for _ in range(steps):
        for call in opt._calls if opt.active else ["step"]:
            looks = []
            for i, p in enumerate(params):
                values = gradient(p.numel(), pass_, i) * (scaler.get_scale() if scaler else 1)
                p.grad, look = lend(values, i)
                looks.append((look, values))
            finish(opt, call, scaler)
            for look, values in looks:
                assert torch.equal(as_a_tensor(look()), values), f"{call} wrote into the owner's memory"
            pass_ += 1
        opt.zero_grad()


def own(values, i):
    return values.clone(), lambda: values


def states(opt, params):
    return [v for p in params for v in (p.detach(), *opt.state[p].values())]


def scaler():
    return torch.amp.GradScaler(torch.get_default_device().type, init_scale=1024.0, growth_interval=1000)


def assert_alike(run):
    """Of every size what ``run(n, True)`` leaves, with lent memory, and ``run(n, False)``, with memory of its own."""
    for n in SIZES:
        assert all(map(torch.equal, run(n, True), run(n, False))), n


def assert_left_alone(backend, kind, base, lender, how, folder):
    def run(n, lent):
        params = weights(n)
        opt = make(kind, base, params, backend, max_grad_norm=0.5 if "clipped" in how else None)
        opt.active = "inactive" not in how
        lend = lender(n, folder)
        train(opt, params, (lambda values, i: lend(values)) if lent else own, scaler() if how == "scaled" else None)
        assert not torch.equal(params[0], weights(n)[0])
        return states(opt, params)

    assert_alike(run)


@every_way
@pytest.mark.parametrize("lender", LENDERS)
def test_lent_gradients(backend, kind, base, lender, how, tmp_path):
    assert_left_alone(backend, kind, base, LENDERS[lender], how, tmp_path)


@on_host
@every_way
@pytest.mark.parametrize("lender", OF_A_HOST)
def test_gradients_that_a_host_lends(backend, kind, base, lender, how, tmp_path):
    assert_left_alone(backend, kind, base, OF_A_HOST[lender], how, tmp_path)


# ---- one tensor in several places


def one_for_both(values, n):
    return [values, values], [values, values]


def halves_of_one(values, n):
    both = torch.cat([values, values + 1])
    return [both[:n], both[n:]], [values, values + 1]


def overlapping(values, n):
    more = torch.cat([values, values.new_ones(1)])
    return [more[:-1], more[1:]], [more[:-1].clone(), more[1:].clone()]


def expanded(values, n):
    one = values[:1].clone()
    return [one.expand(n), values], [one.expand(n).clone(), values]


def reversed_rows(values, n):
    rows = values.view(-1, 10)
    return [rows.t().contiguous().t().reshape(-1), values.flip(0)], [values, values.flip(0)]


SHARINGS = {f.__name__: f for f in (one_for_both, halves_of_one, overlapping, expanded, reversed_rows)}


@every_way
@pytest.mark.parametrize("sharing", SHARINGS)
def test_one_tensor_for_several_parameters(backend, kind, base, sharing, how):
    """d is scaled once, and nobody's gradient becomes another's."""
    if (sharing, how) == ("expanded", "scaled"):
        pytest.skip("GradScaler itself refuses it")

    def run(n, shared):
        params = weights(n, 2)
        opt = make(kind, base, params, backend, max_grad_norm=0.5 if "clipped" in how else None)
        opt.active = "inactive" not in how
        scale = scaler() if how == "scaled" else None
        for k in range(2):
            for call in opt._calls if opt.active else ["step"]:
                values = gradient(n, k) * (scale.get_scale() if scale else 1)
                theirs, apart = SHARINGS[sharing](values.clone(), n)
                apart = [g.clone() for g in apart]
                for p, g in zip(params, theirs if shared else [g.clone() for g in apart]):
                    p.grad = g
                finish(opt, call, scale)
                assert all(map(torch.equal, theirs, apart)), call
        return states(opt, params)

    assert_alike(run)


@on_host
@every_kind
@pytest.mark.parametrize("n", SIZES)
def test_no_overflow_is_written_into_what_others_see(backend, kind, n):
    """How a scaler hears that an earlier pass overflowed must not cost the owner his numbers."""
    p, array = weights(n)[0], np.ones(n, np.float32)
    w = p.detach().clone()
    opt, scale = make(kind, "SGD", [p], backend), scaler()
    scale.scale(torch.ones(()))
    for k, call in enumerate(opt._calls):
        array[:] = 1.0
        p.grad = torch.full((n,), math.inf) if k == 0 else torch.from_numpy(array)
        scale.step(opt) if call == "step" else getattr(opt, call)()
        assert (array == 1).all()
    scale.update()
    assert torch.equal(p, w)
    assert scale.get_scale() == 512.0
    assert opt.skipped_steps == 1


# ---- gradients in memory of parameters and of state


def own_weights(opt, p, q):
    return p.data


def a_view_of_own_weights(opt, p, q):
    return p.data.view(-1, 10).view(-1)


def anothers_weights(opt, p, q):
    return q.data


def own_state(opt, p, q):
    return next(v for v in opt.state[p].values() if v.dim())


def anothers_state(opt, p, q):
    return next(v for v in opt.state[q].values() if v.dim())


PLACES = {f.__name__: f for f in (own_weights, a_view_of_own_weights, anothers_weights, own_state, anothers_state)}


@every_pair
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("passes", ["all", "first", "last"])
def test_gradients_that_lie_in_what_is_written(backend, kind, base, place, passes):
    """It is what was there when the pass ended, not what the phase has made of it meanwhile."""
    if base == "unfused" and "state" in place:
        pytest.skip("torch's own step reads the one while it writes the other")

    def run(n, lying):
        params = weights(n, 2)
        opt = make(kind, base, params, backend, max_grad_norm=2.0)
        for t in range(3):
            for k, call in enumerate(opt._calls):
                for i, p in enumerate(params):
                    p.grad = gradient(n, k + t, i)
                here = {"all": True, "first": k == 0, "last": call == "step"}[passes]
                if t and here:
                    for one, other in (params, params[::-1]):
                        g = PLACES[place](opt, one, other)
                        one.grad = g if lying else g.clone()
                getattr(opt, call)()
            opt.zero_grad()
        return states(opt, params)

    assert_alike(run)


@every_pair
def test_a_plain_step_whose_gradients_lie_in_what_is_written(backend, kind, base):
    if base == "unfused":
        pytest.skip("torch's own step reads the one while it writes the other")

    def run(n, lying):
        params = weights(n, 2)
        opt = make(kind, base, params, backend)
        opt.active = False
        for _ in range(2):
            given = [p.data for p in params[::-1]]
            for p, g in zip(params, given if lying else [g.clone() for g in given]):
                p.grad = g
            opt.step()
            opt.zero_grad()
        return states(opt, params)

    assert_alike(run)
