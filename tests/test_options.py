"""The options in common: each class's signature and docstring say what the one table says."""

import inspect
import re
import typing

import pytest
from torch import nn

import bsam_fused
from bsam_fused.optim import bsam, mixed, sam
from bsam_fused.optim.base import SharpnessAware
from bsam_fused.optim.options import COMMON

FAMILY = [
    kind
    for kind in (getattr(bsam_fused, name) for name in bsam_fused.__all__)
    if isinstance(kind, type) and issubclass(kind, SharpnessAware) and kind is not SharpnessAware
]
every_member = pytest.mark.parametrize("kind", FAMILY)


def arguments(kind):
    """Those of a docstring, by name, in order: what is said of each, in one line."""
    text = inspect.cleandoc(kind.__doc__)  # as Python has it from 3.13 on
    (part,) = re.findall(r"\nArgs:\n(.*?)\n\nRaises:", text, re.DOTALL)
    entries = re.split(r"\n {4}(?=\S)", "\n" + part)
    named = (entry.partition(":") for entry in entries if entry.strip())
    return {name.strip(): " ".join(said.split()) for name, _, said in named}


@every_member
def test_the_signature_is_the_tables(kind):
    """In its order, after the options of its own, with its defaults; types as SAM has them."""
    keywords = [p for p in inspect.signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY]
    shared = keywords[-len(COMMON) :]
    assert {p.name: p.default for p in shared} == {name: option.default for name, option in COMMON.items()}
    assert [p.name for p in shared] == [*COMMON]
    names = vars(bsam) | vars(sam) | vars(mixed)
    hints = [typing.get_type_hints(each.__init__, names) for each in (kind, bsam_fused.SAM)]
    assert all(hints[0][name] == hints[1][name] for name in COMMON)


@every_member
def test_the_docstring_is_the_tables(kind):
    """SAM's in the table's words; others may point to SAM, and add what is theirs."""
    said = arguments(kind)
    assert [*said] == [name for name in inspect.signature(kind).parameters if name != "base_kwargs"] + ["**base_kwargs"]
    for name, option in COMMON.items():
        pointed = kind is not bsam_fused.SAM and re.match(r"as `SAM` has it[.;:]", said[name])
        assert pointed or said[name] == option.words


@pytest.mark.parametrize("name", COMMON)
@every_member
def test_every_option_is_checked(kind, name):
    """By name: nothing is built of a value that no option can have."""
    required = {"mix": lambda sums: (0.0, 1.0)} if kind is bsam_fused.MixedSAM else {}
    with pytest.raises((TypeError, ValueError), match=rf"^{name}\b"):
        kind([nn.Parameter(nn.Linear(2, 2).weight.detach())], lr=0.1, **required, **{name: object()})


def test_defaults_pass_their_own_checks():
    for name, option in COMMON.items():
        assert option.check(name, option.default) == option.default
