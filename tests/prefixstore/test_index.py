"""The prefix index, case by case, and under threads."""

import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from prefixstore.index import RadixIndex, Stats

BLOCK_SIZE = 4


def prompt(*blocks: int) -> np.ndarray:
    """Tokens of whole blocks: block 7 is 70, 71, 72, 73."""
    return np.array([10 * block + i for block in blocks for i in range(BLOCK_SIZE)], np.int32)


def rows(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32).reshape(-1, 1)


def flat(ids: np.ndarray) -> list[int]:
    assert ids.dtype == np.int32
    assert ids.ndim == 2
    return ids.ravel().tolist()


@pytest.fixture
def index() -> Iterator[RadixIndex]:
    index = RadixIndex(BLOCK_SIZE)
    yield index
    assert index.check() == []


def test_matches_the_longest_run_of_whole_blocks(index: RadixIndex) -> None:
    assert flat(index.insert(prompt(1, 2, 3), rows(11, 12, 13))) == [-1, -1, -1]
    match = index.match(np.append(prompt(1, 2, 9), 5))
    assert match.num_tokens == 2 * BLOCK_SIZE
    assert flat(match.block_ids) == [11, 12]
    assert repr(match) == "Match(num_tokens=8)"
    assert flat(index.match(prompt(1, 2, 3, 4)).block_ids) == [11, 12, 13]
    assert index.match(prompt(2)).num_tokens == 0


def test_empty_and_short_prompts_match_nothing(index: RadixIndex) -> None:
    assert index.insert([], np.empty((0, 1), np.int32)).shape == (0, 1)
    assert index.insert(prompt(1), np.empty((0, 1), np.int32)).shape == (0, 1)
    for tokens in ([], prompt(1)[:3], prompt(1)):
        match = index.match(tokens)
        assert match.num_tokens == 0
        assert match.block_ids.shape == (0, 1)
        index.pin(match)  # an empty run pins nothing
        index.unpin(match)
    assert index.num_blocks == 0
    assert index.stats().num_salts == 0


def test_ignores_tokens_beyond_the_inserted_blocks(index: RadixIndex) -> None:
    index.insert(np.append(prompt(1, 2), [7, 7]), rows(11))
    assert index.num_blocks == 1
    assert flat(index.match(prompt(1, 2)).block_ids) == [11]


def test_returns_ids_of_blocks_it_already_has(index: RadixIndex) -> None:
    index.insert(prompt(1, 2), rows(11, 12))
    assert flat(index.insert(prompt(1, 2, 3), rows(21, 12, 23))) == [21, 12, -1]
    assert flat(index.match(prompt(1, 2, 3)).block_ids) == [11, 12, 23]


def test_fills_places_that_held_no_block() -> None:
    index = RadixIndex(BLOCK_SIZE, num_groups=2)
    index.insert(prompt(1, 2), [[11, -1], [12, -1]])
    rejected = index.insert(prompt(1, 2), [[21, 31], [-1, -1]])
    assert rejected.tolist() == [[21, -1], [-1, -1]]
    assert index.match(prompt(1, 2)).block_ids.tolist() == [[11, 31], [12, -1]]
    assert index.evict(9).tolist() == [[12, -1], [11, 31]]
    assert index.check() == []


def test_salts_never_meet(index: RadixIndex) -> None:
    index.insert(prompt(1), rows(11), b"tenant")
    assert index.match(prompt(1)).num_tokens == 0
    assert index.match(prompt(1), b"tenan").num_tokens == 0
    assert index.match(prompt(1), salt=b"tenant").num_tokens == BLOCK_SIZE
    assert index.stats().num_salts == 1
    index.evict(1)
    assert index.stats().num_salts == 0


def test_evicts_the_tail_of_the_least_recent_leaf(index: RadixIndex) -> None:
    index.insert(prompt(1, 2, 3), rows(11, 12, 13))
    index.insert(prompt(1, 4), rows(0, 14))
    index.match(prompt(1, 2))
    # Block 3 is oldest, then block 4; the match renewed 2 and 1, and 1 goes last as their parent.
    assert flat(index.evict(1)) == [13]
    assert flat(index.evict(2)) == [14, 12]
    assert flat(index.evict(9)) == [11]
    assert flat(index.evict(9)) == []
    assert index.num_blocks == 0


def test_a_match_of_a_front_leaves_the_tail_old(index: RadixIndex) -> None:
    index.insert(prompt(1, 2), rows(11, 12))
    index.insert(prompt(3, 4), rows(13, 14))
    index.match(prompt(1))
    assert flat(index.evict(4)) == [12, 14, 13, 11]


