"""paged_attention and merge_attention mean what the reference says, in every implementation."""

from dataclasses import dataclass, field

import pytest
import torch
from implementations import Implementation, every_implementation

from accuracy import assert_as_accurate
from kvkernels.reference import attention as reference
from kvkernels.scoring import Scoring

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNUSED_ID = 2147480000  # past any cache: reading the block it names would fault


@dataclass(frozen=True)
class Case:
    """One call: sequences as (number of queries, length)."""

    name: str
    sequences: tuple[tuple[int, int], ...]
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    block_size: int = 16
    causal: bool = True
    window: int = 0
    layout: str = "pool"
    is_small: bool = True
    extra: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


DECODE = ((1, 1), (1, 15), (1, 16), (1, 17), (1, 70))
MIXED = ((1, 40), (3, 3), (0, 9), (5, 37), (17, 33))

CASES = [
    Case("one_key", ((1, 1),), heads=(1, 1)),
    Case("decode", DECODE),
    Case("prefill", ((20, 20), (1, 1), (33, 33))),
    Case("extend", ((5, 37), (16, 48), (2, 17))),
    Case("mixed", MIXED),
    Case("empty_sequences", ((1, 0), (2, 0), (0, 0), (1, 5), (0, 12))),
    Case("queries_before_position_0", ((7, 3), (20, 1), (3, 0))),
    Case("not_causal", ((7, 3), (5, 37), (1, 20)), causal=False),
    Case("window_of_one", MIXED, window=1),
    Case("window_decode", ((1, 70), (1, 33), (1, 3)), window=20),
    Case("window_extend", ((5, 70), (20, 65), (8, 8)), window=17),
    Case("window_not_causal", ((5, 70), (8, 8)), window=9, causal=False),
    Case("window_from_the_last_key_of_64", ((1, 90), (2, 91)), window=27),
    Case("window_past_length", ((3, 30),), window=1000),
    Case("group_1", MIXED, heads=(3, 3)),
    Case("group_3", MIXED, heads=(9, 3)),
    Case("group_4", MIXED, heads=(4, 1)),
    Case("group_8", MIXED, heads=(8, 1)),
    Case("heads_20", MIXED, heads=(20, 20)),
    Case("group_7", ((1, 40), (2, 20)), heads=(14, 2)),
    Case("head_dim_72", MIXED, head_dim=72),
    Case("head_dim_80", MIXED, head_dim=80),
    Case("head_dim_96", MIXED, head_dim=96),
    Case("head_dim_128", MIXED, head_dim=128),
    Case("head_dim_192", MIXED, head_dim=192),
    Case("head_dim_256", MIXED, head_dim=256),
    # One query a sequence has kernels of its own; the query heads of a group fill several tiles.
    Case("decode_group_40", DECODE, heads=(40, 1)),
    Case("decode_d72", DECODE, head_dim=72),
    Case("decode_d80", DECODE, head_dim=80),
    Case("decode_d96", DECODE, head_dim=96, block_size=32),
    Case("decode_d128", DECODE, head_dim=128, block_size=64),
    Case("decode_d192", DECODE, head_dim=192, block_size=128),
    Case("decode_d256", DECODE, head_dim=256, block_size=256),
    Case("group_40", ((1, 9), (3, 7)), heads=(40, 1)),
    Case("block_32", MIXED, block_size=32),
    Case("block_64", MIXED, block_size=64),
    Case("block_128", ((1, 200), (5, 129)), block_size=128),
    Case("block_256", ((1, 300), (5, 256)), block_size=256),
    Case("tokens_first", MIXED, layout="tokens_first"),
    Case("dense", MIXED, layout="dense"),
    Case("values_lie_otherwise", MIXED, layout="keys_tokens_first"),
    # Sizes at which the CPU kernels take other ways: many rows, several chunks of keys, several
    # tiles of rows.
    Case("many_rows", ((100, 100), (33, 210)), heads=(4, 2), is_small=False),
    Case("many_rows_group_3", ((70, 130),), heads=(9, 3), block_size=64, is_small=False),
    Case("many_rows_d80", ((90, 90),), head_dim=80, is_small=False),
    Case("many_rows_d256", ((60, 90),), head_dim=256, is_small=False),
    Case("many_rows_window", ((150, 400),), heads=(2, 1), window=45, is_small=False),
    Case("many_rows_not_causal", ((50, 170),), causal=False, is_small=False),
    Case("many_chunks", ((1, 5000), (1, 1300), (1, 255)), heads=(2, 1), is_small=False),
    Case("many_chunks_d128", ((1, 2000),), heads=(8, 2), head_dim=128, is_small=False),
    Case("many_chunks_extend", ((3, 3000), (40, 7000)), heads=(2, 1), is_small=False),
    Case("many_chunks_window", ((1, 3000), (4, 2500)), heads=(2, 1), window=1030, is_small=False),
    Case("rows_5_to_7", ((5, 90), (6, 80), (7, 70)), heads=(2, 2), is_small=False),
    Case("huge_block", ((1, 900), (4, 700)), block_size=1024, is_small=False),
]
# Only the CPU kernels, and only those in plain C++, serve these.
ODD_CASES = [
    Case("head_dim_1", MIXED, head_dim=1),
    Case("head_dim_7", MIXED, head_dim=7),
    Case("head_dim_24", MIXED, head_dim=24),
    Case("head_dim_288", ((1, 40), (12, 30)), head_dim=288),
    Case("block_1", MIXED, block_size=1),
    Case("block_7", MIXED, block_size=7),
]


