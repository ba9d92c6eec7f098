"""The results page of a day: the records of its runs as Markdown.

python -m bench.gpu.page writes the pages of all days in bench/results anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench.gpu.files import write

Content = Mapping[str, Any]

METHOD = """Medians after warm-up, quartiles in brackets, the L2 emptied before every timed run. **GPU**: from the
beginning of a phase's first kernel to the end of its last, launched ahead. **Host**: until a phase's call returns, the
device idle before. **Wall**: until the device is done too. Gradients are made before, untimed; a step is the sum of its
phases. Launches: kernels, copies and fills of each phase. Memory: the peak beside that of the base optimizer's own
step, in N parameters. Copy: `Tensor.copy_`, read and written, before and after. `bench/gpu/README.md` says more."""


def day_of(run: Path) -> str:
    """Return the day of a run's file, DEVICE-DATE-TIME.json: DEVICE-DATE."""
    return run.stem.rpartition("-")[0]


def write_day(day: str, folders: Iterable[Path], to: Path) -> None:
    """Write the page of a day into the folder ``to``: of all its runs that there are in ``folders``."""
    runs = {path.name: path for folder in folders for path in folder.glob(f"{day}-*.json")}
    contents = [json.loads(runs[name].read_text()) for name in sorted(runs)]
    write(to / f"{day}.md", page(contents))


def page(runs: Sequence[Content]) -> str:
    """Return the whole page, of a device's runs on a day."""
    about = runs[0]["about"]
    return "\n\n".join([f"# {about['device']}, {about['date'][:10]}", METHOD, *map(_run, runs)]) + "\n"


def _run(content: Content) -> str:
    about = content["about"]
    parts = [f"## {about['date'][11:19]}, commit {about['git_commit']}", _about(about)]
    if content["stages"]:
        parts.append("### Stages\n\n" + _stages(content["stages"]))
    if content["operators"]:
        parts.append("### Operators alone\n\n" + operators(content["operators"]))
    parts += [case(name, found) for name, found in content["steps"].items()]
    parts += [training(name, found) for name, found in content["training"].items()]
    if content.get("accuracy"):  # older records have no such section
        parts.append("### ResNet-18 on CIFAR-10\n\n" + _accuracy(content["accuracy"].values()))
    if content["kernels"]:
        parts.append("### Kernels, by Nsight Compute\n\n" + _kernels(content["kernels"]))
    if content["compared"]:
        parts.append("### Two builds\n\n" + _compared(content["compared"]))
    parts += [_tests(name, found) for name, found in content["tests"].items() if found]
    return "\n\n".join(parts)


def _about(about: Content) -> str:
    return table(("", ""), [(name, "unknown" if said is None else said) for name, said in about.items()])


def _stages(stages: Content) -> str:
    rows = [(name, _how(it["how"]), f"{it['seconds']:.0f} s", it["said"]) for name, it in stages.items()]
    return table(("stage", "", "took", ""), rows)


def _how(how: str) -> str:
    return "**failed**" if how == "failed" else how


def _tests(name: str, found: Content) -> str:
    rows = [(file, it["passed"], it["failed"], it["skipped"], it["said"]) for file, it in found.items()]
    failed = [f"- `{test}`" for it in found.values() for test in it["names"]]
    parts = [f"### Tests: {name}", table(("file", "passed", "failed", "skipped", ""), rows)]
    return "\n\n".join([*parts, *(["Failed:\n\n" + "\n".join(failed)] if failed else [])])


def _kernels(found: Content) -> str:
    heads = list(dict.fromkeys(metric for it in found.values() for metric in it))
    return table(("kernel", *heads), [(name, *(it.get(head, "") for head in heads)) for name, it in found.items()])


def _compared(found: Content) -> str:
    rows = [
        (row, it["before_commit"], f"{it['median']:.3f}", f"{it['low']:.3f} to {it['high']:.3f}", it["verdict"])
        for row, it in found.items()
    ]
    return table(("row", "before", "after / before", "at 99 %", ""), rows)


def around(found: Content) -> str:
    """Return the device's condition before and after a measurement, in a line."""
    copies = " and ".join(f"{found[when]['copy_gb_per_s']:,.0f}" for when in ("before", "after"))
    clocks = "; ".join(_clocks(found[when]["clocks"]) for when in ("before", "after"))
    return f"Copy {copies} GB/s; clocks: {clocks}."


