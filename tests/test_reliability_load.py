"""`make load`, short: flat memory, many tensors and large ones, and what runs side by side; and that a leak is seen."""

import pytest
import torch

from tests.reliability.leaks import Watch
from tests.reliability.load import alone, parts

SHORT = parts(steps=400, optimizers=60, tensors=300, layers=4, seed=1)
FEW = [
    *("steps, BSAM", "changing gradients, LookSAM", "optimizers that come and go"),
    *("many tensors", "a large model, SAM", "two optimizers", "threads", "a checkpointing thread"),
]


@pytest.mark.parametrize("name", FEW)
def test_short(name):
    function, *arguments = SHORT[name]
    assert alone(function, *arguments)


def keeping(make):
    """Steps that keep something each."""
    kept, watch = [], Watch(400)
    for step in range(400):
        kept.append(make())
        watch.look(step)
    return watch.figures()


def a_tensor():
    return torch.zeros(1)


def some_bytes():
    return bytes(8000)


def an_object():
    return [None]


@pytest.mark.parametrize(
    ("make", "words"),
    [(a_tensor, "tensors become more"), (some_bytes, "memory grows"), (an_object, "objects become more")],
)
def test_a_leak_is_seen(make, words):
    with pytest.raises(AssertionError, match=words):
        alone(keeping, make)
