"""SAM, begun at a minimum that SGD found: it escapes at once, and settles in a flatter one in the same valley.

As Figures of "Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training" (arXiv 2410.10373)
show it: the loss after the switch, the largest eigenvalue of the Hessian, and the loss between the two minima.

python examples/two_phase_escape.py
"""

import copy

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR
from training import BASE, LOADER, LOSS, QUARTER, STEPS, network, panels, picture, save, train, trained

from bsam_fused import SAM, sharpness

PICTURE = picture(__file__, __doc__)
EPOCHS = 20
minimum = trained("SGD").state_dict()
losses, curvatures, ends = {}, {}, {}
for name, rho in (("SGD goes on", 0.0), ("SAM takes over", 0.2)):
    net = network(0)
    net.load_state_dict(minimum)
    optimizer = SAM(net.parameters(), rho=rho, **{**BASE, "lr": 0.05})  # with ρ = 0, SGD
    losses[name], curvatures[name] = [], []
    for step in train(net, optimizer, EPOCHS, CosineAnnealingLR(optimizer, EPOCHS * STEPS), seed=1):
        with torch.no_grad():
            losses[name].append(LOSS(net(LOADER[0][0]), LOADER[0][1]).item())
        if step % (2 * STEPS) == 0:
            curvatures[name].append(sharpness.hessian_eigenvalues(net, LOSS, QUARTER, tol=1e-2).item())
    ends[name] = copy.deepcopy(net.state_dict())
    most = max(losses[name])
    print(
        f"{name}: most loss {most:.4f} after {losses[name].index(most) + 1} steps, last {losses[name][-1]:.4f}; "
        f"λ_max {curvatures[name][-1]:.2f}"
    )

net.load_state_dict(minimum)
ways = torch.linspace(-0.5, 1.5, 41).tolist()
between = sharpness.loss_along(net, LOSS, LOADER, sharpness.direction_to(net, ends["SAM takes over"]), ways)
inside = between[10:31]
print(f"between the minima: from {inside[0]:.4f} to {inside[-1]:.4f}, at most {inside.max():.4f}")

figure, (escape, curvature, valley) = panels(3)
for name, values in losses.items():
    escape.plot(range(1, len(values) + 1), values, label=name, linewidth=1)
    curvature.plot(
        [2 * STEPS * (i + 1) for i in range(len(curvatures[name]))], curvatures[name], marker=".", label=name
    )
escape.set(title="after the switch", xlabel="step", ylabel="training loss")
curvature.set(title="flatter", xlabel="step", ylabel="largest eigenvalue of the Hessian")
sharpness.plot_loss_along(ways, {"training loss": between}, valley)
valley.set(title="in the same valley", xlabel="0: SGD's minimum, 1: SAM's", ylabel="training loss")
for panel in (escape, curvature):
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
save(figure, PICTURE)
