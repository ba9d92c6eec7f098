"""Steps that are cut short at a given line of the package, and what they may leave."""

import contextlib
import copy
import functools
import itertools
import sys
from typing import NamedTuple

import torch
from members import calls
from torch import nn

import bsam_fused

ROOT = bsam_fused.__path__[0]
KERNELS = "triton_directions", "triton_kernels", "triton_math", "triton_pieces", "triton_rounding", "triton_updates"
"""Lines that run on the device, and in the interpreter only here: nothing interrupts a kernel."""

SAM, BSAM = bsam_fused.SAM, bsam_fused.BSAM
OPTIMIZERS = {
    "SAM-SGD": (SAM, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "BSAM-AdamW": (BSAM, torch.optim.AdamW, {"lr": 0.1}),
    "SAM-RMSprop": (SAM, torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.9}),
}
REMEMBERING = {
    "LookSAM-SGD": (bsam_fused.LookSAM, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "k": 2}),
    "LookSAM-RMSprop": (bsam_fused.LookSAM, torch.optim.RMSprop, {"lr": 0.1, "k": 2}),
    "FriendlySAM-AdamW": (bsam_fused.FriendlySAM, torch.optim.AdamW, {"lr": 0.1}),
    "FriendlySAM-RMSprop": (bsam_fused.FriendlySAM, torch.optim.RMSprop, {"lr": 0.1}),
}
DTYPES = {
    "one": (torch.float32,),
    "two": (torch.float32, torch.float64),
    "16 bits": (torch.float32, torch.bfloat16),
}


def network():
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3, affine=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.linspace(-1, 1, 6).view(3, 2))
    return net


class Run:
    """An optimizer and the parameters it trains, always the same ones; "model" is a network with BatchNorm."""

    def __init__(self, optimizer, backend, dtypes="one", steps=0):
        kind, base, options = {**OPTIMIZERS, **REMEMBERING}[optimizer]
        self.net = network() if dtypes == "model" else None
        if self.net is None:
            self.params = [nn.Parameter(torch.linspace(0.5, 2, 3 + i).to(d)) for i, d in enumerate(DTYPES[dtypes])]
        else:
            self.params = list(self.net.parameters())
        self.opt = kind(self.params, base, backend=backend, model=self.net, rho=0.3, **options)
        self.edited = False
        self.watched = True  # its lines may be cut
        for _ in range(steps):
            by_hand(self)

    @contextlib.contextmanager
    def unwatched(self):
        self.watched = False
        yield
        self.watched = True

    def backward(self):
        if self.net is None:
            loss = sum(p.double().cos().sum() for p in self.params)
        else:
            loss = self.net(torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, -2.0]])).pow(3).sum()
        loss.backward()
        return loss

    def left(self):
        """Weights and the whole saved state, on which the bits of all later steps depend."""
        saved = self.opt.state_dict()
        values = {(i, k): torch.as_tensor(v).clone() for i, e in saved["state"].items() for k, v in e.items()}
        counts = [(group["rounded_steps"] or 0, group.get("looks", 0)) for group in saved["param_groups"]]
        return [p.detach().clone() for p in self.params], values, counts


def same(one, other):
    (ws, state, count), (vs, right, right_count) = one, other
    return (
        all(map(torch.equal, ws, vs))
        and state.keys() == right.keys()
        and all(torch.equal(value, right[key]) for key, value in state.items())
        and count == right_count
    )


# ---- what is cut short; each ends a step, or gives it up, or takes none


def by_hand(run):
    for call in calls(run.opt):
        run.backward()
        getattr(run.opt, call)()
    run.opt.zero_grad()


def by_closure(run):
    run.opt.step(run.backward)
    run.opt.zero_grad()


def plain(run):
    run.opt.active = False
    try:
        run.backward()
        run.opt.step()
        run.opt.zero_grad()
    finally:
        run.opt.active = True


def plain_by_closure(run):
    run.opt.active = False
    try:
        run.opt.step(run.backward)
        run.opt.zero_grad()
    finally:
        run.opt.active = True


def given_up(run):
    with run.unwatched():
        for call in calls(run.opt)[:-1]:
            run.backward()
            getattr(run.opt, call)()
    run.opt.restore()


