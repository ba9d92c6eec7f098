"""Where the version is told, it is the same one; and it is the changelog's newest."""

import re
from pathlib import Path

import pytest

import bsam_fused

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def headings():
    """The changelog's versions and dates, and what comes before them."""
    return re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def citation():
    return dict(re.findall(r"^(\S+): (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))


def test_the_version(headings, citation):
    assert bsam_fused.__version__ == citation["version"]
    assert headings[:2] == ["Unreleased", f"{citation['version']} ({citation['date-released']})"]


def test_the_changelog_is_in_order(headings):
    releases = [
        re.fullmatch(r"(\d+)\.(\d+)\.(\d+) \((\d{4}-\d\d-\d\d)\)", heading).groups() for heading in headings[1:]
    ]
    versions = [tuple(map(int, release[:3])) for release in releases]
    dates = [release[3] for release in releases]
    assert versions == sorted(set(versions), reverse=True)
    assert dates == sorted(dates, reverse=True)


def test_no_line_of_it_is_too_long():
    """Lines of tables cannot be broken."""
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []
