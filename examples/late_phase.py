"""SAM for the last part of training only: test error, flatness and passes against that part.

As "Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training" (arXiv 2410.10373) has it; the
mirror experiment, SAM for the first part only, beside it. The learning rate stays the same throughout: where it dies
away, a late phase comes too late to go anywhere.

python examples/late_phase.py
"""

from functools import cache
from statistics import fmean

from training import BASE, LOSS, QUARTER, STEPS, error, network, panels, picture, save, train

from bsam_fused import SAM, sharpness
from bsam_fused.schedules import LatePhase

PICTURE = picture(__file__, __doc__)
EPOCHS, SEEDS = 20, (0, 1)
shares = [0.0, 0.1, 0.25, 0.5, 1.0]


@cache
def result(start: float, early: bool) -> tuple[float, float]:
    """Train, and return the test error, in percent, and the largest eigenvalue of the Hessian; means over seeds."""
    runs = []
    for seed in SEEDS:
        net = network(seed)
        optimizer = SAM(net.parameters(), rho=0.2, **{**BASE, "lr": 0.05})
        phase = LatePhase(optimizer, EPOCHS * STEPS, start, early=early)
        for _ in train(net, optimizer, EPOCHS, phase, seed=seed):
            pass
        runs.append((error(net), sharpness.hessian_eigenvalues(net, LOSS, QUARTER, tol=1e-2).item()))
    return fmean(run[0] for run in runs), fmean(run[1] for run in runs)


def early_or_late(share: float, early: bool) -> tuple[float, float]:
    """Return the result of SAM for a share of the steps; all and none are the same, early or late."""
    return result(share, True) if early and 0 < share < 1 else result(1 - share, False)


figure, (left, right) = panels(2, 4.5)
for name, early in (("SAM late", False), ("SAM early", True)):
    errors, curvatures = zip(*(early_or_late(share, early) for share in shares), strict=True)
    left.plot(shares, errors, marker=".", label=name)
    right.plot(shares, curvatures, marker=".", label=name)
    for share, wrong, curvature in zip(shares, errors, curvatures, strict=True):
        print(
            f"{name}, for {share:.0%}: test error {wrong:.2f} %, λ_max {curvature:.2f}, {1 + share:.2f} passes a step"
        )
left.set(xlabel="share of the steps with SAM", ylabel="test error, %")
right.set(xlabel="share of the steps with SAM", ylabel="largest eigenvalue of the Hessian")
for panel in (left, right):
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
save(figure, PICTURE)
