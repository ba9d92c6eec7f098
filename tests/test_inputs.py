"""The parameters and gradients that real models bring. The oracle is the torch backend or a plain twin."""

import copy
import pickle

import pytest
import torch
from samples import assign, gradients
from torch import nn

import bsam_fused

KINDS = [bsam_fused.SAM, bsam_fused.ASAM, bsam_fused.BSAM]
every_kind = pytest.mark.parametrize("kind", KINDS)


def train(opt, net, steps=3, seed=0, loss_of=None):
    generator = torch.Generator("cpu").manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator, device="cpu").to(next(net.parameters()))

        def closure(x=x):
            loss = loss_of(net, x) if loss_of else net(x).square().mean()
            loss.backward()
            return loss

        opt.step(closure)
    return [p.detach().clone() for p in net.parameters()]


def step_without_slope(opt, net):
    """A step that only lets the momentum fade."""
    for call in opt._calls:
        assign(net.parameters(), [torch.zeros_like(p) for p in net.parameters()])
        getattr(opt, call)()


def mlp():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def twin(kind, backend, net, **options):
    """The weights that float64 plain-torch training of a copy reaches."""
    other = copy.deepcopy(net).double()
    return train(kind(other.parameters(), backend="torch", **{"lr": 0.1, "momentum": 0.9, **options}), other)


def assert_like(weights, expected):
    for w, e in zip(weights, expected):
        torch.testing.assert_close(w.double(), e.double(), rtol=1e-5, atol=1e-6)


@every_kind
def test_frozen_parameters_stay_and_take_no_memory(backend, kind):
    net = mlp()
    net[0].requires_grad_(False)
    before = [p.detach().clone() for p in net[0].parameters()]
    opt = kind(net.parameters(), lr=0.1, momentum=0.9, backend=backend)
    weights = train(opt, net)
    assert all(torch.equal(p, w) for p, w in zip(net[0].parameters(), before))
    assert not any(p in opt.state for p in net[0].parameters())
    assert sum(len(flat.params) for flat in opt._flats) == 2
    trainable = mlp()
    for p in trainable[0].parameters():
        p.requires_grad_(False)
    reference = train(kind(trainable[2].parameters(), lr=0.1, momentum=0.9, backend=backend), trainable)
    assert_like(weights, reference)


@every_kind
def test_unfreezing_in_the_middle_keeps_momentum(backend, kind):
    net, plain = mlp(), mlp()
    net[0].requires_grad_(False)
    opt = kind(net.parameters(), lr=0.1, momentum=0.9, backend=backend)
    train(opt, net)
    momentum = opt.state[net[2].weight]["momentum_buffer"].clone()
    net[0].requires_grad_(True)
    step_without_slope(opt, net)
    torch.testing.assert_close(opt.state[net[2].weight]["momentum_buffer"], 0.9 * momentum)
    train(opt, net)
    assert not torch.equal(net[0].weight, plain[0].weight)