def _clocks(clocks: Content) -> str:
    return clocks.get("why") or ", ".join(f"{name} {value}" for name, value in clocks.items())


def operators(found: Content) -> str:
    """Return the table of the operators alone."""
    rows: list[Sequence[str]] = []
    conditions = []
    for title, group in found.items():
        if "why" in group:
            rows.append((title, f"not available: {group['why']}", "", "", "", "", ""))
            continue
        conditions.append(f"{title}: {around(group)}")
        for share in group["figures"]:
            it = group["operators"][share["name"]]
            times = _us(it["gpu_ms"]), f"{it['gb_per_s']:,.0f}", f"{share['value']:.1f} %"
            rows.append((title, share["name"], f"{it['moves']} N", *times, share["target"]))
    heads = ("on", "operator", "moves", "GPU µs", "GB/s", "of copy bandwidth", "bar")
    return "\n\n".join([table(heads, rows), *conditions])


def case(name: str, found: Content) -> str:
    """Return a case's section: a table of the implementations, and one of the figures with their targets."""
    title = f"### {name}"
    if "why" in found:
        return f"{title}\n\nNot measured: {found['why']}"
    size = f"{found['tensors']} tensors, N = {found['elements'] / 1e6:.3g} M, {found['dtype']}; "
    size += f"a step must move {found['moves']} N. {around(found)}"
    rows = [(who, *_implementation(it)) for who, it in found["implementations"].items()]
    tables = [table(("implementation", "GPU µs", "host µs", "wall µs", "launches", "extra memory, N"), rows)]
    if found["figures"]:
        lines = [(it["name"], f"{it['value']:.2f} {it['unit']}".rstrip(), it["target"]) for it in found["figures"]]
        tables.append(table(("figure", "", "bar"), lines))
    return "\n\n".join([title, size, *tables])


def training(name: str, found: Content) -> str:
    """Return the section about whole training steps of a network."""
    title = f"### Training steps of {name}"
    if "why" in found:
        return f"{title}\n\nNot measured: {found['why']}"
    pieces = ("passes_ms", "optimizer_ms", "gaps_ms", "overhead_percent", "optimizer_percent")
    rows = [
        (_name(it), _quartiles(it["step"]), *(f"{it[piece]:.2f}" for piece in pieces), it["launches"])
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
    size += f"Means over the middle half of the steps. {around(found)}"
    return "\n\n".join([title, size, table((*heads, "launches"), rows), table(("figure", "", "bar"), targets)])


def _accuracy(rows: Iterable[Content]) -> str:
    """Return a table of trainings, with the mean of their seeds."""
    found: dict[str, list[Content]] = {}
    for row in rows:
        found.setdefault(row["training"], []).append(row)
    cells = [
        (
            name,
            seeds[0]["epochs"],
            f"{seeds[0]['passes']:.0f}",
            f"{mean(it['accuracy_percent'] for it in seeds):.2f}",
            ", ".join(f"{it['accuracy_percent']:.2f}" for it in seeds),
            f"{mean(it['training_loss'] for it in seeds):.4f}",
            f"{mean(it['seconds'] for it in seeds):.1f}",
        )
        for name, seeds in found.items()
    ]
    return table(("training", "epochs", "passes", "accuracy, %", "of each seed", "training loss", "seconds"), cells)


def _implementation(it: Content) -> Sequence[str]:
    if "why" in it:
        return (f"{'**wrong**' if it['wrong'] else 'not available'}: {it['why']}", "", "", "", "")
    times = [_us(it[kind]["all"]) for kind in ("gpu_ms", "host_ms", "wall_ms")]
    return (*times, _launches(it.get("launches", {})), f"{it['extra_memory_n']:.2f}")


def _name(it: Content) -> str:
    return f"{it['algorithm']}, {it['implementation']}"


def _us(ms: Content) -> str:
    return f"{1e3 * ms['median']:,.0f} [{1e3 * ms['p25']:,.0f}, {1e3 * ms['p75']:,.0f}]"


def _quartiles(ms: Content) -> str:
    return f"{ms['median']:.2f} [{ms['p25']:.2f}, {ms['p75']:.2f}]"


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


if __name__ == "__main__":
    results = Path(__file__).parents[1] / "results"
    for each in {day_of(run) for run in results.glob("*-????-??-??-??????.json")}:
        write_day(each, [results], results)
