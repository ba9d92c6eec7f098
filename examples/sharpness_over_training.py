"""MaxS, MinS and BilS over training by SGD, SAM and BSAM.

Along the gradient the slope that is left counts beside the curvature, and SGD alone ends where it is almost zero.

python examples/sharpness_over_training.py
"""

from torch.optim.lr_scheduler import CosineAnnealingLR
from training import EPOCHS, LOADER, LOSS, OPTIMIZERS, RHO, STEPS, error, network, panels, picture, save, train

from bsam_fused import sharpness

PICTURE = picture(__file__, __doc__)
epochs = range(1, EPOCHS + 1)
measured = {}
for name, build in OPTIMIZERS.items():
    net = network(0)
    optimizer = build(net)
    measured[name] = [
        sharpness.measure(net, LOSS, LOADER, rho=RHO)
        for step in train(net, optimizer, EPOCHS, CosineAnnealingLR(optimizer, EPOCHS * STEPS))
        if step % STEPS == 0
    ]
    print(f"{name}: loss {measured[name][-1].loss:.4f}, test error {error(net):.1f} %")
    for rho in (0.05, 0.1, 0.2):
        last = sharpness.measure(net, LOSS, LOADER, rho)
        print(
            f"  ρ = {rho}: MaxS {last.max_sharpness:.5f}, MinS {last.min_sharpness:.5f}, "
            f"BilS {last.bilateral_sharpness:.5f}"
        )
figure, axes = panels(3)
for panel in sharpness.plot_sharpness(epochs, measured, axes):
    panel.set_yscale("symlog", linthresh=1e-3)
save(figure, PICTURE)
