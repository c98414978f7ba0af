"""paged_attention and merge_attention give the reference's results in every implementation."""

import pytest
import torch
from attention_inputs import (
    CASES,
    DTYPES,
    MIXED,
    ODD_CASES,
    Case,
    assert_attends,
    make_inputs,
)
from implementations import Implementation, every_implementation

import kvkernels
from accuracy import assert_as_accurate
from kvkernels.reference import attention as reference
from kvkernels.scoring import Scoring


def check(implementation: Implementation, case: Case, dtype: torch.dtype, device) -> None:
    inputs = make_inputs(case, dtype, device)
    options = (Scoring(case.head_dim**-0.5, case.causal, case.window), True)
    out, lse = implementation.paged_attention(*inputs.tensors(), *options)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_attends(out, lse, inputs, *options)


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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 128), (64, 320), (96, 32)])
@pytest.mark.parametrize("sequences", [((1, 40), (1, 5)), ((5, 37), (1, 20))], ids=["one", "mixed"])
def test_values_of_another_width_than_keys(
    implementation: Implementation,
    sequences: tuple,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    inputs = make_inputs(Case("", sequences, head_dim=head_dim), dtype, device)
    shape = (*inputs.key_cache.shape[:3], value_dim)
    inputs.value_cache = torch.randn(shape, device=device).to(dtype)
    options = (Scoring(0.125), True)
    out, lse = implementation.paged_attention(*inputs.tensors(), *options)
    assert_attends(out, lse, inputs, *options)


@every_implementation()
@pytest.mark.parametrize("sm_scale", [0.0, 1.0, -0.3, 1e-50])
@pytest.mark.parametrize("sequences", [MIXED, ((3, 65), (20, 90))], ids=["mixed", "tile_ends"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_are_multiplied_by_the_given_scale(
    implementation: Implementation,
    dtype: torch.dtype,
    sequences: tuple[tuple[int, int], ...],
    sm_scale: float,
    device: torch.device,
) -> None:
    inputs = make_inputs(Case("scale", sequences, head_dim=16), dtype, device)
    options = (Scoring(sm_scale, True, 0), True)
    out, lse = implementation.paged_attention(*inputs.tensors(), *options)
    assert_attends(out, lse, inputs, *options)


@every_implementation()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sm_scale", [1.0, -1.0])
def test_large_scores_do_not_overflow(
    implementation: Implementation, sm_scale: float, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = make_inputs(Case("large", ((1, 40), (20, 40))), dtype, device)
    inputs.query *= 100
    options = (Scoring(sm_scale, True, 0), True)
    out, lse = implementation.paged_attention(*inputs.tensors(), *options)
    assert_attends(out, lse, inputs, *options)


@every_implementation()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_queries", [1, 12])
@pytest.mark.parametrize("heads", [(4, 2), (7, 1)])
def test_an_infinite_last_value_stays_infinite(
    implementation: Implementation,
    heads: tuple[int, int],
    num_queries: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Padding next to the last of an odd number of keys must not turn it into NaN."""
    inputs = make_inputs(Case("infinite", ((num_queries, 37),), heads=heads), dtype, device)
    last = inputs.block_table[0, 36 // 16]
    inputs.value_cache[last, :, 36 % 16, 5] = float("inf")
    out, _ = implementation.paged_attention(*inputs.tensors(), Scoring(0.125), False)
    assert torch.isposinf(out[-1, :, 5]).all()
    assert torch.isfinite(out[-1, :, :5]).all() and torch.isfinite(out[-1, :, 6:]).all()


def test_the_widest_window_hides_nothing() -> None:
    """Not even for queries before position 0, whose windows begin far below it."""
    case = Case("window", ((7, 3), (200, 150), (1, 9)))
    inputs = make_inputs(case, torch.float32, torch.device("cpu"))
    options = {"sm_scale": 0.125, "return_lse": True}
    wanted = kvkernels.paged_attention(*inputs.tensors(), **options)
    for window in (1 << 31, (1 << 63) - 1):
        found = kvkernels.paged_attention(*inputs.tensors(), **options, window=window)
        assert all(map(torch.equal, found, wanted))


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
@pytest.mark.parametrize(
    "case",
    [
        *(case for case in CASES if case.name in ("mixed", "many_chunks", "many_chunks_extend")),
        # One tile with all heads for few threads, but a tile for each head for 100.
        Case("heads_spread_over_threads", ((1, 9000),), heads=(16, 16), head_dim=32),
    ],
    ids=str,
)
def test_any_number_of_threads_gives_the_same_bits(
    implementation: Implementation, case: Case
) -> None:
    if implementation.name == "triton":
        pytest.skip("has no threads of its own")
    inputs = make_inputs(case, torch.bfloat16, torch.device("cpu"))
    options = (Scoring(case.head_dim**-0.5, case.causal, case.window), True)
    num_threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 8, 100):
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
    # 4.25 GiB each; on a CPU only touched pages take memory.
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
