"""Rules: state dicts, copies, pickles, and param groups that are added, to the optimizer or to its base."""

import copy
import pickle
from itertools import repeat

import torch
from hypothesis import strategies as st
from torch import nn

from . import setups
from .beside import INDICES, SEEDS, Beside, agree
from .edits import MOST
from .model import tidy
from .setups import completed, values
from .tally import rule


class Copies(Beside):
    """What outlives an optimizer, and what comes from another."""

    @rule()
    def save(self):
        """A group that others added, and no step can begin with, is refused here, too."""
        with self.optimizer.unperturbed():
            saved = self.expect(lambda: copy.deepcopy(self.optimizer.state_dict()), lenient=self.model.refused)
            right = self.model.state_dict()
        if saved is None:
            return
        state, right_state = tidy(saved["state"]), tidy(right["state"])
        assert state.keys() == right_state.keys(), f"a state dict of {set(state)}, and not of {set(right_state)}"
        for i, entry in right_state.items():
            for key, value in entry.items() if isinstance(entry, dict) else ():
                assert agree(state[i][key], value), f"{key} of {i} in the state dict"
        self.checkpoints.append((saved, right))

    @rule()
    def save_within_a_step(self):
        if not self.model.at_rest:
            self.expect(self.optimizer.state_dict, refused=True)

    @rule(which=INDICES, plain=st.booleans())
    def load(self, which, plain):
        """An own state dict, or one of the plain base optimizer."""
        if self.checkpoints:
            self._load(self.optimizer, which, plain)

    @rule(which=INDICES)
    def load_what_cannot_be(self, which):
        """Nothing is loaded, of no group."""
        if self.checkpoints and self.model.at_rest:
            saved = copy.deepcopy(self.checkpoints[which % len(self.checkpoints)][0])
            saved["param_groups"][0]["lr"] = 5.0
            saved["param_groups"][-1]["rho"] = -1.0
            self.expect(lambda: self.optimizer.load_state_dict(saved), refused=True)

    @rule(which=INDICES)
    def load_into_the_base(self, which):
        """It counts, or raises."""
        if self.checkpoints:
            self._load(self.optimizer.base_optimizer, which, plain=True)

    def _load(self, optimizer, which, plain):
        saved, right = copy.deepcopy(self.checkpoints[which % len(self.checkpoints)])
        fits = self.fits(saved)
        if plain:
            names = self.model.base.defaults.keys() | {"params"}
            for d in (saved, right):
                d["param_groups"] = [{k: v for k, v in g.items() if k in names} for g in d["param_groups"]]
        ours = optimizer is self.optimizer
        refused = not fits or (ours and not self.model.at_rest)
        self.expect(lambda: optimizer.load_state_dict(saved), lambda: self.model.load(right), refused, lenient=not ours)

    def fits(self, saved):
        groups = saved["param_groups"], self.optimizer.base_optimizer.param_groups
        return len({tuple(len(group["params"]) for group in side) for side in groups}) == 1

    @rule(pickled=st.booleans())
    def go_on_with_a_copy(self, pickled):
        def call():
            whole = (self.params, self.net, self.optimizer)
            return pickle.loads(pickle.dumps(whole)) if pickled else copy.deepcopy(whole)

        copies = self.expect(call, refused=not self.model.at_rest)
        if copies:
            self.params, self.net, self.optimizer = copies
            self.gradients.forget()
            self.model.decided = None  # of this optimizer, of gradients that it does not have

    @rule(seed=SEEDS, options=setups.group_options, wrong=st.sampled_from(["", "", "rho", "twice", "complex"]))
    def add_param_group(self, seed, options, wrong):
        self._add_group(self.optimizer, seed, options, wrong)

    @rule(seed=SEEDS, options=setups.group_options)
    def add_a_group_to_the_base(self, seed, options):
        """It counts, or raises."""
        if "BSAM" in self.kind:  # whose largest lr and rho_min are otherwise those of when it is noticed
            given = {"rho_min": options.get("rho", 0.05), "given_lr": options.get("lr", 0.1), "largest_lr": 0.0}
            options = {**given, **options}
        self._add_group(self.optimizer.base_optimizer, seed, options)
        self.disturb()

    @rule(i=INDICES, seed=SEEDS)
    def add_one_whose_gradients_are_another(self, i, seed):
        """They lie in a parameter that is perturbed where this one is not, and moves before it in a step."""
        i, n = self.pick(i), len(self.params)
        options = {"perturb": not self.model.options()[i]["perturb"]}
        self._add_group(self.optimizer, seed, options, like=self.params[i])
        if len(self.params) > n:
            self.whole_step(seed, repeat({n: "of_another"}))

    def _add_group(self, optimizer, seed, options, wrong="", like=None):
        if len(self.params) == MOST:
            return
        shape, dtype = ((3,), torch.float64) if like is None else (like.shape, like.dtype)
        p, ours = nn.Parameter(values(shape, dtype, seed)), optimizer is self.optimizer
        given = {"twice": self.params[self.pick(seed)], "complex": nn.Parameter(torch.ones(1, dtype=torch.cfloat))}.get(
            wrong, p
        )
        group = {"params": [given], **options, **({"rho": -1.0} if wrong == "rho" else {})}
        refused = bool(wrong) or (ours and not self.model.at_rest)
        whole = completed(self.kind, {**self.model.base.defaults, **options})

        def then():
            self.params.append(p)
            self.model.add(p, whole)

        self.expect(lambda: optimizer.add_param_group(group), then, refused, lenient=not ours)
