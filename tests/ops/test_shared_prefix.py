"""shared_prefix_attention matches paged_attention; shared prefixes are found."""

from __future__ import annotations

import itertools
import random
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kvkernels
from accuracy import assert_as_accurate
from kvkernels import SharedPrefixes
from kvkernels.reference import attention as reference
from kvkernels.scoring import Scoring

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZE = 16


def make_batch(
    groups: list[tuple[int, list[tuple[int, int]]]], dtype: torch.dtype, heads: tuple[int, int]
) -> tuple[torch.Tensor, ...]:
    """Inputs of groups: shared blocks, and each member's queries and own tokens."""
    members = [member for _, group in groups for member in group]
    width = max(shared + -(-own // BLOCK_SIZE) for shared, group in groups for _, own in group)
    num_blocks = len(members) * width + 1
    free = torch.randperm(num_blocks).tolist()
    table = torch.full((len(members), width + 1), -1, dtype=torch.int32)
    lens, seq = [], 0
    for shared, group in groups:
        common = [free.pop() for _ in range(shared)]
        for _, own in group:
            blocks = common + [free.pop() for _ in range(-(-own // BLOCK_SIZE))]
            table[seq, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
            lens.append(shared * BLOCK_SIZE + own)
            seq += 1
    counts = torch.tensor([0] + [count for count, _ in members]).cumsum(0).int()
    shape = (num_blocks, heads[1], BLOCK_SIZE, 64)
    key_cache, value_cache = (torch.randn(shape).to(dtype) for _ in range(2))
    query = torch.randn(int(counts[-1]), heads[0], 64).to(dtype)
    is_decode = all(count == 1 for count, _ in members)
    return (
        *(query, key_cache, value_cache, table, torch.tensor(lens, dtype=torch.int32)),
        None if is_decode else counts,
    )


GROUPS = {
    "decode": [(5, [(1, 3), (1, 40), (1, 1)])],
    "two_groups": [(2, [(1, 3), (1, 20)]), (4, [(1, 8), (1, 9), (1, 33)])],
    "some_alone": [(0, [(1, 30)]), (3, [(1, 3), (1, 20)]), (0, [(1, 1)])],
    "extend": [(3, [(4, 9), (1, 1), (17, 20)]), (1, [(2, 2), (3, 50)])],
    "nothing_shared": [(0, [(1, 3)]), (0, [(1, 17)])],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("rules", ["plain", "soft_cap_and_sinks"])
def test_equals_the_flat_attention(name: str, dtype: torch.dtype, rules: str) -> None:
    groups = GROUPS[name]
    inputs = make_batch(groups, dtype, (6, 2))
    options = {}
    if rules != "plain":
        options = {"soft_cap": 2.0, "sinks": torch.randn(6)}
    prefixes = SharedPrefixes(
        [len(group) for _, group in groups], [shared * BLOCK_SIZE for shared, _ in groups]
    )
    out, lse = kvkernels.shared_prefix_attention(
        *inputs, prefixes=prefixes, return_lse=True, only_if_it_pays=False, **options
    )
    scoring = Scoring(0.125, **options)
    wide = [tensor.double() for tensor in inputs[:3]]
    exact = reference.paged_attention(*wide, *inputs[3:], scoring, True)
    rounded = reference.paged_attention(*inputs, scoring, True)
    assert_as_accurate(out, rounded[0], exact[0], "out")
    assert_as_accurate(lse, rounded[1], exact[1], "lse")


@pytest.mark.parametrize("name", GROUPS)
def test_finds_what_is_shared(name: str) -> None:
    groups = GROUPS[name]
    _, _, _, table, lens, _ = make_batch(groups, torch.float32, (2, 1))
    counts = [count for _, group in groups for count, _ in group]
    found = SharedPrefixes.find(table, lens, BLOCK_SIZE, counts)
    expected = [(len(group), shared * BLOCK_SIZE) for shared, group in groups if shared]
    assert [
        pair for pair in zip(found.group_sizes, found.prefix_lens, strict=True) if pair[1]
    ] == expected
    assert found.num_seqs == len(counts)


def test_never_shares_a_block_that_a_query_stands_in() -> None:
    table = torch.tensor([[4, 5, 6], [4, 5, 7], [4, 5, 6]], dtype=torch.int32)
    lens = torch.tensor([33, 32, 40], dtype=torch.int32)
    found = SharedPrefixes.find(table, lens, BLOCK_SIZE)
    assert found.prefix_lens == (16,) and found.group_sizes == (3,)


def find(table: list[list[int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Group sizes and numbers of shared blocks, for sequences of these blocks and a token more."""
    blocks = torch.tensor([[*row, -1] for row in table], dtype=torch.int32)
    lens = torch.full((len(table),), len(table[0]) * BLOCK_SIZE + 1, dtype=torch.int32)
    found = SharedPrefixes.find(blocks, lens, BLOCK_SIZE)
    return found.group_sizes, tuple(length // BLOCK_SIZE for length in found.prefix_lens)


def test_a_neighbour_with_little_in_common_stays_out() -> None:
    long, stranger = list(range(9)), [0, *range(20, 28)]
    assert find([long] * 4) == ((4,), (9,))
    assert find([long] * 4 + [stranger]) == ((4, 1), (9, 0))
    assert find([stranger] + [long] * 4) == ((1, 4), (0, 9))
    assert find([long] * 2 + [stranger] * 3) == ((2, 3), (9, 9))
    # A ninth shared block among four saves less than eight shared blocks of a fifth sequence.
    near = [*range(8), 30]
    assert find([long] * 4 + [near]) == ((5,), (8,))


def table_of(common: list[int], width: int) -> list[list[int]]:
    """A table in which each sequence shares so many blocks with the previous one."""
    table = [[0] * width]
    for number, shared in enumerate(common, start=1):
        table.append(table[-1][:shared] + [number] * (width - shared))
    return table


def blocks_saved(table: list[list[int]]) -> int:
    sizes, shared = find(table)
    return sum((size - 1) * blocks for size, blocks in zip(sizes, shared, strict=True))


@pytest.mark.parametrize("seed", range(60))
def test_no_other_groups_would_save_more(seed: int) -> None:
    rng = random.Random(seed)
    most_common = rng.randint(1, 6)
    common = [rng.randint(0, most_common) for _ in range(rng.randint(1, 9))]
    most = 0
    for cuts in itertools.product([False, True], repeat=len(common)):
        groups = [[]]
        for shared, is_cut in zip(common, cuts, strict=True):
            groups.append([]) if is_cut else groups[-1].append(shared)
        most = max(most, sum(len(group) * min(group) for group in groups if group))
    assert blocks_saved(table_of(common, 6)) == most


@pytest.mark.parametrize("order", ["any", "rising", "falling", "hill", "steps"])
@pytest.mark.parametrize("seed", range(12))
def test_no_other_groups_of_a_large_batch_would_save_more(seed: int, order: str) -> None:
    rng = random.Random(seed)
    most_common = rng.choice([5, 20, 60])
    common = [rng.randint(most_common // 4, most_common) for _ in range(rng.randint(20, 70))]
    if order != "any":
        common.sort(reverse=order == "falling")
    if order == "hill":
        common = common[::2] + common[1::2][::-1]
    if order == "steps":
        common = [shared - rng.randint(0, 1) for shared in common]
    most = [0]  # by the number of sequences, the most that they can save
    for end in range(1, len(common) + 2):
        alone = most[-1]
        ends = ((end - first - 1) * min(common[first : end - 1]) for first in range(end - 1))
        most.append(max([alone, *map(sum, zip(most, ends, strict=False))]))
    assert blocks_saved(table_of(common, 60)) == most[-1]


def test_a_large_batch_takes_little_longer_than_its_tables() -> None:
    table = table_of([1 + number % 2 for number in range(8000)], 2)
    started = time.monotonic()
    assert blocks_saved(table) == 8000
    assert time.monotonic() - started < 5  # comparing each pair of sequences took 20 s


def test_sequences_without_a_prefix_may_be_empty() -> None:
    """They may also have more queries than tokens; those see nothing, as in `paged_attention`."""
    key_cache, value_cache = (torch.randn(8, 2, BLOCK_SIZE, 64) for _ in range(2))
    table = torch.tensor([[0, 1], [0, 2], [3, 3], [4, 5]], dtype=torch.int32)
    lens = torch.tensor([20, 25, 0, 2], dtype=torch.int32)
    bounds = torch.tensor([0, 1, 2, 3, 7], dtype=torch.int32)
    inputs = torch.randn(7, 4, 64), key_cache, value_cache, table, lens, bounds
    prefixes = SharedPrefixes.find(table, lens, BLOCK_SIZE, [1, 1, 1, 4])
    assert prefixes.prefix_lens == (BLOCK_SIZE, 0, 0)
    out = kvkernels.shared_prefix_attention(*inputs, prefixes=prefixes, only_if_it_pays=False)
    torch.testing.assert_close(out, kvkernels.paged_attention(*inputs))


@pytest.mark.parametrize(
    ("shape", "lens", "counts", "message"),
    [
        ((2,), [20, 20], None, "block_table: expected shape [any, any], got [2]"),
        ((1, 2), [20, 20, 20], None, "seq_lens: expected shape [1], got [3]"),
        ((2, 2), [20, 33], None, "seq_lens: expected 0 to 32 (the table's width), got 33"),
        ((2, 2), [-1, 20], None, "seq_lens: expected 0 to 32 (the table's width), got -1"),
        ((2, 2), [20, 20], [1], "num_queries: expected 2 numbers, got 1"),
        ((2, 2), [20, 20], [-20, 1], "num_queries: expected integers of 0 or more, got [-20, 1]"),
        ((2, 2), [20, 20], [1.5, 1], "num_queries: expected integers of 0 or more, got [1.5, 1]"),
    ],
)
def test_refuses_to_look_where_nothing_is(
    shape: tuple[int, ...], lens: list[int], counts: list[float] | None, message: str
) -> None:
    table = torch.zeros(shape, dtype=torch.int32)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        SharedPrefixes.find(table, torch.tensor(lens, dtype=torch.int32), BLOCK_SIZE, counts)


def test_is_the_same_bits_in_any_batch_where_that_is_asked_for() -> None:
    query, key_cache, value_cache, table, lens, _ = make_batch(
        [(90, [(1, 5), (1, 40), (1, 1)])], torch.bfloat16, (6, 2)
    )

    def run(num_seqs: int) -> torch.Tensor:
        rows = table[:num_seqs], lens[:num_seqs]
        return kvkernels.shared_prefix_attention(
            *(query[:num_seqs], key_cache, value_cache, *rows),
            prefixes=SharedPrefixes.find(*rows, BLOCK_SIZE),
            batch_invariant=True,
            only_if_it_pays=False,
        )

    assert torch.equal(run(3)[0], run(1)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("only_if_it_pays", [False, True])
def test_compiles_into_one_graph(dtype: torch.dtype, dynamic: bool, only_if_it_pays: bool) -> None:
    def step(*inputs: torch.Tensor | None, prefixes: SharedPrefixes) -> tuple[torch.Tensor, ...]:
        return kvkernels.shared_prefix_attention(
            *inputs, prefixes=prefixes, return_lse=True, only_if_it_pays=only_if_it_pays
        )

    torch.compiler.reset()  # what was compiled for other parameters counts towards the limit
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for groups in GROUPS.values():
        inputs = make_batch(groups, dtype, (6, 2))
        prefixes = SharedPrefixes(
            [len(group) for _, group in groups], [shared * BLOCK_SIZE for shared, _ in groups]
        )
        expected = step(*inputs, prefixes=prefixes)
        got = compiled(*inputs, prefixes=prefixes)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_compiled_call_refuses_prefixes_that_reach_past_a_query() -> None:
    inputs = make_batch([(2, [(1, 3), (1, 20)])], torch.float32, (2, 1))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(prefixes: SharedPrefixes) -> torch.Tensor:
        return kvkernels.shared_prefix_attention(*inputs, prefixes=prefixes, only_if_it_pays=False)

    with pytest.raises(ValueError, match="stand before the queries, got 48 for sequence 0"):
        step(SharedPrefixes([2], [48]))


@pytest.mark.parametrize("has_counts", [False, True])
def test_the_lengths_behind_prefixes_are_an_op_as_pytorch_expects(has_counts: bool) -> None:
    lens = torch.tensor([20, 33], dtype=torch.int32)
    counts = torch.tensor([0, 4, 5], dtype=torch.int32) if has_counts else None
    prefix_lens = torch.tensor([16, 32], dtype=torch.int32)
    op = torch.ops.kvkernels.lens_behind_prefixes.default
    torch.library.opcheck(op, (lens, counts, prefix_lens, 48))
    assert op(lens, counts, prefix_lens, 48).tolist() == [4, 1]


def test_takes_one_pass_where_two_would_not_pay() -> None:
    inputs = make_batch(GROUPS["decode"], torch.bfloat16, (6, 2))
    prefixes = SharedPrefixes([3], [5 * BLOCK_SIZE])
    assert not prefixes.pays(3, 6, *inputs[1:3])
    assert torch.equal(
        kvkernels.shared_prefix_attention(*inputs, prefixes=prefixes),
        kvkernels.paged_attention(*inputs),
    )
    large = torch.empty(0, 8, 64, 128, dtype=torch.bfloat16)
    assert SharedPrefixes([16], [4096]).pays(16, 32, large, large)
    assert not SharedPrefixes([1] * 16, [4096] * 16).pays(16, 32, large, large)


@pytest.mark.parametrize(
    ("sizes", "lens", "message"),
    [
        ([3], [80, 16], "prefix_lens: expected one for each of 1 groups, got 2"),
        ([0, 3], [0, 80], "group_sizes: expected integers of 1 or more, got (0, 3)"),
        ([3], [-16], "prefix_lens: expected integers of 0 or more, got (-16,)"),
        ([2], [80], "prefixes: expected groups of 3 sequences together, got 2"),
        ([3], [81], "prefixes: expected multiples of the block size 16 up to 144, got 81"),
        ([3], [1600], "prefixes: expected multiples of the block size 16 up to 144, got 1600"),
        ([3], [96], "prefixes: expected no more tokens than stand before the queries, got 96"),
    ],
)
def test_refuses_prefixes_that_do_not_fit(sizes: list, lens: list, message: str) -> None:
    inputs = make_batch(GROUPS["decode"], torch.float32, (6, 2))
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        kvkernels.shared_prefix_attention(*inputs, prefixes=SharedPrefixes(sizes, lens))


@pytest.mark.parametrize("lens", [[80], [80, 0]], ids=["one_prefix", "two_prefixes"])
@pytest.mark.parametrize("only_if_it_pays", [False, True])
def test_refuses_a_sequence_longer_than_the_table(lens: list[int], only_if_it_pays: bool) -> None:
    """Even where its tokens behind the prefix would fit into the table."""
    query, *caches, table, seq_lens, _ = make_batch(GROUPS["decode"], torch.float32, (6, 2))
    seq_lens[1] = table.shape[1] * BLOCK_SIZE + 1
    sizes = [3] if len(lens) == 1 else [2, 1]
    message = "seq_lens: expected 0 to 144 (the table's width), got 145 for sequence 1"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        kvkernels.shared_prefix_attention(
            *(query, *caches, table, seq_lens),
            prefixes=SharedPrefixes(sizes, lens),
            only_if_it_pays=only_if_it_pays,
        )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cu_seqlens_q", lambda bounds: bounds[:-1]),
        ("block_table", lambda table: table[0]),
        ("key_cache", lambda cache: cache[0]),
        ("query", lambda query: query[0]),
        ("key_cache", lambda cache: cache[:, :, :0]),
        ("seq_lens", lambda lens: lens[None]),
        ("prefixes", lambda _: SharedPrefixes([3], [80], device="meta")),
    ],
)
def test_names_the_argument_that_does_not_fit(name: str, change: Callable[[Any], Any]) -> None:
    names = ("query", "key_cache", "value_cache", "block_table", "seq_lens")
    inputs = make_batch(GROUPS["decode"], torch.float32, (6, 2))
    arguments: dict[str, Any] = dict(zip(names, inputs, strict=False))
    arguments["cu_seqlens_q"] = torch.arange(4, dtype=torch.int32)
    arguments["prefixes"] = SharedPrefixes([3], [80])
    arguments[name] = change(arguments[name])
    if name == "key_cache":
        arguments["value_cache"] = change(arguments["value_cache"])
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        kvkernels.shared_prefix_attention(**arguments)
