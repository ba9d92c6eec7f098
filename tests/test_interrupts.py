"""Whole or not at all: an error or a KeyboardInterrupt at any line leaves w, or the next w, with its state.

At the latest after one call of restore(), everywhere, and the next full step is the one that comes from there.
"""

import copy
import os
import random
import subprocess
import sys
import time

import pytest
import torch
from cut_short import (
    OPTIMIZERS,
    REMEMBERING,
    WAYS,
    Run,
    by_closure,
    by_hand,
    complaints,
    cut_short,
    given_up,
    plain,
    same,
    traces,
)
from samples import interpreted

pytestmark = pytest.mark.usefixtures("one_thread")
ERRORS = KeyboardInterrupt, RuntimeError
BACKENDS = "cpp", "torch"
DTYPES = "one", "two", "16 bits", "model"


def combinations():
    """Of optimizer, way and backend all; the rest so that any two values meet."""
    for i, optimizer in enumerate(OPTIMIZERS):
        for j, way in enumerate(WAYS):
            for k, backend in enumerate(BACKENDS):
                n = i + j + k
                yield optimizer, way, backend, DTYPES[(n + 1) % 4], (i + k) % 2, ERRORS[(n + j // 2) % 2]
    yield "SAM-RMSprop", "by_hand", "cpp", "16 bits", 1, KeyboardInterrupt  # each dtype has its own count of roundings


def assert_none(complaints):
    wrong = list(complaints)
    assert not wrong, f"{len(wrong)} lines, such as {wrong[:5]}"


every_combination = pytest.mark.parametrize(
    ("optimizer", "way", "backend", "dtypes", "steps", "error"), list(combinations())
)


@pytest.mark.part(4)  # make interrupts: all
@every_combination
def test_at_every_line(optimizer, way, backend, dtypes, steps, error):
    assert_none(complaints(lambda: Run(optimizer, backend, dtypes, steps), WAYS[way], error))


@pytest.mark.parametrize(("optimizer", "steps"), [("LookSAM-SGD", 1), ("FriendlySAM-RMSprop", 1)])
def test_at_every_line_of_what_remembers(optimizer, steps):
    """In a step of one pass, too; the history is of the same step as weights and state, and so is the count."""
    assert_none(complaints(lambda: Run(optimizer, "cpp", "one", steps), by_hand, KeyboardInterrupt))


@pytest.mark.parametrize("steps", [0, 1])
def test_at_every_line_of_every_backend(backend, steps):
    """One parameter. The interpreter, at a tenth of a second a line, takes a third of those that Triton alone has."""
    few = {"module": "triton_flat", "each": 3} if interpreted(backend) else {}
    assert_none(complaints(lambda: Run("SAM-SGD", backend, "one", steps), by_hand, KeyboardInterrupt, **few))


def test_at_every_line_of_every_backends_restore(backend):
    """In the interpreter at a third of them, as none is Triton's own."""
    few = {"each": 3} if interpreted(backend) else {}
    assert_none(complaints(lambda: Run("SAM-SGD", backend, "one", 1), given_up, KeyboardInterrupt, **few))


@pytest.mark.parametrize(("optimizer", "backend"), zip(OPTIMIZERS, ("cpp", "torch", "cpp")))
def test_at_every_line_of_load_state_dict(backend, optimizer):
    """What was there before, or what was saved; never some of each."""
    other = Run(optimizer, backend, "16 bits", 3)
    for group in other.opt.param_groups:
        group["lr"] = 0.5
    saved = other.opt.state_dict()

    def load(run):
        run.opt.load_state_dict(copy.deepcopy(saved))  # torch's own loads the tensors themselves

    def left(run):
        return run.left(), [group["lr"] for group in run.opt.param_groups]

    line, wrong = 0, []
    while True:
        line += 1
        run, right = Run(optimizer, backend, "16 bits", 1), Run(optimizer, backend, "16 bits", 1)
        before = left(run)
        cut = cut_short(run, load, line, KeyboardInterrupt())
        if cut.where is None:
            break
        unchanged = same(left(run)[0], before[0]) and left(run)[1] == before[1]
        if not unchanged:
            load(right)
            if not same(left(run)[0], left(right)[0]) or left(run)[1] != left(right)[1]:
                wrong.append(f"{cut.where}: neither")
                continue
        by_hand(run)
        by_hand(right)
        if not same(run.left(), right.left()):
            wrong.append(f"{cut.where}: the next step is another one")
    assert_none(wrong)


def test_a_cut_is_seen():
    """The tracer reaches every function of a step, and tells a broken one: its lines are counted, and none is lost."""
    run, seen = Run("SAM-SGD", "torch"), set()
    for line in range(1, 10_000):
        cut = cut_short(Run("SAM-SGD", "torch"), by_hand, line, KeyboardInterrupt())
        if cut.where is None:
            break
        seen.add(cut.where.split(":")[0])
    assert seen >= {"optim/base.py", "optim/flats.py", "ops/torch_flat.py", "ops/dispatch.py"}
    restore, run.opt.restore = run.opt.restore, lambda: None
    run.backward()
    run.opt.ascend()
    assert not same(_left_anyhow(run), _left_anyhow(Run("SAM-SGD", "torch")))
    restore()
    assert same(run.left(), Run("SAM-SGD", "torch").left())


def _left_anyhow(run):
    return [p.detach().clone() for p in run.params], {}, []


# ---- `make interrupts`


@pytest.mark.interrupts
@every_combination
def test_after_every_call(optimizer, way, backend, dtypes, steps, error):
    """Where Python looks for signals: after a function in C came back, before anything is made of what it returned."""
    assert_none(complaints(lambda: Run(optimizer, backend, dtypes, steps), WAYS[way], error, after="c_return"))


@pytest.mark.interrupts
@pytest.mark.part(8)
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", ["two", "16 bits"])
@pytest.mark.parametrize("way", ["by_hand", "by_closure", "plain", "given_up", "saved"])
@pytest.mark.parametrize("optimizer", REMEMBERING)
def test_at_every_line_of_more_that_remembers(optimizer, way, backend, dtypes, steps):
    """Where a step has several FlatParams, and whatever is cut short."""
    assert_none(complaints(lambda: Run(optimizer, backend, dtypes, steps), WAYS[way], KeyboardInterrupt))


INTERRUPTER = """
import os, signal, sys, time
for line in sys.stdin:
    end = time.perf_counter() + float(line)
    while time.perf_counter() < end:
        pass
    os.kill(int(sys.argv[1]), signal.SIGINT)
"""
SIGNALS = 500
CASES = [(o, b, d) for o in ("SAM-SGD", "BSAM-AdamW") for b in BACKENDS for d in ("one", "two", "16 bits", "model")]


@pytest.fixture
def interrupter():
    """Call it with seconds: another process then sends us SIGINT."""
    command = [sys.executable, "-c", INTERRUPTER, str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, bufsize=1) as process:
        yield lambda seconds: process.stdin.write(f"{seconds}\n")
        process.stdin.close()


class Path:
    """What every step of a run that nobody interrupts leaves: every fourth one is the plain base's."""

    def __init__(self, *case):
        self.run = Run(*case)
        self.states = [self.run.left()]

    def __getitem__(self, step):
        while len(self.states) <= step:
            (plain if self.is_plain(len(self.states) - 1) else by_hand)(self.run)
            self.states.append(self.run.left())
        return self.states[step]

    @staticmethod
    def is_plain(step):
        return step % 4 == 3


@pytest.mark.interrupts
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_real_signals(case, interrupter):
    """Training goes on after each, in the same optimizer or a new one, and stays on its path bit for bit."""
    seed = int(os.environ.get("SEED", random.randrange(2**32)))
    print(f"\nSEED={seed}", case)
    rng, path = random.Random(seed), Path(*case)
    begin = time.perf_counter()
    path[20]
    a_step = (time.perf_counter() - begin) / 20
    run, step, caught = Run(*case), 0, 0
    for _ in range(-(-SIGNALS // len(CASES))):
        if rng.random() < 0.4:
            run, step = Run(*case), 0
        try:
            interrupter(rng.uniform(0, 4 * a_step))
            give_up = time.perf_counter() + 5  # whatever swallowed it, such as a __del__
            while time.perf_counter() < give_up:
                if rng.random() < 0.2:
                    given_up(run)
                (plain if path.is_plain(step) else rng.choice((by_hand, by_closure)))(run)
                step += 1
        except KeyboardInterrupt:
            caught += 1
        torch.set_grad_enabled(True)  # torch.no_grad() itself may have been interrupted
        run.opt.restore()
        run.opt.active, run.watched = True, True
        run.opt.zero_grad()
        left = run.left()
        now = [later for later in (step, step + 1) if same(left, path[later])]
        assert now, f"SEED={seed}: after step {step} neither w nor the next w, with its state"
        assert not traces(run), f"SEED={seed}: {traces(run)}"
        step = now[0]
    assert caught > 0.9 * SIGNALS // len(CASES)
