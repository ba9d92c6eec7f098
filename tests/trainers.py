"""What the tests of trainers share: scikit-learn's digits, a small network, and the same training by hand."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from bsam_fused import BSAM, SAM
from bsam_fused.report.training.tasks import digits

DATA = digits(torch.float32)
MICRO = 32
KINDS = [SAM, BSAM]


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def optimizer(kind, net, **options):
    return kind(net.parameters(), **{"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-4, "rho": 0.05, **options})


def loader(images=None):
    return DataLoader(TensorDataset(DATA.x[:images], DATA.y[:images]), batch_size=MICRO)


def by_hand(kind, batches, k, *, epochs=1, cast=torch.float32, active=True, **options):
    """The network after training by hand: gradients of k micro-batches accumulate in each pass; each loss is over k."""
    net = network()
    opt = optimizer(kind, net, **options)
    opt.active = active
    for _ in range(epochs):
        for i in range(0, len(batches), k):
            for call in opt._calls if active else ("step",):
                for x, y in batches[i : i + k]:
                    with torch.autocast("cpu", torch.bfloat16, enabled=cast is torch.bfloat16):
                        loss = cross_entropy(net(x), y) / k
                    loss.backward()
                getattr(opt, call)()
            opt.zero_grad()
    return net


def accuracy(net):
    with torch.no_grad():
        return (net(DATA.x_test).argmax(1) == DATA.y_test).double().mean().item()


def same(net, other):
    return all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters()))
