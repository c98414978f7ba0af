"""On the CPU an infinite or NaN key reaches only the queries that see it."""

from __future__ import annotations

import pytest
import torch
from attention_inputs import DTYPES, Case, make_inputs
from implementations import Implementation, every_implementation
from test_attention_features import Feature, make_scoring
from test_attention_properties import on_every_cpu_path

from accuracy import assert_as_accurate
from kvkernels.reference import attention as reference
from kvkernels.scoring import Scoring

CPU = torch.device("cpu")
FEATURES = [
    Feature("prefill", Case("", ((50, 50),))),
    Feature("group_1", Case("", ((21, 90),), heads=(2, 2), head_dim=80)),
    Feature("one_query_a_tile", Case("", ((2, 41),), heads=(16, 2))),
    Feature("window", Case("", ((40, 75),), window=13)),
    Feature("few_rows", Case("", ((3, 75),), window=2)),
    Feature("tree", Case("", ((9, 60),)), tree=True),
    Feature("tree_of_few", Case("", ((2, 30),)), tree=True),
    Feature("tree_window", Case("", ((16, 60),), window=3), tree=True),
    # The windows begin in a chunk of keys that ends before the new tokens.
    Feature("tree_window_chunks", Case("", ((8, 1500),), window=700), tree=True),
]


