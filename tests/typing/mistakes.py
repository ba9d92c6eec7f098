"""What type checkers must flag in a user's script: each line is marked, and a mark that nothing needs is an error."""

import torch
from torch import Tensor, nn

from bsam_fused import ASAM, BSAM, SAM, SharpnessAware, losses, schedules

model = nn.Linear(2, 1)
loss: Tensor = model(torch.ones(2)).sum()
sam, asam, bsam = SAM(model.parameters()), ASAM(model.parameters()), BSAM(model.parameters())


def closure() -> Tensor:
    return loss


# What is optimized
SAM(model)  # type: ignore[arg-type]
SAM(nn.Sequential(model))  # type: ignore[arg-type]
SAM(model.parameters(), "SGD")  # type: ignore[arg-type]
SAM(model.parameters(), model=model.parameters())  # type: ignore[arg-type]

# Numbers and switches
SAM(model.parameters(), rho="0.05")  # type: ignore[arg-type]
ASAM(model.parameters(), eta=None)  # type: ignore[arg-type]
BSAM(model.parameters(), max_grad_norm="1")  # type: ignore[arg-type]
SAM(model.parameters(), adaptive="yes")  # type: ignore[arg-type]
SAM(model.parameters(), seed=0.5)  # type: ignore[arg-type]
SAM(model.parameters(), master_weights="no")  # type: ignore[arg-type]

# Choices
SAM(model.parameters(), rounding="up")  # type: ignore[arg-type]
SAM(model.parameters(), sync="first")  # type: ignore[arg-type]
ASAM(model.parameters(), backend="cpu")  # type: ignore[arg-type]
BSAM(model.parameters(), rho_min_decay="linear")  # type: ignore[arg-type]
BSAM(model.parameters(), update_from="w_max")  # type: ignore[arg-type]
schedules.CosineRadius(sam, 10, radius="lr")  # type: ignore[arg-type]
losses.bisam_log_loss(loss, loss, reduction="average")  # type: ignore[arg-type]
losses.BiSAMTanhLoss(reduction="average")  # type: ignore[arg-type]

# Calls
sam.step(loss)  # type: ignore[call-overload]
bsam.step(loss)  # type: ignore[call-overload]
sam.step(ascent_closure=closure)  # type: ignore[call-overload]
bsam.step(closure, ascent_closure=closure)  # type: ignore[call-overload]
sam.descend()  # type: ignore[attr-defined]
asam.third_step()  # type: ignore[attr-defined]
wrong: float = sam.step(closure)  # type: ignore[assignment]
also_wrong: Tensor = bsam.step()  # type: ignore[assignment]


def half_done(optimizer: SharpnessAware) -> float:
    return optimizer.step(closure)  # type: ignore[return-value]
