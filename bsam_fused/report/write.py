"""The report as a page and as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from tempfile import NamedTemporaryFile

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bsam_fused.report import figures, said
from bsam_fused.report.models import Refused
from bsam_fused.report.results import Report

PAGE = "page.html.jinja"
FILES = ("index.html", "report.json")


def prepare(out: Path) -> str:
    """Make the directory, and return what to tell of an earlier report that will be replaced; "" where there is none.

    Raises:
        Refused: it cannot be made or written to, or what would be replaced is no report.
    """
    folder(out)
    there = [name for name in FILES if (out / name).exists()]
    if not there:
        return ""
    try:
        earlier = json.loads((out / "report.json").read_text(encoding="utf-8"))
        return f"Replaced: the report of {earlier['date']} on {earlier['model']}, {earlier['device']}"
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Refused(
            f"--out {out}: there is {' and '.join(there)}, of no earlier report; name another folder"
        ) from error


def folder(out: Path) -> None:
    """Make a directory where there is none.

    Raises:
        Refused: it cannot be made or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=out):  # a folder that is there may not be one to write to
            pass
    except OSError as error:
        raise Refused(f"--out {out}: {error}") from error


def written(out: Path) -> str:
    """Return where the report is, in words."""
    return f"Written: {', '.join(str(out / name) for name in FILES)}"


def files(report: Report, out: Path) -> None:
    """Write index.html and report.json, each whole or not at all.

    Args:
        report: what to write.
        out: a directory.

    Raises:
        Refused: ``out`` cannot be written to.
    """
    content = {**asdict(report), "agree": report.agree}
    texts = (page(report), json.dumps(content, indent=2, allow_nan=True) + "\n")
    for name, text in zip(FILES, texts, strict=True):
        try:
            _replace(out / name, text)
        except OSError as error:
            raise Refused(f"--out {out}: {error}") from error


def page(report: Report) -> str:
    """Return the page: one HTML file that needs no other."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(PAGE).render(report=report, said=said, figures=figures)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
