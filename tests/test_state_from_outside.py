"""State that others change: every step begins from what is under ``optimizer.state`` then, as torch.optim's do.

Beside torch.optim, to which the same is done. With a dampening the SGD of `twins` tells a momentum that begins.
"""

import copy
import io
import pickle
from collections import defaultdict

import pytest
import torch
from samples import assign, gradients
from test_owners import BETWEEN, every_base, every_kind, made, start, whatever_comes_between
from torch import nn
from twins import BASES, assert_alike, copies, ours, plain, step

import bsam_fused

pytestmark = pytest.mark.part(4)

# ---- edits. Each takes an optimizer, ours or torch's, and its parameters; `first`'s keys are the base's own.


def clear(optimizer, params):
    optimizer.state.clear()


def assign_a_defaultdict(optimizer, params):
    optimizer.state = defaultdict(dict)


def assign_an_older_one(optimizer, params):
    """As it was a step ago: a dict of copies that the caller made."""
    older = defaultdict(dict)
    for p, entry in optimizer.state.items():
        older[p] = {key: value.clone() for key, value in entry.items()}
    step(optimizer, 7)
    optimizer.state = older


def assign_the_same_tensors(optimizer, params):
    optimizer.state = defaultdict(dict, {p: dict(entry) for p, entry in optimizer.state.items()})


def delete_an_entry(optimizer, params):
    del optimizer.state[params[0]]


def empty_an_entry(optimizer, params):
    optimizer.state[params[0]] = {}


def clear_an_entry(optimizer, params):
    optimizer.state[params[0]].clear()


def replace_an_entry(optimizer, params):
    entry = optimizer.state[params[0]]
    optimizer.state[params[0]] = {key: value + 1 for key, value in entry.items()}


def replace_tensors(optimizer, params):
    for p in params[:2]:
        for key, value in optimizer.state[p].items():
            optimizer.state[p][key] = value + 1


def replace_by_other_strides(optimizer, params):
    entry = optimizer.state[params[0]]
    for key, value in entry.items():
        if value.dim() == 2:
            entry[key] = (2 * value).t().contiguous().t()


def set_data(optimizer, params):
    for value in optimizer.state[params[1]].values():
        value.data = value.data + 3


def exchange_entries(optimizer, params):
    state, p, q = optimizer.state, params[0], params[1]
    state[p], state[q] = state[q], state[p]


def exchange_tensors(optimizer, params):
    one, other = optimizer.state[params[0]], optimizer.state[params[3]]
    for key in one:
        one[key], other[key] = other[key], one[key]


def zero_in_place(optimizer, params):
    for entry in optimizer.state.values():
        for value in entry.values():
            value.zero_()


def add_in_place(optimizer, params):
    """What is written into the tensors themselves needs no noticing, but must not be undone by what is noticed."""
    for p in params[:2]:
        for value in optimizer.state[p].values():
            value.add_(5)
    delete_an_entry(optimizer, params)


def taken_out_and_put_back(optimizer, params):
    """After steps without: the values are those of when it was taken out."""
    taken = optimizer.state.pop(params[0])
    for t in (5, 6):
        step(optimizer, t)
    optimizer.state[params[0]] = taken


def all_taken_out_and_put_back(optimizer, params):
    taken = optimizer.state
    optimizer.state = defaultdict(dict)
    for t in (5, 6):
        step(optimizer, t)
    optimizer.state = taken


def edited_at_the_base(optimizer, params):
    """davda54/sam's users know the base optimizer by this name."""
    base = getattr(optimizer, "base_optimizer", optimizer)
    base.state = defaultdict(dict)
    step(optimizer, 5)
    del base.state[params[1]]


def given_to_a_parameter_without(optimizer, params):
    """The thawed one goes on from a state that never was its own."""
    params[2].requires_grad_(True)
    optimizer.state[params[2]] = {
        key: torch.ones_like(params[2]) if value.dim() else value.clone()
        for key, value in optimizer.state[params[0]].items()
    }


EDITS = {
    edit.__name__: edit
    for edit in (
        *(clear, assign_a_defaultdict, assign_an_older_one, assign_the_same_tensors, delete_an_entry, empty_an_entry),
        *(clear_an_entry, replace_an_entry, replace_tensors, replace_by_other_strides, set_data, exchange_entries),
        *(exchange_tensors, zero_in_place, add_in_place, taken_out_and_put_back, all_taken_out_and_put_back),
        *(edited_at_the_base, given_to_a_parameter_without),
    )
}


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@every_base
@whatever_comes_between
@pytest.mark.parametrize("edit", EDITS)
def test_state_is_edited(backend, base, between, edit):
    optimizer, params, twin, others = start(base, backend)
    for which, theirs in ((optimizer, params), (twin, others)):
        EDITS[edit](which, theirs)
        BETWEEN[between](which)
    for t in range(2, 4):
        step(optimizer, t)
        step(twin, t)
        assert_alike(optimizer, params, twin, others)
    assert optimizer.state_dict()["state"].keys() == twin.state_dict()["state"].keys()


