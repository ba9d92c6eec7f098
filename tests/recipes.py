"""The snippets of docs/recipes.md: each runs as it stands, after the first, and trains its model."""

import re
from pathlib import Path

import torch

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
RECIPES = re.findall(r"^##+ (.+?)$|^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
WITH_TORCHVISION = {"timm", "fastai"}
"""Headings of those that run in tests/with_torchvision."""


def snippets():
    """Each block of code, under the heading that it follows."""
    heading = "setup"
    for title, code in RECIPES:
        heading = title or heading
        if code:
            yield heading, code


(_, SETUP), *SNIPPETS = snippets()


def run(code):
    """Run a snippet; return its names."""
    names = {"__name__": "__recipe__"}
    exec(compile(SETUP, "docs/recipes.md, setup", "exec"), names)
    exec(compile(code, "docs/recipes.md", "exec"), names)
    model = names["model"].eval().to("cpu", torch.float32)
    with torch.no_grad():
        output = model(names["x_test"])
        logits = getattr(output, "logits", output)
        assert (logits.argmax(1) == names["y_test"]).double().mean() > 0.85
    return names
