"""The usable prefix is the longest one whose every needed block is available."""

import numpy as np
import pytest

from prefixstore.residency import first_block_needed, longest_prefix


def naive_longest_prefix(available, block_size, windows):
    """Token by token: position p = num_blocks * block_size sees keys after p - window."""
    best = 0
    for num_blocks in range(1, len(available[0]) + 1):
        position = num_blocks * block_size
        if all(
            group[key // block_size]
            for group, window in zip(available, windows, strict=True)
            for key in range(position)
            if window is None or key > position - window
        ):
            best = num_blocks
    return best


@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 5, 8, 9, 100])
def test_agrees_with_looking_at_every_key(window):
    rng = np.random.default_rng(3)
    for _ in range(200):
        available = [rng.random(7) < 0.8, rng.random(7) < 0.7]
        windows = [None, window]
        assert longest_prefix(available, 4, windows) == naive_longest_prefix(available, 4, windows)


def test_a_window_within_the_next_block_needs_no_cached_block():
    assert first_block_needed(3, 4, 1) == 3
    assert longest_prefix([np.array([False, False])], 4, [1]) == 2


def test_no_blocks_is_no_prefix():
    assert longest_prefix([np.zeros(0, bool)], 4, [None]) == 0
