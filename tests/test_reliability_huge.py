"""The check of more than 2^31 elements, on fewer."""

import pytest
import torch

from tests.reliability import huge


def test_a_step(backend, monkeypatch):
    """The formulas hold for its weights and gradients, on every backend."""
    monkeypatch.setattr(huge, "RHO", 20.0)  # as ‖g‖ is smaller
    huge.a_step(backend, (20_000, 1_000))


def test_an_offset_that_wraps_around_is_seen():
    """The same numbers are found nowhere near a multiple of 2^31."""
    assert all(2 < 2**31 * k % huge.PERIOD < huge.PERIOD - 2 for k in (1, 2))
    begin = 2**31
    with pytest.raises(AssertionError):
        torch.testing.assert_close(huge.pattern(begin, begin + 100, 0), huge.pattern(0, 100, 0), rtol=2**-7, atol=2**-9)
