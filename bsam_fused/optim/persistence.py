"""What outlives an optimizer: its state dicts, copies and pickles."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from bsam_fused.ops.contract import MASTER_WEIGHT
from bsam_fused.optim import others
from bsam_fused.optim.around import Around
from bsam_fused.optim.options_read import OptionsRead
from bsam_fused.optim.state import with_steps_on_host, without_masters

SWITCHES = ("active", "decide", "radius_factor")
"""What schedules set."""

_OWN = ("norm_eps", "max_grad_norm", "sync", "same_randomness", "model", "backend", "sharpness", *SWITCHES)
"""Attributes that copies have, too."""


class Persistent(Around):
    """An optimizer around a base optimizer that can be saved, loaded and copied."""

    _own: ClassVar[tuple[str, ...]] = ()
    """Those that a class adds."""
    _masters: ClassVar[dict[Tensor, Tensor]] = {}
    """Master weights on their way from a saved state, past torch, which would cast them."""

    def _require_w(self, call: str) -> None:
        """Raise while the weights are perturbed."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state, and param groups with the sharpness-aware options.

        Groups also have a version, ``bsam_fused_format``, and where parameters are rounded stochastically the count
        of ``rounded_steps``.

        Raises:
            RuntimeError: while the weights are perturbed: a checkpoint of the model would hold w_max.
        """
        self._require_w("state_dict()")
        self._notice()
        self._flats.retract()
        self._flats.hear_of_all()
        packed = self._packed()
        count = self._flats.rounded_steps
        counted = [{**group, "rounded_steps": count} for group in packed["param_groups"]]
        return {**packed, "state": with_steps_on_host(packed["state"]), "param_groups": counted}

    def _packed(self) -> dict[str, Any]:
        """Return torch's state dict, which has no words for the state of what is in no param group any more."""
        ids = {id(p) for group in self._groups for p in group["params"]}
        state = self.state
        if all(id(key) in ids for key in state if isinstance(key, Tensor)):
            return super().state_dict()
        shown = torch.optim.Optimizer.__new__(torch.optim.Optimizer)
        shown.__dict__.update(self.__dict__, param_groups=self._groups)
        shown.state = {key: entry for key, entry in state.items() if id(key) in ids or not isinstance(key, Tensor)}  # type: ignore[assignment]
        return torch.optim.Optimizer.state_dict(shown)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer, of the plain base optimizer, or of another SAM over that base.

        Options that a saved group lacks stay as they are here.

        Raises:
            RuntimeError: within a step.
            ValueError: the groups do not match, have an option that cannot be used, or are of a later version's format;
                then nothing was loaded.
        """
        self._require_rest("load_state_dict()")
        self._notice()
        state_dict = others.as_ours(state_dict)
        for i, (here, group) in enumerate(zip(self._groups, state_dict["param_groups"], strict=False)):
            self._check_options({**here, **group}, i)
        state, masters = without_masters(state_dict["state"])
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self._groups for p in group["params"]]
        self._masters = {p: masters[i] for i, p in zip(ids, params, strict=False) if i in masters}  # type: ignore[misc]
        super().load_state_dict({**state_dict, "state": state})
        self._notice()

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy take: no flat buffers, and state that is no view of one."""
        self._require_rest("copying or pickling the optimizer")
        self._notice()
        self._flats.retract()
        state: Any = type(self.state)(dict) if isinstance(self.state, defaultdict) else {}
        for key, entry in self.state.items():
            state[key] = _cloned(entry) if isinstance(key, Tensor) else entry
        base = {**self.base_optimizer.__getstate__(), "state": state, "param_groups": self._groups}
        ours = {name: getattr(self, name) for name in (*_OWN, *self._own)}
        return {
            "defaults": self.defaults,
            **ours,
            "base": (type(self.base_optimizer), base),
            "_flats": self._flats.anew(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a pickled state, or, from load_state_dict, state and param groups."""
        if "base" in state:
            kind, base = state.pop("base")
            self.base_optimizer = kind.__new__(kind)
            self.base_optimizer.__setstate__(base)
            self._known = self._completed = list(self.base_optimizer.param_groups)
            self._read = OptionsRead()
            super().__setstate__(state)
        else:
            if self._flats.masters:
                for param, master in self._masters.items():
                    state["state"][param][MASTER_WEIGHT] = master.to(param.device, torch.float32)
            self.base_optimizer.__setstate__({key: state[key] for key in ("state", "param_groups")})
            self._masters = {}  # type: ignore[misc]


def _cloned(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in entry.items()}
