"""Mixed precision and clipping: a real GradScaler, on every backend, beside the same step without one."""

import math

import pytest
import torch
from members import MEMBERS, calls, each_pass, every_member, some_of_each_member
from samples import DTYPES, TOLERANCE, assign, gradients, parameters
from torch import nn

import bsam_fused
from bsam_fused.optim import scaling

KINDS = [bsam_fused.SAM, bsam_fused.ASAM, bsam_fused.BSAM]
every_kind = pytest.mark.parametrize("kind", KINDS)
BASES = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "AdamW": (torch.optim.AdamW, {"eps": 1e-3}),
    "general": (torch.optim.RMSprop, {"eps": 1e-3}),
}
each_base = pytest.mark.parametrize("base", BASES)


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def prepared(kind, base, backend, **options):
    torch.manual_seed(1)
    net = network()
    base_class, base_options = BASES[base]
    device = next(net.parameters()).device
    opt = kind(net.parameters(), base_class, lr=0.05, backend=backend, **{"rho": 0.2, **base_options, **options})
    return net, opt, torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=1000)


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def same(net, before):
    return all(torch.equal(p, w) for p, w in zip(net.parameters(), before))


def walk(net, opt, scaler=None, overflow_at=None, unscale=False, unscale_at=None, seed=0):
    """A step by hand; in pass ``overflow_at`` a gradient is inf; ``unscale`` after the last one, or ``unscale_at``."""
    generator, names = torch.Generator("cpu").manual_seed(seed), calls(opt)
    for k, call in enumerate(names, 1):
        x = torch.randn(16, 6, generator=generator, device="cpu").to(next(net.parameters()))
        loss = net(x).square().mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if k == overflow_at:
            net[2].weight.grad[1, 2] = math.inf
        if k == unscale_at:
            scaler.unscale_(opt)
        if k < len(names):
            getattr(opt, call)()
        elif scaler is None:
            opt.step()
        else:
            if unscale:
                scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
    opt.zero_grad()


@some_of_each_member
@each_base
def test_a_scaled_step_is_the_plain_one(backend, member, base):
    """To the bit: powers of two scale gradients, norms and steps exactly. Below 1, too, whither scalers back off."""
    if member.refuses_a_scaler:
        return  # below
    kind = member.build
    options = {"max_grad_norm": 0.7, "norm_eps": 0.0}
    (scaled, opt, scaler), (plain, other, _) = (prepared(kind, base, backend, **options) for _ in range(2))
    for t, scale in enumerate([1024.0, 1024.0, 2.0**-8]):
        if t:
            scaler.update(scale)
        walk(scaled, opt, scaler, seed=t)
        walk(plain, other, seed=t)
        assert same(scaled, weights(plain))
    assert scaler.get_scale() == 2.0**-8
    walk(scaled, opt, seed=3)  # and without a scaler again
    walk(plain, other, seed=3)
    assert same(scaled, weights(plain))
    assert not hasattr(opt, "grad_scale")


@each_pass
@each_base
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
def test_an_overflow_in_any_pass_backs_the_scale_off(backend, member, at, base, unscale):
    if (unscale and member.mixes) or member.refuses_a_scaler:
        return  # refused: below
    k = {"k": 1} if "k" in member.options else {}  # all of LookSAM's steps are of two passes
    net, opt, scaler = prepared(member.build, base, backend, **k)
    for t in range(2):  # in the first step ever, and once momentum is there
        before = weights(net)
        walk(net, opt, scaler, overflow_at=at, unscale=unscale, seed=t)
        assert same(net, before)
        assert opt.skipped_steps == t + 1
        assert scaler.get_scale() == 1024.0 / 2 ** (t + 1)
        walk(net, opt, scaler, unscale=unscale, seed=t)
        assert not same(net, before)
        assert scaler.get_scale() == 1024.0 / 2 ** (t + 1)
        assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("kind", [bsam_fused.SAM, bsam_fused.LookSAM])
