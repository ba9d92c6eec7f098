"""What others do to buffers between and within passes: found by a hostile reader of the extra passes' delivery."""

import copy

import pytest
import torch
from torch import nn

from bsam_fused import BSAM, SAM
from bsam_fused.batchnorm import frozen_running_stats
from bsam_fused.buffers import Snapshot

KINDS = [SAM, BSAM]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


class Module(nn.Module):
    """Calls ``work(self)`` in every forward, the n-th from 1 on."""

    def __init__(self, work=lambda module: None, **buffers):
        super().__init__()
        self.l, self.work, self.n = nn.Linear(4, 4), work, 0
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x):
        self.n += 1
        with torch.no_grad():
            self.work(self)
        return self.l(x)


class Queue(nn.Module):
    """Its loss depends on its buffer, which every pass moves."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 4)
        self.register_buffer("b", torch.zeros(4))

    def forward(self, x):
        y = self.l(x) * (1 + self.b.clone())
        self.b += 1
        return y


def closure_of(net, losses=None):
    x = torch.ones(3, 4)

    def closure():
        loss = net(x).square().mean()
        loss.backward()
        if losses is not None:
            losses.append(loss.item())
        return loss

    return closure


@pytest.mark.parametrize("way", ["another parameter", "its memory"])
def test_a_parameter_made_of_a_buffer_between_steps_is_trained(kind, way):
    net = Module(shadow=torch.randn(4, 4))
    opt = kind(net.parameters(), lr=0.1, model=net)
    opt.step(closure_of(net))
    if way == "another parameter":
        net.l.weight = nn.Parameter(net.shadow)
        opt.param_groups[0]["params"][0] = net.l.weight
    else:
        net.l.weight.data = net.shadow
    before = net.l.weight.detach().clone()
    opt.step(closure_of(net))
    assert not torch.equal(net.l.weight, before)


def test_a_view_of_a_parameter_that_is_one_no_more_is_put_back(kind):
    def work(module):
        module.v.add_(1)

    net = Module(work)
    net.register_buffer("v", net.l.weight.detach()[0])
    opt = kind(net.parameters(), lr=0.0, rho=0.0, model=net)
    opt.step(closure_of(net))
    net.l.weight.data = net.l.weight.data.clone()
    before = net.v.clone()
    opt.step(closure_of(net))
    assert torch.equal(net.v, before + 1)


def test_what_is_trained_and_in_no_parameter_of_the_model(kind):
    """A buffer that requires a gradient, and one that views a parameter of another module."""
    net, backbone = Module(), nn.Linear(4, 4, bias=False)
    scale = torch.ones(4, requires_grad=True)
    net.register_buffer("scale", scale)
    net.register_buffer("view", backbone.weight.detach())
    opt = kind([*net.parameters(), scale, backbone.weight], lr=0.1, model=net)
    before = backbone.weight.detach().clone()
    opt.step(lambda: (net(backbone(torch.ones(3, 4))) * scale).square().mean().backward())
    assert scale.tolist() != [1.0] * 4
    assert not torch.equal(backbone.weight, before)


@pytest.mark.parametrize("same_randomness", [False, True])
def test_looking_at_w_within_a_pass(kind, same_randomness):
    """By a teacher, or by a base's train(), which Hugging Face's Trainer calls before every pass: the pass goes on."""

    class WithModes(torch.optim.SGD):
        def train(self):
            pass

    net, losses = Queue(), []
    opt = kind(net.parameters(), WithModes, lr=0.1, rho=0.0, model=net, same_randomness=same_randomness)
    run = closure_of(net, losses)

    def closure():
        opt.train()
        with opt.unperturbed(), torch.no_grad():
            net.l(torch.ones(1, 4))
        return run()

    opt.step(closure)
    assert len(set(losses)) == 1
    assert net.b.tolist() == [1.0] * 4


def test_looking_at_w_between_pass_and_phase(kind):
    net = Module()
    opt = kind(net.parameters(), lr=0.1, model=net, same_randomness=True)
    for call in opt._calls:
        with opt.one_pass():
            closure_of(net)()
        with opt.unperturbed():
            pass
        getattr(opt, call)()


def test_the_third_pass_begins_with_nothing_of_the_second():
    """Not its shapes, its names, nor its memory."""
    at = []

    def work(module):
        at.append(len(module.seen))
        module.seen.resize_(len(module.seen) + 1).fill_(1)
        if module.n == 2:
            module.b.data = torch.full((6,), 9.0)
        at.append(module.b.tolist())

    net = Module(work, seen=torch.zeros(0), b=torch.zeros(2))
    BSAM(net.parameters(), lr=0.1, model=net).step(closure_of(net))
    assert at == [0, [0.0, 0.0], 1, [9.0] * 6, 1, [0.0, 0.0]]
    assert net.b.tolist() == [0.0, 0.0]


def test_a_scripted_module(kind):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(4, 4)
            self.register_buffer("total", torch.zeros(4))

        def forward(self, x):
            self.total = self.total + x.sum(0)
            return self.l(x)

    net = torch.jit.script(Counting())
    opt = kind(net.parameters(), lr=0.1, model=net)
    opt.step(closure_of(net))
    assert net.total.tolist() == [3.0] * 4


@pytest.mark.parametrize("size", [0, 400])
@pytest.mark.parametrize("at", [1, 2])
def test_memory_that_is_freed_or_shrunk_comes_back(kind, at, size):
    """In an extra pass; what is gone after the first one is left alone."""

    def work(module):
        if module.n == at:
            module.b.untyped_storage().resize_(size)

    net = Module(work, b=torch.ones(1000))
    kind(net.parameters(), lr=0.1, model=net).step(closure_of(net))
    found = net.b.untyped_storage().nbytes()  # a message that shows the tensor itself would read what is not there
    assert found == (4000 if at == 2 else size)
    assert at == 1 or net.b.tolist() == [1.0] * 1000


def test_a_name_that_the_first_pass_deleted_stays_deleted(kind):
    def work(module):
        if module.n == 1:
            del module.init

    net = Module(work, init=torch.ones(2))
    kind(net.parameters(), lr=0.1, model=net).step(closure_of(net))
    assert "init" not in net.state_dict()


WAYS = {
    "t_": lambda b: b.t_(),
    "mT": lambda b: setattr(b, "data", b.data.mT),
    "as_strided_": lambda b: b.as_strided_((2, 2), (0, 1)),
    "dtype": lambda b: setattr(b, "data", b.data.view(torch.int32)),
}


@pytest.mark.parametrize("way", WAYS)
def test_another_layout_of_the_same_memory(kind, way):
    def work(module):
        if module.n == 2:
            WAYS[way](module.b)

    net = Module(work, b=torch.arange(4.0).reshape(2, 2))
    kind(net.parameters(), lr=0.1, model=net).step(closure_of(net))
    assert net.b.dtype == torch.float32
    assert net.b.tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_a_buffer_under_another_name(kind):
    def work(module):
        if module.n == 4:
            module.c = module.c + 1

    net = Module(work, b=torch.zeros(4))
    opt = kind(net.parameters(), lr=0.1, model=net)
    opt.step(closure_of(net))
    b = net.b
    del net.b
    net.register_buffer("c", b)
    net.n = 2
    opt.step(closure_of(net))
    assert [name for name, _ in net.named_buffers()] == ["c"]
    assert net.c.tolist() == [0.0] * 4


def test_a_deleted_buffer_comes_back_as_it_was(kind):
    """Not persistent, and in its place: state_dict() is as before."""

    def work(module):
        if module.n == 2:
            del module.k, module.a

    net = Module(work, a=torch.zeros(1), b=torch.zeros(2))
    net.register_buffer("k", torch.ones(1), persistent=False)
    before = list(net.state_dict())
    kind(net.parameters(), lr=0.1, model=net).step(closure_of(net))
    assert list(net.state_dict()) == before
    assert net.k.tolist() == [1.0]


def test_active_is_switched_off_within_a_step(kind):
    net, losses = Queue(), []
    opt = kind(net.parameters(), lr=0.1, rho=0.0, model=net, same_randomness=True)
    run = closure_of(net, losses)

    def closure():
        opt.active = len(losses) == 0
        return run()

    opt.step(closure)
    assert len(set(losses)) == 1


def test_a_first_pass_that_a_trainer_gave_up(kind):
    """Its beginning is not that of the next step."""
    net, losses = Queue(), []
    opt = kind(net.parameters(), lr=0.1, rho=0.0, model=net)
    opt._begin_first_pass()
    net(torch.ones(3, 4))
    opt.step(closure_of(net, losses))
    assert len(set(losses)) == 1


ODD = {
    "complex": lambda: torch.ones(2, dtype=torch.cfloat),
    "conjugate": lambda: torch.ones(2, dtype=torch.cfloat).conj(),
    "negated": lambda: torch.ones(2, dtype=torch.cfloat).conj().imag,
    "bool": lambda: torch.ones(2, dtype=torch.bool),
    "float8": lambda: torch.ones(2).to(torch.float8_e4m3fn),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "zero": lambda: torch._efficientzerotensor((2,)),
    "empty": lambda: torch.ones(0, 3),
    "inference": lambda: inference(),
}


def inference():
    with torch.inference_mode():
        return torch.ones(2)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("odd", ODD)
def test_buffers_of_any_kind(kind, odd, native, monkeypatch):
    if not native:
        monkeypatch.setattr("bsam_fused.ops.copies._on_cpu", torch._foreach_copy_)
    net = Module(odd=ODD[odd](), b=torch.ones(2))
    kind(net.parameters(), lr=0.1, model=net).step(closure_of(net))
    with frozen_running_stats(net):
        net.b.zero_()
    assert net.b.tolist() == [1.0, 1.0]


def test_an_optimizer_pickled_before_it_had_the_option(kind):
    """Has no attribute of that name."""
    net = Module()
    opt = kind(net.parameters(), lr=0.1, model=net)
    del opt.__dict__["same_randomness"]
    opt.step(closure_of(net))


def test_a_snapshot_is_in_place_or_not():
    net = Module(b=torch.ones(2))
    snapshot = Snapshot(net)
    assert snapshot.is_in_place
    net.b = copy.deepcopy(net.b)
    assert not snapshot.is_in_place
    snapshot.write_back()
    assert snapshot.is_in_place
