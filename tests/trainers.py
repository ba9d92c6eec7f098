"""What the tests of trainers share: scikit-learn's digits, a small network, and the same training by hand."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from bsam_fused import BSAM, SAM, LookSAM
from bsam_fused.report.training.tasks import digits
from bsam_fused.schedules import LargeGradients

DATA = digits(torch.float32)
MICRO = 32
KINDS = [SAM, BSAM]
THRIFTY = {  # one pass in some steps: the optimizer, its options, and a policy
    "LookSAM": (LookSAM, {"k": 2}, None),
    "large gradients": (SAM, {}, lambda opt: LargeGradients(opt, 6, lambda_1=-4.0, lambda_2=4.0)),
}


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def optimizer(kind, net, **options):
    return kind(net.parameters(), **{"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-4, "rho": 0.05, **options})


def loader(images=None):
    return DataLoader(TensorDataset(DATA.x[:images], DATA.y[:images]), batch_size=MICRO)


def by_hand(kind, batches, n, *, epochs=1, cast=torch.float32, active=True, policy=None, passes=None, **options):
    """The network after training by hand: gradients of n micro-batches accumulate in each pass; each loss is over n.

    ``policy``: built of the optimizer, and stepped after it; ``passes``: a list, to which those of each step are added.
    """
    net = network()
    opt = optimizer(kind, net, **options)
    opt.active = active
    stepped = policy and policy(opt)

    def run_pass(micro_batches):
        for x, y in micro_batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=cast is torch.bfloat16):
                loss = cross_entropy(net(x), y) / n
            loss.backward()

    for _ in range(epochs):
        for i in range(0, len(batches), n):
            run_pass(batches[i : i + n])
            taken = opt.passes
            for call in opt._calls[: taken - 1]:
                getattr(opt, call)()
                run_pass(batches[i : i + n])
            opt.step()
            opt.zero_grad()
            if passes is not None:
                passes.append(taken)
            if stepped:
                stepped.step()
    return net


def accuracy(net):
    with torch.no_grad():
        return (net(DATA.x_test).argmax(1) == DATA.y_test).double().mean().item()


def same(net, other):
    return all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters()))