def test_sam_is_right_after_unscale(backend, kind):
    """Its direction is the gradient that was unscaled, and that users clip or change then; LookSAM's v is of both."""
    (scaled, opt, scaler), (plain, other, _) = (prepared(kind, "SGD", backend) for _ in range(2))
    for t in range(2):
        walk(scaled, opt, scaler, unscale=True, seed=t)
        walk(plain, other, seed=t)
    assert same(scaled, weights(plain))


@pytest.mark.parametrize("kind", [bsam_fused.SAM, bsam_fused.ASAM, bsam_fused.LookSAM])
@pytest.mark.parametrize("clear", [False, True], ids=["", "zero_grad"])
def test_sam_refuses_unscale_of_an_earlier_pass(backend, kind, clear):
    """GradScaler then calls the last gradients unscaled, which are not: the step would be 1024 times too long.

    Whatever reads the param groups before the last backward, as zero_grad() does, and whatever changes the gradients
    after it, as clipping does, must not pass for unscale_().
    """
    net, opt, scaler = prepared(kind, "SGD", backend)
    before = weights(net)
    for _ in range(2):
        scaler.scale(net(torch.ones(2, 6)).square().mean()).backward()
        scaler.unscale_(opt)
        opt.ascend()
        if clear:
            opt.zero_grad()
        scaler.scale(net(torch.ones(2, 6)).square().mean()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1e9)
        with pytest.raises(RuntimeError, match=r"unscale_\(\) before the last backward.*max_grad_norm=; restore\(\)"):
            scaler.step(opt)
        opt.restore()
        scaler.update()
        assert same(net, before)
        assert not hasattr(opt, "found_inf")
    for unscale in (False, True):
        walk(net, opt, scaler, unscale=unscale)
        assert not same(net, before)
    assert opt.skipped_steps == 0


@every_member
def test_who_mixes_gradients_refuses_unscale_of_any_pass(backend, member):
    if not member.mixes:
        return  # as SAM: above
    net, opt, scaler = prepared(member.build, "SGD", backend)
    before, name = weights(net), member.kind.__name__
    for k in range(1, member.passes):
        with pytest.raises(RuntimeError, match=rf"{name} after GradScaler.unscale_.*max_grad_norm=; restore\(\)"):
            walk(net, opt, scaler, unscale_at=k)
        opt.restore()
        scaler.update()
        assert same(net, before)


@pytest.mark.parametrize(
    ("name", "why", "unscale"),
    [
        ("BSAM", r"BSAM after GradScaler.unscale_.*max_grad_norm=", True),
        ("extrapolated BSAM", r"BSAM after GradScaler.unscale_.*max_grad_norm=", True),
        ("SAM with a loss budget", "loss_budget with GradScaler", False),
        ("FriendlySAM", "FriendlySAM with GradScaler", False),
    ],
)
def test_what_a_scaler_is_refused_can_be_restored(backend, name, why, unscale):
    net, opt, scaler = prepared(MEMBERS[name].build, "SGD", backend)
    before = weights(net)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"{why}.*restore\(\)"):
            walk(net, opt, scaler, unscale=unscale)
        opt.restore()
        scaler.update()
        assert same(net, before)
        assert not hasattr(opt, "found_inf")
    walk(net, opt, None if MEMBERS[name].refuses_a_scaler else scaler)
    assert not same(net, before)
    assert opt.skipped_steps == 0


@every_kind
def test_a_closure_with_a_scaler_is_refused(backend, kind):
    net, opt, scaler = prepared(kind, "SGD", backend)
    scaler.scale(net(torch.ones(2, 6)).sum()).backward()
    before = weights(net)

    def closure():
        raise AssertionError("not called")

    with pytest.raises(RuntimeError, match=r"GradScaler.step\(\) with a closure.*by hand"):
        scaler.step(opt, closure)
    assert same(net, before)
    assert not hasattr(opt, "found_inf")
    scaler.update()
    opt.zero_grad()
    walk(net, opt, scaler)
    assert scaler.get_scale() == 1024.0


@every_kind
def test_a_found_inf_from_elsewhere_skips(backend, kind):
    """Sharded scalers reduce it over ranks: the inf may be in nobody's gradients here."""
    net, opt, _ = prepared(kind, "SGD", backend)
    before = weights(net)
    opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    walk(net, opt)
    assert same(net, before)
    assert opt.skipped_steps == 1


