"""Attention over quantised blocks as our pools never hold them: caches may come from other code."""

from dataclasses import dataclass

import pytest
import torch
from attention_inputs import (
    DTYPES,
    Case,
    assert_attends,
    make_inputs,
)
from implementations import Implementation, every_implementation
from test_attention_features import quantize_some

from accuracy import assert_as_accurate
from kvkernels.quantized_cache import QuantizedCache, tag_blocks
from kvkernels.reference import attention as reference
from kvkernels.reference.quantize import quantize_values
from kvkernels.scoring import Scoring


@dataclass(frozen=True)
class Codes:
    """Random codes of one kind beside floats."""

    name: str
    kind: str
    head_dim: int
    value_dim: int
    key_groups: int = 1
    value_groups: int = 1
    num_blocks: int = 3
    block_size: int = 32
    dtype: torch.dtype = torch.float16
    is_float8: bool = False

    def __str__(self) -> str:
        return self.name

    def cache(self, device: torch.device) -> QuantizedCache:
        def codes(width: int) -> torch.Tensor:
            row_bytes = width if self.kind == "int8" else width // 2
            shape = (self.num_blocks, 1, self.block_size, row_bytes)
            return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

        def scales(*shape: int) -> torch.Tensor:
            largest = 0.02 if self.kind == "int8" else 0.2
            return torch.rand(self.num_blocks, 1, *shape, 2, device=device).half() * largest

        return QuantizedCache(
            codes(self.head_dim),
            scales(self.key_groups, self.head_dim),
            codes(self.value_dim),
            scales(self.block_size, self.value_groups),
        )


CODES = [
    Codes("odd_halves", "int4", 66, 66),
    Codes("odd_halves_beside_float8", "int4", 66, 66, is_float8=True),
    Codes("odd_halves_of_values", "int8", 64, 66),
    Codes("groups_of_3_channels", "int8", 96, 96, value_groups=32),
    Codes("groups_of_1_channel", "int8", 64, 64, value_groups=64),
    Codes("groups_of_5_channels", "int4", 80, 80, 2, value_groups=16),
    Codes("groups_of_6_channels", "int8", 96, 96, 2, value_groups=16),
    Codes("no_blocks", "int8", 64, 64, num_blocks=0),
    Codes("tiles_of_one_group", "int4", 128, 128, block_size=64, dtype=torch.bfloat16),
    Codes("tiles_of_narrow_values", "int4", 128, 64, 2, block_size=128, dtype=torch.bfloat16),
    Codes("tiles_of_narrow_keys", "int4", 64, 128, 4, 2, block_size=64, dtype=torch.bfloat16),
]


@every_implementation()
@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("num_queries", [1, 3])
def test_reads_codes_of_unusual_widths_and_groups(
    implementation: Implementation, num_queries: int, codes: Codes, device: torch.device
) -> None:
    keys, values = (
        torch.randn(3, 1, codes.block_size, width, device=device).to(codes.dtype)
        for width in (codes.head_dim, codes.value_dim)
    )
    if codes.is_float8:
        keys, values = keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn)
    ints = {"dtype": torch.int32, "device": device}
    table, lens = (
        torch.tensor([[2, 0, 1]], **ints),
        torch.tensor([3 * codes.block_size - 6], **ints),
    )
    sums = None if num_queries == 1 else torch.tensor([0, num_queries], **ints)
    if codes.num_blocks:
        table[0, 1] = tag_blocks(table[0, 1:2] + 1, codes.kind)[0]
    query = torch.randn(num_queries, 2, codes.head_dim, device=device).to(codes.dtype)
    rest = (table, lens, sums, Scoring(0.125), True)
    options = {f"{codes.kind}_cache": codes.cache(device)}
    exact = reference.paged_attention(
        query.double(), keys.double(), values.double(), *rest, **options
    )
    rounded = reference.paged_attention(
        query, keys.to(codes.dtype), values.to(codes.dtype), *rest, **options
    )
    out, lse = implementation.paged_attention(query, keys, values, *rest, **options)
    assert_as_accurate(out, rounded[0], exact[0], "out")
    assert_as_accurate(lse, rounded[1], exact[1], "lse")


