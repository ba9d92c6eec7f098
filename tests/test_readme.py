"""README.md and the pages under docs/: short enough, every block of code runs as it stands, links lead somewhere."""

import re
from pathlib import Path

import graphed
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bsam_fused import BSAM, SAM

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("bench/**/*.md")),
]
MOST_WORDS = 900


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_it_is_short():
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in prose.splitlines() if not line.startswith(("    ", "|"))]
    assert len(" ".join(lines).split()) <= MOST_WORDS


def test_the_first_screens_have_a_picture_and_a_whole_script():
    top = "\n".join(README.splitlines()[:60])
    assert re.search(r"^!\[.+\]\(docs/.+\)$", top, re.MULTILINE)
    (script,) = blocks(top, "python")
    assert script.startswith("import torch")


@pytest.mark.usefixtures("one_thread")
def test_blocks_run_as_they_stand(capsys):
    """The first one alone; it learns. The others continue from it."""
    names = {"__name__": "__readme__"}
    first, *others = blocks(README, "python")
    exec(first, names)
    assert float(re.search(r"loss ([\d.]+)", capsys.readouterr().out)[1]) < 0.3  # ln 2 before
    for block in others:
        weights = [p.detach().clone() for p in names["model"].parameters()]
        exec(block, names)
        assert any(not torch.equal(p, w) for p, w in zip(names["model"].parameters(), weights))
        assert names["optimizer"].state_dict()["state"]


@pytest.mark.usefixtures("one_thread")
def test_a_direction_of_ones_own_runs():
    """And is what it says: the update of plain SGD with d = (g/‖g‖ + g_max/‖g_max‖) ‖g_max‖ / 2."""
    (block,) = blocks((ROOT / "docs" / "adding-an-optimizer.md").read_text(), "python")
    torch.manual_seed(0)
    names = {"__name__": "__adding__"}
    exec(block.rsplit("optimizer.step(closure)", 1)[0], names)
    model, optimizer, closure = names["model"], names["optimizer"], names["closure"]
    params, passes = [*model.parameters()], []
    w = [p.detach().clone() for p in params]

    def noting():
        loss = closure()
        passes.append(torch.cat([p.grad.flatten() for p in params]))
        return loss

    optimizer.step(noting)
    g, g_max = passes
    d = (g / g.norm() + g_max / g_max.norm()) * g_max.norm() / 2
    moved = torch.cat([(before - p.detach()).flatten() for before, p in zip(w, params)])
    torch.testing.assert_close(moved, 0.1 * d, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("sign", "-+")
def test_both_sides_of_the_diff_run(sign):
    (diff,) = blocks(README, "diff")
    code = "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] in {sign, " "})
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    loader = [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))] * 3
    exec(code, {"torch": torch, "SAM": SAM, "model": model, "cross_entropy": F.cross_entropy, "loader": loader})
    assert not torch.equal(model.weight, before)


@pytest.mark.recipe  # gloo in this process
def test_block_of_the_page_on_processes():
    (block,) = blocks((ROOT / "docs" / "distributed.md").read_text(), "python")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    model = nn.Linear(3, 2)
    names = {"torch": torch, "BSAM": BSAM, "DistributedDataParallel": nn.parallel.DistributedDataParallel}

    def closure():
        loss = F.cross_entropy(names["model"](torch.ones(4, 3)), torch.tensor([0, 1, 1, 0]))
        loss.backward()
        return loss

    names |= {"model": model, "closure": closure}
    before = model.weight.detach().clone()
    exec(block, names)
    torch.distributed.destroy_process_group()
    assert not torch.equal(model.weight, before)


@graphed.where
def test_block_of_the_page_on_graphs(backend, captures):
    (block,) = blocks((ROOT / "docs" / "graphs.md").read_text(), "python")
    model = graphed.network()
    x, y = graphed.data(0)
    names = {"F": F, "model": model, "optimizer": graphed.optimizer(SAM, model), "x": x, "y": y}
    before = model[0].weight.detach().clone()
    exec(block, names)
    assert names["loss"] > 0
    assert not torch.equal(model[0].weight, before)


def anchors(page):
    """Those of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    broken = []
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken
