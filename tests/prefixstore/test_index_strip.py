"""What the index gives up of a windowed group, and in which order."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from prefixstore.index import RadixIndex

WINDOW = 2  # blocks


def prompt(*blocks: int) -> np.ndarray:
    """Tokens of blocks of one token."""
    return np.array(blocks, np.int32)


def rows(*ids: int) -> np.ndarray:
    """Id 7 in the full group, 107 in the one with a window."""
    return np.array([[one, 100 + one] for one in ids], np.int32)


@pytest.fixture
def index() -> Iterator[RadixIndex]:
    index = RadixIndex(1, 2, [None, WINDOW])
    yield index
    assert index.check() == []


def held(index: RadixIndex, tokens: Sequence[int]) -> list[list[int]]:
    return index.peek(np.array(tokens, np.int32)).block_ids.tolist()


def test_what_no_end_needs_goes_first(index: RadixIndex) -> None:
    index.insert(prompt(1, 2, 3), rows(1, 2, 3))
    index.insert(prompt(5, 6, 7, 8), rows(5, 6, 7, 8))
    assert index.strip(1, 2).tolist() == [101, 105]
    assert held(index, [5, 6, 7, 8]) == [[5, -1], [6, 106], [7, 107], [8, 108]]
    assert index.strip(1, 1).tolist() == [106]
    assert index.stats().stripped_blocks == 3
    assert index.num_blocks == 7


def test_windows_of_ends_go_whole_and_by_their_last_use(index: RadixIndex) -> None:
    index.insert(prompt(1, 2), rows(1, 2))
    index.insert(prompt(5, 6), rows(5, 6))
    index.match(prompt(1, 2, 9))
    assert index.strip(1, 1).tolist() == [105, 106]
    assert index.strip(1, 9).tolist() == [101, 102]
    assert index.strip(1, 9).tolist() == []
    assert held(index, [1, 2]) == [[1, -1], [2, -1]]


def test_the_steps_of_a_growing_sequence_are_no_ends(index: RadixIndex) -> None:
    """Each step publishes and pins its blocks: nodes that are newer than another prompt's end."""
    index.insert(prompt(1, 2), rows(1, 2))
    pinned = index.peek(prompt(5))
    for end in range(6, 12):
        tokens = prompt(*range(5, end))
        index.insert(tokens, rows(*range(5, end)))
        index.unpin(pinned)
        pinned = index.peek(tokens)
        index.pin(pinned)
    assert index.stats().num_runs == 7
    # All but the last window go before the older end, which a prompt may still continue.
    assert index.strip(1, 4).tolist() == [105, 106, 107, 108]
    assert index.strip(1, 1).tolist() == [101, 102]
    assert held(index, range(5, 11))[-2:] == [[9, 109], [10, 110]]


def test_windows_of_pinned_ends_go_last(index: RadixIndex) -> None:
    """Running sequences still use them, unless they have moved past them."""
    index.insert(prompt(1, 2), rows(1, 2))
    pinned = index.peek(prompt(1, 2))
    index.pin(pinned)
    index.insert(prompt(5, 6), rows(5, 6))
    assert index.strip(1, 1).tolist() == [105, 106]
    assert index.strip(1, 1).tolist() == [101, 102]
    index.unpin(pinned)


def test_where_a_match_ended_the_window_stays_longer(index: RadixIndex) -> None:
    index.insert(prompt(1, 2, 3, 4, 5, 6), rows(1, 2, 3, 4, 5, 6))
    index.match(prompt(1, 2, 3, 9))
    assert index.strip(1, 2).tolist() == [104, 101]  # block 4 was not touched again
    assert index.strip(1, 1).tolist() == [105, 106]  # the end is older than the match
    assert index.strip(1, 1).tolist() == [102, 103]


def test_a_place_with_several_continuations_is_an_end(index: RadixIndex) -> None:
    index.insert(prompt(1, 2, 3, 4), rows(1, 2, 3, 4))
    index.insert(prompt(1, 2, 5, 6), rows(1, 2, 5, 6))
    assert index.strip(1, 1).tolist() == [103, 104]
    assert sorted(index.strip(1, 1).tolist()) == [101, 102, 105, 106]  # touched together


def test_an_insert_fills_what_was_stripped(index: RadixIndex) -> None:
    index.insert(prompt(1, 2, 3), rows(1, 2, 3))
    index.strip(1, 9)
    rejected = index.insert(prompt(1, 2, 3), [[4, -1], [5, 105], [6, 106]])
    assert rejected.tolist() == [[4, -1], [5, -1], [6, -1]]
    assert held(index, [1, 2, 3]) == [[1, -1], [2, 105], [3, 106]]
    assert index.strip(1, 9).tolist() == [105, 106]


def test_eviction_takes_the_ids_that_are_left(index: RadixIndex) -> None:
    index.insert(prompt(1, 2, 3), rows(1, 2, 3))
    index.strip(1, 1)
    assert index.evict(9).tolist() == [[3, 103], [2, 102], [1, -1]]


def test_with_windows_only_what_leads_to_nothing_is_removed() -> None:
    index = RadixIndex(1, 1, [WINDOW])
    for first in range(0, 500, 10):
        index.insert(np.arange(first, first + 10), np.arange(first, first + 10)[:, None])
        index.strip(0, 8)
    assert index.num_blocks == 500  # a path to the last window of each
    assert index.strip(0, 2 * WINDOW).tolist() == [8, 9, 18, 19]
    assert index.num_blocks == 480
    index.strip(0, 500)
    assert (index.num_blocks, index.stats().num_runs, index.stats().num_salts) == (0, 0, 0)
    assert index.check() == []


def test_refuses_a_group_without_a_window(index: RadixIndex) -> None:
    with pytest.raises(ValueError, match="group: expected one with a window, got 0"):
        index.strip(0, 1)
    with pytest.raises(ValueError, match="group: expected 0 to 1, got 2"):
        index.strip(2, 1)
    with pytest.raises(ValueError, match="num_blocks: expected 0 to"):
        index.strip(1, -1)
    with pytest.raises(ValueError, match=r"window_blocks: expected 2 \(one a group\), got 1"):
        RadixIndex(1, 2, [None])
    with pytest.raises(ValueError, match="window_blocks: expected 0 to"):
        RadixIndex(1, 1, [-1])


def test_a_peek_is_no_look_up(index: RadixIndex) -> None:
    index.insert(prompt(1, 2), rows(1, 2))
    assert index.peek(prompt(1, 3)).block_ids.tolist() == [[1, 101]]
    assert index.stats().num_matches == index.stats().lookup_blocks == 0
