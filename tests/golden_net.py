"""The network of the recorded trajectories, and how one is replayed. See golden/README.md."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

import bsam_fused

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.npz"))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.fc = nn.Linear(192, 10)

    def forward(self, x):
        return self.fc(torch.tanh(self.conv2(torch.tanh(self.conv1(x)))).flatten(1))


class Recording:
    """One recorded trajectory."""

    def __init__(self, name):
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
            self.arrays = {key: torch.as_tensor(file[key]) for key in file.files if key != "meta"}
            self.meta = json.loads(str(file["meta"]))
        self.dtype = getattr(torch, self.meta["dtype"].removeprefix("torch."))

    def network(self):
        net = Net().to(self.dtype)
        net.load_state_dict({n: self.arrays[f"init.{n}"] for n, _ in net.named_parameters()})
        return net

    def final(self):
        return {n.removeprefix("final."): a for n, a in self.arrays.items() if n.startswith("final.")}

    def optimizer(self, params, **kwargs):
        meta = self.meta
        options = {"lr": meta["lr"], **meta["base_kwargs"], **kwargs}
        base = getattr(torch.optim, meta["base"])
        if meta["algorithm"] == "BSAM":
            decay = "lr" if meta["rho_min_follows_lr"] else "none"
            options |= {
                "rho_min": meta["rho_min"],
                "rho_min_decay": decay,
                "update_from": meta["update_from"],
            }
            return bsam_fused.BSAM(params, base, rho=meta["rho"], **options)
        options |= {"adaptive": meta.get("adaptive", False), "eta": meta.get("eta", 0.0)}
        return bsam_fused.SAM(params, base, rho=meta["rho"], **options)

    def groups(self, net):
        """The parameters, or two groups where biases have no weight decay."""
        if not self.meta.get("bias_group_weight_decay_zero"):
            return list(net.parameters())
        weights = [p for n, p in net.named_parameters() if n.endswith("weight")]
        biases = [p for n, p in net.named_parameters() if n.endswith("bias")]
        return [{"params": weights}, {"params": biases, "weight_decay": 0.0}]

    def learning_rates(self):
        lr, steps = self.meta["lr"], len(self.arrays["x"])
        if not self.meta.get("cosine"):
            return [lr] * steps
        return [lr * 0.5 * (1 + np.cos(np.pi * t / steps)) for t in range(steps)]

    def batches(self):
        return zip(self.arrays["x"], self.arrays["y"], self.learning_rates(), strict=True)
