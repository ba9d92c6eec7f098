"""The site's pages are the repository's: README.md and others join those of docs/, and links go on leading to them."""

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""The site's name for each page that is not below docs/, by the repository's."""
BADGE = re.compile(r"^\[!\[.*\n", re.MULTILINE)  # a picture from the network
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
HELP = re.compile(r"^\$ bsam-fused (.*--help)$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> None:
    """Fill in the navigation: of a folder its pages, and nothing for what is not there (yet).

    A page that a wrong name leaves out is one that is not in the navigation, which is an error.
    """
    config.nav = _existing(config.nav or [])


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that are not below docs/."""
    for path, uri in OUTSIDE.items():
        if (ROOT / path).exists():
            files.append(File.generated(config, uri, content=BADGE.sub("", (ROOT / path).read_text())))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links between pages to the site's, and say where other files of the repository are; fill in ``--help``."""
    here = page.file.src_uri
    folder = posixpath.dirname(_source(here))

    def led(link: re.Match[str]) -> str:
        text, target, anchor = link.groups(default="")
        path = posixpath.normpath(posixpath.join(folder, target))
        uri = OUTSIDE.get(path, path.removeprefix("docs/"))
        if uri != path and not (ROOT / path).is_dir():
            return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(here))}{anchor})"
        if (ROOT / path).exists():
            return text if path in text else f"{text} (`{path}`)"
        return link[0]

    return HELP.sub(_with_its_output, LINK.sub(led, markdown))


def _existing(nav: list[Any]) -> list[Any]:
    kept = []
    for entry in nav:
        title, pages = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        found = _pages(pages)
        if found:
            kept.append({title: found} if title else found)
    return kept


def _pages(entry: str | list[Any]) -> str | list[Any] | None:
    """Return what there is of a page, a folder or a list of them."""
    if isinstance(entry, list):
        return _existing(entry)
    if entry.endswith("/"):
        names = sorted((page.name for page in (ROOT / "docs" / entry).glob("*.md")), key=_order)
        return [entry + name for name in names]
    return entry if (ROOT / _source(entry)).exists() else None


def _order(name: str) -> tuple[bool, str]:
    """What a folder's pages are sorted by: the first of them says what the others are."""
    return name != "README.md", name


def _source(uri: str) -> str:
    """Return where a page of the site is in the repository."""
    return next((path for path, page in OUTSIDE.items() if page == uri), f"docs/{uri}")


def _with_its_output(command: re.Match[str]) -> str:
    arguments = [sys.executable, "-m", "bsam_fused", *command[1].split()]
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return f"{command[0]}\n{done.stdout.rstrip()}"
