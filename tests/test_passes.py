"""The extra passes leave no trace: after a step a model's buffers are those of one plain forward, whatever writes them.

The oracle is a copy of the model that goes forward once. Weights move far (ρ = 1), so that a pass at w_max or w_min
would write something else.
"""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import on_two_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.utils import parametrizations

from bsam_fused import BSAM, SAM
from bsam_fused.buffers import Snapshot

KINDS = [SAM, BSAM]
PASSES = {SAM: 2, BSAM: 3}


class OwnStatistics(nn.BatchNorm1d):
    """Writes its running statistics itself, as subclasses in libraries do."""

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(x.mean(0), 0.1)
                self.num_batches_tracked += 1
        return x - x.mean(0)


class Codebook(nn.Module):
    """Vector quantization whose codes are moving averages."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(5, 4))
        self.register_buffer("counts", torch.ones(5), persistent=False)

    def forward(self, x):
        nearest = torch.cdist(x.detach(), self.codes).argmin(1)
        quantized = self.codes[nearest]
        with torch.no_grad():
            hits = nn.functional.one_hot(nearest, 5).to(x.dtype)
            self.counts.lerp_(hits.sum(0), 0.1)
            self.codes.lerp_(hits.t() @ x.detach() / hits.sum(0).clamp(min=1).unsqueeze(1), 0.1)
        return x + (quantized - x).detach() + 0.25 * (x - quantized.detach())


class Queue(nn.Module):
    """MoCo's: keys of this batch are negatives of the next."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", normalize(torch.randn(12, 4), dim=1))
        self.register_buffer("at", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        scores = normalize(x, dim=1) @ self.queue.clone().t()
        with torch.no_grad():
            keys, at = normalize(x, dim=1), int(self.at)
            self.queue[at : at + len(keys)] = keys
            self.at.copy_((self.at + len(keys)) % len(self.queue))
        return scores


class Replacing(nn.Module):
    """Assigns a new tensor in every pass, the batch itself and something of another shape among them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(4))
        self.register_buffer("last", None)
        self.register_buffer("shapes", torch.zeros(0))

    def forward(self, x):
        self.total, self.last = self.total + x.detach().sum(0), x.detach()
        self.shapes = torch.cat([self.shapes, self.shapes.new_ones(1)])
        return x * (1 + self.total.tanh())


class Growing(nn.Module):
    """Resizes a buffer in place, as observers do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x):
        with torch.no_grad():
            n = len(self.seen)
            self.seen.resize_(n + 1)
            self.seen[n] = x.sum()
        return x


class Expanded(nn.Module):
    """One number for all, and a view of another buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1).expand(4))
        self.register_buffer("table", torch.zeros(2, 4))
        self.register_buffer("row", self.table[1])

    def forward(self, x):
        with torch.no_grad():
            self.table[0] += x.mean(0)
            self.row += 2 * x.mean(0)
            self.scale[:1] += x.square().mean()
        return x * self.scale * (1 + self.table.sum(0).tanh())


def old_spectral_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.spectral_norm(nn.Linear(4, 4))


def qat(fx):
    """Conv and BatchNorm folded into one, with fake quantization and its observers."""
    from torch.ao import quantization
    from torch.ao.quantization import quantize_fx

    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = quantization.get_default_qat_qconfig("fbgemm")
        if fx:
            mapping = quantization.QConfigMapping().set_global(config)
            net = quantize_fx.prepare_qat_fx(net, mapping, torch.ones(2, 1, 2, 2))
        else:
            net.qconfig = config
            net = quantization.prepare_qat(quantization.fuse_modules_qat(net, [["0", "1"]]))
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), net, nn.Flatten())


LAYERS = {
    "BatchNorm": lambda: nn.BatchNorm1d(4),
    "BatchNorm, cumulative": lambda: nn.BatchNorm1d(4, momentum=None),
    "a subclass that writes its own statistics": lambda: OwnStatistics(4),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "spectral norm, old": old_spectral_norm,
    "codebook": Codebook,
    "queue": Queue,
    "replaced": Replacing,
    "resized": Growing,
    "expanded": Expanded,
    "quantization-aware": lambda: qat(fx=False),
    "quantization-aware, FX": lambda: qat(fx=True),
    "shared": lambda: nn.Sequential(layer := nn.BatchNorm1d(4), nn.Tanh(), layer),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def network(layer):
    net = nn.Sequential(nn.Linear(4, 4), layer()).train()
    for _ in range(2):
        net(torch.randn(6, 4))
    return net


def copied(net):
    for module in net.modules():  # old spectral norm leaves there what it has worked out
        if "weight" in vars(module):
            module.weight = module.weight.detach()
    return copy.deepcopy(net)


def buffers(model):
    return {name: value.clone() for name, value in model.named_buffers(remove_duplicate=False)}


def objects(model):
    return {name: id(value) for name, value in model.named_buffers(remove_duplicate=False)}


def same(now, then):
    return now.keys() == then.keys() and all(
        now[name].shape == value.shape and torch.equal(now[name], value) for name, value in then.items()
    )


def closure_of(net, x, after_first=None):
    """Its losses; ``after_first`` is called at the end of the first pass."""
    losses = []

    def closure():
        loss = net(x).square().mean() + net[0].weight.sum()
        loss.backward()
        losses.append(loss.item())
        if after_first and len(losses) == 1:
            after_first()
        return loss

    return closure, losses


def test_after_a_step_buffers_are_those_of_one_plain_forward(backend, kind, layer):
    """And in later steps: objects, shapes and values; the second step's layout is that of the first, or another."""
    net = network(layer)
    opt = kind(net.parameters(), lr=0.01, rho=1.0, model=net, backend=backend)
    for _ in range(3):
        x, plain, left = torch.randn(6, 4), copied(net), {}
        closure, losses = closure_of(net, x, after_first=lambda left=left: left.update(objects(net)))
        opt.step(closure)
        plain(x)
        assert len(losses) == PASSES[kind]
        assert same(buffers(net), buffers(plain))
        assert objects(net) == left