@dataclass
class Inputs:
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor | None

    def tensors(self, dtype: torch.dtype | None = None) -> tuple:
        """In the order of the ops' arguments; those of floats in `dtype`."""
        floats = (self.query, self.key_cache, self.value_cache)
        if dtype is not None:
            floats = tuple(tensor.to(dtype) for tensor in floats)
        return (*floats, self.block_table, self.seq_lens, self.cu_seqlens_q)


def make_cache(case: Case, num_blocks: int, dtype: torch.dtype, device: torch.device) -> tuple:
    """Two caches in which every slot is NaN (keys) or infinite (values), as unused slots stay."""
    heads, width, slots = case.heads[1], case.head_dim, case.block_size
    if case.layout == "dense":
        shape = (num_blocks, heads, slots, width)
        key, value = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    elif case.layout == "tokens_first":
        data = torch.empty(num_blocks, slots, 2, heads, width, dtype=dtype, device=device)
        key, value = (data[:, :, side].transpose(1, 2) for side in range(2))
    elif case.layout == "keys_tokens_first":
        key = torch.empty(num_blocks, slots, heads, width, dtype=dtype, device=device)
        key, value = key.transpose(1, 2), torch.empty_like(key.transpose(1, 2).contiguous())
    else:
        data = torch.empty(num_blocks, 2, 2, heads, slots, width, dtype=dtype, device=device)
        key, value = data[:, 1, 0], data[:, 1, 1]
    return key.fill_(torch.nan), value.fill_(torch.inf)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    num_heads, num_kv_heads = case.heads
    lens = [length for _, length in case.sequences]
    counts = [count for count, _ in case.sequences]
    needed = [-(-length // case.block_size) for length in lens]
    num_blocks = sum(needed) + 2  # two that nobody uses
    free = torch.randperm(num_blocks).tolist()
    key_cache, value_cache = make_cache(case, num_blocks, dtype, device)
    block_table = torch.full((len(lens), max(needed) + 2), UNUSED_ID, dtype=torch.int32)
    block_table[:, -1] = -1
    for seq, (count, length) in enumerate(case.sequences):
        # Blocks wholly before the window of the first query, and all of a sequence that asks
        # nothing, are never looked at.
        first_seen = max(0, length - count - case.window + 1) if case.window else 0
        for index in range(needed[seq]):
            begin = index * case.block_size
            end = min(length, begin + case.block_size)
            if count == 0 or end <= first_seen // case.block_size * case.block_size:
                continue
            block = free.pop()
            block_table[seq, index] = block
            shape = (num_kv_heads, end - begin, case.head_dim)
            key_cache[block, :, : end - begin] = torch.randn(shape).to(dtype).to(device)
            value_cache[block, :, : end - begin] = torch.randn(shape).to(dtype).to(device)
    cu_seqlens_q = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()
    query = torch.randn(sum(counts), num_heads + 1, case.head_dim).to(dtype)[:, 1:]
    return Inputs(
        query.to(device),
        key_cache,
        value_cache,
        block_table.to(device),
        torch.tensor(lens, dtype=torch.int32, device=device),
        None if set(counts) == {1} else cu_seqlens_q.to(device),
    )


def check(implementation: Implementation, case: Case, dtype: torch.dtype, device) -> None:
    inputs = make_inputs(case, dtype, device)
    options = (Scoring(case.head_dim**-0.5, case.causal, case.window), True)
    exact = reference.paged_attention(*inputs.tensors(torch.float64), *options)
    rounded = reference.paged_attention(*inputs.tensors(), *options)
    out, lse = implementation.paged_attention(*inputs.tensors(), *options)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_as_accurate(out, rounded[0], exact[0], "out")
    assert_as_accurate(lse, rounded[1], exact[1], "lse")


@every_implementation()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(
    implementation: Implementation, case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    if implementation.is_slow and not case.is_small:
        pytest.skip("too long for the interpreter")
    check(implementation, case, dtype, device)


@every_implementation()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_odd_sizes_match_reference_on_the_cpu(
    implementation: Implementation, case: Case, dtype: torch.dtype
) -> None:
    if implementation.name == "triton":
        pytest.skip("Triton kernels serve the sizes of a pool")
    check(implementation, case, dtype, torch.device("cpu"))


@every_implementation()
@pytest.mark.parametrize("sm_scale", [0.0, 1.0, -0.3])
def test_sm_scale(implementation: Implementation, sm_scale: float, device: torch.device) -> None:
    inputs = make_inputs(Case("scale", MIXED, head_dim=16), torch.float32, device)
    options = (Scoring(sm_scale, True, 0), True)
    exact = reference.paged_attention(*inputs.tensors(torch.float64), *options)
    rounded = reference.paged_attention(*inputs.tensors(), *options)
    out, lse = implementation.paged_attention(*inputs.tensors(), *options)
    assert_as_accurate(out, rounded[0], exact[0], "out")
    assert_as_accurate(lse, rounded[1], exact[1], "lse")


@every_implementation()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(
    implementation: Implementation, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = make_inputs(Case("large", ((1, 40), (20, 40))), dtype, device)
    inputs.query *= 100
    options = (Scoring(1.0, True, 0), True)
    exact = reference.paged_attention(*inputs.tensors(torch.float64), *options)
    rounded = reference.paged_attention(*inputs.tensors(), *options)
    out, lse = implementation.paged_attention(*inputs.tensors(), *options)
    assert_as_accurate(out, rounded[0], exact[0], "out")
    assert_as_accurate(lse, rounded[1], exact[1], "lse")


@every_implementation()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_queries", [1, 12])
def test_an_infinite_last_value_stays_infinite(
    implementation: Implementation, num_queries: int, dtype: torch.dtype, device: torch.device
) -> None:
    """What stands beside the last of an odd number of keys must not turn it into a NaN."""
    inputs = make_inputs(Case("infinite", ((num_queries, 37),)), dtype, device)
    last = inputs.block_table[0, 36 // 16]
    inputs.value_cache[last, :, 36 % 16, 5] = float("inf")
    out, _ = implementation.paged_attention(*inputs.tensors(), Scoring(0.125), False)
    assert torch.isposinf(out[-1, :, 5]).all()
    assert torch.isfinite(out[-1, :, :5]).all() and torch.isfinite(out[-1, :, 6:]).all()


@every_implementation()
def test_lse_only_where_asked_for(implementation: Implementation, device: torch.device) -> None:
    inputs = make_inputs(Case("no_lse", MIXED), torch.float32, device)
    out, lse = implementation.paged_attention(*inputs.tensors(), Scoring(0.1), True)
    alone, none = implementation.paged_attention(*inputs.tensors(), Scoring(0.1), False)
    assert torch.equal(out, alone)
    assert lse.shape == (26, 4) and none.shape == (0, 4)


@every_implementation()
def test_no_queries_give_an_empty_result(
    implementation: Implementation, device: torch.device
) -> None:
    cache = torch.zeros(1, 2, 16, 64, device=device)
    none = torch.zeros(0, 4, 64, device=device)
    ints = {"dtype": torch.int32, "device": device}
    table, lens = torch.zeros(0, 3, **ints), torch.zeros(0, **ints)
    for sums in (None, torch.zeros(1, **ints)):
        out, lse = implementation.paged_attention(
            none, cache, cache, table, lens, sums, Scoring(1.0), True
        )
        assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


@every_implementation()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 64), (5, 3, 80), (7, 2, 128), (0, 2, 64)], ids=str)
@pytest.mark.parametrize("lse", [0.0, 300.0, -300.0])  # 0, and where exponentials leave float32
def test_merge_matches_reference(
    implementation: Implementation,
    lse: float,
    shape: tuple,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    out_a, out_b = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    lse_a, lse_b = (lse + 5 * torch.randn(shape[:2], device=device) for _ in range(2))
    if shape[0] > 3:
        lse_a[0], lse_b[1] = -torch.inf, -torch.inf
        lse_a[2], lse_b[2] = -torch.inf, -torch.inf
        out_a[0], out_b[1], out_a[2], out_b[2] = torch.nan, torch.inf, torch.nan, torch.nan
    exact = reference.merge_attention(
        out_a.double(), lse_a.double(), out_b.double(), lse_b.double()
    )
    rounded = reference.merge_attention(out_a, lse_a, out_b, lse_b)
    merged = implementation.merge_attention(out_a, lse_a, out_b, lse_b)
    assert_as_accurate(merged[0], rounded[0], exact[0], "out")
    assert_as_accurate(merged[1], rounded[1], exact[1], "lse")


@every_implementation()
def test_merged_halves_are_the_whole(implementation: Implementation, device: torch.device) -> None:
    case = Case("whole", ((1, 48), (1, 32)))
    inputs = make_inputs(case, torch.float32, device)
    options = (Scoring(case.head_dim**-0.5, True, 0), True)
    whole = implementation.paged_attention(*inputs.tensors(), *options)
    query, keys, values, table, lens, _ = inputs.tensors()
    first = implementation.paged_attention(
        query, keys, values, table, torch.full_like(lens, 16), None, *options
    )
    rest = implementation.paged_attention(
        query, keys, values, table[:, 1:], lens - 16, None, *options
    )
    merged = implementation.merge_attention(*first, *rest)
    for got, want in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


@every_implementation()
@pytest.mark.parametrize("name", ["mixed", "many_chunks", "many_rows_group_3"])
def test_repeats_bit_for_bit(
    implementation: Implementation, name: str, device: torch.device
) -> None:
    case = next(case for case in CASES if case.name == name)
    if implementation.is_slow and not case.is_small:
        pytest.skip("too long for the interpreter")
    inputs = make_inputs(case, torch.bfloat16, device)
    options = (Scoring(case.head_dim**-0.5, case.causal, case.window), True)
    first = implementation.paged_attention(*inputs.tensors(), *options)
    for _ in range(5):
        again = implementation.paged_attention(*inputs.tensors(), *options)
        assert all(map(torch.equal, first, again))


@every_implementation()
@pytest.mark.parametrize("name", ["mixed", "many_chunks", "many_chunks_extend"])
def test_any_number_of_threads_gives_the_same_bits(
    implementation: Implementation, name: str
) -> None:
    if implementation.name == "triton":
        pytest.skip("has no threads of its own")
    case = next(case for case in CASES if case.name == name)
    inputs = make_inputs(case, torch.bfloat16, torch.device("cpu"))
    options = (Scoring(case.head_dim**-0.5, case.causal, case.window), True)
    num_threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(implementation.paged_attention(*inputs.tensors(), *options))
    finally:
        torch.set_num_threads(num_threads)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


@every_implementation()
def test_other_sequences_do_not_change_the_bits(implementation: Implementation) -> None:
    if implementation.name == "triton":
        pytest.skip("may cut its work by the size of the batch")
    case = Case("batch", ((1, 700), (1, 40), (1, 2000)))
    inputs = make_inputs(case, torch.float32, torch.device("cpu"))
    query, keys, values, table, lens, _ = inputs.tensors()
    together, _ = implementation.paged_attention(
        query, keys, values, table, lens, None, Scoring(0.1), False
    )
    for seq in range(3):
        one = slice(seq, seq + 1)
        alone, _ = implementation.paged_attention(
            query[one], keys, values, table[one], lens[one], None, Scoring(0.1), False
        )
        assert torch.equal(together[one], alone)


@every_implementation()
def test_reads_past_two_to_the_31_elements(
    implementation: Implementation, device: torch.device
) -> None:
    if implementation.is_slow:
        pytest.skip("the interpreter copies the whole cache")
    # 4.25 GiB each; on a CPU only address space, of which the touched pages get memory.
    num_blocks, block_size, head_dim = 17 << 10, 1024, 128
    shape = (num_blocks, 1, block_size, head_dim)
    key_cache = torch.empty(shape, dtype=torch.bfloat16, device=device)
    value_cache = torch.empty_like(key_cache)
    last = num_blocks - 1
    assert last * block_size * head_dim > 2**31
    for cache in (key_cache, value_cache):
        cache[last, 0, :20] = torch.randn(20, head_dim, device=device).bfloat16()
    query = torch.randn(9, 2, head_dim, device=device).bfloat16()
    ints = {"dtype": torch.int32, "device": device}
    lens, sums, far = (torch.tensor(values, **ints) for values in ([20], [0, 9], [[last]]))
    options = (Scoring(head_dim**-0.5, True, 0), True)
    got = implementation.paged_attention(query, key_cache, value_cache, far, lens, sums, *options)
    near = implementation.paged_attention(
        query, key_cache[-1:], value_cache[-1:], far - last, lens, sums, *options
    )
    assert all(map(torch.equal, got, near))
