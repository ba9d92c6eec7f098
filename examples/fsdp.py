"""SAM on several processes, with FSDP2: every rank keeps, perturbs and updates its shards; and a checkpoint of them.

torchrun --nproc-per-node 2 examples/fsdp.py
"""

import argparse
import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bsam_fused import SAM
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
model = network(0).to(device)
fully_shard(model, mesh=init_device_mesh(device.type, (ranks,)))
optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=0.003, rho=0.1, model=model)
order = torch.Generator().manual_seed(0)  # the same on all ranks


def train() -> None:
    """Train for an epoch, and say what the last batch's loss was."""
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
        print(f"loss {loss.item():.4f}")


for _ in range(4):
    train()

folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)  # rank 0's
weights, state = get_state_dict(model, optimizer)
checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder[0])
checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=folder[0])
set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
train()

with torch.no_grad():
    right = (model.eval()(data.x_test.to(device)).argmax(1).cpu() == data.y_test).double().mean()
if rank == 0:
    print(f"test images named rightly: {right:.1%}")
dist.destroy_process_group()
