"""Which member goes with what: every cell of docs/members.md is run here, beside the papers' formulas, or is refused.

`PYTHONPATH=. python tests/test_members_table.py` writes that page anew.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import graphed
import host_cuda
import host_graphs
import pytest
import ranks
import reference as ref
import torch
import torch.distributed as dist
from members import MEMBERS, calls, options_of
from samples import gradients, parameters
from test_against_reference import step_beside
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from bsam_fused.graphs import GraphedStep
from bsam_fused.ops import dispatch

PAGE = Path(__file__).parents[1] / "docs" / "members.md"
LR, CLIPPED = 0.1, 0.05


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def halves():
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    return [(x[:4], y[:4]), (x[4:], y[4:])]


def joint():
    return tuple(torch.cat(both) for both in zip(*halves()))


def build(member, net, **options):
    """With a loss budget that counts for so small a network."""
    budget = {"loss_budget": 0.1} if "loss_budget" in member.options else {}
    return member.build(net.parameters(), **{"lr": LR, "model": net, **budget, **options})


def backward(net, data, scaler=None):
    loss = nn.functional.mse_loss(net(data[0]), data[1])
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss


def steps_of(member):
    """How many each cell takes: what is remembered counts from the second one on."""
    return range(1 if member.memory is None else 2)


def by_hand(member, opt, net, data):
    for _ in steps_of(member):
        for call in calls(opt):
            with opt.one_pass():
                backward(net, data)
            getattr(opt, call)()
        opt.zero_grad()


def assert_right(member, net, batches=None, max_norm=math.inf):
    """Steps from `network()` came to the weights that the papers' formulas have, of the batches' mean direction."""
    start = network()
    opt, ws = build(member, start), [p.detach() for p in start.parameters()]
    options = options_of(opt, [*start.parameters()])
    history = [torch.zeros_like(w) for w in ws]

    def gradient(weights, data):
        at = {name: w.clone().requires_grad_() for (name, _), w in zip(start.named_parameters(), weights)}
        loss = nn.functional.mse_loss(torch.func.functional_call(start, at, (data[0],)), data[1])
        return torch.autograd.grad(loss, [*at.values()])

    for t in steps_of(member):
        directions = []
        for data in batches or [joint()]:
            g = gradient(ws, data)
            q = member.memory.along(g, options, history) if member.memory else g
            n = ref.ascent_norm(ws, q, options)
            places = [ref.w_max, ref.w_min][: member.passes_of(t) - 1]
            moved = [[at(w, x, n, o) for w, x, o in zip(ws, q, options)] for at in places]
            passes = [g, *(gradient(weights, data) for weights in moved)]
            directions.append(member.d(passes, options, history))
        if member.memory:
            history = member.memory.remembered(passes, options, history)
        mean = [sum(ds) / len(ds) for ds in zip(*directions)]
        ws = [w - LR * d for w, d in zip(ws, ref.clipped(mean, max_norm))]
    for p, w in zip(net.parameters(), ws):
        whole = p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()
        torch.testing.assert_close(whole, w, rtol=1e-10, atol=1e-12)


# ---- the ways


def closure(member):
    net = network()
    opt = build(member, net)
    for _ in steps_of(member):
        opt.step(lambda: backward(net, joint()))
    assert_right(member, net)


def hand(member):
    net = network()
    by_hand(member, build(member, net), net, joint())
    assert_right(member, net)


def grad_scaler(member):
    net = network()
    opt, scaler = build(member, net), torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in steps_of(member):
        for call in calls(opt):
            backward(net, joint(), scaler)
            scaler.step(opt) if call == "step" else getattr(opt, call)()
        scaler.update(16.0)
        opt.zero_grad()
    assert_right(member, net)


def clip(member):
    net = network()
    by_hand(member, build(member, net, max_grad_norm=CLIPPED), net, joint())
    assert_right(member, net, max_norm=CLIPPED)


def sync_last(member):
    net = DDP(network())
    by_hand(member, build(member, net, sync="last"), net, halves()[dist.get_rank()])
    assert_right(member, net, halves())


def fsdp2(member):
    net = fully_shard(network())
    by_hand(member, build(member, net), net, halves()[dist.get_rank()])
    assert_right(member, net)


def captured(member):
    """Beside eager steps, on the host, where host_graphs.py stands in for CUDA's graphs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dispatch._FACTORIES, "cuda", host_cuda.flat_params)
        patch.setattr(dispatch, "unavailable", lambda name, device: None)
        host_graphs.stand_in(patch)
        nets = [graphed.network() for _ in range(2)]
        for net in nets:
            net[2].p = 0.0
        opts = [build(member, net, backend="cuda", momentum=0.9) for net in nets]
        step = GraphedStep(nets[0], graphed.loss_fn, opts[0], graphed.data(0))
        for t in range(2):
            step(*graphed.data(t))
            graphed.eager_step(nets[1], opts[1], graphed.data(t))
            graphed.assert_equal(*nets)