@every_kind
def test_tied_weights(backend, kind):
    """One parameter in two places is perturbed once."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(4)
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    net = Tied()
    expected = twin(kind, backend, net)
    assert_like(train(kind(net.parameters(), lr=0.1, momentum=0.9, backend=backend), net), expected)


@every_kind
def test_a_hundred_groups_with_layerwise_learning_rates(backend, kind):
    """A group a parameter, each with its own lr: an option read from the wrong group would show."""
    params = [nn.Parameter(torch.randn(6)) for _ in range(100)]
    options = [{"lr": 0.1 * 0.97**i, "rho": 0.05 + i / 1000, "weight_decay": i / 1e4} for i in range(100)]
    opt = kind([{"params": [p], **o} for p, o in zip(params, options)], momentum=0.9, backend=backend)
    other = [nn.Parameter(p.detach().double()) for p in params]
    reference = kind([{"params": [p], **o} for p, o in zip(other, options)], momentum=0.9, backend="torch")
    for t in range(3):
        for k, call in enumerate(opt._calls):
            grads = gradients(params, 10 * t + k)
            assign(params, grads)
            assign(other, [g.double() for g in grads])
            getattr(opt, call)()
            getattr(reference, call)()
    assert_like([p.detach() for p in params], [p.detach() for p in other])


@every_kind
def test_channels_last_model(backend, kind):
    def build():
        torch.manual_seed(4)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 3))

    def loss_of(net, x):
        images = torch.linspace(-1, 1, 4 * 3 * 36).view(4, 3, 6, 6).to(x.dtype) * x[0, 0]
        return net(images.to(memory_format=torch.channels_last)).square().mean()

    net, reference = build().to(memory_format=torch.channels_last), build().double()
    opt = kind(net.parameters(), lr=0.1, momentum=0.9, backend=backend)
    weights = train(opt, net, loss_of=loss_of)
    assert opt.state[net[0].weight]["momentum_buffer"].stride() == net[0].weight.stride()
    expected = train(kind(reference.parameters(), lr=0.1, momentum=0.9, backend="torch"), reference, loss_of=loss_of)
    assert_like(weights, expected)


def test_layout_changed_between_steps(backend):
    """model.to(memory_format=...) after the first step: state follows its parameter, element by element."""
    net = nn.Conv2d(3, 4, 3)
    opt = bsam_fused.SAM(net.parameters(), lr=0.1, momentum=0.9, backend=backend)

    def step():
        for call in opt._calls:
            net(torch.ones(1, 3, 5, 5)).square().sum().backward()
            getattr(opt, call)()

    step()
    momentum = opt.state[net.weight]["momentum_buffer"].clone()
    net.to(memory_format=torch.channels_last)
    step_without_slope(opt, net)
    torch.testing.assert_close(opt.state[net.weight]["momentum_buffer"], 0.9 * momentum)
    step()


@every_kind
def test_gradients_with_other_strides(backend, kind):
    """A row-major parameter whose gradients come column-major, and the other way round."""
    params = [nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(7, 5).t())]
    other = [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in params]
    opts = [kind(ps, lr=0.1, momentum=0.9, backend=backend) for ps in (params, other)]
    for t in range(2):
        for k, call in enumerate(opts[0]._calls):
            torch.manual_seed(9 * t + k)
            grads = [torch.randn(5, 7) for _ in params]
            params[0].grad, params[1].grad = grads[0].t().contiguous().t(), grads[1].clone()
            assign(other, grads)
            for opt in opts:
                getattr(opt, call)()
    # Which elements torch's own fused SGD rounds an instruction later depends on their place in memory.
    ulp = 1e-7 if backend == "torch" else 0
    torch.testing.assert_close(params, other, rtol=ulp, atol=ulp)


def test_mixed_dtypes_in_one_model(backend):
    params = [nn.Parameter(torch.randn(9).to(d)) for d in (torch.float32, torch.bfloat16, torch.float64, torch.float16)]
    opt = bsam_fused.BSAM(params, lr=0.1, momentum=0.9, backend=backend)
    before = [p.detach().clone() for p in params]
    for call in opt._calls:
        assign(params, gradients(params, 0))
        getattr(opt, call)()
    assert len(opt._flats) == 4
    assert all(not torch.equal(p, w) and p.dtype == w.dtype for p, w in zip(params, before))
    params[1].grad = torch.full_like(params[1], float("nan"))  # one dtype's bad gradient skips all
    after = [p.detach().clone() for p in params]
    opt.ascend()
    assert all(torch.equal(p, w) for p, w in zip(params, after))
    opt.restore()


@every_kind
def test_add_param_group_after_training_began(backend, kind):
    net = mlp()
    head = nn.Parameter(torch.ones(3))
    opt = kind(net.parameters(), lr=0.1, momentum=0.9, backend=backend)
    train(opt, net)
    momentum = opt.state[net[0].weight]["momentum_buffer"].clone()
    opt.add_param_group({"params": [head], "rho": 0.5, "lr": 0.01})
    assert opt.base_optimizer.param_groups is opt.param_groups
    assert torch.equal(opt.state[net[0].weight]["momentum_buffer"], momentum)
    train(opt, net, loss_of=lambda net, x: (net(x) * head).square().mean())
    assert not torch.equal(head, torch.ones(3))
    assert opt.state[head]["momentum_buffer"].shape == (3,)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@every_kind
def test_copies_between_steps_go_on_alike_and_apart(backend, kind, base, copied):
    net = mlp()
    opt = kind(net.parameters(), base, lr=0.05, backend=backend)
    train(opt, net)
    other_net, other = copied((net, opt))
    ours = train(opt, net, seed=1)
    theirs = train(other, other_net, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert not any(a.data_ptr() == b.data_ptr() for a, b in zip(net.parameters(), other_net.parameters()))
    train(opt, net, seed=2)
    assert all(torch.equal(p, w) for p, w in zip(other_net.parameters(), theirs))


def test_pickle_holds_each_state_once(backend):
    """A hundred views of one flat buffer must not be written a hundred times."""
    params = [nn.Parameter(torch.randn(1000)) for _ in range(100)]
    opt = bsam_fused.SAM(params, lr=0.1, momentum=0.9, backend=backend)
    for call in opt._calls:
        assign(params, gradients(params, 0))
        getattr(opt, call)()
    opt.zero_grad()
    assert len(pickle.dumps(opt)) < 1.3 * 2 * 100 * 1000 * 4  # parameters and momentum


@every_kind
def test_model_zero_grad_and_accumulation(backend, kind):
    """Micro-batches in each pass add up to the whole batch; the model's zero_grad serves as well as ours."""
    nets = [mlp(), mlp()]
    opts = [kind(net.parameters(), lr=0.1, momentum=0.9, backend=backend) for net in nets]
    x = torch.randn(8, 6)
    for _ in range(2):
        for net, opt, parts in zip(nets, opts, (1, 4)):
            net.zero_grad()
            for call in opt._calls:
                for part in x.chunk(parts):
                    (net(part).square().sum() / len(x)).backward()
                getattr(opt, call)()
    assert_like([p.detach() for p in nets[1].parameters()], [p.detach() for p in nets[0].parameters()])


