"""State dicts of other implementations of SAM, as ours would be."""

from __future__ import annotations

from typing import Any

from bsam_fused.callers import warn

_WITHIN_A_STEP = {"old_p", "e_w"}
"""What they keep of a parameter within a step: w, or the perturbation. Ours would take it for the base's state."""


def as_ours(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict without what other implementations keep within a step, and leave there.

    Warns where no state of the base optimizer is beside it: davda54's SAM has that in its ``base_optimizer`` alone.
    """
    state = state_dict["state"]
    theirs = {i for i, entry in state.items() if isinstance(entry, dict) and _WITHIN_A_STEP & entry.keys()}
    if not theirs:
        return state_dict
    rest = {i: {key: value for key, value in state[i].items() if key not in _WITHIN_A_STEP} for i in theirs}
    if not any(rest.values()):
        warn(
            "load_state_dict() of another SAM's state dict, which has no state of its base optimizer: momentum and the "
            "like begin anew. They are in sam.base_optimizer.state_dict(), which loads as well"
        )
    kept = {i: entry for i, entry in {**state, **rest}.items() if entry or i not in theirs}
    return {**state_dict, "state": kept}
