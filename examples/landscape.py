"""The loss on a filter-normalised plane around the minima of SGD, SAM and BSAM.

python examples/landscape.py
"""

import torch
from training import LOSS, OPTIMIZERS, QUARTER, panels, picture, save, trained

from bsam_fused import sharpness

PICTURE = picture(__file__, __doc__)
steps = torch.linspace(-1, 1, 21).tolist()
planes = {}
for name in OPTIMIZERS:
    net = trained(name)
    directions = sharpness.random_direction(net, seed=1), sharpness.random_direction(net, seed=2)
    planes[name] = sharpness.loss_on_plane(net, LOSS, QUARTER, directions, (steps, steps))
    rise = planes[name] - planes[name][10, 10]
    print(f"{name}: loss {planes[name][10, 10]:.4f}, rise on the plane: mean {rise.mean():.4f}, most {rise.max():.4f}")

lowest, highest = (of(plane.min() if of is min else plane.max() for plane in planes.values()) for of in (min, max))
levels = torch.linspace(lowest, highest, 25).tolist()  # the same for all
figure, axes = panels(3, 4.6)
for panel, (name, plane) in zip(axes, planes.items(), strict=True):
    sharpness.plot_landscape((steps, steps), plane, panel, levels).set_title(name)
save(figure, PICTURE)
