"""How many predictions a perturbation flips: from BiSAM's losses, beside cross-entropy's, against ρ.

The perturbation is SAM's, w + ρ g/‖g‖ for each batch of the test images, g the gradient of each loss in turn.

python examples/bisam_flips.py
"""

import torch.nn.functional as F
from training import BASE, BATCH, DATA, panels, picture, save, trained

from bsam_fused import SAM
from bsam_fused.losses import bisam_log_loss, bisam_tanh_loss

PICTURE = picture(__file__, __doc__)
LOSSES = {"cross-entropy": F.cross_entropy, "BiSAM (log)": bisam_log_loss, "BiSAM (tanh)": bisam_tanh_loss}
radii = [0.05, 0.1, 0.2, 0.5, 1.0]
net = trained("SAM", epochs=5)
images = len(DATA.y_test)
flips: dict[str, list[int]] = {name: [] for name in LOSSES}
wrong: dict[str, list[int]] = {name: [] for name in LOSSES}
for name, loss in LOSSES.items():
    for rho in radii:
        optimizer = SAM(net.parameters(), rho=rho, **BASE)
        flipped = missed = 0
        for x, y in zip(DATA.x_test.split(BATCH), DATA.y_test.split(BATCH), strict=True):
            logits = net(x)
            loss(logits, y).backward()
            optimizer.ascend()
            predictions = net(x).argmax(1)
            optimizer.restore()
            flipped += (predictions != logits.argmax(1)).sum().item()
            missed += (predictions != y).sum().item()
        flips[name].append(flipped)
        wrong[name].append(missed)
    print(f"{name}: of {images} predictions, flipped / then wrong at ρ")
    print("  " + ", ".join(f"{r}: {a} / {b}" for r, a, b in zip(radii, flips[name], wrong[name], strict=True)))

figure, axes = panels(1, 5.0)
for name, counts in flips.items():
    axes.plot(radii, [100 * count / images for count in counts], marker=".", label=name)
axes.set(xlabel="ρ", ylabel="predictions flipped, % of the test images", xscale="log")
axes.grid(alpha=0.3)
axes.legend(frameon=False)
save(figure, PICTURE)
