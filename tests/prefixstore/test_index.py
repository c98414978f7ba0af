"""The prefix index, case by case; test_index_random.py drives it beside a model."""

import array
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

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
        index.pin(match)  # the empty run: nothing to keep
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
    # Block 3 is oldest, then block 4; the match kept 2 and 1, which also goes last as a parent.
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
    index.insert(prompt(1, 2), rows(0, 22))  # the same tokens, but another block
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


def test_counts(index: RadixIndex) -> None:
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


BIG = [1, 2**31, 2**32 - 1, 0]

FORMS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "list of numpy integers": lambda tokens: list(np.array(tokens)),
    "uint32": lambda tokens: np.array(tokens, np.uint32),
    "int64": lambda tokens: np.array(tokens, np.int64),
    "uint64": lambda tokens: np.array(tokens, np.uint64),
    "strided": lambda tokens: np.repeat(np.array(tokens, np.uint32), 3)[::3],
    "reversed": lambda tokens: np.array(tokens[::-1])[::-1],
    "misaligned": lambda tokens: np.frombuffer(
        b"x" + np.array(tokens, np.uint32).tobytes(), np.uint32, offset=1
    ),
    "array q": lambda tokens: array.array("q", tokens),
    "array I": lambda tokens: array.array("I", tokens),
    "memoryview": lambda tokens: memoryview(np.array(tokens)),
    "int64 tensor": torch.tensor,
}
SMALL_FORMS: dict[str, Callable[[list[int]], Any]] = {
    "range": lambda tokens: range(tokens[0], tokens[-1] + 1),
    "bytes": bytes,
    **{
        name: lambda tokens, name=name: np.array(tokens, name)
        for name in ("int8", "uint8", "int16", "uint16", "int32")
    },
    "int32 tensor": lambda tokens: torch.tensor(tokens, dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("form", "tokens"),
    [(form, BIG * 5) for form in FORMS.values()]
    + [(form, list(range(20))) for form in SMALL_FORMS.values()],
    ids=[*FORMS, *SMALL_FORMS],
)
def test_reads_tokens_in_any_form(index: RadixIndex, form: Any, tokens: list[int]) -> None:
    index.insert(np.array(tokens, np.uint32), rows(1, 2, 3, 4, 5))
    assert index.match(form(tokens)).num_tokens == 20
    assert flat(index.insert(form(tokens[:8]), rows(21, 22))) == [21, 22]
    assert index.match(form(tokens[4:])).num_tokens < 20


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, -1], "values from 0 to 4294967295, got -1"),
        ([2**32], "values from 0 to 4294967295, got 4294967296"),
        ([2**80], "values from 0 to 4294967295, got 1208925819614629174706176"),
        ([1, 2.0], "integers, got float"),
        ([True], "integers, got bool"),
        ([[1, 2]], "integers, got list"),
        (np.array([3] * 40 + [-7], np.int32), "values from 0 to 4294967295, got -7"),
        (np.array([3] * 40 + [-7]), "values from 0 to 4294967295, got -7"),
        (np.array([2**63], np.uint64), "values from 0 to 4294967295, got 9223372036854775808"),
        (array.array("b", [-1]), "values from 0 to 4294967295, got -1"),
        (np.zeros(4), "a 1-d array of integers, got dtype float64"),
        (np.zeros(4, bool), "a 1-d array of integers, got dtype bool"),
        (np.zeros(4, ">i4"), "a 1-d array of integers, got dtype >i4"),
        (np.zeros((2, 2), int), "a 1-d array of integers, got 2 dimensions"),
        (array.array("d", [1.0]), "a 1-d array of integers, got 1 dimensions of format 'd'"),
        (torch.zeros(4), "a 1-d array of integers, got dtype float32"),
        (torch.zeros(4, dtype=torch.bfloat16), "a 1-d array of integers, got Tensor"),
        ("text", "a 1-d array of integers, got 0 dimensions"),
        (None, "a 1-d array of integers, got 0 dimensions"),
        (5, "a 1-d array of integers, got 0 dimensions"),
    ],
)
def test_refuses_bad_tokens(index: RadixIndex, tokens: Any, message: str) -> None:
    for call in (lambda: index.match(tokens), lambda: index.insert(tokens, rows())):
        with pytest.raises(ValueError, match=r"^tokens: expected ") as error:
            call()
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("block_ids", "message"),
    [
        (rows(1, 2, 3), "block_ids: expected at most 2 rows (whole blocks of tokens), got 3"),
        (np.zeros(2, np.int32), "block_ids: expected shape [num_blocks, 1], got [2]"),
        (np.zeros((2, 2), np.int32), "block_ids: expected shape [num_blocks, 1], got [2, 2]"),
        ([[1.0]], "block_ids: expected dtype int32, got dtype float64"),
        (rows(1, -2), "block_ids: expected -1 to 2147483647, got -2"),
        ([[2**31]], "block_ids: expected -1 to 2147483647, got 2147483648"),
        (np.array([[2**32 - 1]], np.uint32), "block_ids: expected -1 to 2147483647, got 4294967295"),
        (np.array([[1]], np.uint64), "block_ids: expected dtype int32, got dtype uint64"),
    ],
)
def test_refuses_bad_block_ids(index: RadixIndex, block_ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^block_ids") as error:
        index.insert(prompt(1, 2), block_ids)
    assert message in str(error.value)
    assert index.num_blocks == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RadixIndex(0), "block_size: expected 1 to 65535, got 0"),
        (lambda: RadixIndex(65536), "block_size: expected 1 to 65535, got 65536"),
        (lambda: RadixIndex(2.0), "block_size: expected an integer, got 2.0"),  # type: ignore[arg-type]
        (lambda: RadixIndex(True), "block_size: expected an integer, got True"),
        (lambda: RadixIndex(4, 0), "num_groups: expected 1 to 65535, got 0"),
        (lambda: RadixIndex(4).evict(-1), "num_blocks: expected 0 to 9223372036854775807, got -1"),
        (lambda: RadixIndex(4).match([1], "salt"), "salt: expected bytes, got str"),  # type: ignore[arg-type]
        (lambda: RadixIndex(4).insert([1], rows(), None), "salt: expected bytes, got NoneType"),  # type: ignore[arg-type]
    ],
)
def test_refuses_other_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message


def test_says_what_is_missing_without_the_extension() -> None:
    code = "import sys; sys.modules['_kvkernels'] = None; import prefixstore.index"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ImportError: prefixstore.index needs the compiled extension" in done.stderr


def test_needs_no_torch() -> None:
    code = "import sys, prefixstore.index; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_threads_lose_and_double_no_block() -> None:
    """Whatever ids go in come out once: rejected, evicted, or still there at the end."""
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
