"""Networks to measure on, by name or a user's own; nothing is downloaded. Needs torch alone."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

Loss = Callable[[Any, Any], Tensor]


class Refused(Exception):
    """What was asked for cannot be had: the message says by which option, and why. Any other error is a fault."""


class Workload(NamedTuple):
    """What a pass is made of: ``loss(model(inputs), targets)``."""

    model: nn.Module
    inputs: Any
    targets: Any
    loss: Loss = functional.cross_entropy

    def a_pass(self) -> Tensor:
        """Run forward and backward; return the loss."""
        loss = self.loss(self.model(self.inputs), self.targets)
        loss.backward()
        return loss

    @property
    def batch(self) -> str:
        """The inputs, in words."""
        shape = isinstance(self.inputs, Tensor)
        return f"inputs {tuple(self.inputs.shape)}" if shape else f"inputs: a {type(self.inputs).__name__}"

    def take(self, examples: Any) -> Workload:
        """Return some of the examples: those of an index of every tensor's first dimension, such as a slice."""
        inputs, targets = (mapped(each, lambda tensor: tensor[examples]) for each in (self.inputs, self.targets))
        return self._replace(inputs=inputs, targets=targets)


# ---- networks


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Return a convolution that keeps the size, but for the stride."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class Residual(nn.Module):
    """``shortcut(x) + body(x)``; where the body is wider, the shortcut is filled with zeros (PyramidNet)."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.last = body, shortcut, last

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        y, x = self.body(x), self.shortcut(x)
        return self.last(y + functional.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])))


def resnet(stem: list[nn.Module], depths: list[int], expansion: int, classes: int) -> nn.Sequential:
    """Return a ResNet (arXiv 1512.03385) of basic (expansion 1) or bottleneck blocks (expansion 4)."""
    layers, inputs = [*stem], 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        for block in range(depth):
            stride = 2 if stage and not block else 1
            outputs = width * expansion
            body = [convolution(inputs, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU()]
            if expansion > 1:
                body = [convolution(inputs, width, 1), nn.BatchNorm2d(width), nn.ReLU()]
                body += [convolution(width, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU()]
            body += [convolution(width, outputs, 1 if expansion > 1 else 3), nn.BatchNorm2d(outputs)]
            same = stride == 1 and inputs == outputs
            change = [] if same else [convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)]
            layers.append(Residual(nn.Sequential(*body), nn.Sequential(*change), nn.ReLU()))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def wide_resnet(blocks: int, widen: int, classes: int) -> nn.Sequential:
    """Return a WideResNet of 6 ``blocks`` + 4 layers (arXiv 1605.07146)."""
    inputs = 16
    layers: list[nn.Module] = [convolution(3, inputs, 3)]
    for stage in range(3):
        width = (16 << stage) * widen
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            body = [nn.BatchNorm2d(inputs), nn.ReLU(), convolution(inputs, width, 3, stride)]
            body += [nn.BatchNorm2d(width), nn.ReLU(), convolution(width, width, 3)]
            change = convolution(inputs, width, 1, stride) if inputs != width else nn.Identity()
            layers.append(Residual(nn.Sequential(*body), change, nn.Identity()))
            inputs = width
    head = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers, *head)


def pyramidnet(layers: int, widening: int, classes: int) -> nn.Sequential:
    """Return a PyramidNet of basic blocks (arXiv 1610.02915): widths grow by ``widening`` in all."""
    blocks = (layers - 2) // 6
    inputs = 16
    body: list[nn.Module] = [convolution(3, inputs, 3), nn.BatchNorm2d(inputs)]
    for i in range(3 * blocks):
        width = 16 + round(widening * (i + 1) / (3 * blocks))
        stride = 2 if i in (blocks, 2 * blocks) else 1
        block = [nn.BatchNorm2d(inputs), convolution(inputs, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU()]
        block += [convolution(width, width, 3), nn.BatchNorm2d(width)]
        shortcut = nn.AvgPool2d(2) if stride == 2 else nn.Identity()
        body.append(Residual(nn.Sequential(*block), shortcut, nn.Identity()))
        inputs = width
    head = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*body, *head)


class Attention(nn.Module):
    """A pre-norm transformer block, as wide and with as many heads as in ViT-B and GPT-2 small."""

    def __init__(self, causal: bool, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.causal, self.heads = causal, heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to (batch, positions, width)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """ViT-B/16 at 224 x 224 (arXiv 2010.11929)."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 768, 16, 16)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, 768)), nn.Parameter(torch.zeros(1, 197, 768))
        self.blocks = nn.Sequential(*(Attention(causal=False) for _ in range(12)))
        self.norm, self.head = nn.LayerNorm(768), nn.Linear(768, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class GPT2(nn.Module):
    """GPT-2 small; the output layer's weights are the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(50257, 768), nn.Embedding(1024, 768)
        self.blocks = nn.Sequential(*(Attention(causal=True) for _ in range(12)))
        self.norm = nn.LayerNorm(768)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next tokens, (batch * positions, 50257)."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        return functional.linear(self.norm(self.blocks(x)), self.embedding.weight).flatten(0, 1)


class Tiny(nn.Module):
    """500 tensors of 64 elements: nothing but host time."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ParameterList(torch.rand(64) / 8 for _ in range(500))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of 500 classes."""
        return x @ torch.stack(list(self.rows)).T


def digits_network() -> nn.Sequential:
    """Return a small convolutional network for 8 x 8 digits, BatchNorm after every layer but the last."""
    layers: list[nn.Module] = []
    for channels, wider in ((1, 16), (16, 32)):
        layers += [convolution(channels, wider, 3), nn.BatchNorm2d(wider), nn.ReLU()]
    layers += [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 128), nn.BatchNorm1d(128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def _cifar_stem() -> list[nn.Module]:
    return [convolution(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU()]


def _imagenet_stem() -> list[nn.Module]:
    return [convolution(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]


# ---- by name


class BuiltIn(NamedTuple):
    """A network, and the shape and number of classes of what it is fed; tokens where the shape has one number."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    batch_size: int
    """By default: what a CPU can bear."""


BUILT_IN = {
    "digits": BuiltIn(digits_network, (1, 8, 8), 10, 64),
    "resnet18": BuiltIn(lambda: resnet(_cifar_stem(), [2, 2, 2, 2], 1, 10), (3, 32, 32), 10, 16),
    "resnet50": BuiltIn(lambda: resnet(_imagenet_stem(), [3, 4, 6, 3], 4, 1000), (3, 224, 224), 1000, 4),
    "wrn28_10": BuiltIn(lambda: wide_resnet(4, 10, 10), (3, 32, 32), 10, 8),
    "pyramidnet110": BuiltIn(lambda: pyramidnet(110, 270, 10), (3, 32, 32), 10, 8),
    "vit_b_16": BuiltIn(ViT, (3, 224, 224), 1000, 4),
    "gpt2": BuiltIn(GPT2, (128,), 50257, 2),
    "tiny500": BuiltIn(Tiny, (64,), 500, 8),
}


def shapes(name: str) -> list[tuple[int, ...]]:
    """Return the shapes of a built-in network's parameters."""
    with torch.device("meta"):
        return [tuple(p.shape) for p in BUILT_IN[name].build().parameters()]


def device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        Refused: it is not there.
    """
    found = torch.device(name)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise Refused(f"--device {name}: torch {torch.__version__} sees no NVIDIA GPU")
    return found


def workload(name: str, batch_size: int | None, device: torch.device, dtype: torch.dtype) -> Workload:
    """Return a network and a batch of random numbers for it, or those of a user's function.

    Args:
        name: a built-in one's, or ``module:function``. The function returns (model, (inputs, targets)), and a third
            value where the loss is not cross-entropy: ``loss(output, targets)``.
        batch_size: examples a batch; None: the network's default. A function takes it as its ``batch_size``.
        device: where to put them.
        dtype: of the weights, and of inputs and targets that are floating point.

    Raises:
        Refused: no such network, or a function that cannot be found or returns something else.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = _user(name, batch_size) if ":" in name else _built_in(name, batch_size)

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return found._replace(
        model=found.model.to(device, dtype).train(),
        inputs=mapped(found.inputs, moved),
        targets=mapped(found.targets, moved),
    )


def _built_in(name: str, batch_size: int | None) -> Workload:
    if name not in BUILT_IN:
        raise Refused(f"--model {name}: must be one of {', '.join(BUILT_IN)}, or module:function")
    build, shape, classes, default = BUILT_IN[name]
    size = batch_size or default
    if name == "gpt2":
        tokens = torch.randint(classes, (size, shape[0] + 1))
        return Workload(build(), tokens[:, :-1], tokens[:, 1:].flatten())
    return Workload(build(), torch.rand(size, *shape), torch.randint(classes, (size,)))


def _user(name: str, batch_size: int | None) -> Workload:
    make = _function(name)
    if batch_size is not None and not _takes_batch_size(make):
        raise Refused(f"--batch-size {batch_size}: {name}() has no parameter batch_size; leave the option out")
    returned = make(batch_size=batch_size) if batch_size is not None else make()
    try:
        model, (inputs, targets), *loss = returned
        found = Workload(model, inputs, targets, *loss)
    except (TypeError, ValueError) as error:
        raise Refused(f"--model {name}: return (model, (inputs, targets)), and a loss if not cross-entropy") from error
    if not isinstance(model, nn.Module):
        raise Refused(f"--model {name}: its first value is a {type(model).__name__}, not a torch.nn.Module")
    if not any(p.requires_grad for p in model.parameters()):
        raise Refused(f"--model {name}: its model has no parameters that require gradients")
    if not callable(found.loss):
        raise Refused(f"--model {name}: its third value, the loss, is a {type(found.loss).__name__}, not a function")
    if not loss and isinstance(targets, Tensor) and targets.is_floating_point():
        # Cross-entropy would take them for probabilities of classes: of one class, a loss that is always 0.
        raise Refused(
            f"--model {name}: its targets are {targets.dtype}; return their loss, too, "
            "such as torch.nn.functional.mse_loss: (model, (inputs, targets), loss)"
        )
    return found


def _function(name: str) -> Callable[..., Any]:
    """Return the function that ``module:function`` names. What fails inside the module is its own error."""
    module, _, function = name.partition(":")
    if not module or module.startswith("."):
        raise Refused(f"--model {name}: must be module:function, the module by its full name")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` has it, and the installed command has not
    advice = "run in the module's folder, or name it in PYTHONPATH"
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            raise Refused(f"--model {name}: {error}; {advice}") from error
        raise
    make = getattr(found, function, None)
    if not callable(make):
        raise Refused(f"--model {name}: {found.__name__} has no function {function!r}; {advice}")
    return make


def _takes_batch_size(make: Callable[..., Any]) -> bool:
    try:
        return "batch_size" in inspect.signature(make).parameters
    except ValueError:  # some of C have none
        return False


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return what ``change`` makes of a tensor, or of each of those in a dict, list or tuple."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    if not isinstance(value, (list, tuple)):
        return value
    items = [mapped(item, change) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)  # a namedtuple takes them apart
