"""Short sequences, the same ones every time; `make fuzz` has others."""

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from .machine import Machine

PROFILE = settings(
    derandomize=True,
    max_examples=500,
    stateful_step_count=20,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


def test_any_sequence_of_calls_and_faults(one_thread):
    run_state_machine_as_test(Machine, settings=PROFILE)