def edited(run):
    """w seen in every phase; what is written to it in the first one counts from there on."""
    for call in calls(run.opt):
        with run.unwatched():
            run.backward()
            getattr(run.opt, call)()
        with run.opt.unperturbed():
            if not run.edited:
                for p in run.params:
                    p.data.add_(1.0)
                run.edited = True
    run.opt.zero_grad()


def saved(run):
    run.opt.state_dict()
    copy.deepcopy(run.opt)


WAYS = {way.__name__: way for way in (by_hand, by_closure, plain, plain_by_closure, given_up, edited, saved)}


# ---- cutting


class Cut(NamedTuple):
    """Where, and what happened."""

    where: str | None
    """The line that was not run; None: there are not as many."""
    error: BaseException | None


@functools.cache
def _is_ours(name, module):
    return name.startswith(ROOT) and module in name and not any(kernel in name for kernel in KERNELS)


def cut_short(run, way, at, error, after="line", module=""):
    """Go ``way`` up to the ``at``-th line of the package, or of a ``module``, which raises ``error`` instead of it.

    With ``after="c_return"`` up to the ``at``-th return of a function in C, where real signals are noticed.
    """
    seen, where = 0, None

    def trace(frame, event, _):
        nonlocal seen, where
        if where is not None or not _is_ours(frame.f_code.co_filename, module):
            return None
        if event == after and run.watched:
            seen += 1
            if seen == at:
                where = f"{frame.f_code.co_filename[len(ROOT) + 1 :]}:{frame.f_lineno}"
                raise error
        return trace

    before, watch = (sys.gettrace(), sys.settrace) if after == "line" else (sys.getprofile(), sys.setprofile)
    watch(trace)
    try:
        way(run)
    except BaseException as raised:
        if raised is not error:
            return Cut(where, raised)
    finally:
        watch(before)
    return Cut(where, None)


def complaints(make, way, error, after="line", module="", each=1):
    """Yield what is wrong after ``way`` was cut short, line by line.

    Args:
        make: returns a new `Run`.
        way: of `WAYS`.
        error: the class of what is raised.
        after: as `cut_short` has it, and so is `module`.
        each: 3 of every third line.
    """
    first, then = make(), make()
    allowed = [first.left()]
    if way is edited:
        for p in then.params:
            p.data.add_(1.0)
        allowed.append(then.left())
    way(first)
    allowed.append(first.left())
    follow = {}
    for line in itertools.count(1, each):
        run = make()
        cut = cut_short(run, way, line, error(), after, module)
        if cut.where is None:
            if cut.error is not None:  # without any cut
                yield f"after all lines: {cut.error!r}"
            return
        complaint = _complaint(run, cut, allowed, follow, make)
        if complaint:
            yield f"{cut.where}: {complaint}"


def traces(run):
    """What an optimizer at rest must not leave anywhere."""
    if not torch.is_grad_enabled():
        return "gradients are off"
    if any(p._post_accumulate_grad_hooks for p in run.params):
        return "a hook is left"
    if run.net is not None and type(run.net[1]) is not nn.BatchNorm1d:
        return "a layer is left frozen"
    return "counted as skipped" if run.opt.skipped_steps else None


def _complaint(run, cut, allowed, follow, make):
    if cut.error is not None:
        return f"became {cut.error!r}"
    try:
        run.opt.restore()
        left = run.left()
        which = [i for i, state in enumerate(allowed) if same(left, state)]
        if not which or (run.edited and which == [0]):
            return "neither w nor the next w, with its state"
        if traces(run):
            return traces(run)
        run.opt.zero_grad()
        by_hand(run)
        if which[0] not in follow:
            follow[which[0]] = _next(make(), left)
        if not same(run.left(), follow[which[0]]):
            return "the next step is another one"
    except Exception as error:
        return f"then {error!r}"
    return None


def _next(run, left):
    """What a step leaves that begins from ``left``: in an optimizer that never was interrupted."""
    weights, state, counts = left
    packed = run.opt.state_dict()
    entries = {}
    for (i, key), value in state.items():
        entries.setdefault(i, {})[key] = value.clone()
    groups = [
        {**group, "rounded_steps": n, **({"looks": looks} if "looks" in group else {})}
        for group, (n, looks) in zip(packed["param_groups"], counts, strict=True)
    ]
    run.opt.load_state_dict({"state": entries, "param_groups": groups})
    with torch.no_grad():
        for p, w in zip(run.params, weights):
            p.copy_(w)
    by_hand(run)
    return run.left()