def bits_16(member):
    params = parameters("odd", torch.bfloat16)
    opt = member.build(params, lr=LR, momentum=0.9)
    for t in steps_of(member):
        step_beside(member, opt, params, ref.sgd, [gradients(params, 9 * t + k) for k in range(member.passes)])


ALONE = {
    "closure": closure,
    "by hand": hand,
    "`GradScaler`": grad_scaler,
    "`max_grad_norm`": clip,
    "captured": captured,
    "16 bits": bits_16,
}
ON_RANKS = {'`sync="last"`': sync_last, "FSDP2": fsdp2}
ORDER = ("closure", "by hand", "`GradScaler`", "`max_grad_norm`", '`sync="last"`', "FSDP2", "captured", "16 bits")


# ---- the table


def cell(name, way, run):
    """Return "yes", or why not, in the words of an error that names what is refused."""
    try:
        run(MEMBERS[name])
    except Exception as error:
        if isinstance(error, RuntimeError | ValueError) and way.strip("`") in str(error):
            return str(error)
        raise AssertionError(f"{name}, {way}: {error}") from error
    return "yes"


def column(way, run):
    return {name: cell(name, way, run) for name in MEMBERS}


def on_a_rank(file):
    columns = {way: column(way, run) for way, run in ON_RANKS.items()}
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(columns))


def columns_of(pair, file):
    """All of them; what needs ranks on both of a pair, once for all members."""
    pair.run(__name__ if __name__ != "__main__" else Path(__file__).stem, "on_a_rank", [str(file)])
    return {**{way: column(way, run) for way, run in ALONE.items()}, **json.loads(Path(file).read_text())}


def page(columns):
    """The Markdown of docs/members.md."""
    reasons = list(dict.fromkeys(cell for way in ORDER for cell in columns[way].values() if cell != "yes"))
    lines = [
        "# Every member with everything",
        "",
        "Each cell was run by the tests, beside the papers' formulas: `yes`, or the error that refuses it. Written by",
        "`PYTHONPATH=. python tests/test_members_table.py`; a test fails where it is not what is found.",
        "",
        "| | " + " | ".join(ORDER) + " |",
        "|" + " --- |" * (len(ORDER) + 1),
    ]
    for name in MEMBERS:
        cells = [columns[way][name] for way in ORDER]
        told = ["yes" if cell == "yes" else f"no ({reasons.index(cell) + 1})" for cell in cells]
        lines.append(f"| {name} | {' | '.join(told)} |")
    if reasons:
        lines += ["", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))]
    return "\n".join([*lines, ""])


def test_the_page_is_what_is_found(pair, tmp_path):
    assert PAGE.read_text() == page(columns_of(pair, tmp_path / "columns.json"))


if __name__ == "__main__":
    both = ranks.Ranks(2)
    PAGE.write_text(page(columns_of(both, Path(tempfile.mkdtemp()) / "columns.json")))
    both.stop()
    sys.exit(0)