@on_every_cpu_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES, ids=str)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_only_queries_that_see_it_notice(
    implementation: Implementation, batch_invariant: bool, feature: Feature, dtype: torch.dtype
) -> None:
    inputs = make_inputs(feature.case, dtype, CPU)
    scoring = make_scoring(feature, CPU)
    ((num_queries, length),) = feature.case.sequences
    exact = reference.paged_attention(*inputs.tensors(torch.float64), scoring, True)
    rounded = reference.paged_attention(*inputs.tensors(), scoring, True)
    options = {"batch_invariant": batch_invariant}
    clean = implementation.paged_attention(*inputs.tensors(), scoring, True, **options)
    block_size = feature.case.block_size
    sees, _ = reference._relate(length, 0, 0, num_queries, scoring, CPU)
    step = 1 + num_queries // 4
    places = [*range(max(0, length - num_queries - 2), length, step)]
    if feature.case.window:
        first = length - num_queries - feature.case.window + 1  # that the first query sees
        places += range(first, first + num_queries, step)
    for at in places:
        block, slot = inputs.block_table[0, at // block_size], at % block_size
        key, value = inputs.key_cache[block, :, slot], inputs.value_cache[block, :, slot]
        before = key.clone(), value.clone()
        key[..., 0], value[..., 1], value[..., 3] = torch.nan, torch.inf, torch.nan
        out, lse = implementation.paged_attention(*inputs.tensors(), scoring, True, **options)
        key[:], value[:] = before
        others = ~sees[:, at]
        assert out[sees[:, at]].isnan().all()
        assert_as_accurate(out[others], rounded[0][others], exact[0][others], "out")
        assert_as_accurate(lse[others], rounded[1][others], exact[1][others], "lse")
        if batch_invariant and not feature.tree:  # then a tree's keys are summed in parts
            assert torch.equal(out[others], clean[0][others])
            assert torch.equal(lse[others], clean[1][others])


@on_every_cpu_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_queries", [1, 9])
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("window", [12, 13])  # begins at an odd key, or an even one
def test_an_infinite_value_makes_infinity_of_what_sees_it(
    implementation: Implementation,
    window: int,
    batch_invariant: bool,
    num_queries: int,
    dtype: torch.dtype,
) -> None:
    """Also the first one that is seen, with others of its block or tile before it."""
    case = Case("", ((num_queries, 40),), window=window)
    inputs, scoring = make_inputs(case, dtype, CPU), make_scoring(Feature("", case), CPU)
    first = 40 - num_queries - window + 1
    for at in (first, first + 1, 39):
        inputs.value_cache[inputs.block_table[0, at // 16], :, at % 16, 1] = torch.inf
        sees, _ = reference._relate(40, 0, 0, num_queries, scoring, CPU)
        options = {"batch_invariant": batch_invariant}
        out, lse = implementation.paged_attention(*inputs.tensors(), scoring, True, **options)
        assert out[sees[:, at], :, 1].isposinf().all()
        assert not out.isnan().any() and lse.isfinite().all()
        inputs.value_cache[inputs.block_table[0, at // 16], :, at % 16, 1] = 0


@on_every_cpu_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_tree", [False, True], ids=["chain", "tree"])
def test_other_heads_keep_their_bits(
    implementation: Implementation, is_tree: bool, dtype: torch.dtype
) -> None:
    """Though several heads, how many depends on the threads, are computed together."""
    # So many sequences that no thread lacks work and heads stay together.
    feature = Feature("", Case("", ((3, 60),) * 8, heads=(4, 2)), tree=is_tree)
    inputs, scoring = make_inputs(feature.case, dtype, CPU), make_scoring(feature, CPU)
    clean, _ = implementation.paged_attention(*inputs.tensors(), scoring, False)
    block, slot = inputs.block_table[0, 58 // 16], 58 % 16
    inputs.value_cache[block, 0, slot, 3] = torch.nan
    out, _ = implementation.paged_attention(*inputs.tensors(), scoring, False)
    assert out[:, :2].isnan().any() and torch.equal(out[:, 2:], clean[:, 2:])


@on_every_cpu_path
@pytest.mark.parametrize("window", [1, 3])
def test_a_new_token_may_lie_before_one_that_it_sees(
    implementation: Implementation, window: int
) -> None:
    """A chain that lies leaf first, and whose root has an infinite value."""
    inputs = make_inputs(Case("", ((4, 30),)), torch.float32, CPU)
    chain = torch.tensor([0b1111, 0b1110, 0b1100, 0b1000], dtype=torch.int32)
    scoring = Scoring(0.125, True, window, tree_mask=chain)
    sees, _ = reference._relate(30, 0, 0, 4, scoring, CPU)
    exact = reference.paged_attention(*inputs.tensors(torch.float64), scoring, True)
    rounded = reference.paged_attention(*inputs.tensors(), scoring, True)
    inputs.value_cache[inputs.block_table[0, 29 // 16], :, 29 % 16, 1] = torch.inf
    out, lse = implementation.paged_attention(*inputs.tensors(), scoring, True)
    others = ~sees[:, 29]
    assert others.sum() == 4 - window
    assert out[~others, :, 1].isposinf().all()
    assert_as_accurate(out[others], rounded[0][others], exact[0][others], "out")
    assert_as_accurate(lse, rounded[1], exact[1], "lse")


@every_implementation()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sequences", [((1, 41), (1, 0)), ((1, 300),), ((20, 90), (3, 3))], ids=["one", "split", "many"]
)
def test_a_score_of_infinity_makes_the_log_sum_exp_infinity(
    implementation: Implementation,
    sequences: tuple[tuple[int, int], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    case = Case("", sequences)
    inputs = make_inputs(case, dtype, device)
    inputs.key_cache[inputs.block_table[0, 1], :, 20 - case.block_size, 0] = torch.inf
    scoring = make_scoring(Feature("", case), device)
    exact, exact_lse = reference.paged_attention(*inputs.tensors(torch.float64), scoring, True)
    out, lse = implementation.paged_attention(*inputs.tensors(), scoring, True)
    infinite = exact_lse.isposinf()
    assert infinite.any() and not infinite.all() and exact[infinite].isnan().all()
    assert torch.equal(lse.isposinf(), infinite) and not lse.isnan().any()
    assert torch.equal(out.isnan(), exact.isnan())


@on_every_cpu_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sequences", [((1, 41),), ((3, 40),), ((20, 90),), ((1, 700),)], ids=str)
def test_a_query_whose_scores_are_minus_infinity_gets_nothing(
    implementation: Implementation, sequences: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> None:
    """Not even an infinite value, which a weight of 0 would make a NaN."""
    case = Case("", sequences)
    inputs = make_inputs(case, dtype, CPU)
    inputs.query[..., 0] = 1
    inputs.key_cache[..., 0] = -torch.inf
    inputs.value_cache[..., 1] = torch.inf
    scoring = make_scoring(Feature("", case), CPU)
    out, lse = implementation.paged_attention(*inputs.tensors(), scoring, True)
    assert out.eq(0).all() and lse.isneginf().all()


@every_implementation()
@pytest.mark.parametrize("num_queries", [1, 3])
def test_a_sink_of_infinity_makes_the_log_sum_exp_infinity(
    implementation: Implementation, num_queries: int, device: torch.device
) -> None:
    case = Case("", ((num_queries, 30),))
    inputs = make_inputs(case, torch.float32, device)
    scoring = make_scoring(Feature("", case, sinks=True), device)
    assert scoring.sinks is not None
    scoring.sinks[1] = torch.inf
    out, lse = implementation.paged_attention(*inputs.tensors(), scoring, True)
    assert lse[:, 1].isposinf().all() and out[:, 1].isnan().all()
    others = torch.tensor([0, 2, 3], device=device)
    assert lse[:, others].isfinite().all() and out[:, others].isfinite().all()


def test_the_reference_tells_no_number_from_no_key() -> None:
    case = Case("", ((1, 0), (2, 5)))
    inputs = make_inputs(case, torch.float32, CPU)
    inputs.key_cache[inputs.block_table[1, 0], :, 2, 3] = torch.nan
    out, lse = reference.paged_attention(
        *inputs.tensors(), make_scoring(Feature("", case), CPU), True
    )
    assert out[0].eq(0).all() and lse[0].isneginf().all()
    assert out[1:].isnan().all() and lse[1:].isnan().all()
    merged, _ = reference.merge_attention(out, lse, torch.zeros_like(out), torch.zeros_like(lse))
    assert merged[0].eq(0).all() and merged[1:].isnan().all()


@every_implementation()
@pytest.mark.parametrize("is_first", [False, True])
def test_a_merge_tells_no_number_from_no_key(
    implementation: Implementation, is_first: bool, device: torch.device
) -> None:
    """One part has a NaN score; the other has no key, or some."""
    out = torch.randn(4, 2, 64, device=device)
    unknown = (out * torch.nan, torch.full((4, 2), torch.nan, device=device))
    known = (out, torch.zeros(4, 2, device=device))
    known[1][:2] = -torch.inf
    parts = (*unknown, *known) if is_first else (*known, *unknown)
    merged, lse = implementation.merge_attention(*parts)
    assert merged.isnan().all() and lse.isnan().all()


@every_implementation()
def test_a_merge_of_what_is_no_finite_number_is_that_of_the_reference(
    implementation: Implementation, device: torch.device
) -> None:
    kinds = torch.tensor([torch.inf, -torch.inf, 0.0, torch.nan], device=device)
    lse_a, lse_b = (lse.contiguous() for lse in torch.meshgrid(kinds, kinds, indexing="ij"))
    out_a, out_b = torch.randn(2, 4, 4, 64, device=device)
    parts = out_a, lse_a, out_b, lse_b
    merged, lse = implementation.merge_attention(*parts)
    exact, exact_lse = reference.merge_attention(*(part.double() for part in parts))
    torch.testing.assert_close(merged, exact.float(), equal_nan=True)
    torch.testing.assert_close(lse, exact_lse.float(), equal_nan=True)
    assert lse[lse_a == torch.inf].tolist()[:3] == [torch.inf] * 3
    assert merged[lse_a == torch.inf].isnan().all()


@on_every_cpu_path
@pytest.mark.parametrize("num_queries", [1, 20])
@pytest.mark.parametrize("score", [1e10, -1e10])
def test_scores_with_more_digits_than_a_float_has(
    implementation: Implementation, score: float, num_queries: int
) -> None:
    """Equal keys have equal weights, however much of their score is lost to rounding."""
    inputs = make_inputs(Case("", ((num_queries, 40),)), torch.float32, CPU)
    for scale in torch.linspace(0.7, 0.8, 20).tolist():
        inputs.query.zero_()[..., 0] = 1.0
        inputs.key_cache.zero_()[..., 0] = score
        out, lse = implementation.paged_attention(*inputs.tensors(), Scoring(scale, False, 0), True)
        mean = inputs.value_cache[inputs.block_table[0, :3].long()]
        expected = mean.transpose(1, 2).flatten(0, 1)[:40].mean(0)
        group = out.shape[1] // expected.shape[0]
        expected = expected.repeat_interleave(group, 0).expand_as(out)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse, torch.full_like(lse, scale * score))
