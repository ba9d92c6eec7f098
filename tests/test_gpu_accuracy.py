"""The trainings on CIFAR-10 of `make gpu`, on random images, with the CUDA kernels and captures on the CPU."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR

from bsam_fused.report import models
from bsam_fused.report.training.task import Part

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.gpu import accuracy
from bench.gpu.device import Device

SEED, EPOCHS, BATCH, COUNT = 3, 2, 4, 9


def network():
    """Two layers, with running statistics."""
    convolution = models.convolution(3, 4, 3, 8)
    return nn.Sequential(convolution, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))


@pytest.fixture
def images(monkeypatch, captures):
    """A batch and a half of them, which a small network sees in batches of four."""
    monkeypatch.setattr(accuracy, "BATCH", BATCH)
    monkeypatch.setattr(accuracy, "current", lambda: Device("host", {}, None))
    monkeypatch.setattr(accuracy, "BASE", accuracy.BASE._replace(options={**accuracy.BASE.options, "backend": "cuda"}))
    monkeypatch.setitem(models.BUILT_IN, "resnet18", models.BUILT_IN["resnet18"]._replace(build=network))
    x = functional.pad(torch.randint(256, (COUNT, 3, 32, 32), dtype=torch.uint8), (accuracy.SHIFT,) * 4)
    return accuracy.Images(x, torch.randint(10, (COUNT,)))


@pytest.mark.parametrize("backend", ["cuda-on-host"], indirect=True)
@pytest.mark.parametrize("name", accuracy.TRAININGS)
def test_trains_as_steps_that_are_not_captured(images, name):
    """The same batches by `step(closure)`; SGD's by torch's own optimizer."""
    testing = Part(accuracy.normalized(images.x[:, :, 4:-4, 4:-4]), images.y)
    row = accuracy.train(name, SEED, EPOCHS, images, testing)
    (method, times), device = accuracy.TRAININGS[name], images.y.device
    torch.manual_seed(SEED)
    own = accuracy.Autocast(network().to(device))
    if method is accuracy.SGD:
        options = {key: value for key, value in accuracy.BASE.options.items() if key != "backend"}
        optimizer, policy = torch.optim.SGD(own.parameters(), **options), None
    else:
        optimizer, policy = method.build(own, accuracy.BASE, accuracy.RHO), method.policy
    steps = times * EPOCHS * (COUNT // BATCH)
    stepped = [CosineAnnealingLR(optimizer, steps), *([policy(optimizer, steps)] if policy else [])]
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(own(x), y)
        loss.backward()
        return loss

    for epoch in range(times * EPOCHS):
        for batch in images.batches(1000 * SEED + epoch):
            x, y = batch
            losses.append(optimizer.step(closure).item())
            for each in stepped:
                each.step()
    assert row.training_loss == pytest.approx(sum(losses[-(COUNT // BATCH) :]) / (COUNT // BATCH), rel=1e-3)
    own.eval()
    right = (own(testing.x).argmax(1) == testing.y).float().mean()
    assert row.accuracy_percent == pytest.approx(100 * float(right))
    assert (row.epochs, row.passes) == (times * EPOCHS, method.passes * times * EPOCHS)


@pytest.mark.parametrize("backend", ["cuda-on-host"], indirect=True)
def test_an_epoch_has_each_image_once_moved_and_mirrored(images):
    """Every image of a batch is a window of its own one, or that window's mirror image."""
    batches = [*images.batches(0)]
    assert len(batches) == COUNT // BATCH
    seen = []
    for x, y in batches:
        assert x.is_contiguous(memory_format=torch.channels_last)
        for image, label in zip(x, y, strict=True):
            (found,) = {(i, mirrored) for i, mirrored, window in windows(images) if torch.equal(window, image)}
            assert images.y[found[0]] == label
            seen.append(found)
    assert len({i for i, _ in seen}) == len(seen) == COUNT // BATCH * BATCH
    assert {mirrored for _, mirrored in seen} == {False, True}


def test_a_seed_of_every_training_then_the_next_one_as_far_as_the_time_goes(monkeypatch):
    """One second for each epoch of passes, and time for all of seed 0 and three of seed 1."""

    class Deadline:
        def __init__(self, seconds):
            Deadline.left = seconds

    def train(name, seed, epochs, *data):
        method, times = accuracy.TRAININGS[name]
        passes = method.passes * times * epochs
        Deadline.left -= passes
        return accuracy.Row(name, seed, times * epochs, 90.0, 0.1, passes, seconds=passes)

    monkeypatch.setattr(accuracy, "Deadline", Deadline)
    record = SimpleNamespace(content={"accuracy": {}}, save=lambda: None)
    monkeypatch.setattr(accuracy, "Record", lambda path: record)
    monkeypatch.setattr(accuracy, "images", lambda device: (None, None))
    monkeypatch.setattr(accuracy, "current", lambda: Device("host", {}, None))
    monkeypatch.setattr(accuracy, "train", train)
    passes = {name: method.passes * times * EPOCHS for name, (method, times) in accuracy.TRAININGS.items()}
    first, others = [*passes], [*passes][:3]
    seconds = sum(passes.values()) + sum(passes[name] for name in others)
    assert accuracy.main(["--record=", f"--seconds={seconds}", f"--epochs={EPOCHS}"]) == 0
    rows = record.content["accuracy"].values()
    assert [(row["seed"], row["training"]) for row in rows] == [*((0, it) for it in first), *((1, it) for it in others)]


def windows(images):
    """Every one that an image may be seen through, normalized."""
    whole = accuracy.normalized(images.x)
    places = 2 * accuracy.SHIFT + 1
    for i in range(COUNT):
        for down in range(places):
            for right in range(places):
                window = whole[i, :, down : down + 32, right : right + 32]
                yield i, False, window
                yield i, True, window.flip(-1)
