"""Every snippet of docs/recipes.md runs as it stands, after the first, and trains its model."""

import re
import socket
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

pytestmark = [pytest.mark.recipe, pytest.mark.usefixtures("one_thread")]

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
RECIPES = re.findall(r"^##+ (.+?)$|^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def snippets():
    """Each block of code, under the heading that it follows."""
    heading = "setup"
    for title, code in RECIPES:
        heading = title or heading
        if code:
            yield heading, code


(_, SETUP), *SNIPPETS = snippets()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("code", [pytest.param(code, id=heading) for heading, code in SNIPPETS])
def test_snippet(code, monkeypatch):
    """Those for several processes in a group of one."""
    if "init_process_group" in code:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for name, value in alone.items():
            monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    names = {"__name__": "__recipe__"}
    exec(compile(SETUP, "docs/recipes.md, setup", "exec"), names)
    exec(compile(code, "docs/recipes.md", "exec"), names)
    model = names["model"].eval().to("cpu", torch.float32)
    with torch.no_grad():
        output = model(names["x_test"])
        logits = getattr(output, "logits", output)
        assert (logits.argmax(1) == names["y_test"]).double().mean() > 0.85


def test_every_recipe_that_was_asked_for_is_there():
    titles = " ".join(title for title, _ in RECIPES)
    for topic in (
        *("GradScaler", "bfloat16", "Clipping", "accumulation", "Checkpoint", "DDP", "FSDP2", "CUDA graphs"),
        *("torch.compile", "Lightning", "Hugging Face", "Accelerate", "EMA", "schedulers"),
        *("skorch", "PEFT", "TensorBoard"),
    ):
        assert topic in titles
