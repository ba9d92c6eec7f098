"""Where the gradients at w and at w_min conflict: against ρ_min, and over training by BSAM with its decay and without.

python examples/gradient_conflict.py
"""

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR
from training import BASE, EPOCHS, LOADER, LOSS, RHO, STEPS, network, panels, picture, save, train

from bsam_fused import BSAM, sharpness
from bsam_fused.schedules import decayed_radius

PICTURE = picture(__file__, __doc__)
radii = torch.linspace(0, 5 * RHO, 21).tolist()
over_training, against_radius = {}, {}
for name, decay in (("with decay", "lr"), ("without", "none")):
    net = network(0)
    optimizer = BSAM(net.parameters(), rho=RHO, rho_min_decay=decay, **BASE)
    over_training[name] = []
    for step in train(net, optimizer, EPOCHS, CosineAnnealingLR(optimizer, EPOCHS * STEPS)):
        if step % STEPS:
            continue
        lr = optimizer.param_groups[0]["lr"]
        rho_min = decayed_radius(RHO, lr, BASE["lr"]) if decay == "lr" else RHO
        over_training[name] += sharpness.gradient_conflict(net, LOSS, LOADER, [rho_min])
    against_radius[name] = sharpness.gradient_conflict(net, LOSS, LOADER, radii)
    loss = sharpness.measure(net, LOSS, LOADER, rho=0.0).loss
    least, last = min(over_training[name]), over_training[name][-1]
    print(f"{name}: cos at the radius in use at least {least:.3f}, after the last epoch {last:.3f}; loss {loss:.4f}")

figure, (left, right) = panels(2, 4.5)
sharpness.plot_conflict(radii, against_radius, left).set_title("after training")
sharpness.plot_conflict(range(1, EPOCHS + 1), over_training, right, xlabel="epoch").set_title("at the ρ_min in use")
save(figure, PICTURE)
