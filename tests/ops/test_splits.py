"""The Triton kernels split long sequences as planned, and merge the splits."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from attention_inputs import (
    Case,
    assert_attends,
    make_inputs,
)

from kvkernels.reference import attention as reference
from kvkernels.scoring import Scoring

triton = pytest.importorskip("triton", reason="Triton is only on Linux")
tl = pytest.importorskip("triton.language")
decode = pytest.importorskip("kvkernels.triton_kernels.decode")
prefill = pytest.importorskip("kvkernels.triton_kernels.prefill")
launch = pytest.importorskip("kvkernels.triton_kernels.launch")
splits = pytest.importorskip("kvkernels.triton_kernels.splits")
calls = pytest.importorskip("kvkernels.triton_kernels.calls")
_count_splits = splits.count_splits

# float32 heads of 256 have the smallest tile, 16 tokens: many splits in a short sequence.
TILE_N = 16


@dataclass(frozen=True)
class Batch:
    """Lengths of sequences with one query each, on a device with so many multiprocessors."""

    name: str
    seq_lens: tuple[int, ...]
    num_multiprocessors: int
    most_splits: int
    window: int = 0
    heads: tuple[int, int] = (2, 1)

    def __str__(self) -> str:
        return self.name


BATCHES = [
    Batch("many_splits", (500,), 8, 16),
    Batch("splits_without_end", (90,), 132, 3),
    Batch("one_split_each", (30, 32, 17), 2, 1),
    Batch("one_program_at_a_time", (300,), 1, 2),
    Batch("very_unequal", (1, 400, 0, 33, 2, 0), 8, 9),
    Batch("two_groups", (200, 90), 4, 2, heads=(2, 2)),
    Batch("window", (400, 30, 130), 8, 4, window=100),
    Batch("more_than_128_sequences", (*[0, 3] * 65, 200), 40, 4),
    Batch("all_empty", (0, 0, 0), 8, 1),
]


def expected_splits(
    num_tiles: int, work: int, at_once: int, max_splits: int, shortest: int = 2
) -> int:
    """Splits of a sequence, each at least one concurrent program's share of all work."""
    share = math.ceil(Fraction(work, at_once))
    length = max(share, math.ceil(Fraction(num_tiles, max_splits)), shortest)
    if 2 * num_tiles <= 3 * length:
        return 1
    length = math.ceil(Fraction(num_tiles, max(2, num_tiles // length)))
    return math.ceil(Fraction(num_tiles, length))


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_splits_as_planned_and_matches_reference(batch: Batch, device: torch.device) -> None:
    sequences = tuple((1, length) for length in batch.seq_lens)
    case = Case("", sequences, heads=batch.heads, head_dim=256, window=batch.window)
    inputs = make_inputs(case, torch.float32, device)
    out = torch.full_like(inputs.query, torch.nan, memory_format=torch.contiguous_format)
    lse = torch.full(out.shape[:2], torch.nan, device=device)
    options = (Scoring(1 / 16, True, batch.window), True)
    device_like = launch.Device(9, batch.num_multiprocessors)
    call = calls.Call(*inputs.tensors(), options[0])
    launches = decode.plan_decode(call, out, lse, device_like)
    planned = launches[0].arguments
    for scratch in ("partial_out_ptr", "partial_lse_ptr"):
        planned[scratch].fill_(torch.nan)
    launch.run(launches, inputs.query)

    assert_attends(out, lse, inputs, *options)

    num_tiles = []
    for length in batch.seq_lens:
        first = max(0, length - batch.window) // TILE_N if batch.window else 0
        num_tiles.append(math.ceil(length / TILE_N) - first)
    machine = planned["num_programs_at_once"], planned["max_splits"]
    work = sum(num_tiles) * batch.heads[1]
    expected = [expected_splits(count, work, *machine) for count in num_tiles]
    found = [1] * len(expected)
    if planned["IS_SPLIT"]:
        # Only sequences with several splits write partial results.
        partial = planned["partial_lse_ptr"].view(len(expected), batch.heads[0], -1)[:, 0]
        found = [max(1, count) for count in partial.isfinite().sum(1).tolist()]
        assert not planned["counters_ptr"].any(), "a counter is not zero again"
    assert planned["TILE_N"] == TILE_N
    assert found == expected
    assert max(found) == batch.most_splits


# Sequences as (number of queries, length), float32 heads of 256: 32 rows and 16 tokens a tile.
QUERIES = [
    ("short_after_long", ((3, 700),), {}),
    ("with_others", ((5, 900), (1, 40), (0, 30), (1, 500)), {}),
    ("many_rows", ((40, 640),), {}),
    ("window", ((4, 600), (1, 90)), {"window": 200}),
    ("three_heads_of_a_tile", ((3, 500),), {"heads": (3, 1)}),
    ("more_heads_than_a_tile", ((2, 500),), {"heads": (71, 1)}),
    ("rules", ((7, 800), (2, 300)), {"rules": ("sinks", "alibi", "soft_cap")}),
]


@pytest.mark.parametrize(("name", "sequences", "options"), QUERIES, ids=lambda value: str(value))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_splits_of_few_queries_match_reference(
    name: str,
    sequences: tuple[tuple[int, int], ...],
    options: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    heads, window = options.get("heads", (2, 1)), options.get("window", 0)
    case = Case("", sequences, heads=heads, head_dim=256, window=window)
    inputs = make_inputs(case, dtype, device)
    rules: dict[str, Any] = {}
    if "rules" in options:
        rules = {"soft_cap": 5.0, "sinks": torch.randn(heads[0], device=device)}
        rules["alibi_slopes"] = torch.rand(heads[0], device=device) / 8
    scoring = Scoring(1 / 16, True, window, **rules)
    out = torch.full_like(inputs.query, torch.nan, memory_format=torch.contiguous_format)
    lse = torch.full(out.shape[:2], torch.nan, device=device)
    call = calls.Call(*inputs.tensors(), scoring)
    launches = prefill.plan_prefill(call, out, lse, launch.Device(9, 40))
    planned = launches[0].arguments
    assert planned["IS_SPLIT"] and len(launches) == 2
    for scratch in ("partial_out_ptr", "partial_lse_ptr"):
        planned[scratch].fill_(torch.nan)
    planned["num_splits_ptr"].fill_(1 << 30)  # else unwritten: the merging kernel would not end
    launch.run(launches, inputs.query)

    assert_attends(out, lse, inputs, scoring, True)
    found = planned["num_splits_ptr"].view(out.shape[:2])
    assert (found == found[:, :1]).all()
    assert found.max() > 1
    # Only tokens with several splits write partial results; a split that saw nothing has a
    # log-sum-exp of minus infinity.
    partial = planned["partial_lse_ptr"].view(*out.shape[:2], -1)
    written = (~partial.isnan()).sum(2)
    assert torch.equal(written, torch.where(found > 1, found, 0).to(written.dtype))


@triton.jit
def _length_kernel(
    seq_lens_ptr, num_seqs, num_tiles, num_groups, at_once, max_splits, result_ptr,
    TILE_N: tl.constexpr,
):  # fmt: skip
    splits, length = _count_splits(
        seq_lens_ptr, num_seqs, num_tiles, num_groups, at_once, max_splits, 0, TILE_N, False, 2, 0
    )
    tl.store(result_ptr, splits)
    tl.store(result_ptr + 1, length)


@pytest.mark.parametrize("num_groups", [1, 8])
@pytest.mark.parametrize("at_once", [1, 264])
@pytest.mark.parametrize(
    "seq_lens",
    [[1], [0] * 5, [129] * 128, [1000] * 127 + [70000] * 3, [1 << 20] * 4400],
    ids=["one", "none", "one_load", "two_loads", "more_tiles_than_int32_holds"],
)
def test_splits_are_as_many_and_as_long_as_planned(
    seq_lens: list[int], at_once: int, num_groups: int, device: torch.device
) -> None:
    num_tiles = [math.ceil(length / TILE_N) for length in seq_lens]
    result = torch.zeros(2, dtype=torch.int32, device=device)
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    _length_kernel[(1,)](
        lens, len(lens), num_tiles[-1], num_groups, at_once, 11, result, TILE_N=TILE_N
    )
    count, length = result.tolist()
    assert count == expected_splits(num_tiles[-1], sum(num_tiles) * num_groups, at_once, 11)
    assert length == max(1, math.ceil(num_tiles[-1] / count))


@pytest.mark.parametrize("sums", [None, [0, 1, 2]], ids=["decode", "prefill"])
def test_a_table_of_no_blocks_leaves_one_split(
    sums: list[int] | None, device: torch.device
) -> None:
    ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
    cache = torch.full((1, 1, 16, 64), torch.nan, device=device)
    query = torch.randn(2, 2, 64, device=device)
    out, lse = torch.full_like(query, torch.nan), torch.full((2, 2), torch.nan, device=device)
    cu_seqlens_q = None if sums is None else torch.tensor(sums, **ints)
    call = calls.Call(
        query, cache, cache, torch.zeros(2, 0, **ints), torch.zeros(2, **ints), cu_seqlens_q,
        Scoring(0.125),
    )  # fmt: skip
    plan = decode.plan_decode if sums is None else prefill.plan_prefill
    launches = plan(call, out, lse, launch.Device(9, 132))
    assert [min(one.grid) for one in launches] == [1]
    launch.run(launches, query)
    assert not out.any() and torch.isneginf(lse).all()


def test_tokens_of_no_sequence_stay_as_they_are(device: torch.device) -> None:
    """Such as padding at the end of a graph's batch; no split counts are written for them."""
    inputs = make_inputs(Case("", ((4, 700),), heads=(2, 1)), torch.float32, device)
    query, *others, lens, _ = inputs.tensors()
    sums = torch.tensor([0, 2], dtype=torch.int32, device=device)
    out, lse = torch.full((4, 2, 64), 7.0, device=device), torch.full((4, 2), 7.0, device=device)
    call = calls.Call(query, *others, lens, sums, Scoring(0.125))
    launches = prefill.plan_prefill(call, out, lse, launch.Device(9, 40))
    launches[0].arguments["num_splits_ptr"].fill_(launches[0].arguments["max_splits"])
    launch.run(launches, query)
    expected, _ = reference.paged_attention(query[:2], *others, lens, sums, Scoring(0.125), False)
    torch.testing.assert_close(out[:2], expected)
    assert (out[2:] == 7).all() and (lse[2:] == 7).all()


def test_no_more_splits_are_joined_than_there_is_room_for(device: torch.device) -> None:
    query = torch.zeros(2, 1, 16, device=device)
    cache = torch.zeros(1, 1, 16, 16, device=device)
    ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
    table, lens = torch.zeros(2, 1, **ints), torch.zeros(2, **ints)
    call = calls.Call(query, cache, cache, table, lens, None, Scoring(1.0))
    out, lse = torch.empty_like(query), torch.empty(2, 1, device=device)
    partials = splits.Partials.like(out, 4)
    partials.out.normal_()
    partials.lse.normal_()
    partials.num_splits[0], partials.num_splits[1] = 6, 2
    launch.run([splits.plan_join(call, partials, out, lse)], query)
    for row, count in ((0, 4), (1, 2)):
        logits = partials.lse.view(2, 4)[row, :count]
        joined = logits.softmax(0) @ partials.out.view(2, 4, 16)[row, :count]
        torch.testing.assert_close(out[row, 0], joined)
        torch.testing.assert_close(lse[row, 0], logits.logsumexp(0))
