"""Random sequences of every public call, with faults and interrupts, beside the model of what must happen."""

import copy
from itertools import count

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, HypothesisProvider
from hypothesis.stateful import run_state_machine_as_test

from .beside import INDICES, SEEDS
from .copies import Copies
from .edits import OPTIONS, Edits
from .interrupts import interrupted
from .setups import values
from .steps import Steps
from .tally import rule


class Fresh(HypothesisProvider):
    """Draws as hypothesis does; but as it is another backend, no sequence is a variation of the one before.

    Five in six would be, with parts repeated: they find less than new ones.
    """


AVAILABLE_PROVIDERS["fresh"] = f"{__name__}.{Fresh.__name__}"
PROFILE = settings(
    backend="fresh",
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
"""What all runs share."""
LONG = settings(PROFILE, max_examples=200, stateful_step_count=30, print_blob=False)
INTERRUPTED = st.sampled_from(["go_on", "closure", "closure", "restore", "look", "save", "load", "copy"])
"""A closure has most of the lines."""
LINES = st.sampled_from([60, 300, 1000]).flatmap(lambda last: st.integers(1, last))
"""Of a call: some have 60, others 1,000."""


class Machine(Steps, Edits, Copies):
    """Every rule does a thing to the optimizer and tells the model."""

    @rule(what=INTERRUPTED, seed=SEEDS, at=LINES)
    def interrupt(self, what, seed, at):
        """At a line of the package."""
        self._interrupt_once(what, seed, at)

    @rule(what=INTERRUPTED, seed=SEEDS, further=st.integers(20, 60))
    def interrupt_again_and_again(self, what, seed, further):
        """A little later each time, until the call comes to its end: its last lines are as likely as its first ones."""
        lines = count(1 + seed % further, further)
        while self._interrupt_once(what, seed, next(lines)):
            self.agrees()

    @rule(k=INDICES, option=st.sampled_from(OPTIONS), seed=SEEDS, at=LINES)
    def interrupt_a_load_before_another(self, k, option, seed, at):
        """Of other options than those of now, which come back with neither load."""
        if self.model.at_rest:
            self.save()
            self.set_option(k, option)
            self._interrupt_once("load", seed, at)
            self.agrees()
            self.load_into_the_base(seed)

    def _interrupt_once(self, what, seed, at):
        """And restore() once: w with the state of before, or the next w with its state. Returns where, if at all."""
        if self.disturbed:
            return []
        self.read()  # and with it how far the dtypes of today reach
        before, after, tracked = self.model, copy.deepcopy(self.model), self.tracked
        call = getattr(self, f"_interruptible_{what}")(seed, after)
        with interrupted(at) as where:
            call()
        if where:
            self.optimizer.restore()
            before.restore()
        possible = [after] if not where else [before, after] if after.at_rest else [before]
        for model in possible if where else ():
            for group, right in zip(self.optimizer.base_optimizer.param_groups, model.base.param_groups):
                right.update({key: group[key] for key in group.keys() & {"largest_lr"}})  # may be noted or not
        differences = [self.difference(model) for model in possible]
        when = f"interrupted at {' '.join(where)}" if where else f"{what}, not interrupted"
        assert None in differences, f"{when}: {', and '.join(differences)}"
        self.model = possible[differences.index(None)]
        if self.model.at_rest:
            self.tracked = int(self.net.num_batches_tracked)
            assert self.tracked - tracked in {0, 1}, f"{when}: running statistics of {self.tracked - tracked} batches"
        return where

    def _interruptible_go_on(self, seed, after):
        if after.at_rest and after.refused:
            return self._interruptible_look(seed, after)
        self.backward(seed, {})
        grads = self.read()
        after.decide(grads)
        name = "plain_step" if after.at_rest and after.plain else after.next
        getattr(after, name)(grads)
        return getattr(self.optimizer, name.removeprefix("plain_"))

    def _interruptible_closure(self, seed, after):
        if not after.at_rest or after.refused:
            return self._interruptible_restore(seed, after)
        after.decided = None
        for n in range(len(after.calls)):
            if n and after.at_rest:
                break  # a step of one pass is over
            params = self.mine(trainable=True)
            grads = {i: values(p.shape, p.dtype, 100 * (seed + n) + i).double() for i, p in params.items()}
            after.decide(grads)
            getattr(after, after.whole[n])(grads)
        seeds = iter(range(seed, seed + 3))
        return lambda: self.optimizer.step(lambda: self.backward(next(seeds), {}))

    def _interruptible_restore(self, seed, after):
        after.restore()
        return self.optimizer.restore

    def _interruptible_look(self, seed, after):
        def call():
            with self.optimizer.unperturbed():
                pass

        return call

    def _interruptible_save(self, seed, after):
        return self.optimizer.state_dict if after.at_rest else self._interruptible_look(seed, after)

    def _interruptible_load(self, seed, after):
        fitting = [checkpoint for checkpoint in self.checkpoints if self.fits(checkpoint[0])]
        if not (after.at_rest and fitting):
            return self._interruptible_look(seed, after)
        saved, right = copy.deepcopy(fitting[-1])
        after.load(right)
        return lambda: self.optimizer.load_state_dict(saved)

    def _interruptible_copy(self, seed, after):
        return (lambda: copy.deepcopy(self.optimizer)) if after.at_rest else self._interruptible_look(seed, after)


def batch(seed, how=LONG):
    """200 sequences. The same seed makes the same ones, of the same sources: hypothesis tries their constants, too."""
    machine = hypothesis.seed(seed)(type("Machine", (Machine,), {}))
    run_state_machine_as_test(machine, settings=how)