@every_implementation()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("num_queries", [1, 20])
def test_reads_scales_of_either_sign(
    implementation: Implementation,
    num_queries: int,
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Our quantiser gives no negative scales, but a cache may come from other code."""
    inputs = make_inputs(Case("", ((num_queries, 64),), block_size=32), dtype, device)
    cache = quantize_some(inputs, (kind,), 64, 64)[f"{kind}_cache"]
    for codes, scales in (cache[:2], cache[2:]):
        codes.copy_(torch.randint(0, 256, codes.shape))
        scales.copy_(torch.randn(scales.shape) / (1 << (7 if kind == "int8" else 3)))
    cache.value_scales[:, :, ::2, :, 0] *= -1
    cache.value_scales[-1, ..., 0] = -cache.value_scales[-1, ..., 0].abs()
    arguments, options = (Scoring(0.125), True), {f"{kind}_cache": cache}
    out, lse = implementation.paged_attention(*inputs.tensors(), *arguments, **options)
    assert_attends(out, lse, inputs, *arguments, **options)


@every_implementation()
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_one_key_outweighs_the_others(
    implementation: Implementation, kind: str, device: torch.device
) -> None:
    """Rounded to integers, the others' weights are 0: what each adds by mistake is not hidden."""
    case = Case("", ((1, 192),), heads=(8, 2), head_dim=128, block_size=64)
    inputs, arguments = make_inputs(case, torch.bfloat16, device), (Scoring(8.0), True)
    options = quantize_some(inputs, (kind,), 128, 128)
    out, lse = implementation.paged_attention(*inputs.tensors(), *arguments, **options)
    assert_attends(out, lse, inputs, *arguments, **options)


@every_implementation()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(
    ("score", "size"), [(-22.5, 1e3), (11.25, 1e-4)], ids=["large_values", "small_values"]
)
def test_one_key_has_values_of_another_size(
    implementation: Implementation,
    score: float,
    size: float,
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Large ones and next to no weight, or small ones and most of the weight."""
    case = Case("", ((1, 64),), heads=(8, 2), head_dim=128, block_size=64)
    inputs, arguments = make_inputs(case, dtype, device), (Scoring(0.125), True)
    inputs.query[..., 0] = 4
    inputs.key_cache[..., 0] = 0
    inputs.key_cache[:, :, 5, 0] = 2 * score  # the other channels change little of it
    inputs.value_cache[:, :, 5] *= size
    options = quantize_some(inputs, (kind,), 128, 128)
    out, lse = implementation.paged_attention(*inputs.tensors(), *arguments, **options)
    assert_attends(out, lse, inputs, *arguments, **options)


@every_implementation()
@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
def test_what_an_earlier_call_left_does_no_harm(
    implementation: Implementation, kind: str, device: torch.device
) -> None:
    """Nor past the last key of a block that is not full, in memory that calls share."""
    case = Case("", ((1, 64),), heads=(8, 2), head_dim=128, block_size=64)
    inputs, arguments = make_inputs(case, torch.bfloat16, device), (Scoring(0.125), True)
    options = {} if kind == "float" else quantize_some(inputs, (kind,), 128, 128)
    query, *rest = inputs.tensors()
    implementation.paged_attention(query * torch.nan, *rest, *arguments, **options)
    inputs.seq_lens.fill_(40)
    out, lse = implementation.paged_attention(query, *rest, *arguments, **options)
    assert_attends(out, lse, inputs, *arguments, **options)


@every_implementation()
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_many_scales_of_few_channels(
    implementation: Implementation, kind: str, device: torch.device
) -> None:
    """More scales than in our pools, as a cache may come from other code."""
    case = Case("", ((1, 64),), head_dim=256, block_size=32)
    inputs = make_inputs(case, torch.float16, device)
    values = inputs.value_cache.cpu().clone()  # quantising poisons the original
    cache = quantize_some(inputs, (kind,), 256, 256)[f"{kind}_cache"]
    bits, scales = 8 if kind == "int8" else 4, []
    for block in range(len(values)):
        codes, few = quantize_values(values[block], bits, 16)
        cache.value_codes[len(values) - block] = codes.to(device)
        scales.append(few)
    scales.append(torch.zeros_like(scales[0]))  # for block 0, which is unused
    cache = cache._replace(value_scales=torch.stack(scales[::-1]).to(device))
    arguments, options = (Scoring(0.0625), True), {f"{kind}_cache": cache}
    out, lse = implementation.paged_attention(*inputs.tensors(), *arguments, **options)
    assert_attends(out, lse, inputs, *arguments, **options)


@every_implementation()
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_reads_codes_at_odd_addresses(
    implementation: Implementation, kind: str, device: torch.device
) -> None:
    """Addresses that our pools do not have, and where a kernel cannot load two codes at once."""
    inputs = make_inputs(Case("", ((1, 100),), block_size=32), torch.float16, device)
    cache = quantize_some(inputs, (kind,), 64, 64)[f"{kind}_cache"]
    odd = []
    for codes in (cache.key_codes, cache.value_codes):
        moved = torch.empty(codes.numel() + 1, dtype=torch.uint8, device=device)[1:]
        odd.append(moved.view(codes.shape).copy_(codes))
    moved_cache = cache._replace(key_codes=odd[0], value_codes=odd[1])
    arguments = (*inputs.tensors(), Scoring(0.125), True)
    expected = reference.paged_attention(*arguments, **{f"{kind}_cache": cache})
    exact = reference.paged_attention(
        *inputs.tensors(torch.float64), Scoring(0.125), True, **{f"{kind}_cache": cache}
    )
    found = implementation.paged_attention(*arguments, **{f"{kind}_cache": moved_cache})
    assert_as_accurate(found[0], expected[0], exact[0], "out")
    assert_as_accurate(found[1], expected[1], exact[1], "lse")
