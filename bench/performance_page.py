"""docs/performance.md, from the figures that were measured on a CPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.cases import OVER_SAM, SHAPES
from bench.gpu.page import table
from bsam_fused.report import said
from bsam_fused.report.implementations import PACKAGE
from bsam_fused.report.rows import Row

Content = Mapping[str, Any]

HEAD = """# Performance

Made from `bench/results/cpu.json` by `python -m bench.performance --page-only`; do not edit. `make performance`
measures everything anew and writes both files.

**Not measured here: any GPU.** [An H200's figures](../bench/results/README.md) are on record; `make gpu`
(`bench/gpu/README.md`) makes more. Nor were other CPUs, more threads, or other dtypes than float32."""

METHOD = """## Method

Implementations take turns within every repetition, so that whatever else the machine does hits all alike; figures are
medians. Before each phase every implementation gets fresh gradients that nobody else holds, untimed; what a phase frees
or clears itself is timed. Before the timing all must have the same weights as the papers' loops after two steps.

- **loops**: the papers' formulas, a tensor at a time; **foreach**: `torch._foreach` with torch's fused base optimizer,
  as a careful engineer writes it; **compiled**: such code under `torch.compile` (ResNet-18, BSAM over SGD alone:
  compiling takes minutes); **pytorch_optimizer**: that package's SAM from the registry, as it is by default (its BSAM
  is another algorithm); **cpp**, **torch**: backends of `bsam_fused`.
- **byte budget**: the time in which `Tensor.copy_` over 64 M elements moves as many bytes, read and written, as a step
  must move (`docs/design.md`), measured in the same repetitions, after two copies that are not counted: they write back
  what others left in the caches. **of copy** is the budget over the time. It can exceed 100 %: `copy_` reads what it is
  going to write, which stores around the cache save, and this CPU's last cache holds a part of what a step moves.
- **host**: the time of the same step on as many tensors of one element each.
- **extra memory**: the peak of torch's allocator beside that of the base optimizer alone, in N elements.

A bar that was set for the project and is missed is said to be missed; nothing is left out for it."""

BARS = """## Bars