def test_an_insert_of_cached_blocks_touches_them(index: RadixIndex) -> None:
    index.insert(prompt(1), rows(11))
    index.insert(prompt(2), rows(12))
    index.insert(prompt(1), rows(11))
    assert flat(index.evict(1)) == [12]


def test_pins_keep_a_run_and_all_before_it(index: RadixIndex) -> None:
    index.insert(prompt(1, 2, 3, 4), rows(11, 12, 13, 14))
    match = index.match(prompt(1, 2))
    index.pin(match)
    index.pin(index.match(prompt(1, 2)))  # counted
    assert flat(index.evict(9)) == [14, 13]
    index.unpin(match)
    assert flat(index.evict(9)) == []
    assert index.stats().num_pinned_runs == 1
    index.unpin(match)
    assert flat(index.evict(9)) == [12, 11]


def test_a_pin_survives_splits_before_it(index: RadixIndex) -> None:
    index.insert(prompt(1, 2, 3), rows(11, 12, 13))
    match = index.match(prompt(1, 2, 3))
    index.pin(match)
    assert index.match(prompt(1, 5)).num_tokens == BLOCK_SIZE  # splits after block 1
    index.insert(prompt(1, 2, 6), rows(0, 0, 16))  # splits after block 2
    assert index.match(prompt(1, 2, 3)).node == match.node
    assert flat(index.evict(9)) == [16]
    index.unpin(match)
    assert flat(index.evict(9)) == [13, 12, 11]


def test_a_pin_does_not_cover_what_is_added_after_it(index: RadixIndex) -> None:
    index.insert(prompt(1), rows(11))
    match = index.match(prompt(1))
    index.insert(prompt(1, 2), rows(0, 12))
    index.pin(match)
    assert flat(index.evict(9)) == [12]
    index.pin(match)


def test_growing_a_leaf_block_by_block_keeps_one_run(index: RadixIndex) -> None:
    for num_blocks in range(1, 33):
        index.insert(prompt(*range(num_blocks)), rows(*range(num_blocks)))
    assert index.stats().num_runs == 1
    assert flat(index.match(prompt(*range(40))).block_ids) == list(range(32))
    assert flat(index.evict(32)) == list(range(31, -1, -1))


def test_refuses_stale_handles(index: RadixIndex) -> None:
    index.insert(prompt(1, 2), rows(11, 12))
    whole, front = index.match(prompt(1, 2)), index.match(prompt(1))
    index.evict(1)
    with pytest.raises(ValueError, match="match: expected a run that is still cached"):
        index.pin(whole)
    index.insert(prompt(1, 2), rows(0, 22))  # the same tokens, but another block id
    with pytest.raises(ValueError, match="still cached"):
        index.unpin(whole)
    index.pin(front)
    index.unpin(front)
    with pytest.raises(ValueError, match="match: expected a pinned run"):
        index.unpin(front)
    index.evict(9)
    with pytest.raises(ValueError, match="still cached"):
        index.pin(front)


def test_refuses_a_match_of_another_index(index: RadixIndex) -> None:
    other = RadixIndex(BLOCK_SIZE)
    other.insert(prompt(1), rows(11))
    with pytest.raises(ValueError, match="match: expected one made by this index"):
        index.pin(other.match(prompt(1)))
    with pytest.raises(ValueError, match="match: expected a Match, got int"):
        index.pin(other.match(prompt(1)).node)


def test_block_ids_are_a_snapshot(index: RadixIndex) -> None:
    index.insert(prompt(1), rows(11))
    match = index.match(prompt(1))
    match.block_ids[0, 0] = 99
    index.evict(1)
    assert flat(match.block_ids) == [11]


def test_counts_matches_evictions_and_what_it_holds(index: RadixIndex) -> None:
    index.insert(prompt(1, 2), rows(11, 12))
    index.match(prompt(1, 3, 4))
    index.match(prompt(5))
    index.evict(1)
    stats = index.stats()
    overhead = stats.overhead_bytes
    assert overhead > 0
    assert stats == Stats(
        num_blocks=1,
        num_runs=1,
        num_salts=1,
        num_pinned_runs=0,
        num_matches=2,
        lookup_blocks=4,
        hit_blocks=1,
        inserted_blocks=2,
        evicted_blocks=1,
        stripped_blocks=0,
        token_bytes=16,
        overhead_bytes=overhead,
    )


