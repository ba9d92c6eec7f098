"""Adversarial training (PGD) for the last epochs only: robust and natural error against the share of such epochs.

The late-phase paper (arXiv 2410.10373) finds for it what it finds for SAM.

python examples/adversarial_late_phase.py
"""

from statistics import fmean

import torch
from torch import Tensor, nn
from training import BASE, DATA, LOSS, error, network, panels, picture, save, train

PICTURE = picture(__file__, __doc__)
EPSILON = 0.1
"""How far an attack may change a pixel, of [0, 1]."""
EPOCHS, SEEDS = 20, (0, 1)


def pgd(net: nn.Module, x: Tensor, y: Tensor, steps: int = 4) -> Tensor:
    """Return images within `EPSILON` of ``x`` that the network does worse on: projected gradient ascent by signs."""
    moved = (x + EPSILON * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(steps):
        moved.requires_grad_()
        (g,) = torch.autograd.grad(LOSS(net(moved), y), moved)
        moved = moved.detach() + EPSILON / 2 * g.sign()
        moved = (x + (moved - x).clamp(-EPSILON, EPSILON)).clamp(0, 1)
    return moved


shares = [0.0, 0.1, 0.25, 0.5, 1.0]
robust, natural = [], []
for share in shares:
    runs = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        net = network(seed)
        optimizer = torch.optim.SGD(net.parameters(), **{**BASE, "lr": 0.05})
        adversarial = round(share * EPOCHS)
        for _ in train(net, optimizer, EPOCHS - adversarial, seed=seed):
            pass
        for _ in train(net, optimizer, adversarial, attack=pgd, seed=seed + 100):
            pass
        runs.append((error(net, pgd(net, DATA.x_test, DATA.y_test, steps=20)), error(net)))
    robust.append(fmean(run[0] for run in runs))
    natural.append(fmean(run[1] for run in runs))
    print(f"adversarial for {share:.0%}: robust error {robust[-1]:.1f} %, natural error {natural[-1]:.1f} %")

figure, axes = panels(1, 5.0)
axes.plot(shares, robust, marker=".", label=f"robust: PGD, ε = {EPSILON}")
axes.plot(shares, natural, marker=".", label="natural")
axes.set(xlabel="share of the epochs with adversarial training", ylabel="test error, %", ylim=(0, None))
axes.grid(alpha=0.3)
axes.legend(frameon=False)
save(figure, PICTURE)