A whole BSAM step takes no more of the host's time than one of torch's fused AdamW from 10 tensors on, than one of its
fused SGD from 60 on. From a million elements on, a step takes at most 1.15 (BSAM) or 1.2 times (SAM) its byte budget,
and beats the loops, the `_foreach` version and `pytorch_optimizer` by a factor; the extra memory is what it says. From
10 M elements on SAM's relatives take at most 1.1 times what the bytes that they move say, by SAM's own time. Steps
of one pass and of two that follow each other take at most 1.05 times what they take alone."""

QUIET = 0.2
"""Cores that others may keep busy on a machine that does nothing else."""
STEADY = 0.8
"""Of the highest bandwidth: above, all cases had the same."""
TITLES = {"bsam": "BSAM", "sam": "SAM", "sgd": "SGD with momentum", "adamw": "AdamW"}
OTHERS = ("loops", "foreach", "compiled", "pytorch_optimizer", "torch")


def page(content: Content, family: Content | None, policies: Content | None) -> str:
    """Return the whole page; ``family``: what `bench.members` found, if it ran; ``policies``: what `bench.policies`."""
    parts = [HEAD, _about(content["about"]), _bandwidth(content["steps"]), _host(content["scaling"])]
    parts += _training(content["training"])
    missing = [name for name in SHAPES if name not in {it["shapes"] for it in content["steps"]}]
    if missing:
        parts.insert(1, f"**Not measured yet: the shapes of {', '.join(missing)}.**")
    groups = dict.fromkeys((it["algorithm"], it["base"]) for it in content["steps"])
    parts.append("## The optimizer's own step\n\nPasses excluded. Ratios: the other's time over that of cpp.")
    parts += [_group(content["steps"], *group) for group in groups]
    parts += [_freeing(content["freeing"]), _bars(content, family, policies)]
    parts += [*_family(family), *_policies(policies)]
    parts += [_operators(content["operators"]), _scaling(content["scaling"]), METHOD]
    parts += ["## Every row", *(_details(content["steps"], *group) for group in groups)]
    return "\n\n".join(parts) + "\n"


def _about(about: Content) -> str:
    said = (
        f"Measured {about['date'][:10]} on {about['cpu']}, {about['threads']} threads, {about['instruction_set']}; "
        f"torch {about['torch']}, Python {about['python']}, bsam_fused {about['bsam_fused']}, "
        f"commit {about['git_commit']}."
    )
    if about["busy_cores"] <= QUIET:
        return f"{said} Between the measurements others kept at most {about['busy_cores']} cores busy."
    return (
        f"{said}\n\n**The machine was busy with other work** ({about['busy_cores']} cores, between measurements): "
        "times are longer than on a quiet one, by different factors, so ratios are only rough, too. Measure anew "
        "before quoting any."
    )


def _bandwidth(cases: Sequence[Content]) -> str:
    rates = [case["copy_gb_per_s"] for case in cases]
    said = f"`Tensor.copy_` moved {min(rates):.1f} to {max(rates):.1f} GB/s, from case to case"
    if min(rates) > STEADY * max(rates):
        return f"{said}."
    return (
        f"{said}: **others on the same host took memory bandwidth meanwhile**, more and less of it within a case, "
        "too. The large shapes' times and shares of the copy are rough for that."
    )


def _figures(content: Content, family: Content | None, policies: Content | None) -> Iterable[tuple[str, Content]]:
    for case in content["steps"]:
        yield from ((f"{case['algorithm']}-{case['base']}-{case['shapes']}", it) for it in case["figures"])
    yield from (("cost", it) for it in content["scaling"]["figures"])
    for group in family["families"] if family else ():
        for member in group["members"]:
            yield from ((f"{member['name']}, {group['base']}, {group['shapes']}", it) for it in member["figures"])
    for run in policies["runs"] if policies else ():
        for policy in run["policies"]:
            yield from ((f"{policy['name']}, {run['base']}, {run['backend']}", it) for it in policy["figures"])


def _bars(content: Content, family: Content | None, policies: Content | None) -> str:
    judged = [(where, it) for where, it in _figures(content, family, policies) if it["target"]]
    missed = [(where, it) for where, it in judged if it["target"].endswith("missed")]
    rows = [(where, it["name"], _number(it), it["target"].removesuffix("missed").strip()) for where, it in missed]
    said = f"{BARS}\n\nOf {len(judged)} bars, {len(judged) - len(missed)} are met"
    if not missed:
        return f"{said}."
    return f"{said}, and these {len(missed)} are missed:\n\n" + table(("case", "figure", "measured", "bar"), rows)


def _number(figure: Content) -> str:
    return f"{figure['value']:.2f} {figure['unit']}".rstrip()


def _training(trained: Sequence[Content]) -> Iterable[str]:
    yield (
        "## Whole training steps\n\nMeasured by `bsam-fused report`: forward and backward passes, and the optimizer "
        "between them; means over the middle half of the steps. Overheads are over 1, 2 or 3 × the pass of the base "
        "optimizer alone; the step's includes what passes vary. *Within noise*: no larger than spreads make it."
    )
    for it in trained:
        rows = [
            (
                f"{row['algorithm']}, {row['implementation']}",
                row["passes"],
                f"{row['step_ms']:.2f}",
                f"{row['optimizer_ms']:.2f}",
                f"{row['gaps_ms']:.2f}",
                said.overhead(Row(**row)),
                said.own_overhead(Row(**row)),
            )
            for row in it["rows"]
        ]
        title = f"{it['model']}, {it['batch']}, {it['parameters'] / 1e6:.3g} M parameters in {it['tensors']} tensors; "
        heads = ("implementation", "passes", "step, ms", "optimizer, ms", "gaps, ms", "step over", "optimizer over")
        yield f"### {title}one pass {it['base_pass_ms']:.2f} ms\n\n{table(heads, rows)}"


def _group(cases: Sequence[Content], algorithm: str, base: str) -> str:
    own = [case for case in cases if (case["algorithm"], case["base"]) == (algorithm, base)]
    others = [name for name in OTHERS if any(name in case["rows"] for case in own)]
    rows = []
    for case in own:
        cpp = case["rows"]["cpp"]
        time = cpp["step_ms"]["median"]
        ratios = [
            f"{case['rows'][name]['step_ms']['median'] / time:.1f}" if name in case["rows"] else "" for name in others
        ]
        size = f"{case['tensors']}, {case['elements'] / 1e6:.3g} M"
        rows.append((case["shapes"], size, f"{time:.3g}", f"{cpp['copy_percent']:.0f} %", *ratios))
    heads = ("shapes", "tensors, N", "cpp, ms", "of copy", *(f"{name} / cpp" for name in others))
    title = f"### {TITLES[algorithm]} over {TITLES[base]}: {own[0]['moves']} N to move"
    absent = {f"{case['shapes']}, {name}: {why}" for case in own for name, why in case["absent"].items()}
    return "\n\n".join([title, table(heads, rows), *(f"Not measured: {line}." for line in sorted(absent))])


def _details(cases: Sequence[Content], algorithm: str, base: str) -> str:
    rows = [
        (
            case["shapes"],
            name,
            f"{row['step_ms']['median']:.3g}",
            f"{row['step_ms']['p25']:.3g} to {row['step_ms']['p75']:.3g}",
            f"{row['mbytes_to_move']:.4g}",
            f"{row['copy_percent']:.1f} %",
            "" if row["host_us"] is None else f"{row['host_us']:.0f}",
            f"{row['extra_memory_n']:.2f}",
            f"{row['loops_ratio']:.2f}",
        )
        for case in cases
        if (case["algorithm"], case["base"]) == (algorithm, base)
        for name, row in case["rows"].items()
    ]
    heads = ("shapes", "implementation", "ms", "quartiles", "MB to move", "of copy", "host, µs", "extra memory, N")
    return f"### {TITLES[algorithm]} over {TITLES[base]}\n\n" + table((*heads, "loops over it"), rows)


def _family(family: Content | None) -> Iterable[str]:
    yield "## SAM's relatives beside SAM"
    if family is None:
        yield "**Not measured yet**: `python -m bench.members`."
        return
    yield (
        f"{_about(family['about'])}\n\n"
        f"All take turns in one run, `python -m bench.members`. **{OVER_SAM}**: cpp's time over that of SAM's cpp; "
        "its bar is 1.1 times the ratio of what they move. SAM on normalization layers perturbs the parameters of one "
        "dimension alone, with them the biases. LookSAM's steps are apart: every k-th, in two passes, and those "
        f"between, in one. {PACKAGE}'s LookSAM has norms and products a tensor at a time, which is another algorithm."
    )
    for group in family["families"]:
        others = [f"{name} / cpp" for name in OTHERS if any(name in it["step_ms"] for it in group["members"])]
        heads = ("", "moves", "cpp, ms", OVER_SAM, "bar", *others, "extra memory of cpp")
        rows = map(_relative, group["members"])
        size = f"{group['tensors']} tensors, {group['elements'] / 1e6:.3g} M"
        title = f"### {group['shapes']} over {TITLES[group['base']]}: {size}"
        yield f"{title}\n\n" + table(heads, ([row.get(head, "") for head in heads] for row in rows))
        for it in group["members"]:
            yield from (f"Not measured: {it['name']}, {name}: {why}." for name, why in it["absent"].items())


def _relative(member: Content) -> Mapping[str, str]:
    """Return a row of the family's table, by its heads."""
    cells = {"": member["name"], "moves": f"{member['moves']} N"}
    for it in member["figures"]:
        cells[it["name"]] = _number(it)
        if it["name"] == OVER_SAM:
            cells |= {"cpp, ms": _spread(member["step_ms"]["cpp"]), "bar": it["target"]}
    return cells