@every_base
@pytest.mark.parametrize("edit", EDITS)
def test_state_is_edited_under_bsam(backend, base, edit):
    optimizer, params, twin, others = start(base, backend, "BSAM")
    for which, theirs in ((optimizer, params), (twin, others)):
        EDITS[edit](which, theirs)
    for t in range(2, 4):
        step(optimizer, t)
        step(twin, t)
        assert_alike(optimizer, params, twin, others)


@every_base
@pytest.mark.parametrize("edit", ["clear", "delete_an_entry", "replace_tensors", "exchange_tensors", "set_data"])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
def test_what_was_left_is_what_is_saved(backend, base, edit, how):
    """A checkpoint or copy of the edited state, without a step in between."""
    optimizer, params, twin, others = start(base, backend)
    for which, theirs in ((optimizer, params), (twin, others)):
        EDITS[edit](which, theirs)
    if how == "state_dict":
        saved, right = optimizer.state_dict()["state"], twin.state_dict()["state"]
        assert saved.keys() == right.keys()
        for i, entry in right.items():
            for key, value in entry.items():
                at_home = key != "step"  # saved on the CPU, where torch makes it: but here on the default device
                torch.testing.assert_close(saved[i][key], value, rtol=1e-11, atol=1e-12, check_device=at_home)
    else:
        optimizer, params = copy.deepcopy((optimizer, params))
    for t in range(2, 4):
        step(optimizer, t)
        step(twin, t)
    assert_alike(optimizer, params, twin, others)


@pytest.mark.parametrize("edit", EDITS)
def test_state_is_edited_within_a_step(backend, edit):
    """Between the passes: the update begins from what is there when it comes."""
    if edit in {"assign_an_older_one", "taken_out_and_put_back", "all_taken_out_and_put_back", "edited_at_the_base"}:
        return  # steps within a step
    optimizer, params, twin, others = start("SGD", backend)

    def fill(them):
        for p in them:
            p.grad = torch.ones_like(p) if p.requires_grad else None

    fill(params)
    optimizer.ascend()
    for which, theirs in ((optimizer, params), (twin, others)):
        EDITS[edit](which, theirs)
    fill(params)
    fill(others)
    optimizer.step()
    twin.step()
    assert_alike(optimizer, params, twin, others)


@pytest.mark.parametrize("base", ["SGD", "Adam"])
@pytest.mark.parametrize("then", ["train", "deepcopy"])
def test_a_plain_dict_is_assigned(backend, base, then):
    """torch's own lists expect a defaultdict; what begins with an empty dict begins all the same."""
    optimizer, params, twin, others = start(base, backend)
    optimizer.state, twin.state = {}, defaultdict(dict)
    if then == "deepcopy":
        optimizer, params = copy.deepcopy((optimizer, params))
    for t in range(2, 4):
        step(optimizer, t)
        step(twin, t)
        assert_alike(optimizer, params, twin, others)


@pytest.mark.parametrize("gone", ["deleted", "None"])
@whatever_comes_between
def test_a_momentum_deleted_or_none(backend, between, gone):
    """It begins again, as torch's SGD has it."""
    optimizer, params, twin, others = start("SGD", backend)
    for which, theirs in ((optimizer, params), (twin, others)):
        if gone == "deleted":
            del which.state[theirs[0]]["momentum_buffer"]
        else:
            which.state[theirs[0]]["momentum_buffer"] = None
        BETWEEN[between](which)
    for t in range(2, 4):
        step(optimizer, t)
        step(twin, t)
        assert_alike(optimizer, params, twin, others)


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_a_part_of_adams_entry_is_gone(backend, key):
    """torch's Adam raises KeyError; ours does, with the weights unmoved, or begins. It does not go on as if not."""
    optimizer, params, twin, others = start("Adam", backend)
    del optimizer.state[params[0]][key]
    del twin.state[others[0]]
    before = [p.detach().clone() for p in params]
    try:
        step(optimizer, 2)
    except (KeyError, ValueError, RuntimeError):
        optimizer.restore()
        assert all(torch.equal(p, w) for p, w in zip(params, before))
        return
    step(twin, 2)
    assert_alike(optimizer, params, twin, others)


