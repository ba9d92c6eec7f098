"""Every snippet of docs/recipes.md runs as it stands, after the first, and trains its model."""

import socket

import pytest
import recipes
from accelerate.state import AcceleratorState

pytestmark = [pytest.mark.recipe, pytest.mark.usefixtures("one_thread")]

HERE = [snippet for snippet in recipes.SNIPPETS if snippet[0] not in recipes.WITH_TORCHVISION]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("code", [pytest.param(code, id=heading) for heading, code in HERE])
def test_snippet(code, monkeypatch):
    """Those for several processes in a group of one."""
    if "init_process_group" in code:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for name, value in alone.items():
            monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    recipes.run(code)


def test_every_recipe_that_was_asked_for_is_there():
    titles = " ".join(title for title, _ in recipes.RECIPES)
    for topic in (
        *("GradScaler", "bfloat16", "Clipping", "accumulation", "Checkpoint", "DDP", "FSDP2", "CUDA graphs"),
        *("torch.compile", "Lightning", "Hugging Face", "Accelerate", "EMA", "schedulers"),
        *("Schedule-Free", "Two optimizers", "skorch", "PEFT", "TensorBoard", "timm", "fastai"),
    ):
        assert topic in titles
