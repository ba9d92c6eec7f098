"""Three steps of BSAM, with a closure and by hand: what a training loop changes.

python examples/three_steps.py
"""

import argparse

import torch
from torch import nn

from bsam_fused import BSAM

argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5))
optimizer = BSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, model=model)
x, y = torch.randn(64, 20), torch.randint(5, (64,))


def closure() -> torch.Tensor:
    """Return the loss, after its backward pass."""
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


for step in range(3):
    loss = optimizer.step(closure)  # three passes: at w, w_max and w_min
    print(f"step {step}: loss {loss.item():.4f}, BilS {optimizer.sharpness.bilateral_sharpness.item():.4f}")

closure()  # the same by hand
optimizer.ascend()
closure()
optimizer.descend()
closure()
optimizer.step()
optimizer.zero_grad()

print(f"backends: {optimizer.backends}")
assert optimizer.skipped_steps == 0
