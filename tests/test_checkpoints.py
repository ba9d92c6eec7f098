"""Training that was stopped at any step and taken up from a file goes on bit for bit as if it had not been."""

import io

import pytest
import torch
from torch import nn

import bsam_fused
from bsam_fused import schedules

STEPS = 7
KINDS = [bsam_fused.SAM, bsam_fused.ASAM, bsam_fused.BSAM]
BASES = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    "AdamW": (torch.optim.AdamW, {"eps": 1e-3}),
    "general": (torch.optim.RMSprop, {"eps": 1e-3}),  # 1e-8 is 0 in float16
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def to_file(what):
    file = io.BytesIO()
    torch.save(what, file)
    return file.getvalue()


def from_file(file):
    return torch.load(io.BytesIO(file), weights_only=True)


class Run:
    """A model in training, with everything beside it that moves from step to step."""

    def __init__(self, kind, base, dtype, backend, lr=0.05, rho=0.1):
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        base_class, options = BASES[base]
        self.opt = kind(
            self.net.parameters(),
            base_class,
            lr=lr,
            rho=rho,
            model=self.net,
            backend=backend,
            max_grad_norm=1.0,
            **options,
        )
        self.others = [
            torch.optim.lr_scheduler.OneCycleLR(self.opt, 0.08, STEPS + 1, cycle_momentum=False),
            schedules.CosineRadius(self.opt, STEPS, end=0.02),
            schedules.LatePhase(self.opt, STEPS, start=0.3, every=2),
        ]

    def step(self, t):
        generator = torch.Generator("cpu").manual_seed(t)
        x = torch.randn(16, 6, generator=generator, device="cpu").to(next(self.net.parameters()))

        def closure():
            loss = self.net(x).float().square().mean()
            loss.backward()
            return loss

        self.opt.step(closure)
        for other in self.others:
            other.step()

    def saved(self):
        parts = [self.net, self.opt, *self.others]
        return to_file([part.state_dict() for part in parts])

    def load(self, file):
        parts = [self.net, self.opt, *self.others]
        for part, state in zip(parts, from_file(file), strict=True):
            part.load_state_dict(state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
@each_dtype
def test_resumed_at_any_step(backend, kind, base, dtype):
    run = Run(kind, base, dtype, backend)
    files = []
    for t in range(STEPS):
        files.append(run.saved())
        run.step(t)
    assert not run.opt.skipped_steps
    end = run.saved()
    for t, file in enumerate(files):
        resumed = Run(kind, base, dtype, backend, lr=0.9, rho=9.0)
        resumed.load(file)
        for later in range(t, STEPS):
            resumed.step(later)
        for mine, theirs in zip(from_file(resumed.saved()), from_file(end), strict=True):
            assert_same(mine, theirs)


def assert_same(mine, theirs):
    """Two state dicts, bit for bit."""
    if isinstance(mine, torch.Tensor):
        assert torch.equal(mine, theirs)
    elif isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert_same(mine[key], theirs[key])
    elif isinstance(mine, list | tuple):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert_same(a, b)
    else:
        assert mine == theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@each_dtype
def test_a_file_is_as_large_as_the_bases(backend, kind, base, dtype):
    """But for the options, which do not grow with the model."""
    options = {"lr": 0.1, **({"momentum": 0.9} if base is torch.optim.SGD else {})}
    sizes = []
    for make in (lambda p: kind(p, base, backend=backend, **options), lambda p: base(p, **options)):
        params = [nn.Parameter(torch.randn(300, 100).to(dtype)) for _ in range(3)]
        opt = make(params)
        for call in getattr(opt, "_calls", ["step"]):
            for p in params:
                p.grad = torch.ones_like(p)
            getattr(opt, call)()
        sizes.append(len(to_file(opt.state_dict())))
    assert abs(sizes[0] - sizes[1]) < 1500
    assert sizes[0] > 90_000 * params[0].element_size()
