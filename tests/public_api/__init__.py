"""The public API as a stub, and what of it no longer works for those who used the last release.

Public is what `bsam_fused.__all__` names, what the modules among that name in turn, and `bsam_fused.integrations`; of
a class also what it inherits. griffe reads all of it off the sources: nothing is imported.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[2]
PACKAGE = "bsam_fused"
BESIDES = ["integrations"]
"""Public modules that `bsam_fused.__all__` lacks, as they are for those who have the trainers."""


def stub(source: Path = ROOT) -> str:
    """Return the public API of the package in ``source``, modules written as classes."""
    package = griffe.load(PACKAGE, search_paths=[source], try_relative_path=False)
    names = [*package.exports, *(name for name in BESIDES if name in package.members)]
    return "".join(f"{line}\n" for name in sorted(names) for line in _lines(name, package[name]))


def _lines(name: str, found: griffe.Object | griffe.Alias) -> Iterator[str]:
    if found.is_function:
        yield f"def {found.signature(name=name, return_type=True)}: ..."
    elif found.is_attribute:
        yield f"{name}: {found.annotation or '...'}"
    else:
        yield f"class {name}:"
        members = [line for member in sorted(_public(found)) for line in _lines(member, found.all_members[member])]
        yield from (f"    {line}" for line in members or ["..."])


def _public(found: griffe.Object | griffe.Alias) -> list[str]:
    if found.is_module and found.exports:
        return found.exports
    return [name for name, member in found.all_members.items() if member.is_public]


class _Keywords(griffe.Extension):
    """An option that is gone is gone, though the base optimizer's ``**base_kwargs`` take its name."""

    def on_function_instance(self, *, func: griffe.Function, **_: object) -> None:
        for parameter in func.parameters:
            if parameter.kind is griffe.ParameterKind.var_keyword:
                parameter.kind = griffe.ParameterKind.keyword_only


def broken(old: str, new: str) -> list[str]:
    """Return what of an old stub no longer works, a line each: ``SAM.step(closure): Parameter was removed``."""
    extensions = griffe.load_extensions(_Keywords)
    before, after = (griffe.visit(PACKAGE, Path(PACKAGE), code, extensions=extensions) for code in (old, new))
    found = griffe.find_breaking_changes(before, after)
    said = (breakage.explain(griffe.ExplanationStyle.ONE_LINE) for breakage in found)
    plain = (re.sub(r"\x1b\[\d+m", "", line) for line in said)
    return sorted(line.partition(": ")[2] for line in plain)  # without the place
