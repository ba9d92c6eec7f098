"""BSAM on several processes, with DistributedDataParallel: one all-reduce a step, by sync="last".

torchrun --nproc-per-node 2 examples/ddp.py
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bsam_fused import BSAM
from bsam_fused.report.learning import network
from bsam_fused.report.training.tasks import digits

argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
else:
    device = torch.device("cpu")
    torch.set_num_threads(1)
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()

data = digits(torch.float32)
model = DistributedDataParallel(network(0).to(device))
optimizer = BSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1, model=model, sync="last")
order = torch.Generator().manual_seed(0)  # the same on all ranks

for epoch in range(5):
    for batch in torch.randperm(len(data.y), generator=order).split(128)[:-1]:
        mine = batch[rank::ranks]
        x, y = data.x[mine].to(device), data.y[mine].to(device)

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            """Return the loss of this rank's share, after its backward pass."""
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
    if rank == 0:
        print(f"epoch {epoch}: loss {loss.item():.4f}")

with torch.no_grad():
    right = (model.module.eval()(data.x_test.to(device)).argmax(1).cpu() == data.y_test).double().mean()
if rank == 0:
    print(f"test images named rightly: {right:.1%}")
dist.destroy_process_group()
