"""docs/reliability.md, from the records of the last full runs: `python -m tests.reliability.page`.

Its sentences are in reliability.md.jinja; a check that has no record is said to have had no full run.
"""

import json
import sys
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bench.gpu.page import table

from .records import FOLDER

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def records(folder=FOLDER):
    """Return every record, by the name of its check."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def page(found):
    """Return the whole page.

    Args:
        found: records, by the name of their check.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    templates.globals.update(last=last, counts=counts, hunted=hunted, ranks=ranks, load=load)
    templates.tests["found"] = is_found
    return templates.get_template("reliability.md.jinja").render(records=found)


def last(record):
    """Return when and where a check ran last, and how long, in words."""
    machine, minutes = record["machine"], record["seconds"] / 60
    took = f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{minutes:.0f} minute{'s' * (round(minutes) != 1)}"
    where = f"{machine['cpu']}, Python {machine['python']}, torch {machine['torch']}"
    commit, _, changed = (machine["git_commit"] or "unknown").partition("-")
    source = f"commit {commit[:8]}{' and changes' if changed else ''}"
    return f"`{record['command']}`, {record['date'][:10]}, {source}, {took} ({where})"


def counts(name, numbers):
    """Return a table of how often each was."""
    return table([name, "times"], [[key.replace("_", " "), f"{n:,}"] for key, n in numbers.items()])


def hunted(bugs):
    """Return a table of planted bugs, and after how many sequences each was found."""
    rows = [[name.replace("_", " "), _found(said)] for name, said in bugs.items()]
    return table(["bug", "found after"], rows)


def _found(said):
    if "broken" in said:
        return f"broken: {said['broken']}"
    if said["found"] is None:
        return f"**not found** in {said['sequences']:,} sequences"
    return f"{said['sequences']:,} sequences" if "sequences" in said else said["found"]


def is_found(said):
    """Return whether a planted bug was."""
    return "broken" not in said and said["found"] is not None


def ranks(rows):
    """Return a table of faults of one rank, and how the others took them."""
    cells = [
        [
            row["fault"],
            row["setup"],
            row["ranks"],
            row["runs"],
            row["others"],
            "" if row["seconds_until_the_last_raised"] is None else f"{row['seconds_until_the_last_raised']:.1f} s",
        ]
        for row in rows
    ]
    return table(["fault", "training", "ranks", "runs", "the others", "raised after, at the most"], cells)


def load(figures, *wanted):
    """Return a table of parts of a run under load: those that have these figures."""
    parts = {name: it for name, it in figures.items() if isinstance(it, dict) and set(wanted) <= set(it)}
    rows = [[name, *(f"{it[key]:,}" for key in wanted)] for name, it in parts.items()]
    return table(["", *(key.replace("_", " ") for key in wanted)], rows)


def main():
    PAGE.write_text(page(records()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