def _policies(found: Content | None) -> Iterable[str]:
    yield "## Which steps take the extra passes"
    if found is None:
        yield "**Not measured yet**: `python -m bench.policies`."
        return
    yield (
        f"{_about(found['about'])}\n\n"
        "Steps of a policy and those of its two kinds alone take turns in one run, `python -m bench.policies`; every "
        "other batch, drawn at random, has gradients twice as large. **Over the sum**: the time of its steps over that "
        "of as many of each kind alone, medians of series of ten. **Asking**: what `optimizer.passes` takes, which "
        "reads the gradients where they decide; **with it**: the same with that time."
    )
    for run in found["runs"]:
        rows = [*map(_alone, run["kinds"].items()), *map(_in_turns, run["policies"])]
        heads = ("", "passes a step", "ms", "over the sum", "bar", "asking, ms", "with it")
        yield f"### {run['shapes']} over {TITLES[run['base']]}, {run['backend']}\n\n{table(heads, rows)}"


def _alone(kind: tuple[str, Content]) -> Sequence[Any]:
    name, ms = kind
    return name, "", _spread(ms), "", "", "", ""


def _in_turns(policy: Content) -> Sequence[Any]:
    over, asked = policy["figures"]
    times = f"{policy['passes']:.2f}", f"{policy['mean_ms']:.3g}"
    return policy["name"], *times, _number(over), over["target"], _spread(policy["asking_ms"]), _number(asked)