def test_every_pass_is_the_same_function(kind, layer):
    """At ρ = 0 all losses are equal: else a queue's positive key is a negative in pass 2, and a codebook has moved."""
    net = network(layer)
    closure, losses = closure_of(net, torch.randn(6, 4))
    kind(net.parameters(), lr=0.01, rho=0.0, model=net).step(closure)
    assert len(set(losses)) == 1 or isinstance(net[1], Growing)


@pytest.mark.parametrize("how", ["bare", "one_pass"])
def test_by_hand(kind, layer, how):
    """Bare, extra passes begin from what the first one left; in one_pass() from where it began. Both leave no trace."""
    net, x = network(layer), torch.randn(6, 4)
    plain = copied(net)
    opt = kind(net.parameters(), lr=0.01, rho=0.0, model=net)
    closure, losses = closure_of(net, x)
    plain(x)
    left = buffers(plain)
    for call in opt._calls:
        if how == "bare":
            closure()
        else:
            with opt.one_pass():
                closure()
        getattr(opt, call)()
        assert same(buffers(net), left)
    if how == "one_pass" and not isinstance(net[1], Growing):
        assert len(set(losses)) == 1
    if how == "bare" and isinstance(net[1], Queue | Replacing):
        assert losses[1] != losses[0]


def test_unperturbed_restore_and_a_skipped_step(kind, layer):
    net = network(layer)
    opt = kind(net.parameters(), lr=0.01, rho=1.0, model=net)
    for end in ("restore", "skip"):
        x, plain = torch.randn(6, 4), copied(net)
        plain(x)
        left = buffers(plain)
        closure_of(net, x)[0]()
        opt.ascend()
        closure_of(net, x)[0]()
        moved = buffers(net)
        with opt.unperturbed():
            assert same(buffers(net), left)
        assert same(buffers(net), moved)  # and the pass goes on
        if end == "restore":
            opt.restore()
        else:
            net[0].weight.grad.fill_(torch.inf)
            for call in opt._calls[1:]:
                getattr(opt, call)()
                if call != "step":
                    closure_of(net, x)[0]()
        assert same(buffers(net), left)
    assert opt.skipped_steps == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_an_extra_pass(kind, layer, error):
    for at in range(2, PASSES[kind] + 1):
        net, x = network(layer), torch.randn(6, 4)
        plain, opt = copied(net), kind(net.parameters(), lr=0.01, rho=1.0, model=net)
        closure, losses = closure_of(net, x)

        def failing(closure=closure, losses=losses, at=at):
            loss = closure()
            if len(losses) == at:
                raise error
            return loss

        with pytest.raises(error):
            opt.step(failing)
        plain(x)
        assert same(buffers(net), buffers(plain))


def test_a_buffer_that_views_a_parameter_is_left_alone(kind):
    """Putting it back would undo the update."""
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].register_buffer("view", net[0].weight.detach()[0])
    opt = kind(net.parameters(), lr=0.1, rho=0.1, model=net)
    before = net[0].view.clone()
    opt.step(closure_of(net, torch.randn(6, 4))[0])
    assert not torch.equal(net[0].view, before)
    assert torch.equal(net[0].view, net[0].weight[0])


def test_a_retained_graph_through_evaluation_mode(kind):
    """A frozen BatchNorm's graph has saved its statistics: to write them back moves no version counter."""
    net, teacher = nn.Linear(4, 4), nn.BatchNorm1d(4).eval().requires_grad_(False)
    x = torch.randn(6, 4, requires_grad=True)
    kept = teacher(x).square().sum()
    opt = kind(net.parameters(), lr=0.1, rho=1.0, model=nn.ModuleList([net, teacher]))
    opt.step(lambda: net(x.detach()).square().sum().backward())
    kept.backward()
    assert x.grad.isfinite().all()


