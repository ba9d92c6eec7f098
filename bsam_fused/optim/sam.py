"""SAM (arXiv 2010.01412) and ASAM (2102.11600)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from bsam_fused.distributed import Sync
from bsam_fused.ops.dispatch import Backend
from bsam_fused.optim.base import Closure, R, SharpnessAware
from bsam_fused.optim.options import Rounding, common

Base = type[torch.optim.Optimizer] | torch.optim.Optimizer


class SAM(SharpnessAware):
    """Sharpness-aware minimization: the base optimizer's step from w, with the gradient at w_max.

    w_max = w + ρ T² g / (‖T g‖ + norm_eps), g = ∇L(w), the norm over all parameters that have a gradient; T = 1,
    or |w| + η where adaptive (SAM eq. 2, ASAM eq. 5). Two passes a step.

    Args:
        params: parameters, (name, parameter) pairs or param groups; groups may set ``rho``, ``adaptive``, ``eta``,
            ``loss_budget`` and the base optimizer's options (where the base has an option of such a name, Adadelta's
            rho, ours is ``sharpness_rho``), and ``perturb=False``: trained, but neither perturbed nor in the norm (all
            but normalization layers: SAM-ON, arXiv 2306.04226).
        base_optimizer: a torch.optim.Optimizer class, or an instance over the same parameters. Exactly torch's
            SGD, Adam and AdamW are fused; any other gets the direction in ``.grad`` and runs its own ``step()``.
        rho: radius ρ ≥ 0 of the neighbourhood, in units of ‖w‖ (adaptive: relative to |w|).
        adaptive: scale the neighbourhood by |w| + η, elementwise.
        eta: η ≥ 0.
        loss_budget: σ ≥ 0, what the loss may rise by to first order: the radius is min(σ / ‖T g‖, ρ) (LE-SAM,
            arXiv 2605.10183, which calls ρ then ρ_max); not with a GradScaler. None: ρ alone.
        norm_eps: added to the norm, ≥ 0.
        max_grad_norm: > 0: scale the direction down to this norm over all parameters where it is longer, as
            torch.nn.utils.clip_grad_norm_ would; after a GradScaler's scale is divided out. None: do not.
        rounding: of bfloat16 and float16 parameters when they are perturbed and updated, and of their base state:
            "stochastic", up or down at random so that the mean is right, or "nearest", which loses most of a small
            perturbation. Wider parameters need none.
        seed: of stochastic rounding, in [0, 2³²): the same gradients then give the same bits on every backend.
        master_weights: update 16-bit parameters from and to a float32 copy, ``state[p]["master_weight"]``, of which the
            weights are the rounding to nearest; a weight set from outside counts from there on. Fused bases only.
        sync: what DistributedDataParallel averages: "every" pass's gradients, or only what comes "last", the direction:
            each rank then perturbs by the gradient of its own batch (m-sharpness), and one all-reduce a step is left.
            Needs ``model=`` to be the DDP module; passes by hand go into ``with optimizer.one_pass():``.
        same_randomness: whether dropout, drop-path and augmentation draw the same in all passes of a step, and go on
            after it as after one: the generators of the CPU and of the parameters' devices, not those passed to
            layers, NumPy's or Python's. Passes by hand go into ``with optimizer.one_pass():``.
        model: whose buffers (running statistics, observers, codebooks, queues) the extra passes shall leave as the
            first one left them, whatever writes them, the loop included; not those that share memory with a parameter,
            nor what is no buffer. Also which FSDP2 is to gather anew for every pass.
        backend: "auto", "cuda", "triton", "cpp" or "torch".
        **base_kwargs: options of the base optimizer's class.

    Raises:
        ValueError, TypeError: an option or a parameter that cannot be used, by name.
        RuntimeError: a backend asked for by name that cannot be had, with the reason.
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        eta: float = 0.0,
        loss_budget: float | None = None,
        norm_eps: float = 1e-12,
        max_grad_norm: float | None = None,
        rounding: Rounding = "stochastic",
        seed: int = 0,
        master_weights: bool = False,
        sync: Sync = "every",
        same_randomness: bool = False,
        model: nn.Module | None = None,
        backend: Backend = "auto",
        **base_kwargs: Any,
    ) -> None:
        options = {"rho": rho, "adaptive": adaptive, "eta": eta, "loss_budget": loss_budget}
        super().__init__(params, base_optimizer, options, base_kwargs, common(locals()))

    @overload
    def step(self, closure: None = None, *, ascent_closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], R], *, ascent_closure: None = None) -> R: ...

    @overload
    def step(self, closure: Closure, *, ascent_closure: Callable[[], R]) -> R: ...

    def step(self, closure: Closure | None = None, *, ascent_closure: Closure | None = None) -> Any:
        """Finish a step by hand, or run a whole one with closures.

        Args:
            closure: as `SharpnessAware.step` has it; called twice.
            ascent_closure: takes another loss for the first pass (BiSAM, arXiv 2407.12993); ``closure`` is then
                called once, at w_max.

        Returns:
            The loss of the first pass: L(w), or the ascent loss; None without a closure.

        Raises:
            TypeError: ``ascent_closure`` without ``closure``, or with `decide`, which asks the first pass.
            RuntimeError: as `SharpnessAware.step` has it.
        """
        if ascent_closure is None:
            return super().step(closure)
        if closure is None:
            raise TypeError("ascent_closure without closure: pass both, or call the phases by hand")
        if self.decide is not None:
            raise TypeError(
                "ascent_closure with decide: a step that ends after its first pass would be made by the ascent loss. "
                "Leave out one of them"
            )
        return self._run([ascent_closure, closure])


class ASAM(SAM):
    """Adaptive SAM: `SAM` with ``adaptive=True`` and the ASAM paper's radius.

    Args:
        params: as `SAM` has it.
        base_optimizer: as `SAM` has it.
        rho: radius ρ ≥ 0, relative to |w| + η.
        eta: η ≥ 0.
        loss_budget: as `SAM` has it.
        norm_eps: as `SAM` has it.
        max_grad_norm: as `SAM` has it.
        rounding: as `SAM` has it.
        seed: as `SAM` has it.
        master_weights: as `SAM` has it.
        sync: as `SAM` has it.
        same_randomness: as `SAM` has it.
        model: as `SAM` has it.
        backend: as `SAM` has it.
        **base_kwargs: options of the base optimizer's class.

    Raises:
        ValueError, TypeError, RuntimeError: as `SAM` has it.
    """

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Base = torch.optim.SGD,
        *,
        rho: float = 0.5,
        eta: float = 0.01,
        loss_budget: float | None = None,
        norm_eps: float = 1e-12,
        max_grad_norm: float | None = None,
        rounding: Rounding = "stochastic",
        seed: int = 0,
        master_weights: bool = False,
        sync: Sync = "every",
        same_randomness: bool = False,
        model: nn.Module | None = None,
        backend: Backend = "auto",
        **base_kwargs: Any,
    ) -> None:
        shared = common(locals())
        radius: dict[str, Any] = {"rho": rho, "adaptive": True, "eta": eta, "loss_budget": loss_budget}
        super().__init__(params, base_optimizer, **radius, **shared, **base_kwargs)