def _operators(found: Content) -> str:
    rows = [
        (shapes, name, f"{it['moves']} N", backend, f"{it['ms']['median']:.3g}", f"{it['copy_percent']:.0f} %")
        for shapes, backends in found.items()
        for backend, operators in backends.items()
        for name, it in operators.items()
    ]
    return "## Operators alone\n\n" + table(("shapes", "operator", "moves", "backend", "ms", "of copy"), rows)


def _host(found: Content) -> str:
    names = list(next(iter(found["by_tensors_ms"].values())))
    rows = [
        (f"{int(n):,}", *(_spread(each[name], 1e3) for name in names)) for n, each in found["by_tensors_ms"].items()
    ]
    said = (
        f"## What a step costs the host\n\nWith tensors of {found['each']} elements, on one thread, nothing but the "
        "host counts. A step of ours is three phases, in which no gradient is freed: all are held. µs, and quartiles."
    )
    return f"{said}\n\n{table(('tensors', *names), rows)}"


def _spread(ms: Content, factor: float = 1) -> str:
    values = [factor * ms[key] for key in ("median", "p25", "p75")]
    median, low, high = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values)
    return f"{median} ({low} to {high})"


def _freeing(found: Content) -> str:
    rows = [(way, *(_spread(ms) for ms in each.values())) for way, each in found["ways"].items()]
    names = list(next(iter(found["ways"].values())))
    settings = " ".join(f"{name}={value}" for name, value in found["settings"].items())
    size = found["elements"] * 4 / 1e6
    return "\n\n".join(
        [
            "## What freed gradients cost",
            f"A phase frees the gradients that it has used, here {size:.0f} MB in one tensor. With its defaults, glibc "
            "gives so much back to the kernel, and the next pass takes it anew, page by page. It keeps it, at the "
            f"price of a process that never shrinks, with\n\n    {settings} python train.py",
            table(("", *(f"{name}, ms" for name in names)), rows),
            f"(`pass` here only makes gradients, of {found['elements']:,} elements, as the last part of a backward "
            "pass does.) All other figures on this page are with the defaults. On a GPU torch keeps its memory itself.",
        ]
    )


def _scaling(found: Content) -> str:
    elements = [(f"one tensor of {int(n):,}", f"{us:,.1f}") for n, us in found["by_elements_us"].items()]
    figures = [(it["name"], _number(it), it["target"]) for it in found["figures"]]
    left_out = ", ".join(f"{n:,}" for n in found["left_out_elements"])
    parts = [
        "## How cost grows",
        "A BSAM step over SGD on the cpp backend, with the number of elements, on all threads. Fit: a · elements^b "
        "from 10 M elements on, where nothing stays in a cache.",
        table(("parameters", "µs"), elements),
        table(("figure", "", "bar"), figures),
    ]
    return "\n\n".join([*parts, *([f"Left out for want of memory: {left_out} elements."] if left_out else [])])