@every_kind
@pytest.mark.parametrize("base", ["SGD", "general"])
@pytest.mark.parametrize("form", [lambda x: torch.full((1,), x), float, int], ids=["one", "float", "int"])
def test_what_scalers_set_may_be_of_any_form(backend, kind, base, form):
    """ShardedGradScaler's numbers have the shape (1,), another scaler's may be Python's: the same step as without."""
    (scaled, opt, scaler), (plain, other, _) = (prepared(kind, base, backend) for _ in range(2))
    for found_inf in (0, 1):
        before = weights(scaled)
        for k, call in enumerate(opt._calls, 1):
            scaler.scale(scaled(torch.ones(2, 6)).square().mean()).backward()
            if k == len(opt._calls):
                opt.grad_scale, opt.found_inf = form(1024), form(found_inf)
            getattr(opt, call)()
        opt.zero_grad()
        if found_inf:
            assert same(scaled, before)
        else:
            for call in other._calls:
                plain(torch.ones(2, 6)).square().mean().backward()
                getattr(other, call)()
            assert same(scaled, weights(plain))
        scaling.forget(opt)
    assert opt.skipped_steps == 1


@every_kind
def test_more_than_one_scale_is_refused(backend, kind):
    net, opt, _ = prepared(kind, "SGD", backend)
    before = weights(net)
    opt.grad_scale, opt.found_inf = torch.ones(2), torch.tensor(0.0)
    with pytest.raises(ValueError, match=r"grad_scale is of shape \(2,\)"):
        walk(net, opt)
    opt.restore()
    assert same(net, before)
    walk(net, opt)
    assert not same(net, before)


@every_kind
@pytest.mark.parametrize("base", ["SGD", "general"])
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
def test_the_first_trainable_parameter_is_thawed_within_a_step(backend, kind, base, unscale):
    """No pass before it had a gradient to scale, or to be watched: g is zero, and so is BSAM's c."""
    if unscale and kind is bsam_fused.BSAM:
        return  # refused: above
    net, opt, scaler = prepared(kind, base, backend)
    twin = [nn.Parameter(p.detach().clone()) for p in net.parameters()]
    base_class, base_options = BASES[base]
    reference = base_class(twin, lr=0.05, **base_options)
    net.requires_grad_(False)
    x = torch.ones(2, 6)
    for call in opt._calls[:-1]:
        getattr(opt, call)()
    net.requires_grad_(True)
    scaler.scale(net(x).square().mean()).backward()
    if unscale:
        scaler.unscale_(opt)
    for p, q in zip(net.parameters(), twin):
        q.grad = p.grad / (1 if unscale else 1024) * (kind is not bsam_fused.BSAM)
    scaler.step(opt)
    scaler.update()
    reference.step()
    for p, q in zip(net.parameters(), twin):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert opt.skipped_steps == 0


@every_kind
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
def test_a_differentiable_base_steps_tensors_that_are_no_leaves(backend, kind, scaled):
    """As torch's does: the graph from the leaf to the next weights stays whole. No hook of a scaler's fits them."""
    leaf = torch.ones(3, requires_grad=True)
    p, q = leaf * 2, leaf * 2
    # On a GPU torch would take its foreach loops, which break the graph: SGD's defaults leave `differentiable` out.
    options = {"lr": 0.1, "weight_decay": 0.5, "differentiable": True, "foreach": False}
    opt = kind([p], torch.optim.SGD, rho=0.1, backend=backend, **options)
    scaler = torch.amp.GradScaler(p.device.type, init_scale=4.0)
    scaler.scale(leaf.new_ones(()))
    d = torch.tensor([1.0, 2.0, 3.0])
    for k, call in enumerate(opt._calls, 1):
        p.grad = 4 * d if scaled else d.clone()
        scaler.step(opt) if scaled and k == len(opt._calls) else getattr(opt, call)()
    plain = torch.optim.SGD([q], **options)
    q.grad = d  # BSAM's is g + g_max - g_min: the same here
    plain.step()
    torch.testing.assert_close(p, q)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), leaf, retain_graph=True) for x in (p, q)))