@pytest.mark.parametrize("how", ["in place", "by another tensor"])
@pytest.mark.parametrize("to", [0.0, 1.0, 100.0])
@whatever_comes_between
def test_adams_count_is_set(backend, between, to, how):
    """From outside, as warm restarts do: the corrections 1 − β^t are those of that t, and exp_avg stays."""
    optimizer, params, twin, others = start("Adam", backend)
    for which in (optimizer, twin):
        for entry in which.state.values():
            if how == "in place":
                entry["step"].fill_(to)
            else:
                entry["step"] = torch.tensor(to)
        BETWEEN[between](which)
    assert_alike(optimizer, params, twin, others)
    saved = optimizer.state_dict()["state"]
    assert saved[0]["exp_avg"].any()
    assert saved[0]["step"] == twin.state[others[0]]["step"]
    for t in range(2, 4):
        step(optimizer, t)
        step(twin, t)
        assert_alike(optimizer, params, twin, others)


def test_state_of_another_dtype_is_taken_by_its_values(backend):
    """As a float32 checkpoint put there by hand."""
    optimizer, params, twin, others = start("SGD", backend)
    for which, theirs in ((optimizer, params), (twin, others)):
        entry = which.state[theirs[0]]
        entry["momentum_buffer"] = (entry["momentum_buffer"] + 1).float()
    twin.state[others[0]]["momentum_buffer"] = twin.state[others[0]]["momentum_buffer"].double()
    step(optimizer, 2)
    step(twin, 2)
    assert_alike(optimizer, params, twin, others)


@pytest.mark.parametrize("base", ["SGD", "Adam"])
def test_state_of_another_shape_is_an_error_and_nothing_moves(backend, base):
    optimizer, params, *_ = start(base, backend)
    key = "momentum_buffer" if base == "SGD" else "exp_avg"
    held = optimizer.state[params[3]][key]
    optimizer.state[params[3]][key] = torch.ones(3, dtype=torch.float64)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=rf"parameter 0 of group 1.*{key} of shape \(3,\)"):
        step(optimizer, 2)
    optimizer.restore()
    assert all(torch.equal(p, w) for p, w in zip(params, before))
    optimizer.state[params[3]][key] = held
    step(optimizer, 2)
    assert not torch.equal(params[3], before[3])


# ---- the base optimizer's own methods


def counts(call, name):
    """Whether ``call`` went well; else it has to name the right one."""
    try:
        call()
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        assert f"optimizer.{name}" in str(error).replace("base_optimizer.", "")  # noqa: PT017
        return False
    return True


@every_kind
@every_base
@pytest.mark.parametrize("of", ["another of ours", "the plain base", "itself, earlier"])
@pytest.mark.parametrize("began", [True, False])
def test_the_base_optimizer_loads_a_state_dict(backend, kind, base, of, began):
    params = [made(4, 3), made(5)]
    others = copies(params)
    twin = plain(base, others)
    optimizer = ours(kind, base, params, backend, lr=0.02 if of == "itself, earlier" else 9.0)
    for t in range(2):
        step(twin, t)
    if began or of == "itself, earlier":
        step(optimizer, 5)
    if of == "the plain base":
        saved = twin.state_dict()
    elif of == "another of ours":
        theirs = ours(kind, base, copies(params), backend)
        theirs.load_state_dict(copy.deepcopy(twin.state_dict()))
        saved = theirs.base_optimizer.state_dict()
    else:
        optimizer.load_state_dict(copy.deepcopy(twin.state_dict()))
        saved = copy.deepcopy(optimizer.base_optimizer.state_dict())
        step(optimizer, 6)
    saved = copy.deepcopy(saved)
    if not counts(lambda: optimizer.base_optimizer.load_state_dict(saved), "load_state_dict"):
        return
    with torch.no_grad():
        for p, q in zip(params, others):
            p.copy_(q)
    assert optimizer.param_groups[0]["lr"] == twin.param_groups[0]["lr"]
    for t in range(2, 4):
        step(optimizer, t)
        step(twin, t)
        assert_alike(optimizer, params, twin, others)
    assert optimizer.state_dict()["param_groups"][0]["rho"] == 0.0
    other = ours(kind, base, copies(params), backend)
    other.load_state_dict(optimizer.state_dict())


