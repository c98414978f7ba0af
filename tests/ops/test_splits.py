"""The Triton decode kernel cuts long sequences as planned, and joins the parts again."""

import math
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from test_attention import Case, make_inputs

from accuracy import assert_as_accurate
from kvkernels.reference import attention as reference
from kvkernels.scoring import Scoring

triton = pytest.importorskip("triton", reason="Triton is only on Linux")
tl = pytest.importorskip("triton.language")
decode = pytest.importorskip("kvkernels.triton_kernels.decode")
launch = pytest.importorskip("kvkernels.triton_kernels.launch")
splits = pytest.importorskip("kvkernels.triton_kernels.splits")
calls = pytest.importorskip("kvkernels.triton_kernels.calls")
_count_splits = splits.count_splits

# float32 heads of 256 have the smallest tile, 16 tokens: many splits in a short sequence.
TILE_N = 16


@dataclass(frozen=True)
class Batch:
    """Lengths of sequences that ask one query each, on a machine of so many units."""

    name: str
    seq_lens: tuple[int, ...]
    num_multiprocessors: int
    most_splits: int
    window: int = 0
    heads: tuple[int, int] = (2, 1)

    def __str__(self) -> str:
        return self.name


BATCHES = [
    Batch("many_splits", (500,), 8, 11),
    Batch("splits_without_end", (90,), 132, 3),
    Batch("one_split_each", (30, 32, 17), 2, 1),
    Batch("one_program_at_a_time", (300,), 1, 2),
    Batch("very_unequal", (1, 400, 0, 33, 2, 0), 8, 9),
    Batch("two_groups", (200, 90), 4, 3, heads=(2, 2)),
    Batch("window", (400, 30, 130), 8, 4, window=100),
    Batch("more_than_128_sequences", (*[0, 3] * 65, 200), 40, 5),
    Batch("all_empty", (0, 0, 0), 8, 1),
]


def expected_length(
    num_tiles: list[int], seq: int, num_groups: int, at_once: int, max_splits: int
) -> int:
    """Tiles of a split: all work over the programs that run at once, and 10 %; two at least."""
    share = math.ceil(Fraction(11, 10) * sum(num_tiles) * num_groups / at_once)
    return max(share, math.ceil(Fraction(num_tiles[seq], max_splits)), 2)


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

    exact = reference.paged_attention(*inputs.tensors(torch.float64), *options)
    rounded = reference.paged_attention(*inputs.tensors(), *options)
    assert_as_accurate(out, rounded[0], exact[0], "out")
    assert_as_accurate(lse, rounded[1], exact[1], "lse")

    num_tiles = []
    for length in batch.seq_lens:
        first = max(0, length - batch.window) // TILE_N if batch.window else 0
        num_tiles.append(math.ceil(length / TILE_N) - first)
    machine = planned["num_programs_at_once"], planned["max_splits"]
    expected = [
        max(1, math.ceil(count / expected_length(num_tiles, seq, batch.heads[1], *machine)))
        for seq, count in enumerate(num_tiles)
    ]
    found = [1] * len(expected)
    if planned["IS_SPLIT"]:
        # A partial of a sequence with several splits was written, of one with a single not.
        partial = planned["partial_lse_ptr"].view(len(expected), batch.heads[0], -1)[:, 0]
        found = [max(1, count) for count in partial.isfinite().sum(1).tolist()]
        assert not planned["counters_ptr"].any(), "a counter is not zero again"
    assert planned["TILE_N"] == TILE_N
    assert found == expected
    assert max(found) == batch.most_splits


@triton.jit
def _length_kernel(
    seq_lens_ptr, num_seqs, num_tiles, num_groups, at_once, max_splits, result_ptr,
    TILE_N: tl.constexpr,
):  # fmt: skip
    _, length = _count_splits(
        seq_lens_ptr, num_seqs, num_tiles, num_groups, at_once, max_splits, 0, TILE_N, False, 2, 0
    )
    tl.store(result_ptr, length)


@pytest.mark.parametrize("num_groups", [1, 8])
@pytest.mark.parametrize("at_once", [1, 264])
@pytest.mark.parametrize(
    "seq_lens",
    [[1], [0] * 5, [129] * 128, [1000] * 127 + [70000] * 3, [1 << 20] * 400],
    ids=["one", "none", "one_load", "two_loads", "more_tiles_than_int32_holds_times_11"],
)
def test_length_of_a_split(
    seq_lens: list[int], at_once: int, num_groups: int, device: torch.device
) -> None:
    num_tiles = [math.ceil(length / TILE_N) for length in seq_lens]
    result = torch.zeros(1, dtype=torch.int32, device=device)
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    _length_kernel[(1,)](
        lens, len(lens), num_tiles[-1], num_groups, at_once, 11, result, TILE_N=TILE_N
    )
    assert result.item() == expected_length(num_tiles, len(lens) - 1, num_groups, at_once, 11)