@every_kind
def test_an_inactive_optimizer_with_a_scaler(backend, kind):
    """The plain base's step, with the scale and the clipping in one factor of d; the scaler hears of the NaN."""
    (scaled, opt, scaler), (plain, *_) = (prepared(kind, "SGD", backend, max_grad_norm=0.1) for _ in range(2))
    reference = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    opt.active = False
    for t in range(3):
        x = torch.randn(8, 6)
        scaler.scale(scaled(x).square().mean()).backward()
        if t == 1:
            scaled[0].bias.grad[0] = math.nan
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        if t != 1:
            plain(x).square().mean().backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            reference.step()
            reference.zero_grad()
        for w, expected in zip(scaled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(w, expected, rtol=1e-5, atol=1e-7)
    assert opt.skipped_steps == 1
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("first", [0, 1, 2], ids=["frozen", "empty", "sparse"])
def test_gradients_that_no_hook_and_no_mark_fits(backend, first):
    """A frozen parameter with a gradient, one without elements, and a sparse one: the error is the phase's own."""
    frozen, empty = nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(0))
    table = nn.Embedding(4, 3, sparse=True)
    params = [frozen, empty, table.weight]
    opt = bsam_fused.SAM(params[first:] + params[:first], lr=0.1, backend=backend)
    scaler = torch.amp.GradScaler(table.weight.device.type, init_scale=2.0)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.ascend()
    empty.grad = torch.ones_like(empty)
    scaler.scale(table(torch.tensor([1])).sum()).backward()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        scaler.step(opt)
    opt.restore()
    assert torch.equal(frozen, torch.ones(3))


@every_kind
def test_pure_float16_with_a_scaler(backend, kind):
    """Near the float32 run, whose gradients are no better for being scaled."""
    ends = []
    for dtype in (torch.float16, torch.float32):
        net, opt, scaler = prepared(kind, "SGD", backend)
        net.to(dtype)
        for t in range(3):
            walk(net, opt, scaler, seed=t)
        assert opt.skipped_steps == 0
        ends.append([w.float() for w in weights(net)])
    for a, b in zip(*ends):
        torch.testing.assert_close(a, b, rtol=0.01, atol=0.01)


# ---- clipping


def direction(passes):
    """d in float64, from the papers' formulas."""
    g, *rest = ([x.double() for x in grads] for grads in passes)
    if len(rest) == 1:
        return rest[0]
    norms = [math.sqrt(sum(x.square().sum().item() for x in grads)) for grads in rest]
    return [x + y - norms[0] / norms[1] * z for x, y, z in zip(g, *rest)]


CLIPPED = {  # bases whose first step depends on the length of d, and magnifies no rounding of it
    "SGD": BASES["SGD"],
    "AdamW": (torch.optim.AdamW, {"eps": 1.0}),
    "general": (type("Own", (torch.optim.SGD,), {}), {}),
}


@every_kind
@pytest.mark.parametrize("base", CLIPPED)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_the_direction_is_clipped_as_torch_clips(backend, kind, base, dtype):
    """Against clip_grad_norm_ of the direction and the plain base's step, over two groups and FlatParams."""
    base_class, base_options = CLIPPED[base]
    for fraction in (0.3, 2.0):
        params = parameters("odd", dtype) + parameters("block_edges", torch.float64)
        others = [nn.Parameter(p.detach().double()) for p in params]
        passes = [gradients(params, k) for k in range(len(kind._calls))]
        for k, grads in enumerate(passes):  # the gradients of a real model point to one side
            for x, shared in zip(grads, gradients(params, 9)):
                x.mul_(0.3).add_(shared) if k else x.copy_(shared)
        d = direction(passes)
        limit = fraction * math.sqrt(sum(x.square().sum().item() for x in d))
        halves = [{"params": params[:2]}, {"params": params[2:]}]
        options = {"lr": 0.05, **base_options}
        opt = kind(halves, base_class, max_grad_norm=limit, backend=backend, **options)
        for call, grads in zip(opt._calls, passes):
            assign(params, grads)
            getattr(opt, call)()
        for p, x in zip(others, d):
            p.grad = x
        nn.utils.clip_grad_norm_(others, limit)
        base_class(others, **options).step()
        tol = 3 * TOLERANCE[dtype]
        for p, q in zip(params, others):
            torch.testing.assert_close(p.detach().double(), q.detach(), rtol=tol, atol=tol)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "x"])
