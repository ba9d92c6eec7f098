"""Rules: passes, phases, closures, restore and unperturbed, in any order and with what may go wrong in a pass."""

import math
from itertools import repeat

import torch
from hypothesis import strategies as st

from bsam_fused.optim.base import NO_GRADIENT

from . import gradients
from .beside import INDICES, SEEDS, Beside, agree, without_history
from .model import CALLS, is_whole
from .setups import Counting
from .tally import rule

FAULTS = st.sampled_from(["", "", "raise", "nan loss", "no loss", "nothing"])
ALIASES = ("first_step", "second_step", "third_step")


class Steps(Beside):
    """One step after the other, or not to its end."""

    @rule(seed=SEEDS, kinds=gradients.faults)
    def backward(self, seed, kinds):
        self.forward()
        self.give(seed, kinds)

    def give(self, seed, kinds):
        """No tiny gradients beside frozen parameters, which may count in what is too small, or not."""
        if self.model.at_rest:
            self.gradients.forget()  # those of a step are held until it ends
        params = self.mine(trainable=True)
        kinds = {} if kinds == gradients.TINY and len(params) < len(self.mine()) else kinds
        self.gradients.give(params, self.optimizer, seed, kinds)

    @rule()
    def passes(self):
        """How many the step has, as it is asked after its first backward."""
        model, grads = self.model, self.read()
        asked = model.at_rest and model.threshold is not None
        if asked:
            model.decided = None
            model.decide(grads)
        lacking = asked and not grads and not model.single
        passes = self.expect(lambda: self.optimizer.passes, refused=lacking)
        assert lacking or passes == (1 if model.at_rest and model.single else len(model.calls))

    @rule(seed=SEEDS, kinds=gradients.faults)
    def go_on(self, seed, kinds):
        """Backward, and the call that is next."""
        self.backward(seed, kinds)
        self.passes()
        self.phase("step" if self.model.plain and self.model.at_rest else self.model.next)

    @rule(seed=SEEDS, n=st.integers(1, 3), kinds=gradients.faults, at=st.integers(0, 8))
    def whole_steps(self, seed, n, kinds, at):
        """To the end of the step and further ones; the gradients of these kinds in pass number ``at``."""
        odd = iter([*at * [{}], kinds])
        for k in range(n):
            before = self.model.skipped
            self.whole_step(seed + 3 * k, odd)
            if self.model.at_rest and not self.model.refused and not kinds:
                self._assert_told(self.model.skipped > before)
            self.agrees()

    @rule(i=INDICES, seed=SEEDS, kind=st.sampled_from(["own", "nan"]), written=st.booleans())
    def gradient_in_the_first_pass_alone(self, i, seed, kind, written):
        """What is written to its parameter after that counts; of a step that is skipped there are norms, too."""
        at, i, before = i, self.pick(i), self.model.skipped
        if not self.model.at_rest or self.is_alone(i):
            return
        self.go_on(seed, {i: kind})
        if written:
            self.write(at, seed)
        self.to_the_end(seed, repeat({i: "none"}))
        if self.model.at_rest and not self.model.refused:
            self._assert_told(self.model.skipped > before)

    def is_alone(self, i):
        """Whether a pass without this parameter's gradient has none, and so does not come to its end."""
        return list(self.mine(trainable=True)) == [i]

    @rule(active=st.booleans(), seed=SEEDS, kinds=gradients.faults)
    def step_of_a_hooked_base(self, active, seed, kinds):
        """Whoever listens to the base's steps has it make them itself."""
        if self.model.at_rest and self.fused and self.suits_torch():
            hook = self.optimizer.base_optimizer.register_step_post_hook(lambda *_: None)
            self.fused = self.model.fused = False
            self.step_while(active, seed, kinds)
            self.fused = self.model.fused = True
            hook.remove()

    def suits_torch(self):
        """Whether torch's own step finds all state, of its parameter's dtype, and does not round to 16 bits."""
        state = [(self.params[i], entry) for i, entry in without_history(self.state()).items()]
        tensors = [(p, t) for p, entry in state for key, t in entry.items() if key != "step"]
        alike = all(t.dtype == p.dtype for p, t in tensors) and torch.bfloat16 not in {p.dtype for p in self.params}
        return alike and all(is_whole(entry) for _, entry in state)

    def step_while(self, active, seed, kinds):
        """A whole step, the gradients of these kinds in its first pass."""
        before = self.model.active
        self.set_active(active)
        self.whole_step(seed, iter([kinds]))
        self.set_active(before)

    def whole_step(self, seed, odd):
        self.go_on(seed, next(odd, {}))
        self.to_the_end(seed, odd)

    def to_the_end(self, seed, odd):
        while not self.model.at_rest and not self.disturbed:
            self.agrees()
            seed += 1
            self.go_on(seed, next(odd, {}))

    def _assert_told(self, skipped):
        """Metrics are of the latest step alone; of one that was skipped norms may be NaN."""
        told, right = self.optimizer.metrics(), self.model.norms
        names = [name for name in ("norm_g", "norm_g_max", "norm_g_min") if name in told]
        assert len(names) == len(right), f"norms {names}, and not {right}"
        tolerance = max(map(self.tolerance, self.params))
        for name, x in zip(names, right):
            unknown = not math.isfinite(x) or (skipped and math.isnan(told[name]))
            assert unknown or agree(told[name], x, tolerance), f"{name}: {told[name]}, and not {x}"

    @rule(name=st.sampled_from(CALLS["BSAM"]), alias=st.booleans())
    def call(self, name, alias):
        if name in self.model.calls:
            self.phase(name, alias)

    def phase(self, name, alias=False):
        """One of ascend, descend, step, with the gradients that there are."""
        grads, model = self.read(), self.model
        if name == "ascend" or (name == "step" and not model.moves_nothing):
            model.decide(grads)
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
        if model.refused and model.threshold is not None:
            return  # it is, or not, by the gradients
        if at_rest:
            model.decided = None

        def closure():
            nonlocal passes, lacking
            self.agrees()
            self.forward()
            here = passes == at
            silent = here and fault in {"no loss", "nothing"}
            odd = gradients.NO_GRADIENTS if fault == "nothing" else kinds
            self.give(seed + passes, odd if here else {})
            passes += 1
            if here and fault == "raise":
                raise ZeroDivisionError
            grads = self.read()
            if not refused:
                model.decide(grads)
            name = model.whole[passes - 1]
            looked_at = self.fused or not model.single or model.between
            judged = looked_at and bool(self.mine(trainable=True))
            loss = math.nan if here and fault == "nan loss" and judged else 0.5
            lacking = self.lacks(grads) and not (model.single and silent)
            ending[:] = [lambda: None if lacking else getattr(model, name)(grads, loss)]
            if passes < len(model.whole) and not refused:  # now; the last one when the update was made
                ending.pop()()
            return None if silent else torch.tensor(loss)

        def given_up():
            """A closure that does nothing, and says so."""
            return (passes, at) == (1, 0) and fault in {"no loss", "nothing"}

        try:
            self.expect(lambda: self.optimizer.step(closure), lambda: [end() for end in ending], refused)
        except ZeroDivisionError:
            model.restore()
        except RuntimeError as error:
            if given_up() or not (lacking and NO_GRADIENT in str(error)):
                raise
            model.restore()
        else:
            assert not lacking or given_up()
        assert at_rest or not passes

    @rule()
    def restore(self):
        self.optimizer.restore()
        self.model.restore()

    @rule()
    def zero_grad(self):
        self.optimizer.zero_grad()

    @rule(mode=st.sampled_from(["train", "eval"]))
    def go_to(self, mode):
        """Of w, whatever the phase."""
        if self.model.failed:
            return  # perturbed or not
        getattr(self.optimizer, mode)()
        if self.base is Counting:
            self.model.exchange()
            for i in self.mine():
                self.model.w[i].data.neg_()
            self.model.exchange()

    @rule(i=INDICES, seed=SEEDS, kind=st.sampled_from(["none", "zeros"]))
    def infinite_weight(self, i, seed, kind):
        """It stays where its gradient is 0, but for weight decay, of which torch makes NaN, too."""
        at, i = i, self.pick(i)
        decays = any(group["weight_decay"] for group in self.model.base.param_groups)
        remembers = self.kind == "FriendlySAM"  # and moves along that
        lacking = kind == "none" and self.is_alone(i)
        if decays or remembers or lacking or not self.model.at_rest:
            return
        self.params[i].data.fill_(math.inf)
        self.model.w[i].data.fill_(math.inf)
        self.whole_step(seed, repeat({i: kind}))
        self.agrees()
        self.write(at, seed)

    # ---- a look at w

    @rule(
        inside=st.lists(st.sampled_from(["write", "state_dict", "phase", "restore", "raise", "again"]), max_size=2),
        i=INDICES,
    )
    def unperturbed(self, inside, i):
        try:
            with self.optimizer.unperturbed():
                self.model.exchange()
                assert self.net.num_batches_tracked == self.tracked, "w is looked at with an extra pass's buffers"
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
            skipped = model.skipped
            model.step(grads)
            assert model.skipped > skipped, "a base that raises was not asked"
        finally:
            Counting.raising = False

    @rule(i=INDICES, freed=st.booleans())
    def no_memory_of_elements(self, i, freed):
        """A sparse gradient, and one whose memory is gone."""
        p = self.params[self.pick(i)]
        if self.fused and p.dim() and p.numel() and not (self.model.at_rest and self.model.plain):
            p.grad = torch.zeros(p.shape, dtype=p.dtype)
            if freed:
                p.grad.untyped_storage().resize_(0)
            else:
                p.grad = p.grad.to_sparse()
            self.expect(getattr(self.optimizer, self.model.next), refused=True)
            p.grad = None

    @rule(k=INDICES, rho=st.sampled_from([-1.0, math.nan, "wide"]))
    def wrong_rho(self, k, rho):
        if self.model.at_rest and self.model.active:
            groups = self.groups()
            k %= len(groups)
            group, before = groups[k], self.model.base.param_groups[k]["rho"]
            group["rho"] = rho
            self.expect(self.optimizer.ascend, refused=True)
            group["rho"] = before
            self.passes()  # decided or not before it was refused: anew
