"""The planted bugs are bugs of the package as it is now; `make fuzz-self-test` has the fuzzer look for them."""

import pytest

from .planting import ONCE_REAL, OTHERS, ROOT, DoesNotApplyError, apply
from .self_test import MISSES, wrong

FOUND, MISSED, BROKEN = {"found": "AssertionError: weight 0"}, {"found": None}, {"broken": "it does not apply"}
CLEAN = {"no bug": MISSED}


@pytest.mark.parametrize("patch", [*ONCE_REAL, *OTHERS], ids=lambda patch: patch.stem)
def test_applies_and_says_what_it_is(patch):
    apply(patch, ROOT, "--check")
    words, empty, first, *_ = patch.read_text().splitlines()
    assert (words[-1], empty, first[:10]) == (".", "", "diff --git")


def test_a_patch_of_other_sources_is_told_by_name(tmp_path):
    with pytest.raises(DoesNotApplyError, match=ONCE_REAL[0].stem):
        apply(ONCE_REAL[0], tmp_path, "--check")


def test_every_miss_of_what_was_once_real_fails():
    assert wrong(CLEAN, {"a": FOUND}, {"b": FOUND}) == []
    assert wrong(CLEAN, {"a": FOUND, "b": MISSED}, {}) == ["b was once real, and is missed"]


def test_some_others_may_be_missed():
    others = {str(i): MISSED for i in range(MISSES)}
    assert wrong(CLEAN, {}, others) == []
    (sentence,) = wrong(CLEAN, {}, {**others, "one more": MISSED})
    assert "one more" in sentence


def test_what_is_broken_or_found_without_a_bug_fails():
    assert wrong(CLEAN, {"a": BROKEN}, {}) == ["a is broken"]
    assert wrong(CLEAN, {}, {"b": BROKEN}) == ["b is broken"]
    assert wrong({"no bug": FOUND}, {}, {}) == ["without a bug: AssertionError: weight 0"]
