"""The same as python -m tests.kills, with a few kills."""

import pytest

from tests.kills.__main__ import KINDS


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_writers_lose_nothing_and_mix_nothing_up(kind, tmp_path):
    kill, _ = KINDS[kind]
    kill(10, 0, tmp_path)