@every_kind
def test_one_autocast_block_around_all_passes(backend, kind):
    """Its cache of cast weights must not survive a phase, else later passes run at the first pass's weights."""
    results = []
    for around in (True, False):
        net = mlp()
        opt = kind(net.parameters(), lr=0.1, rho=2.0, backend=backend)
        torch.manual_seed(1)
        x = torch.randn(8, 6)

        def autocast(device=x.device.type):
            return torch.autocast(device, dtype=torch.bfloat16)

        losses = []
        if around:
            with autocast():
                for call in opt._calls:
                    losses.append(net(x).square().mean())
                    losses[-1].backward()
                    getattr(opt, call)()
        else:
            for call in opt._calls:
                with autocast():
                    losses.append(net(x).square().mean())
                losses[-1].backward()
                getattr(opt, call)()
        results.append(torch.stack(losses).detach())
    assert torch.equal(*results)
    assert len(set(results[0].tolist())) == len(opt._calls)


@every_kind
def test_a_graph_kept_over_a_phase_raises(backend, kind):
    """As with torch's optimizers: backward through weights that were written since is an error."""
    net = mlp()
    opt = kind(net.parameters(), lr=0.1, backend=backend)
    for call in opt._calls:
        loss = net(torch.randn(8, 6)).square().mean()
        loss.backward(retain_graph=True)
        getattr(opt, call)()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        net.zero_grad()


def test_a_gradient_that_somebody_holds_is_copied(backend):
    """BSAM adds g_max into the g that it kept; neither a held gradient nor a bucket may see that."""
    for size in (10, 5000):  # below and above what is always copied
        p, q = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(size))
        opt = bsam_fused.BSAM([p, q], lr=0.1, backend=backend)
        held, bucket = torch.ones(size), torch.ones(2 * size)
        p.grad, q.grad = held, bucket[size:]
        opt.ascend()
        assert p.grad is None
        assert q.grad is None
        bucket.fill_(7.0)  # as the next backward does with DDP's buckets
        p.grad, q.grad = torch.ones(size), torch.ones(size)
        opt.descend()
        assert torch.equal(held, torch.ones(size))
        assert torch.equal(bucket, torch.full((2 * size,), 7.0))
        p.grad, q.grad = torch.zeros(size), torch.zeros(size)
        opt.step()
        torch.testing.assert_close(q.detach(), torch.full((size,), -0.2))


def test_gradients_of_a_graph_of_gradients(backend):
    """backward(create_graph=True) leaves gradients that require one; the graph must survive the phases."""
    p = nn.Parameter(torch.randn(3000))
    opt = bsam_fused.BSAM([p], lr=0.1, backend=backend)
    p.pow(3).sum().backward(create_graph=True)
    g, expected = p.grad, p.grad.detach().clone()
    opt.ascend()
    p.pow(3).sum().backward()
    opt.descend()
    assert torch.equal(g.detach(), expected)
    opt.restore()


@every_kind
def test_model_to_another_dtype_before_the_first_step(backend, kind):
    net = mlp()
    opt = kind(net.parameters(), lr=0.1, backend=backend)
    net.double()
    train(opt, net)
    assert next(iter(opt._flats)).dtype == torch.float64


def test_named_parameters(backend):
    net = mlp()
    opt = bsam_fused.BSAM(net.named_parameters(), lr=0.1, backend=backend)
    train(opt, net)
    assert opt.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"
