"""What outlives an optimizer: its state dicts, copies and pickles."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from bsam_fused.ops.contract import MASTER_WEIGHT
from bsam_fused.optim import fused
from bsam_fused.optim.flats import Flats


class Persistent(torch.optim.Optimizer):
    """An optimizer around a base optimizer, whose state is views of flat buffers."""

    base_optimizer: torch.optim.Optimizer
    _flats: Flats
    _batchnorm: ExitStack
    _from_saved: bool

    def _require_rest(self, call: str) -> None:
        """Raise within a step."""
        raise NotImplementedError

    def _require_w(self, call: str) -> None:
        """Raise while the weights are perturbed."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state, and param groups with the sharpness-aware options.

        Groups also have ``rounded_steps`` where parameters are rounded stochastically.

        Raises:
            RuntimeError: while the weights are perturbed: a checkpoint of the model would hold w_max.
        """
        self._require_w("state_dict()")
        self._flats.retract()
        packed = super().state_dict()
        packed = {**packed, "state": fused.with_steps_on_host(packed["state"])}
        count = self._flats.rounded_steps
        if count is not None:
            packed["param_groups"] = [{**group, "rounded_steps": count} for group in packed["param_groups"]]
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer or of the plain base optimizer.

        Options that a saved group lacks stay as they are here.

        Raises:
            RuntimeError: within a step.
            ValueError: the groups do not match.
        """
        self._require_rest("load_state_dict()")
        saved, here = state_dict["param_groups"], self.param_groups
        if len(saved) == len(here):
            kept = [{k: v for k, v in group.items() if k in self._kept_options} for group in here]
            saved = [{**options, **group} for options, group in zip(kept, saved, strict=True)]
        counts = {group.get("rounded_steps") for group in saved}
        saved = [{k: v for k, v in group.items() if k != "rounded_steps"} for group in saved]
        state, masters = _without_masters(state_dict["state"])
        super().load_state_dict({**state_dict, "state": state, "param_groups": saved})
        self._flats.forget(counts.pop())
        if self._flats.masters:
            ids = [i for group in saved for i in group["params"]]
            for i, param in zip(ids, (p for group in self.param_groups for p in group["params"]), strict=True):
                if i in masters:
                    self.state[param][MASTER_WEIGHT] = masters[i].to(param.device, torch.float32)

    @property
    def _kept_options(self) -> set[str]:
        return set(self.defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy take: no flat buffers, and state that is no view of one."""
        self._require_rest("copying or pickling the optimizer")
        self._flats.retract()
        state: Any = type(self.state)(dict)
        for param, values in self.state.items():
            state[param] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}
        base = {**self.base_optimizer.__getstate__(), "state": state, "param_groups": self.param_groups}
        ours = {
            name: self.__dict__[name]
            for name in ("norm_eps", "max_grad_norm", "sync", "model", "backend", "active", "sharpness")
        }
        return {
            **super().__getstate__(),
            **ours,
            "state": state,
            "base": (type(self.base_optimizer), base),
            "_from_saved": self._from_saved,
            "_flats": self._flats.unbuilt(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a pickled state, or, from load_state_dict, state and param groups."""
        if "base" in state:
            kind, base = state.pop("base")
            self.base_optimizer = kind.__new__(kind)
            self._batchnorm = ExitStack()
        else:
            base = {"state": state["state"], "param_groups": state["param_groups"]}
            self._flats.forget()
        super().__setstate__(state)
        self.base_optimizer.__setstate__(base)


def _without_masters(state: dict[Any, dict[str, Any]]) -> tuple[dict[Any, dict[str, Any]], dict[Any, Tensor]]:
    """Return a saved state and its master weights apart: torch would cast them to their parameter's dtype."""
    masters = {i: values[MASTER_WEIGHT] for i, values in state.items() if MASTER_WEIGHT in values}
    rest = {i: {key: v for key, v in values.items() if key != MASTER_WEIGHT} for i, values in state.items()}
    return rest, masters