@every_kind
@every_base
@pytest.mark.parametrize("began", [True, False])
def test_the_base_optimizer_is_given_a_group(backend, kind, base, began):
    params = [made(4, 3), made(5)]
    others = copies(params)
    options = {**BASES[base][2], "weight_decay": 0.1}
    optimizer, twin = ours(kind, base, params[:1], backend), plain(base, others[:1])
    if began:
        step(optimizer, 0)
        step(twin, 0)
    group = {"params": params[1:], **options}
    if not counts(lambda: optimizer.base_optimizer.add_param_group(group), "add_param_group"):
        return
    twin.add_param_group({"params": others[1:], **options})
    for t in range(1, 3):
        step(optimizer, t)
        step(twin, t)
        assert_alike(optimizer, params, twin, others)
    added = optimizer.state_dict()["param_groups"][1]
    assert added["rho"] == 0.0
    assert added.keys() >= optimizer.state_dict()["param_groups"][0].keys()


@every_kind
def test_a_group_of_the_base_counts_in_a_whole_step(backend, kind):
    """Its options are asked for before any phase reads gradients."""
    params = [made(4, 3), made(5)]
    optimizer, before = ours(kind, "SGD", params[:1], backend), params[1].detach().clone()
    optimizer.base_optimizer.add_param_group({"params": params[1:]})
    optimizer.step(lambda: assign(params, gradients(params, 0)))
    assert not torch.equal(params[1], before)


@every_kind
def test_what_the_base_loads_before_a_scaler_steps(backend, kind):
    """So are those that a plain state dict lacks, by what a scaler's step refuses."""
    params = [made(4, 3)]
    optimizer, before = ours(kind, "SGD", params, backend), params[0].detach().clone()
    scaler = torch.amp.GradScaler(params[0].device.type, init_scale=1.0)
    scaler.scale(torch.ones(()))
    for call in optimizer._calls:
        assign(params, gradients(params, 0))
        if call == "step":
            optimizer.base_optimizer.load_state_dict(plain("SGD", copies(params)).state_dict())
            scaler.step(optimizer)
        else:
            getattr(optimizer, call)()
    assert not torch.equal(params[0], before)


# ---- keys that are no parameters


class Counting(torch.optim.SGD):
    """Keeps what belongs to no parameter, under text."""

    def step(self, closure=None):
        kept = self.state["kept"]
        kept["steps"] = kept.get("steps", 0) + 1
        kept["last"] = torch.tensor([1.0, 2.0])
        self.state["total"] = torch.tensor(7 + kept["steps"])
        return super().step(closure)


def by_file(what):
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def resumed(optimizer, params, backend):
    others = copies(params)
    other = bsam_fused.SAM(others, type(optimizer.base_optimizer), lr=9.0, momentum=0.9, backend=backend)
    other.load_state_dict(by_file(optimizer.state_dict()))
    return other, others


JOURNEYS = {
    "deepcopy": lambda optimizer, params, backend: copy.deepcopy((optimizer, params)),
    "pickle": lambda optimizer, params, backend: pickle.loads(pickle.dumps((optimizer, params))),
    "torch.save": lambda optimizer, params, backend: by_file((optimizer, params)),
    "load_state_dict": resumed,
}


@pytest.mark.parametrize("base", [Counting, torch.optim.SGD])
@pytest.mark.parametrize("journey", JOURNEYS)
def test_keys_of_text_travel(backend, base, journey):
    """The base's own, and what users of a fused one put there."""
    params = [made(4, 3), made(5)]
    optimizer = bsam_fused.SAM(params, base, lr=0.1, momentum=0.9, backend=backend)
    step(optimizer, 0)
    optimizer.state["note"] = {"epoch": 3, "scores": torch.ones(2)}
    other, others = JOURNEYS[journey](optimizer, params, backend)
    assert other.state["note"]["epoch"] == 3
    assert torch.equal(other.state["note"]["scores"], torch.ones(2))
    for which in (optimizer, other):
        step(which, 1)
    assert all(torch.equal(p, q) for p, q in zip(params, others))
    if base is Counting:
        for which in (optimizer, other):
            assert which.state["kept"]["steps"] == 2
            assert which.state["total"] == 9
            assert which.state_dict()["state"]["total"] == 9
    optimizer.state["note"]["scores"].add_(1)
    assert torch.equal(other.state["note"]["scores"], torch.ones(2))


def test_nn_parameters_that_left_keep_their_entry(backend):
    """State of what is in no group is nobody's to drop."""
    optimizer, params, *_ = start("SGD", backend)
    stranger = nn.Parameter(torch.ones(2))
    optimizer.state[stranger] = {"mine": torch.ones(2)}
    step(optimizer, 2)
    assert torch.equal(optimizer.state[stranger]["mine"], torch.ones(2))
    assert params[0] in optimizer.state
