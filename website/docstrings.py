"""Docstrings as the reference has them: "as `SAM` has it" is said in full, and names in backticks are links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe
from griffe import DocstringSectionKind as Kind

PACKAGE = "bsam_fused"
INTEGRATIONS = ("integrations.lightning", "integrations.transformers")
"""Modules that are public beside what the package exports."""
CALLED = ("__call__",)
NAME = re.compile(r"(?<![`\w])`([A-Za-z_][\w.]*)`(?!`)")
QUOTE = re.compile("^>")  # of "> 0: ..." Markdown would make a quotation
AS_ANOTHER = re.compile(r"as \[`[\w.]+`\]\[([\w.]+)\](?: has it)?[.;:]? ?")
"""How a description begins that is another object's, whose path the link has; what follows is only of this one."""


class InFull(griffe.Extension):
    """Completes the package, once all of it is read."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Leave out what Python calls by itself."""
        if func.name.startswith("__") and func.name not in CALLED:
            func.public = False

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Have classes own what bases give them that are not public; link names; fill in descriptions."""
        if pkg.path != PACKAGE:
            return
        adopt(pkg)
        shown = dict(public(pkg))
        paths: dict[str, str] = {}
        for path, each in shown.items():
            paths.setdefault(each.path, path)
        docstrings = [*_docstrings(pkg)]
        for here, docstring in docstrings:
            _link(here, docstring, pkg, paths)
        for _, docstring in docstrings:
            _fill_in(docstring, shown)


def adopt(package: griffe.Module) -> None:
    """Make what a class has of bases that are not public its own, and the first that is public its only base."""
    classes = {each.path: each for _, each in public(package) if isinstance(each, griffe.Class)}
    for each in classes.values():
        bases = each.mro()
        known = next((base for base in bases if base.path in classes), None)
        for base in bases[: bases.index(known)] if known else bases:
            for name, member in base.members.items():
                if member.is_public and name not in each.members:
                    each.set_member(name, griffe.Alias(name, member, parent=each))
        if bases:
            each.bases = [griffe.ExprName(known.name, parent=known.parent)] if known else []


def public(package: griffe.Module) -> Iterator[tuple[str, griffe.Object]]:
    """Yield what the reference has, by path: modules, their public names, and of classes those that are their own."""
    modules = [each for each in _members(package).values() if each.is_module]
    for module in [package, *modules, *(package[name] for name in INTEGRATIONS)]:
        yield module.path, module
        for name, each in _members(module).items():
            yield f"{module.path}.{name}", each
            if each.is_class:
                yield from ((f"{module.path}.{name}.{own}", member) for own, member in _members(each).items())


def _members(parent: griffe.Object) -> dict[str, griffe.Object]:
    """Return the public ones, where they are written."""
    members = {name: member for name, member in parent.members.items() if member.is_public}
    return {name: _written(member) for name, member in members.items()}


def _written(member: griffe.Object | griffe.Alias) -> griffe.Object:
    return member.final_target if isinstance(member, griffe.Alias) else member


def _docstrings(parent: griffe.Object) -> Iterator[tuple[griffe.Object, griffe.Docstring]]:
    for member in parent.members.values():
        if isinstance(member, griffe.Object):
            yield from _docstrings(member)
    if parent.docstring:
        yield parent, parent.docstring


def _link(here: griffe.Object, docstring: griffe.Docstring, package: griffe.Module, paths: dict[str, str]) -> None:
    """Make links of the names in a docstring that the reference has; ``paths`` are its own, by where it is written."""
    around = [here.parent, here.module, here.module.parent, package, package["SharpnessAware"]]
    scopes = [here, *(each for each in around if each is not None)]

    def link(name: re.Match[str]) -> str:
        found = (_named(scope, name[1]) for scope in scopes)
        path = next((paths[each.path] for each in found if each is not None and each.path in paths), None)
        return f"[{name[0]}][{path}]" if path else name[0]

    docstring.value = NAME.sub(link, docstring.value)


def _named(scope: griffe.Object, dotted: str) -> griffe.Object | None:
    found = scope
    for name in dotted.split("."):
        member = found.all_members.get(name)
        if member is None:
            return None
        try:
            found = _written(member)
        except griffe.AliasResolutionError:  # torch's
            return None
    return found


def _fill_in(docstring: griffe.Docstring, shown: dict[str, griffe.Object]) -> None:
    """Complete the descriptions that say "as `another` has it"."""
    for section in docstring.parsed:
        if section.kind is Kind.parameters:
            for each in section.value:
                each.description = QUOTE.sub(r"\\>", _in_full(each, shown))
        if section.kind is Kind.raises:
            section.value = [error for each in section.value for error in _errors(each, shown)]


def _in_full(parameter: griffe.DocstringParameter, shown: dict[str, griffe.Object]) -> str:
    another = AS_ANOTHER.match(parameter.description)
    if not another:
        return parameter.description
    theirs = next(each for each in _section(shown[another[1]], Kind.parameters) if each.name == parameter.name)
    rest = parameter.description[another.end() :]
    return f"{_in_full(theirs, shown)} Here: {rest}" if rest else _in_full(theirs, shown)


def _errors(error: griffe.DocstringRaise, shown: dict[str, griffe.Object]) -> list[griffe.DocstringRaise]:
    """Return what another object's docstring has of these exceptions, or the error as it is."""
    another = AS_ANOTHER.match(error.description)
    if not another:
        return [error]
    names = _names(error)
    return [
        each
        for theirs in _section(shown[another[1]], Kind.raises)
        if names & _names(theirs)
        for each in _errors(theirs, shown)
    ]


def _section(another: griffe.Object, kind: Kind) -> list[Any]:
    sections = another.docstring.parsed if another.docstring else []
    return [each for section in sections if section.kind is kind for each in section.value]


def _names(error: griffe.DocstringRaise) -> set[str]:
    return set(re.findall(r"[\w.]+", str(error.annotation)))