def test_a_wrong_limit_is_named(value):
    with pytest.raises(ValueError, match="max_grad_norm"):
        bsam_fused.SAM(network().parameters(), lr=0.1, max_grad_norm=value)
    opt = bsam_fused.BSAM(network().parameters(), lr=0.1)
    opt.max_grad_norm = value
    with pytest.raises(ValueError, match="max_grad_norm"):
        opt._plain_step()


@every_kind
def test_a_limit_lifted_after_a_skipped_step(backend, kind):
    """What a NaN left in the sums that only clipping reads must not last."""
    net, opt, _ = prepared(kind, "SGD", backend, max_grad_norm=0.1)
    walk(net, opt, overflow_at=len(opt._calls))
    opt.max_grad_norm = None
    before = weights(net)
    walk(net, opt)
    assert not same(net, before)
    assert all(p.isfinite().all() for p in net.parameters())
    assert opt.skipped_steps == 1


@every_kind
def test_autocast_around_all_passes(backend, kind):
    """float32 weights, bfloat16 passes: near the float32 run, and on one autocast block as on one a pass."""
    runs = []
    for style in ("none", "each", "all"):
        net, opt, _ = prepared(kind, "SGD", backend)
        device = next(net.parameters()).device.type
        x = torch.randn(16, 6, generator=torch.Generator(device).manual_seed(3))
        with torch.autocast(device, torch.bfloat16, enabled=style == "all"):
            for call in opt._calls:
                with torch.autocast(device, torch.bfloat16, enabled=style != "none"):
                    loss = net(x).float().square().mean()
                loss.backward()
                getattr(opt, call)()
        runs.append(weights(net))
    assert all(torch.equal(a, b) for a, b in zip(runs[1], runs[2]))
    for a, b in zip(runs[0], runs[1]):
        torch.testing.assert_close(a, b, rtol=0.02, atol=2e-3)
        assert not torch.equal(a, b)


@pytest.mark.parametrize("reader", ["nobody", "the loop", "metrics", "repr"])
@pytest.mark.parametrize("before", ["nothing", "a step without a scaler"])
def test_unscale_of_the_first_pass_is_refused_whoever_reads(backend, before, reader):
    """Nor does it matter which parameters have a gradient in the last pass: the call of unscale_ itself is seen."""
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(3))
    opt = bsam_fused.SAM([p, q], lr=1e-3, rho=0.0, backend=backend)
    scaler = torch.amp.GradScaler(p.device.type, init_scale=1024.0)
    if before != "nothing":
        opt.step(lambda: (p.sum() + q.sum()).backward())
        opt.zero_grad()
    start = p.item(), q.tolist()
    scaler.scale(p.sum() + q.sum()).backward()
    scaler.unscale_(opt)
    opt.ascend()
    scaler.scale(q.sum()).backward()
    {
        "nobody": lambda: 0,
        "the loop": lambda: opt.param_groups[0]["lr"],
        "metrics": opt.metrics,
        "repr": lambda: repr(opt),
    }[reader]()
    with pytest.raises(RuntimeError, match="unscale_"):
        scaler.step(opt)
    opt.restore()
    assert (p.item(), q.tolist()) == start


def test_the_scaler_backs_off_in_its_first_step_after_one_without_it(backend):
    """An overflow of the first pass, and unscale_ where it belongs: nothing had to be armed before."""
    p = nn.Parameter(torch.ones(2))
    opt = bsam_fused.SAM([p], lr=0.1, backend=backend)
    opt.step(lambda: p.sum().backward())
    scaler = torch.amp.GradScaler(p.device.type, init_scale=1024.0)
    (scaler.scale(p.sum()) * torch.inf).backward()
    opt.ascend()
    scaler.scale(p.sum()).backward()
    scaler.unscale_(opt)
    scaler.step(opt)
    scaler.update()
    assert (scaler.get_scale(), opt.skipped_steps) == (512.0, 1)
