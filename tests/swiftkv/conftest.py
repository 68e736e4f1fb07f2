"""What accelerate keeps for a process."""

import pytest


@pytest.fixture
def no_precision_of_an_earlier_run():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
