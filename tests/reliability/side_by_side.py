"""Two optimizers, threads with a model each, and a thread that writes checkpoints: none changes what another does."""

import copy
import io
import queue
import threading

import torch
from torch import nn

from .kills_training import digest
from .leaks import OPTIMIZERS, closure_of, network


def two_optimizers(steps):
    """Over disjoint parts of one model, in turns; each trains its part as one does to which nobody else belongs."""
    torch.manual_seed(1)
    parts = nn.ModuleList(network() for _ in range(2))
    alone = copy.deepcopy(parts)
    names = "SAM", "BSAM"
    for turns in (True, False):
        models = parts if turns else alone
        optimizers = [OPTIMIZERS[name](part.parameters(), model=part) for name, part in zip(names, models)]
        order = [(step, i) for step in range(steps) for i in range(2)]
        for step, i in order if turns else sorted(order, key=lambda it: it[::-1]):
            torch.manual_seed(2 * step + i)
            optimizers[i].step(closure_of(models[i]))
    assert digest(parts.state_dict()) == digest(alone.state_dict()), "optimizers of disjoint parts touch each other"
    return {"steps": 2 * steps}


def trained(name, steps, after=lambda step, model, optimizer: None):
    """Train a model on batches that are made beforehand, as torch's generator is all threads'; return its hash."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 4)
    optimizer = OPTIMIZERS[name](model.parameters(), model=model)
    batches = [torch.randn(4, 8, generator=generator) for _ in range(50)]
    for step in range(steps):

        def closure(x=batches[step % 50]):
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        after(step, model, optimizer)
    return digest([model.state_dict(), optimizer.state_dict()])


def threads(count, steps):
    """Each trains a model of its own; all end where they end one after the other, bit for bit."""
    names = [*OPTIMIZERS] * count
    ends = {}

    def train(i):
        ends[i] = trained(names[i], steps)

    running = [threading.Thread(target=train, args=(i,)) for i in range(count)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert ends == {i: trained(names[i], steps) for i in range(count)}, "threads with a model each touch each other"
    return {"threads": count, "steps_each": steps}


def checkpointing_thread(steps, name="BSAM"):
    """It writes what the training one copied, and looks at the state at any time: neither disturbs the other."""
    orders, files, errors, looks = queue.Queue(), {}, [], {"answered": 0, "refused": 0}
    digests = {}

    def write():
        try:
            while (order := orders.get()) is not None:
                step, state, optimizer = order
                file = io.BytesIO()
                torch.save(state, file)
                files[step] = file.getvalue()
                looks[_look(optimizer)] += 1
        except BaseException as error:
            errors.append(error)

    def hand_over(step, model, optimizer):
        orders.put((step, copy.deepcopy(_state(model, optimizer)), optimizer))

    def note(step, model, optimizer):
        digests[step] = digest(_state(model, optimizer))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        beside = trained(name, steps, hand_over)
    finally:
        orders.put(None)
        writer.join()
    assert not errors, errors
    assert beside == trained(name, steps, note), "the checkpointing thread changes the training"
    for step, file in files.items():
        assert digest(torch.load(io.BytesIO(file), weights_only=True)) == digests[step], f"the checkpoint of {step}"
    return {"steps": steps, "checkpoints": len(files), **looks}


def _state(model, optimizer):
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def _look(optimizer):
    """Ask for the state, whatever the other thread does: within a step it is refused."""
    try:
        optimizer.state_dict()
    except RuntimeError as error:
        if "while the weights are perturbed" not in str(error):
            raise
        return "refused"
    return "answered"
