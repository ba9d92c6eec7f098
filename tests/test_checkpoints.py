"""Training that was stopped at any step and taken up from a file goes on bit for bit as if it had not been."""

import io

import pytest
import torch
from members import MEMBERS, some_of_each_member
from torch import nn

import bsam_fused
from bsam_fused import schedules

STEPS = 7
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

    def __init__(self, member, base, dtype, backend, lr=0.05, rho=0.1):
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        base_class, options = BASES[base]
        self.opt = member.build(
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


@some_of_each_member
@pytest.mark.parametrize("base", BASES)
@each_dtype
def test_resumed_at_any_step(backend, member, base, dtype):
    run = Run(member, base, dtype, backend)
    files = []
    for t in range(STEPS):
        files.append(run.saved())
        run.step(t)
    assert not run.opt.skipped_steps
    end = run.saved()
    for t, file in enumerate(files):
        resumed = Run(member, base, dtype, backend, lr=0.9, rho=9.0)
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


@pytest.mark.parametrize("name", ["SAM", "ASAM", "BSAM", "MixedSAM"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@each_dtype
def test_a_file_is_as_large_as_the_bases(backend, name, base, dtype):
    """But for the options, which do not grow with the model."""
    options = {"lr": 0.1, **({"momentum": 0.9} if base is torch.optim.SGD else {})}
    sizes = []
    for make in (lambda p: MEMBERS[name].build(p, base, backend=backend, **options), lambda p: base(p, **options)):
        params = [nn.Parameter(torch.randn(300, 100).to(dtype)) for _ in range(3)]
        opt = make(params)
        for call in getattr(opt, "_calls", ["step"]):
            for p in params:
                p.grad = torch.ones_like(p)
            getattr(opt, call)()
        sizes.append(len(to_file(opt.state_dict())))
    assert abs(sizes[0] - sizes[1]) < 1500
    assert sizes[0] > 90_000 * params[0].element_size()


# ---- the format, and version 0.1, which had none

ADAMW_OF_0_1 = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-08, "weight_decay": 0.01, "amsgrad": False}
ADAMW_OF_0_1 |= {"maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None}
ADAMW_OF_0_1 |= {"decoupled_weight_decay": True, "rho_min_decay": "lr", "rho_min_end": 0.0, "rho_min_lr_end": 0.0}
ADAMW_OF_0_1 |= {"adaptive": False, "eta": 0.0, "lr_max": 0.1}
SGD_OF_0_1 = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 0, "nesterov": False, "maximize": False}
SGD_OF_0_1 |= {"foreach": None, "differentiable": False, "fused": None, "adaptive": False, "eta": 0.0}


def in_float64(*values):
    return torch.tensor(values, dtype=torch.float64)


OF_0_1 = {
    "BSAM": (
        (bsam_fused.BSAM, torch.optim.AdamW),
        ([0.29929651788833755, -1.1761816721429568], [2.1960376143309954]),
        {
            "state": {
                0: {
                    "step": torch.tensor(2.0),
                    "exp_avg": in_float64(0.30122025385481643, 0.2026518977158247),
                    "exp_avg_sq": in_float64(0.005044036056808413, 0.0037110588208616193),
                },
                1: {
                    "step": torch.tensor(2.0),
                    "exp_avg": in_float64([-0.2915139900574938]),
                    "exp_avg_sq": in_float64([0.004692964306770799]),
                },
            },
            "param_groups": [
                {**ADAMW_OF_0_1, "rho": 0.05, "rho_min": 0.05, "params": [0]},
                {**ADAMW_OF_0_1, "rho": 0.2, "rho_min": 0.2, "params": [1]},
            ],
        },
        ([0.2075808592774249, -1.1726724749897308], [2.290853513954731]),
    ),
    "SAM": (
        (bsam_fused.SAM, torch.optim.SGD),
        ([0.31312148809713375, -0.951132552000582], [2.210137162005889]),
        {
            "state": {
                0: {"momentum_buffer": in_float64(0.9594876922029808, -0.6297944880540477)},
                1: {"momentum_buffer": in_float64([-1.1424473453957504])},
            },
            "param_groups": [{**SGD_OF_0_1, "rho": 0.05, "params": [0]}, {**SGD_OF_0_1, "rho": 0.2, "params": [1]}],
        },
        ([0.3024478453296583, -0.7985586206094039], [2.247258763219628]),
    ),
}
"""Two steps by 0.1.0 (commit 5af54d5, "torch"): the optimizer, weights, state dict; and the weights a step later."""


@pytest.mark.parametrize("through", ["the optimizer", "the base optimizer"])
@pytest.mark.parametrize("name", OF_0_1)
def test_a_state_dict_of_0_1_goes_on(backend, name, through):
    """With every option, other ones than here: it has neither format nor count of rounded steps."""
    (kind, base), weights, saved, right = OF_0_1[name]
    params = [nn.Parameter(w) for w in (in_float64(*weights[0]), in_float64(weights[1]))]
    opt = kind([{"params": params[:1]}, {"params": params[1:]}], base, lr=9.0, rho=9.0, backend=backend)
    (opt if through == "the optimizer" else opt.base_optimizer).load_state_dict(saved)
    for k, call in enumerate(opt._calls):
        for i, p in enumerate(params):
            p.grad = torch.sin(torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape) + 2 + 2 * k + 3 * i)
        getattr(opt, call)()
    torch.testing.assert_close(params[0], in_float64(*right[0]), rtol=1e-12, atol=0)
    torch.testing.assert_close(params[1], in_float64(right[1]), rtol=1e-12, atol=0)
    assert [group["bsam_fused_format"] for group in opt.state_dict()["param_groups"]] == [1, 1]


@pytest.mark.parametrize(
    ("key", "value"), [("bsam_fused_format", 2), ("bsam_fused_format", None), ("rounded_steps", -1)]
)
def test_what_cannot_be_read_is_refused(key, value):
    """In any group, with nothing loaded; what the base loaded by itself, as soon as it is noticed."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    opt = bsam_fused.SAM([{"params": [p]}, {"params": [q]}], lr=0.1, momentum=0.9)
    for call in opt._calls:
        p.grad, q.grad = torch.ones(3), torch.ones(2)
        getattr(opt, call)()
    before = from_file(to_file(opt.state_dict()))
    saved = from_file(to_file(opt.state_dict()))
    saved["param_groups"][1] |= {key: value, "lr": 7.0}
    saved["state"][0]["momentum_buffer"] += 1
    with pytest.raises(ValueError, match=f"{key}={value} in group 1"):
        opt.load_state_dict(saved)
    assert_same(opt.state_dict(), before)
    opt.base_optimizer.load_state_dict(saved)
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=f"{key}={value} in group 1"):
        opt.ascend()
    assert torch.equal(p, torch.full((3,), 0.9))


def test_format_and_count_are_no_options(backend):
    """Another wrapper around the same base begins anew, and what the plain base loads trains as ever."""
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    plain = torch.optim.SGD([p], lr=0.1)
    plain.param_groups[0] |= {"bsam_fused_format": 2, "rounded_steps": 5}
    opt = bsam_fused.SAM([p], plain, backend=backend)
    group = opt.state_dict()["param_groups"][0]
    assert (group["bsam_fused_format"], group["rounded_steps"]) == (1, None)