def test_names_that_an_extra_pass_registers_stay(kind):
    net = network(lambda: nn.BatchNorm1d(4))
    opt = kind(net.parameters(), lr=0.01, rho=1.0, model=net)
    passes = []

    def closure():
        passes.append(1)
        if len(passes) == 2:
            net[1].register_buffer("late", torch.ones(2))
        return closure_of(net, torch.ones(6, 4))[0]()

    opt.step(closure)
    assert net[1].late.tolist() == [1.0, 1.0]


def test_what_has_no_memory_is_left_alone():
    net = nn.Module()
    net.register_buffer("meta", torch.ones(2, device="meta"))
    net.register_buffer("sparse", torch.eye(2).to_sparse())
    net.register_buffer("none", None)
    net.register_buffer("lazy", nn.parameter.UninitializedBuffer())
    net.register_buffer("dense", torch.ones(2))
    before = Snapshot(net)
    net.lazy.materialize((2,))
    net.dense.zero_()
    before.write_back()
    assert net.dense.tolist() == [1.0, 1.0]
    net.lazy.fill_(1.0)
    before = Snapshot(net, before)
    net.lazy.fill_(2.0)
    before.write_back()
    assert net.lazy.tolist() == [1.0, 1.0]


def test_memory_is_used_again(kind):
    """A step allocates no copies where the same buffers are there."""
    net = network(lambda: nn.BatchNorm1d(4))
    opt = kind(net.parameters(), lr=0.01, rho=1.0, model=net)
    held = []
    for _ in range(3):
        opt.step(closure_of(net, torch.randn(6, 4))[0])
        held.append([id(value) for snapshot in opt._passes.snapshots for value in snapshot._layout.values])
    assert held[0] == held[1] == held[2]


def test_a_pass_that_raises_begins_anew(kind):
    net, x = network(Queue), torch.randn(6, 4)
    opt = kind(net.parameters(), lr=0.01, rho=0.0, model=net)

    def failing():
        with opt.one_pass():
            net(x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    closure, losses = closure_of(net, x)
    plain = copied(net)
    opt.step(closure)
    plain(x)
    assert same(buffers(net), buffers(plain))
    assert len(set(losses)) == 1


def test_copies_and_pickles_go_on(kind):
    net, x = network(Queue), torch.randn(6, 4)
    opt = kind(net.parameters(), lr=0.01, rho=1.0, model=net, same_randomness=True)
    opt.step(closure_of(net, x)[0])
    other_net, other = copy.deepcopy((net, opt))
    assert other.same_randomness
    plain = copied(other_net)
    other.step(closure_of(other_net, x)[0])
    plain(x)
    assert same(buffers(other_net), buffers(plain))


# ---- several ranks, and compiled models


@pytest.fixture(params=["every", "last"])
def sync(request):
    return request.param


@on_two_ranks
def test_ddp_that_broadcasts_buffers(kind, sync):
    """Of other batches on each rank: each keeps what its own first pass left, as it would without extra passes."""
    torch.manual_seed(0)
    net = network(lambda: nn.BatchNorm1d(4))
    plain, replica = DDP(copied(net)), DDP(net)
    if kind is BSAM and sync == "last":  # all passes are local, where DDP broadcasts nothing
        plain = plain.module
    opt = kind(replica.parameters(), lr=0.0, rho=1.0, model=replica, sync=sync)
    for _ in range(2):
        x = torch.randn(6, 4) + 3 * dist.get_rank()
        opt.step(lambda x=x: run(replica, x))
        run(plain, x)
        plain.zero_grad()
        assert same(buffers(replica.module), buffers(getattr(plain, "module", plain)))


def run(net, x):
    loss = net(x).square().mean()
    loss.backward()
    return loss


@on_two_ranks
def test_fsdp2(kind):
    torch.manual_seed(0)
    net = network(lambda: nn.BatchNorm1d(4))
    plain, x = copied(net), torch.randn(6, 4)
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    opt = kind(net.parameters(), lr=0.01, rho=1.0, model=net)
    opt.step(lambda: run(net, x))
    plain(x)
    assert same(buffers(net), buffers(plain))


def test_torch_compile_compiles_nothing_more(kind):
    """One graph, as plain training has it."""
    torch._dynamo.reset()
    net = network(lambda: nn.BatchNorm1d(4))
    compiled, plain = torch.compile(net, backend="eager"), copied(net)
    opt = kind(net.parameters(), lr=0.01, rho=1.0, model=net)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for _ in range(3):
        x = torch.randn(6, 4)
        plain.load_state_dict(net.state_dict())
        opt.step(lambda x=x: run(compiled, x))
        plain(x)
        assert same(buffers(net), buffers(plain))
    assert graphs["unique_graphs"] == before + 1
