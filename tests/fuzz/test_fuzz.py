"""Short sequences, the same ones every time; `make fuzz` has others."""

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from .machine import PROFILE, Machine

SHORT = settings(PROFILE, derandomize=True, max_examples=500, stateful_step_count=20)


def test_any_sequence_of_calls_and_faults(one_thread):
    run_state_machine_as_test(Machine, settings=SHORT)
