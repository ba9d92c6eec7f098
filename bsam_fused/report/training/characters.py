"""Characters of Python's own documentation, of which a small transformer under AdamW learns a part by heart.

The text is `pydoc_data.topics`, English prose about the language that comes with Python, under the PSF license: the
same for a version of Python. The base optimizer ends at a loss far below that of the other parts, which is what
sharpness-aware steps are to help against. Its run takes some twelve seconds of one core.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bsam_fused.report.models import Attention
from bsam_fused.report.training.methods import Base
from bsam_fused.report.training.task import Data, Part, Task

CHARACTERS = 128
"""ASCII's; any other is a question mark."""
PLACES = 64
"""Characters of a window; of each the next one is to be named."""
TRAINING, VALIDATION, TEST = 500, 200, 500
"""Windows of each part."""


def drawn(seed: int) -> Data:
    """Return windows of the text, x and y (n, `PLACES`), none with a character in common with another.

    Args:
        seed: draws which of the text's first 60 % are trained on, and which of the next 20 % chosen by. Those of the
            rest that are tested on are always the same.
    """
    windows = _windows()
    first, second = round(0.6 * len(windows)), round(0.8 * len(windows))
    generator, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    return Data(
        _some(windows[:first], TRAINING, generator),
        _some(windows[first:second], VALIDATION, generator),
        _some(windows[second:], TEST, fixed),
    )


def task() -> Task:
    """Return the task of 500 windows."""
    base = Base(torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1})
    return Task(drawn, Transformer, base, epochs=18, batch_size=20)


class Transformer(nn.Module):
    """A decoder alone, pre-norm, without dropout: two blocks of width 64 and four heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(CHARACTERS, 64), nn.Embedding(PLACES, 64)
        self.blocks = nn.Sequential(*(Attention(causal=True, width=64, heads=4) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, CHARACTERS)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the next characters, (n, places, `CHARACTERS`), of characters (n, places)."""
        with sdpa_kernel(SDPBackend.MATH):  # the one kernel that can be differentiated twice, for the Hessian
            return self.head(self.norm(self.blocks(self.embedding(x) + self.positions.weight)))


@cache
def _windows() -> Tensor:
    """Return the text in windows (n, `PLACES` + 1) of int64: every paragraph once, white space as single spaces."""
    from pydoc_data.topics import topics

    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    text = " ".join(dict.fromkeys(" ".join(paragraph.split()) for paragraph in paragraphs))
    characters = torch.tensor([*text.encode("ascii", "replace")])
    return characters.unfold(0, PLACES + 1, PLACES + 1)


def _some(windows: Tensor, count: int, generator: torch.Generator) -> Part:
    some = windows[torch.randperm(len(windows), generator=generator)[:count]]
    return Part(some[:, :-1], some[:, 1:])
