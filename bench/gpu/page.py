"""The results page: a run's record as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Content = Mapping[str, Any]

METHOD = """Medians after warm-up, the L2 emptied before every timed run, float32. **GPU**: from the beginning of a
phase's first kernel to the end of its last, launched ahead. **Host**: until a phase's call returns, the device idle
before. **Wall**: until the device is done too. Gradients are made before, untimed; a step is the sum of its phases.
Launches: kernels, copies and fills of each phase. Memory: the peak beside that of the base optimizer's own step, in N
parameters. `bench/README.md` says more."""


def page(content: Content) -> str:
    """Return the whole page."""
    about = content["about"]
    parts = [f"# {about['device']}, {about['date'][:10]}", _about(about)]
    if content["stages"]:
        parts.append(_stages(content["stages"]))
    parts.append("## Benchmarks\n\n" + METHOD)
    if "copy_gb_per_s" in content:
        parts.append(f"Copy bandwidth, read and written: {content['copy_gb_per_s']:,.0f} GB/s.")
    if content["operators"]:
        parts.append("### Operators alone\n\n" + operators(content["operators"]))
    parts += [case(name, found) for name, found in content["steps"].items()]
    parts += [training(name, found) for name, found in content["training"].items()]
    return "\n\n".join(parts) + "\n"


def _about(about: Content) -> str:
    return table(("", ""), [(name, "unknown" if said is None else said) for name, said in about.items()])


def _stages(stages: Content) -> str:
    rows = [(name, _ok(it["ok"]), f"{it['seconds']:.0f} s", it["said"]) for name, it in stages.items()]
    return "## Stages\n\n" + table(("stage", "", "took", ""), rows)


def _ok(ok: bool) -> str:
    return "ok" if ok else "**failed**"


def operators(found: Content) -> str:
    """Return the table of the operators alone."""
    rows: list[Sequence[str]] = []
    for title, group in found.items():
        if "why" in group:
            rows.append((title, f"not available: {group['why']}", "", "", "", "", ""))
            continue
        for share in group["figures"]:
            it = group["operators"][share["name"]]
            times = f"{1e3 * it['gpu_ms']['median']:,.0f}", f"{it['gb_per_s']:,.0f}", f"{share['value']:.1f} %"
            rows.append((title, share["name"], f"{it['moves']} N", *times, share["target"]))
    return table(("on", "operator", "moves", "GPU µs", "GB/s", "of copy bandwidth", "target"), rows)


def case(name: str, found: Content) -> str:
    """Return a case's section: a table of the implementations, and one of the figures with their targets."""
    title = f"### {name}"
    if "why" in found:
        return f"{title}\n\nNot measured: {found['why']}"
    size = f"{found['tensors']} tensors, N = {found['elements'] / 1e6:.3g} M; a step must move {found['moves']} N."
    rows = [(who, *_implementation(it)) for who, it in found["implementations"].items()]
    tables = [table(("implementation", "GPU µs", "host µs", "wall µs", "launches", "extra memory, N"), rows)]
    if found["figures"]:
        lines = [(it["name"], f"{it['value']:.2f} {it['unit']}".rstrip(), it["target"]) for it in found["figures"]]
        tables.append(table(("figure", "", "target"), lines))
    return "\n\n".join([title, size, *tables])


def training(name: str, found: Content) -> str:
    """Return the section about whole training steps of a network."""
    title = f"### Training steps of {name}"
    if "why" in found:
        return f"{title}\n\nNot measured: {found['why']}"
    pieces = ("step_ms", "passes_ms", "optimizer_ms", "gaps_ms", "overhead_percent", "optimizer_percent")
    rows = [
        (f"{it['algorithm']}, {it['implementation']}", *(f"{it[piece]:.2f}" for piece in pieces), it["launches"])
        for it in found["rows"]
    ]
    rows += [(who, why, *[""] * 6) for who, why in found["absent"].items()]
    heads = (
        "implementation",
        "step, ms",
        "passes, ms",
        "optimizer, ms",
        "gaps, ms",
        "step over, %",
        "optimizer over, %",
    )
    targets = [(it["name"], f"{it['value']:.2f} %", it["target"]) for it in found["figures"] if it["target"]]
    size = f"Batch {found['batch_size']}; one pass {found['base_pass_ms']:.2f} ms; over: 1, 2 or 3 x that pass. "
    size += "Means over the middle half of the steps."
    return "\n\n".join([title, size, table((*heads, "launches"), rows), table(("figure", "", "target"), targets)])


def _implementation(it: Content) -> Sequence[str]:
    if "why" in it:
        return (f"{'**wrong**' if it['wrong'] else 'not available'}: {it['why']}", "", "", "", "")
    times = [f"{1e3 * it[kind]['all']['median']:,.0f}" for kind in ("gpu_ms", "host_ms", "wall_ms")]
    return (*times, _launches(it.get("launches", {})), f"{it['extra_memory_n']:.2f}")


def _launches(by_phase: Mapping[str, int | None]) -> str:
    return " + ".join("?" if count is None else str(count) for count in by_phase.values())


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def targets_met(content: Content) -> tuple[int, list[str]]:
    """Return how many figures meet their targets, and which ones miss them."""
    groups = {**content["operators"], **content["steps"], **content["training"]}
    told = [(title, it) for title, group in groups.items() for it in group.get("figures", ())]
    missed = [
        f"{title}: {it['name']} {it['value']:.2f} {it['unit']}, {it['target'].removesuffix('  missed')}"
        for title, it in told
        if it["target"].endswith("missed")
    ]
    return sum(it["target"].endswith("met") for _, it in told), missed
