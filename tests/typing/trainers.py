"""The mixins in a user's classes, as training.py is checked."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from bsam_fused import BSAM
from bsam_fused.integrations import lightning, transformers


class Net(lightning.SharpnessAwareMixin, LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return BSAM(self.parameters(), torch.optim.SGD, lr=0.1, model=self)


class Sharp(transformers.SharpnessAwareMixin, Trainer):
    pass


def train(model: nn.Module) -> None:
    LightningTrainer(accumulate_grad_batches=2, gradient_clip_val=1.0).fit(Net())
    Sharp(model, optimizers=(BSAM(model.parameters(), lr=0.1), None)).train()
