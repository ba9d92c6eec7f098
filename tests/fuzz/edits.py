"""Rules: weights, options, param groups and state, changed from outside."""

import operator
from collections import defaultdict
from functools import partial
from itertools import repeat

import torch
from hypothesis import strategies as st

from . import gradients, setups
from .beside import INDICES, SEEDS, Beside
from .setups import values
from .tally import rule

OPTIONS = [("lr", 0.05), ("lr", 0.0), ("rho", 0.3), ("weight_decay", 0.3), ("eta", 0.2)]
OPTIONS += [(name, on) for name in ("perturb", "adaptive") for on in (False, True)]
MOST = 9  # parameters
STATE_EDITS = st.sampled_from(["entry", "key", "replace", "data", "zero", "halve", "all", "new", "note"])


class Edits(Beside):
    """What is the user's to change at any time: it counts, or, within a step, may be an error."""

    @rule(i=INDICES, seed=SEEDS)
    def write(self, i, seed):
        if self.model.failed:
            return  # perturbed or not, and so given back or kept: a step that will be skipped is free to do either
        i = self.pick(i)
        value = values(self.params[i].shape, torch.bfloat16, seed)  # exact in all dtypes that it may have by now
        self.params[i].data.copy_(value)
        self.model.w[i].data = value.double()

    @rule(active=st.booleans())
    def set_active(self, active):
        self.optimizer.active = self.model.active = active

    @rule(factor=st.sampled_from([0.5, 1.0, 2.0]))
    def set_radius_factor(self, factor):
        self.optimizer.radius_factor = self.model.radius_factor = factor

    @rule(threshold=st.sampled_from([None, 5.0, 50.0]))
    def set_decide(self, threshold):
        """As AE-SAM has it: a step with a small gradient ends after its first pass."""
        self.model.threshold = threshold
        self.optimizer.decide = None if threshold is None else partial(operator.lt, threshold)

    @rule(k=INDICES, option=st.sampled_from(OPTIONS))
    def set_option(self, k, option):
        self.both(lambda groups, _: groups[k % len(groups)].update([option]))

    @rule(k=INDICES)
    def rewind(self, k):
        """The options of a param group are again what they were at first, the largest lr so far, too."""
        k %= len(self.first_options)
        if self.model.at_rest:
            self.both(lambda groups, _: groups[k].update(self.first_options[k]))

    @rule(i=INDICES, frozen=st.booleans())
    def freeze(self, i, frozen):
        p = self.params[self.pick(i)]
        p.requires_grad_(not frozen)
        p.grad = None

    @rule(i=INDICES, how=st.sampled_from(["clone", "transposed", "channels_last", "gaps", "wider"]))
    def relay(self, i, how):
        """Other memory, strides or dtype for the same values."""
        p = self.params[self.pick(i)]
        data, grad = p.data, p.grad
        p.grad = None
        if how == "wider" and self.fused:  # the state of others stays as narrow as it was
            p.data = data.to({torch.bfloat16: torch.float32}.get(p.dtype, torch.float64))
        else:
            p.data = data.clone() if how in {"clone", "wider"} else setups.LAYOUTS[how](data)
        if grad is not None and p.dtype == data.dtype:
            p.grad = grad
        self.disturb((p.dtype, p.stride()) != (data.dtype, data.stride()))

    # ---- param groups

    def both(self, edit):
        """Edit param groups alike: of parameters on one side, of the model's on the other."""
        edit(self.groups(), self.params)
        edit(self.model.base.param_groups, self.model.w)

    def place(self, i):
        """The param group of a parameter, and where it is there."""
        groups, w = self.model.base.param_groups, self.model.w[i]
        return next((k, j) for k, group in enumerate(groups) for j, p in enumerate(group["params"]) if p is w)

    @rule(i=INDICES, seed=SEEDS, entry=st.sampled_from(["deleted", "moved", "left"]))
    def replace(self, i, seed, entry):
        """As densifying loops do: another parameter in this one's place."""
        if len(self.params) == MOST:
            return
        old = self.pick(i)
        (k, j), new = self.place(old), self.new_like(old, seed)

        def put(groups, params):
            groups[k]["params"][j] = params[new]

        self.both(put)
        for state, params in ((self.optimizer.state, self.params), (self.model.base.state, self.model.w)):
            if entry != "left" and params[old] in state:
                kept = state.pop(params[old])
                if entry == "moved":
                    state[params[new]] = kept
        self.disturb()

    @rule(i=INDICES, j=INDICES)
    def swap(self, i, j):
        i, j = self.pick(i), self.pick(j)
        (k, at), (m, to) = self.place(i), self.place(j)

        def put(groups, params):
            groups[k]["params"][at], groups[m]["params"][to] = params[j], params[i]

        self.both(put)
        self._regrouped()

    @rule(k=INDICES, seed=SEEDS)
    def append(self, k, seed):
        if len(self.params) < MOST:
            new = self.new_like(self.pick(seed), seed)
            self.both(lambda groups, params: groups[k % len(groups)]["params"].append(params[new]))
            self._regrouped()

    @rule(i=INDICES)
    def remove(self, i):
        if len(self.mine()) > 1:
            k, j = self.place(self.pick(i))
            self.both(lambda groups, params: groups[k]["params"].pop(j))
            self._regrouped()

    def _regrouped(self):
        self.checkpoints.clear()  # of other shapes, perhaps
        self.disturb()

    # ---- state

    @rule(
        begun=st.booleans(),
        i=INDICES,
        n=INDICES,
        seed=SEEDS,
        how=st.one_of(st.just("none"), STATE_EDITS),
        active=st.booleans(),
        kinds=gradients.faults,
    )
    def edit_between_steps(self, begun, i, n, seed, how, active, kinds):
        """It counts in the step after it, be that inactive, as many of a late phase are, or skipped."""
        if not self.model.at_rest:
            return
        if begun:
            self.whole_step(seed, repeat({}))
            self.agrees()
        self.edit_state(i, n, seed, how)
        self.step_while(active, seed + 3, kinds)

    @rule(i=INDICES, n=INDICES, seed=SEEDS, how=STATE_EDITS)
    def edit_state(self, i, n, seed, how):
        i = self.pick(i)
        value = values(self.params[i].shape, self.params[i].dtype, seed).abs()
        both = (self.optimizer, self.params), (self.model.base, self.model.w)
        one, other = (optimizer.state.get(params[i], {}) for optimizer, params in both)
        keys = sorted(one.keys() & other.keys())  # one of them may have a history of zeros
        key = keys[n % len(keys)] if keys else None
        for optimizer, params in both:
            edit_state(optimizer, params[i], key, n, how, value.to(params[i].dtype), self.fused)


def edit_state(optimizer, param, key, n, how, value, fused):
    """An edit of the base optimizer's state; of an entry that lacks something only ours makes sense."""
    state = optimizer.state
    entry = state.get(param, {})
    value = torch.tensor(5.0) if key == "step" else value.clone()
    if how == "all":
        state.clear()
    elif how == "new":
        copies = {p: {k: v.clone() for k, v in e.items()} if isinstance(e, dict) else e for p, e in state.items()}
        optimizer.state = defaultdict(dict, copies)
    elif how == "note" and not fused:
        state["note"] = torch.tensor(n)
    elif how == "entry" or (how == "key" and not fused):
        state.pop(param, None)
    elif key and how == "key" and key != "step":  # without it torch's Adam cannot be copied
        del entry[key]
    elif key and how == "replace":
        entry[key] = value
    elif key and how == "data":
        entry[key].data = value
    elif key and how in {"zero", "halve"}:
        entry[key].mul_(0.0 if how == "zero" or key == "step" else 0.5)
