"""Rules: passes, phases, closures, restore and unperturbed, in any order and with what may go wrong in a pass."""

import math

import torch
from hypothesis import strategies as st
from hypothesis.stateful import rule

from bsam_fused.optim.base import NO_GRADIENT

from . import gradients
from .beside import INDICES, SEEDS, Beside
from .model import CALLS
from .setups import Counting

FAULTS = st.sampled_from(["", "", "raise", "nan loss", "no loss"])
ALIASES = ("first_step", "second_step", "third_step")


class Steps(Beside):
    """One step after the other, or not to its end."""

    @rule(seed=SEEDS, kinds=gradients.faults)
    def backward(self, seed, kinds):
        self.forward()
        self.gradients.give(self.mine(trainable=True), self.optimizer, seed, kinds)

    @rule(seed=SEEDS, kinds=gradients.faults)
    def go_on(self, seed, kinds):
        """Backward, and the call that is next."""
        self.backward(seed, kinds)
        self.phase("step" if self.model.plain and self.model.at_rest else self.model.next)

    @rule(seed=SEEDS)
    def whole_step(self, seed):
        """To the end of the step, or one from the beginning."""
        self.go_on(seed, {})
        while not self.model.at_rest and not self.disturbed:
            self.agrees()
            seed += 1
            self.go_on(seed, {})

    @rule(name=st.sampled_from(CALLS["BSAM"]), alias=st.booleans())
    def call(self, name, alias):
        if name in self.model.calls:
            self.phase(name, alias)

    def phase(self, name, alias=False):
        """One of ascend, descend, step, with the gradients that there are."""
        grads, model = self.read(), self.model
        if model.at_rest and name == "step" and model.plain:
            return self.expect(self.optimizer.step, lambda: model.plain_step(grads))
        begins = name == "ascend" and model.at_rest and (model.single or model.refused)
        refused = model.next != name or begins or self.lacks(grads)
        call = getattr(self.optimizer, ALIASES[model.calls.index(name)] if alias else name)
        return self.expect(call, lambda: getattr(model, name)(grads), refused)

    @rule(seed=SEEDS, kinds=gradients.faults, at=st.integers(0, 2), fault=FAULTS)
    def closure_step(self, seed, kinds, at, fault):
        """The fault, and the gradients of these kinds, in pass number ``at``."""
        model, at_rest, passes, ending, lacking = self.model, self.model.at_rest, 0, [], False
        refused = not at_rest or (model.active and model.refused)
        names, single = model.whole, model.single

        def closure():
            nonlocal passes, lacking
            if not model.failed:
                self.agrees()
            self.forward()
            here, name = passes == at, names[passes]
            self.gradients.give(self.mine(trainable=True), self.optimizer, seed + passes, kinds if here else {})
            passes += 1
            if here and fault == "raise":
                raise ZeroDivisionError
            judged = self.mine(trainable=True) and (self.fused or model.active)  # else nobody looks at it
            loss = math.nan if here and fault == "nan loss" and judged else 0.5
            grads = self.read()
            lacking = self.lacks(grads) and (not single or fault != "no loss" or not here)
            ending[:] = [lambda: None if lacking else getattr(model, name)(grads, loss)]
            if passes < len(names) and not refused:  # now; the last one when the update was made
                ending.pop()()
            return None if here and fault == "no loss" else torch.tensor(loss)

        try:
            self.expect(lambda: self.optimizer.step(closure), lambda: [end() for end in ending], refused)
        except ZeroDivisionError:
            model.restore()
        except RuntimeError as error:
            if not (lacking and NO_GRADIENT in str(error)):
                raise
            model.restore()
        else:
            given_up = (passes, at, fault) == (1, 0, "no loss")
            assert not lacking or given_up
        assert at_rest or not passes

    @rule()
    def restore(self):
        self.optimizer.restore()
        self.model.restore()

    @rule()
    def zero_grad(self):
        self.optimizer.zero_grad()

    # ---- a look at w

    @rule(
        inside=st.lists(st.sampled_from(["write", "state_dict", "phase", "restore", "raise", "again"]), max_size=2),
        i=INDICES,
    )
    def unperturbed(self, inside, i):
        try:
            with self.optimizer.unperturbed():
                self.model.exchange()
                try:
                    for what in inside:
                        getattr(self, f"_look_{what}")(i)
                        self.agrees()
                finally:
                    self.model.exchange()
        except ZeroDivisionError:
            pass

    def _look_write(self, i):
        self.write(i, 5)

    def _look_state_dict(self, i):
        self.optimizer.state_dict()

    def _look_phase(self, i):
        if not self.model.at_rest:
            self.expect(getattr(self.optimizer, self.model.next), refused=True)

    def _look_restore(self, i):
        self.optimizer.restore()
        self.model.forget()

    def _look_raise(self, i):
        raise ZeroDivisionError

    def _look_again(self, i):
        with self.optimizer.unperturbed():
            self.agrees()

    # ---- what is wrong

    @rule(seed=SEEDS)
    def base_raises(self, seed):
        """Every weight is put back; the base's state is its own."""
        model = self.model
        if self.base is not Counting or model.plain or model.next != "step" or self.disturbed:
            return
        self.backward(seed, {})
        grads, calls = self.read(), torch.as_tensor(model.base.state.get("calls", 0)) + 1
        Counting.raising = True
        try:
            self.optimizer.step()
        except ArithmeticError:
            model.base.state["calls"] = calls
            model.restore()
        else:
            assert model.failed
            model.step(grads)
        finally:
            Counting.raising = False

    @rule(i=INDICES)
    def sparse_gradient(self, i):
        p = self.params[self.pick(i)]
        if self.fused and p.dim() and not (self.model.at_rest and self.model.plain):
            p.grad = torch.zeros(p.shape, dtype=p.dtype).to_sparse()
            self.expect(getattr(self.optimizer, self.model.next), refused=True)
            p.grad = None

    @rule(k=INDICES, rho=st.sampled_from([-1.0, math.nan, "wide"]))
    def wrong_rho(self, k, rho):
        if self.model.at_rest and self.model.active:
            k %= len(self.optimizer.param_groups)
            group, before = self.optimizer.param_groups[k], self.model.base.param_groups[k]["rho"]
            group["rho"] = rho
            self.expect(self.optimizer.ascend, refused=True)
            group["rho"] = before
