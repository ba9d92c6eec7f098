"""An optimizer beside its model: how both are told of a call, and what must agree afterwards.

Weights and state agree bit for bit where nothing was computed, else to the dtype's rounding. The model then takes the
optimizer's own numbers over, so that every step is judged alone and no tolerance has to cover a trajectory.
"""

from itertools import zip_longest

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant
from torch import nn

import bsam_fused

from . import gradients, setups
from .model import CALLS, HISTORY, Model, tidy
from .setups import BASES, OWN, TOLERANCE, completed, values
from .tally import DRIVEN

REFUSALS = (RuntimeError, ValueError, TypeError)
OUR_WORDS = "param", "group", "order", "step", "rho", "passes", "unperturbed"
"""One is in every message that says what is wrong."""
INDICES, SEEDS = st.integers(0, 7), st.integers(0, 99)


class Beside(RuleBasedStateMachine):
    """The optimizer, the model, and what they share. The rules are its subclasses'."""

    @initialize(
        kind=st.sampled_from(list(CALLS)),
        base=st.sampled_from(list(BASES)),
        backend=st.sampled_from(["cpp", "torch"]),
        leaves=st.lists(setups.leaves, min_size=1, max_size=4),
        groups=st.lists(setups.group_options, min_size=1, max_size=2),
        update_from=st.sampled_from(["w", "w_min"]),
        max_grad_norm=st.sampled_from([None, None, 0.5, 100.0]),
    )
    def begin(self, kind, base, backend, leaves, groups, update_from, max_grad_norm):
        DRIVEN.sequences += 1
        DRIVEN.kinds[kind] += 1
        self.kind, (self.base, options) = kind, BASES[base]
        self.fused = self.base.__name__ in {"SGD", "Adam", "AdamW"}
        if not self.fused:  # torch's own steps in 16 bits round too often to be judged
            leaves = [leaf._replace(dtype=leaf.dtype.replace("bfloat16", "float32")) for leaf in leaves]
        self.params = [setups.parameter(leaf, i) for i, leaf in enumerate(leaves)]
        cut = [
            {**group, "params": [i for i, leaf in enumerate(leaves) if leaf.group % len(groups) == k]}
            for k, group in enumerate(groups)
        ]
        settings = {"max_grad_norm": max_grad_norm, **({"update_from": update_from} if kind == "BSAM" else {})}
        self.net = nn.BatchNorm1d(2)
        self.net.trained = self.params[0]
        self.optimizer = getattr(bsam_fused, kind.split()[-1])(
            [{**group, "params": [self.params[i] for i in group["params"]]} for group in cut],
            self.base,
            **{
                "lr": 0.1,
                "backend": backend,
                "rounding": "nearest",
                "model": self.net,
                **settings,
                **options,
                **OWN.get(kind, {}),
            },
        )
        cut = [completed(kind, {**options, **group}) for group in cut]
        self.model = Model(kind, self.params, cut, self.base, {"lr": 0.1, **options}, fused=self.fused, **settings)
        self.gradients = gradients.Gradients()
        self.checkpoints = []
        self.tracked = 0  # batches in the running statistics
        self.first_options = [{k: v for k, v in g.items() if k != "params"} for g in self.model.base.param_groups]
        self.disturbed = False  # the step under way may have become impossible: an error, or right

    @invariant()
    def one_step_more(self):
        DRIVEN.steps += 1

    def teardown(self):
        torch.set_grad_enabled(True)  # of the process, and so the next sequence's

    # ---- what must agree

    @invariant()
    def agrees(self):
        if not hasattr(self, "model"):
            return
        difference = self.difference(self.model)
        assert not difference, difference
        assert torch.is_grad_enabled(), "autograd does not record any more"
        self.gradients.assert_untouched()
        at_rest = self.model.at_rest
        assert not at_rest or self.net.num_batches_tracked == self.tracked, "running statistics moved, or did not"
        self.take_over()
        self.disturbed &= not at_rest

    def difference(self, model):
        """What is not as ``model`` has it, in words; None."""
        ways = (self._different_groups, self._different_weight, self._different_state, self._different_history)
        ways = (*ways, self._different_count)
        return next(filter(None, (way(model) for way in ways)), None)

    def _different_groups(self, model):
        """The base's own, which lack what was not noticed yet: who reads ours has it noticed."""
        indices = {id(p): i for i, p in enumerate(self.params)}
        groups = self.optimizer.base_optimizer.param_groups
        for k, (group, right) in enumerate(zip_longest(groups, model.base.param_groups)):
            if not (group and right):
                return "there is a param group more, or less"
            if [indices[id(p)] for p in group["params"]] != [model.index(p) for p in right["params"]]:
                return f"group {k} has other parameters"
            for name in group.keys() & right.keys() - {"params"}:
                if name == "looks" and not self.mine(trainable=True):
                    right[name] = group[name]  # whether steps of nothing count is nobody's concern
                if group[name] is not None and group[name] != right[name]:
                    return f"{name} of group {k}: {group[name]}, and not {right[name]}"
        return None

    def _different_weight(self, model):
        mine = model.options()
        for i, (p, w) in enumerate(zip(self.params, model.w)):
            if i not in mine and not model.at_rest:
                continue  # taken out of the step under way
            if model.failed and not model.stays and i in model.saved and p.isfinite().all():
                continue  # w, or w_min: who learns too late of what was not finite goes on, and gives up at the end
            if not agree(p, w, self.tolerance(p) if i in model.moved else 0):
                return f"weight {i}: {show(p)}, and not {show(w)}"
        return None

    def _different_state(self, model):
        state, right = without_history(self.state()), without_history(model.state())
        if state.keys() != right.keys():
            return f"there is state of {set(state)}, and not of {set(right)}"
        for i, entry in right.items():
            if isinstance(i, str):
                if not agree(state[i], entry):
                    return f"state {i!r}: {state[i]}, and not {entry}"
                continue
            if state[i].keys() != entry.keys():
                return f"state of {i} has {set(state[i])}, and not {set(entry)}"
            for key, value in entry.items():
                if not agree(state[i][key], value, self.tolerance(self.params[i]) if i in model.updated else 0):
                    return f"state {key} of {i}: {show(state[i][key])}, and not {show(value)}"
        return None

    def _different_history(self, model):
        """Zeros where there is none."""
        held, right = self.history(), model.history(range(len(self.params)))
        for i, h in right.items():
            if not agree(held[i], h, self.tolerance(self.params[i]) if i in model.updated else 0):
                return f"history of {i}: {show(held[i])}, and not {show(h)}"
        return None

    def _different_count(self, model):
        skipped = self.optimizer.skipped_steps
        return None if skipped == model.skipped else f"{skipped} steps were skipped, and not {model.skipped}"

    def tolerance(self, p):
        """Of what was computed: its dtype's, and a little of others', whose roundings are in the norms."""
        return max(TOLERANCE[p.dtype], 1e-1 * max(TOLERANCE[q.dtype] for q in self.params))

    def state(self):
        """{index or string: its entry}, as the model has it."""
        indices = {id(p): i for i, p in enumerate(self.params)}
        state = self.optimizer.state
        assert state is self.optimizer.base_optimizer.state
        return tidy({k if isinstance(k, str) else indices[id(k)]: entry for k, entry in state.items()})

    def history(self):
        """{index: what is remembered}, as the model has it."""
        entries = {i: self.optimizer.state.get(p, {}).get(HISTORY.get(self.kind)) for i, p in enumerate(self.params)}
        return {i: torch.zeros_like(self.params[i]) if h is None else h for i, h in entries.items()}

    def take_over(self):
        for p, w in zip(self.params, self.model.w):
            w.data = p.detach().double().clone()
        state = self.state()
        for i, entry in without_history(self.model.state()).items():
            for key, value in entry.items() if isinstance(entry, dict) else ():
                if torch.is_tensor(value):
                    value.copy_(state[i][key])
        self.model.remember({i: h.detach().double() for i, h in self.history().items()})
        self.model.synced()

    # ---- how calls are made

    def expect(self, call, then=None, refused=False, lenient=False):
        """Make ``call``; unless there was an error, tell the model with ``then``.

        There must be one where it is ``refused``, and may be where we are ``lenient``, or the step was disturbed.
        """
        error = None
        try:
            result = call()
        except REFUSALS as caught:
            if not (refused or lenient or (self.disturbed and not self.model.at_rest)):
                raise
            error = str(caught)
        if error is not None:
            assert any(word in error for word in OUR_WORDS), f"unclear: {error}"
            return None
        assert not refused, "should have been refused"
        if then is not None:
            then()
        return result

    def lacks(self, grads):
        """Whether a pass made no gradient, though it could."""
        return not grads and bool(self.mine(trainable=True))

    def disturb(self, really=True):
        """Note what may make the step under way impossible."""
        self.disturbed = really or self.disturbed

    def forward(self):
        """One of the network whose running statistics are the optimizer's to guard."""
        self.tracked += self.model.at_rest
        self.net(torch.ones(2, 2))

    # ---- parameters and param groups

    def groups(self):
        """Ours: every option is there for who asks, but for BSAM's notes of lr until the first call."""
        for k, (group, right) in enumerate(zip(self.optimizer.param_groups, self.model.base.param_groups)):
            lacking = right.keys() - group.keys() - {"given_lr", "largest_lr"}
            assert not lacking, f"group {k} lacks {lacking}"
        return self.optimizer.param_groups

    def mine(self, trainable=False):
        """{index: parameter} of what is in param groups."""
        indices = sorted(self.model.options())
        return {i: self.params[i] for i in indices if self.params[i].requires_grad or not trainable}

    def pick(self, i):
        mine = list(self.mine())
        return mine[i % len(mine)]

    def new_like(self, i, seed):
        """A new parameter, known to the model; its index."""
        p = nn.Parameter(values(self.params[i].shape, self.params[i].dtype, seed))
        self.params.append(p)
        self.model.w.append(nn.Parameter(p.detach().double().clone()))
        return len(self.params) - 1

    def read(self):
        """The gradients, without those that a base of its own ways takes for what they are not."""
        params, plain = self.mine(), self.model.at_rest and (self.model.plain or self.model.threshold is not None)
        self.model.limit = min(torch.finfo(torch.promote_types(p.dtype, torch.float32)).max for p in params.values())
        for p in params.values() if not self.fused else ():
            if plain and p.grad is not None and not p.grad.isfinite().all():
                p.grad = None  # it would step to NaN
            elif p.grad is not None and p.grad.data_ptr() in self._base_writes(plain):
                p.grad = p.grad.clone()  # it would write to them before it reads them
        return gradients.read(params)

    def _base_writes(self, plain):
        entries = [e.values() for e in self.state().values() if isinstance(e, dict)]
        tensors = [t for values in entries for t in values if torch.is_tensor(t)]
        return {t.data_ptr() for t in (*tensors, *(self.params if plain else ()))}


def without_history(state):
    """A state without what is remembered, which is compared apart."""
    return tidy(
        {
            k: {n: v for n, v in e.items() if n not in HISTORY.values()} if isinstance(e, dict) else e
            for k, e in state.items()
        }
    )


def agree(a, b, tolerance=0):
    """Whether ``a`` is ``b``; with a tolerance, what is beyond the dtype of ``a`` is infinite there."""
    a, b = (torch.as_tensor(t).detach() for t in (a, b))
    if a.shape != b.shape:
        return False
    if not tolerance:
        return torch.equal(a.double(), b.double())
    a, b = a.double(), b.to(a.dtype).double()
    return bool(((a == b) | ((a - b).abs() <= tolerance * (1 + b.abs()))).all())


def show(t):
    return [round(x, 9) for x in t.detach().double().reshape(-1)[:4].tolist()]
