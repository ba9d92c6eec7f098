"""What is trained: parts that share nothing, drawn by seed, wrong labels where they are meant to be; no file of others.

CIFAR-10 is made up here, a few images in the two formats that are read; so is a text, where its places count.
"""

import ast
import io
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bsam_fused.report.models import Refused
from bsam_fused.report.training import after, characters, cifar
from bsam_fused.report.training.task import Part
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


def test_sharpness_of_the_transformer_is_measured():
    """Its attention is differentiated twice."""
    network = TASKS["characters"].network()
    x = torch.arange(128).reshape(2, 64)
    assert after.sharpness(network, Part(x, x))["eigenvalue"] > 0


def test_tasks_can_be_named_without_their_packages():
    """What is not needed by every task is imported by the functions that need it."""
    for path in Path(cifar.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in getattr(node, "names", [])] + [getattr(node, "module", None) or ""]
            assert not any(name.startswith(("PIL", "efficientnet", "scipy")) for name in names), path
