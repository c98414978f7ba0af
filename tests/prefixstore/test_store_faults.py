"""Every scenario's fault for a moment: no request fails, hangs or gets a wrong block."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_playing import play
from fault_scenarios import SCENARIOS, Unavailable


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path, since a unix socket's name may have at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="kvf") as path:
        yield Path(path) / "d"


@pytest.mark.parametrize("name", SCENARIOS)
def test_requests_go_on_while_a_tier_fails(name: str, directory: Path) -> None:
    try:
        # how long requests wait is measured by `run_faults.py`, on a machine that does nothing else
        result = play(SCENARIOS[name], directory, seconds=0.5, grace_s=10.0, num_requests=100)
    except Unavailable as error:
        pytest.skip(str(error))
    assert result.problems == ()
    assert (result.num_failed, result.num_wrong) == (0, 0)
    assert result.num_requests > 200
