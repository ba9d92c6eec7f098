"""Models, optimizers and eager steps beside which captured ones are held."""

import pytest
import torch
from torch import nn

from bsam_fused import ASAM, BSAM, SAM

KINDS = {"SAM": SAM, "ASAM": ASAM, "BSAM": BSAM}
BASES = {"SGD": (torch.optim.SGD, {"momentum": 0.9}), "AdamW": (torch.optim.AdamW, {"eps": 1e-3})}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_base = pytest.mark.parametrize("base", BASES)
where = pytest.mark.parametrize(
    "backend", ["cuda-on-host", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True
)
loss_fn = nn.functional.cross_entropy


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.Dropout(0.2), nn.Tanh(), nn.Linear(40, 3))


def data(seed, n=8):
    torch.manual_seed(seed)
    return torch.randn(n, 6), torch.randint(3, (n,))


def optimizer(kind, model, base="SGD", **options):
    kind_of_base, base_options = BASES[base]
    return kind(model.parameters(), kind_of_base, lr=0.05, backend="cuda", model=model, **base_options, **options)


def eager_step(model, opt, batch):
    def closure():
        loss = loss_fn(model(batch[0]), batch[1])
        loss.backward()
        return loss

    return opt.step(closure)


def twins(kind, base="SGD", **options):
    """Two models and their optimizers, alike; without dropout, as a graph draws other numbers than eager steps do."""
    models = [network() for _ in range(2)]
    for model in models:
        model[2].p = 0.0
    return models, [optimizer(kind, model, base, **options) for model in models]


def assert_same_state(opt, other):
    """What checkpoints would hold, and what is shown."""
    for (one, two), shown in (((opt, other), False), ((opt.state_dict(), other.state_dict()), True)):
        states = [
            x["state"] if shown else {i: x.state.get(p, {}) for i, p in enumerate(x._parameters())} for x in (one, two)
        ]
        assert states[0].keys() == states[1].keys()
        for i, entry in states[0].items():
            assert entry.keys() == states[1][i].keys()
            for key, value in entry.items():
                torch.testing.assert_close(value, states[1][i][key], rtol=1e-6, atol=1e-7, msg=lambda m: f"{key}: {m}")  # noqa: B023


def assert_equal(model, other):
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