def test_walk_shows_parents_first(index: RadixIndex) -> None:
    index.insert(prompt(1, 2), rows(11, 12), b"a")
    index.insert(prompt(1, 3), rows(0, 13), b"a")
    index.pin(index.match(prompt(1, 3), b"a"))
    first, *rest = index.walk()
    assert (first.salt, first.first_token, first.num_pins) == (b"a", 0, 0)
    assert first.tokens.tolist() == prompt(1).tolist()
    assert sorted((flat(run.block_ids), run.first_token, run.num_pins) for run in rest) == [
        ([12], 4, 0),
        ([13], 4, 1),
    ]
    assert first.tick > min(run.tick for run in rest)


def test_walk_skips_runs_evicted_meanwhile(index: RadixIndex) -> None:
    index.insert(prompt(1), rows(11))
    index.insert(prompt(2), rows(12))
    walk = index.walk()
    next(walk)
    index.evict(2)
    assert list(walk) == []


def test_outline_shows_where_each_run_hangs(index: RadixIndex) -> None:
    index.insert(prompt(1, 2, 3), rows(11, 12, 13), b"a")
    index.insert(prompt(1, 4), rows(0, 14), b"a")
    index.insert(prompt(1), rows(15), b"b")
    index.pin(index.match(prompt(1, 4), b"a"))
    outline = index.outline()
    found = {}
    for row, handle in enumerate(outline.handles.tolist()):
        tokens = index.tokens_of(handle)
        assert tokens is not None and len(tokens) == outline.num_blocks[row] * BLOCK_SIZE
        parent = int(outline.parents[row])
        assert parent < row
        found[outline.salts[outline.salt_numbers[row]], tuple(tokens.tolist())] = (
            parent if parent < 0 else index.tokens_of(outline.handles[parent]).tolist(),
            int(outline.first_blocks[row]),
            int(outline.num_pins[row]),
            outline.clock - int(outline.ticks[row]),
        )
    assert found == {
        (b"a", tuple(prompt(1))): (-1, 0, 0, 0),
        (b"a", tuple(prompt(2, 3))): (prompt(1).tolist(), 1, 0, 3),
        (b"a", tuple(prompt(4))): (prompt(1).tolist(), 1, 1, 0),
        (b"b", tuple(prompt(1))): (-1, 0, 0, 1),
    }


def test_outline_of_nothing_is_empty(index: RadixIndex) -> None:
    outline = index.outline()
    assert len(outline.handles) == len(outline.parents) == len(outline.salts) == 0


def test_has_no_tokens_of_a_run_evicted_since(index: RadixIndex) -> None:
    index.insert(prompt(1), rows(11))
    (handle,) = index.outline().handles
    index.evict(1)
    assert index.tokens_of(handle) is None


def test_says_what_is_missing_without_the_extension() -> None:
    code = "import sys; sys.modules['_kvkernels'] = None; import prefixstore.index"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ImportError: prefixstore.index needs the compiled extension" in done.stderr


def test_importing_the_index_imports_no_torch() -> None:
    code = "import sys, prefixstore.index; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_threads_lose_and_double_no_block() -> None:
    """Each id inserted comes out once: rejected, evicted, or still there at the end."""
    num_threads, num_steps = 4, 400
    index = RadixIndex(2)
    out: list[list[int]] = [[] for _ in range(num_threads)]
    given: list[range] = [range(0)] * num_threads
    failures: list[BaseException] = []

    def work(thread: int) -> None:
        rng = np.random.default_rng(thread)
        next_id = thread * 10**6
        try:
            for step in range(num_steps):
                tokens = rng.integers(0, 2, 2 * rng.integers(1, 9), dtype=np.int32)
                ids = rows(*range(next_id, next_id + len(tokens) // 2))
                next_id += len(ids)
                out[thread] += [i for i in flat(index.insert(tokens, ids, b"")) if i >= 0]
                match = index.match(tokens)
                try:
                    index.pin(match)
                except ValueError:
                    continue  # another thread evicted it in between
                out[thread] += flat(index.evict(12000 if step % 20 == 0 else 3))
                assert index.match(tokens).num_tokens >= match.num_tokens
                index.unpin(match)
                if step % 50 == 0:
                    assert index.check() == []
                    assert all(len(run.tokens) > 0 for run in index.walk())
        except BaseException as error:
            failures.append(error)
        given[thread] = range(thread * 10**6, next_id)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)
    left = [i for run in index.walk() for i in flat(run.block_ids)]
    assert sorted(sum(out, left)) == [i for ids in given for i in ids]
    assert index.check() == []
