"""docs/reliability.md is that of the records; and what a record has is on the page."""

import argparse
import json

import pytest

from tests.reliability import page, records

RANKS = {"ranks": 2, "setup": "DDP", "runs": 5}
FIGURES = {
    "fuzzer": {"seed": 1, "sequences": 20123, "steps": 54321, "kinds": {"SAM over SGD": 11}, "rules": {"go_on": 1234}},
    "planted bugs": {
        "once real": {"a_bug": {"found": "AssertionError", "sequences": 12}, "another": {"found": "it hangs"}},
        "others": {"a_third": {"found": None, "sequences": 2000}, "a_fourth": {"broken": "it does not apply"}},
        "no bug": {"no bug": {"found": None, "sequences": 2000}},
    },
    "kills": {
        **{"kills": {"SIGKILL, 1 rank": 200}, "resumes": 321, "steps": 4321, "half_written_checkpoints": 17},
        **{"ranks_that_raised": 9, "slowest_end_seconds": 0.25},
    },
    "ranks": {
        **{"runs": 10, "hangs_and_differences": 0, "timeout_seconds": 5},
        "by_fault": [
            {**RANKS, "fault": "killed", "others": "raise", "seconds_until_the_last_raised": 5.25},
            {**RANKS, "fault": "slow", "others": "go on", "seconds_until_the_last_raised": None},
        ],
    },
    "load": {
        "seed": 1,
        "steps, SAM": {
            **{"steps": 50000, "bytes_a_step": 0.25, "bound_bytes_a_step": 16, "tensors_more": 0, "objects_more": 0},
        },
        "many tensors": {"tensors": 10000, "seconds_a_step": 0.125},
        "a large model, SAM": {
            **{"parameters": 1006632960, "weights_gbytes": 2.013, "peak_in_weights": 3.01, "stated_in_weights": 3},
            "seconds_a_step": 9.5,
        },
        "a checkpointing thread": {"steps": 5000, "checkpoints": 5000, "answered": 4000, "refused": 1000},
        "threads": {"threads": 4, "steps_each": 5000},
    },
    "more than 2^31 elements, cpp": {"elements": 2147496993, "peak GB": 13.1},
    "address sanitizer": {"flags": "-fsanitize=address", "tests passed": 4000},
    "thread sanitizer": {"flags": "-fsanitize=thread", "tests passed": 0},
    "arguments": {"sequences": 20000, "returned": {"ascend": 5}},
    "warnings": {"files": 12, "compiler": "c++ 12", "tidy": "clang-tidy, version 23"},
}
ON_THE_PAGE = [
    *("20,123 sequences, 54,321 steps", "| go on | 1,234 |", "| SAM over SGD | 11 |"),
    *("Found 2 of 2 of kinds that were once real", "| a bug | 12 sequences |", "| another | it hangs |"),
    *(
        "Found 0 of 2 of others",
        "| a third | **not found** in 2,000 sequences |",
        "| a fourth | broken: it does not apply |",
    ),
    *("321 times a training was taken up", "| SIGKILL, 1 rank | 200 |"),
    *("| killed | DDP | 2 | 5 | raise | 5.2 s |", "| slow | DDP | 2 | 5 | go on |  |"),
    *("| steps, SAM | 50,000 | 0.25 | 16 | 0 | 0 |", "| a large model, SAM | 1,006,632,960 | 2.013 | 3.01 | 3 | 9.5 |"),
    *("| many tensors | 10,000 | 0.125 |", "| a checkpointing thread | 5,000 | 5,000 | 4,000 | 1,000 |"),
    *("2,147,496,993 elements, at most 13.1 GB", "Nothing was found in 4,000 tests. `-fsanitize=address`"),
    *("Nothing was found. `-fsanitize=thread`", "20,000 sequences; nothing crashed", "None, of 12 files, by c++ 12"),
]


def test_the_page_is_that_of_the_records():
    assert page.PAGE.read_text() == page.page(page.records()), "run: python -m tests.reliability.page"


def test_what_was_found_is_on_the_page(tmp_path):
    for check, figures in FIGURES.items():
        with records.recorded(check, tmp_path) as record:
            record.figures = figures
    text = page.page(page.records(tmp_path))
    assert not [words for words in ON_THE_PAGE if words not in " ".join(text.split("\n")) and words not in text]
    assert "No full run yet" not in text
    commit = json.loads((tmp_path / "kills.json").read_text())["machine"]["git_commit"]
    assert text.count(f"commit {commit[:8]}") == len(FIGURES)


@pytest.mark.parametrize(("said", "where"), [([], "full"), (["--seed=7"], "full"), (["--kills=1"], "trials")])
def test_a_trial_leaves_the_record_of_the_last_full_run(said, where, monkeypatch, tmp_path):
    for name, folder in {"FOLDER": "full", "TRIALS": "trials"}.items():
        monkeypatch.setattr(records, name, tmp_path / folder)
    monkeypatch.setattr("sys.argv", ["kills", *said])
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    records.run("kills", parser, lambda options: {"kills": options.kills})
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")] == [f"{where}/kills.json"]


def test_what_has_had_no_full_run_is_said():
    assert page.page({}).count("No full run yet") == len(FIGURES) - 1, "but of more than 2^31 elements"
