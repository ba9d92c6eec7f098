"""Which combinations of arguments are left to the interpreter: tests/conftest.py."""

import itertools
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


class Collected:
    """What pytest would run."""

    def pytest_collection_finish(self, session):
        self.arguments = [
            {name: str(value) for name, value in item.callspec.params.items() if name != "backend"}
            for item in session.items
        ]


def chosen_of(test):
    """The arguments of each combination of a test that the interpreter runs."""
    collected = Collected()
    options = ["--collect-only", "-qq", "-p", "no:cacheprovider", "-m", "interpreter"]
    assert pytest.main([*options, str(TESTS / test)], plugins=[collected]) == 0
    return collected.arguments


def test_all_pairs_of_three_arguments_meet():
    chosen = chosen_of("test_master_weights.py::test_the_update_is_float32s")
    values = {name: {arguments[name] for arguments in chosen} for name in ("kind", "base", "dtype")}
    assert [len(each) for each in values.values()] == [3, 3, 2]
    assert len(chosen) == 9
    for one, other in itertools.combinations(values, 2):
        met = {(arguments[one], arguments[other]) for arguments in chosen}
        assert met == {*itertools.product(values[one], values[other])}, (one, other)


def test_all_values_of_two_arguments_are_there():
    chosen = chosen_of("test_golden.py::test_recorded_trajectory")
    assert len(chosen) == len({arguments["name"] for arguments in chosen}) == 5
    assert len({arguments["style"] for arguments in chosen}) == 3
