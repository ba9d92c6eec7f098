"""Short sequences of the calls that `python -m tests.reliability.arguments` makes at length."""

import torch

from tests.reliability import arguments


def test_any_calls(one_thread):
    """None crashes or writes beside its parameters; every method that a CPU has did its work in some."""
    returned = arguments.run(200)
    methods = arguments.Object(torch.float32, None, False).methods()
    assert {*methods} - {"write_options"} <= returned.keys()
