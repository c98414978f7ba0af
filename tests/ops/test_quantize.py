"""Quantised pools: what codes mean, and what quantize_blocks and tag_blocks refuse."""

from __future__ import annotations

import re

import pytest
import torch

import kvkernels
from kvkernels import KVLayout, KVPool, QuantizedPool
from kvkernels.reference.quantize import dequantize_keys, dequantize_values, quantize_values

KINDS = ("int8", "int4")


def make_pool(layout: KVLayout, num_blocks: int = 3) -> KVPool:
    pool = KVPool(layout, num_blocks)
    pool.data.normal_()
    return pool


def quantize(pool: KVPool, kind: str) -> QuantizedPool:
    target = QuantizedPool(pool.layout, kind, pool.num_blocks)
    target.data.fill_(255)
    ids = torch.arange(pool.num_blocks)
    kvkernels.quantize_blocks(pool, ids, target, ids.flip(0))
    return target


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "layout", [(2, 3, 64, 64), (1, 1, 80, 16), (1, 2, 128, 256), (3, 2, 6, 16)], ids=str
)
def test_an_element_is_half_a_scale_away_at_most(
    layout: tuple[int, int, int, int], dtype: torch.dtype, kind: str
) -> None:
    pool = make_pool(KVLayout(*layout, dtype=dtype))
    pool.data[:, :, 0, :, :, 1] += 600  # like key biases of some models
    pool.data[0, 0, 1] = 0.5  # every value the same
    pool.data[1, 0, 0, 0] *= 1e-3
    target = quantize(pool, kind)
    levels = (1 << target.num_bits) - 1
    for layer in range(layout[0]):
        cache = target.cache(layer)
        keys = dequantize_keys(*cache[:2], torch.float64)
        values = dequantize_values(*cache[2:], layout[2], torch.float64)
        key_scales = cache.key_scales[..., 0].double()
        value_scales = cache.value_scales[..., 0].double()
        key_scales = key_scales.repeat_interleave(layout[3] // key_scales.shape[2], dim=2)
        value_scales = value_scales.repeat_interleave(layout[2] // value_scales.shape[3], dim=3)
        for got, scales, side in ((keys, key_scales, 0), (values, value_scales, 1)):
            want = pool.data[:, layer, side].flip(0).double()
            error = (got - want).abs()
            # Rounding the scale to float16 shifts the range's end.
            bound = scales * (0.5 + levels * 2**-11) + levels * 2**-25
            assert (error <= bound + 1e-6 * want.abs()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_again_the_codes_stay(kind: str) -> None:
    pool = make_pool(KVLayout(1, 2, 64, 64, torch.float32))
    first = quantize(pool, kind)
    cache = first.cache(0)
    again = KVPool(pool.layout, pool.num_blocks)
    again.data[:, 0, 0] = dequantize_keys(*cache[:2], torch.float32)
    again.data[:, 0, 1] = dequantize_values(*cache[2:], 64, torch.float32)
    second = QuantizedPool(pool.layout, kind, pool.num_blocks)
    ids = torch.arange(pool.num_blocks)
    kvkernels.quantize_blocks(again, ids, second, ids)
    changed = (second.cache(0).key_codes != cache.key_codes).double().mean()
    assert changed < 0.01  # a scale may come out one unit higher


@pytest.mark.parametrize("num_bits", [8, 4, 2])
def test_small_ranges_of_bfloat16_give_the_same_codes_again(num_bits: int) -> None:
    """Ranges with subnormal float16 scales: for some minima, every maximum."""
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16).float()
    numbers = numbers[
        (numbers.abs() < 65408) & ((numbers.abs() > 2**-30) | (numbers == 0))
    ].unique()
    generator = torch.Generator().manual_seed(0)
    for first in range(num_bits, len(numbers), 101):
        largest_range = (1 << num_bits) * 2.0**-14
        count = int((numbers <= numbers[first] + largest_range).sum()) - first
        greatest = torch.arange(count)
        inside = (torch.rand(count, 6, generator=generator) * (greatest[:, None] + 1)).long()
        places = torch.cat([torch.zeros(count, 1).long(), greatest[:, None], inside], 1)
        values = numbers[first + places].bfloat16()
        codes, scales = quantize_values(values, num_bits, 1)
        restored = dequantize_values(codes, scales, 8, torch.bfloat16)
        codes_again, scales_again = quantize_values(restored, num_bits, 1)
        assert torch.equal(codes_again, codes)
        assert torch.equal(scales_again.view(torch.int16), scales.view(torch.int16))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_do_not_overlap(kind: str) -> None:
    layout = KVLayout(2, 2, 64, 32)
    pool = QuantizedPool(layout, kind, 2)
    pool.data.zero_()
    for layer in range(2):
        for number, part in enumerate(pool.cache(layer)):
            part.view(torch.uint8).add_(1 + number)
    used = [part.numel() * part.element_size() for part in pool.cache(0)]
    counts = torch.bincount(pool.data.flatten().long(), minlength=5)
    assert counts[1:].tolist() == [2 * size for size in used]  # two layers
    assert pool.data.shape == (2, 2, pool.layer_bytes) and pool.layer_bytes % 64 == 0
    assert pool.capacity_bytes == pool.data.numel()


BAD_IDS = [
    (torch.tensor([0, 3]), torch.tensor([0, 1]), "block_ids: expected 0 to 2, got 0 to 3"),
    (torch.tensor([0, -1]), torch.tensor([0, 1]), "block_ids: expected 0 to 2, got -1 to 0"),
    (torch.tensor([0, 1]), torch.tensor([0, 5]), "target_ids: expected 0 to 2, got 0 to 5"),
    (torch.tensor([0, 1]), torch.tensor([1, 1]), "target_ids: expected distinct ids, got one"),
    (torch.tensor([0, 1]), torch.tensor([1]), "target_ids: expected int64 ids of shape [2]"),
    (torch.tensor([0, 1]).int(), torch.tensor([0, 1]), "block_ids: expected int64 ids of shape"),
]


@pytest.mark.parametrize(("ids", "targets", "message"), BAD_IDS)
def test_refuses_bad_ids(ids: torch.Tensor, targets: torch.Tensor, message: str) -> None:
    pool = make_pool(KVLayout(1, 1, 16, 16))
    target = QuantizedPool(pool.layout, "int8", 3)
    target.data.fill_(7)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        kvkernels.quantize_blocks(pool, ids, target, targets)
    assert (target.data == 7).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e6, 65504.0, -65440.0])
def test_refuses_what_float16_does_not_hold(value: float) -> None:
    pool = make_pool(KVLayout(2, 1, 16, 16))
    pool.data[1, 1, 1, 0, 3, 5] = value
    target = QuantizedPool(pool.layout, "int4", 3)
    target.data.fill_(7)
    with pytest.raises(ValueError, match="block_ids: expected elements that float16 holds"):
        kvkernels.quantize_blocks(pool, torch.tensor([0, 1]), target, torch.tensor([0, 1]))
    assert (target.data == 7).all()
    kvkernels.quantize_blocks(pool, torch.tensor([0]), target, torch.tensor([0]))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_largest_elements_are_restored_as_numbers(kind: str) -> None:
    pool = make_pool(KVLayout(1, 1, 32, 64, dtype=torch.float16))
    pool.data[0, 0, :, 0, 3, 5] = 65408.0
    pool.data[0, 0, :, 0, 4, 6] = -65408.0
    target = QuantizedPool(pool.layout, kind, 1)
    kvkernels.quantize_blocks(pool, torch.tensor([0]), target, torch.tensor([0]))
    for scales in (target.cache(0).key_scales, target.cache(0).value_scales):
        assert scales.isfinite().all()


def test_refuses_pools_that_do_not_fit() -> None:
    layout = KVLayout(1, 1, 16, 16)
    with pytest.raises(ValueError, match="kind: expected one of"):
        QuantizedPool(layout, "int3", 1)
    with pytest.raises(ValueError, match="num_blocks: expected 1 to"):
        QuantizedPool(layout, "int8", 0)
    with pytest.raises(ValueError, match="layout: expected an even head_dim for int4, got 15"):
        QuantizedPool(KVLayout(1, 1, 15, 16), "int4", 1)
    with pytest.raises(ValueError, match="layer: expected 0 to 0, got 1"):
        QuantizedPool(layout, "int8", 1).cache(1)
    ids = torch.tensor([0])
    other = QuantizedPool(KVLayout(1, 2, 16, 16), "int8", 1)
    with pytest.raises(ValueError, match="target: expected blocks of shape"):
        kvkernels.quantize_blocks(make_pool(layout), ids, other, ids)


def test_a_tag_tells_the_kind_of_a_block_and_keeps_its_id() -> None:
    ids = torch.tensor([0, 5, (1 << 28) - 1], dtype=torch.int32)
    assert torch.equal(kvkernels.tag_blocks(ids, "float"), ids)
    for kind, number in (("int8", 1), ("int4", 2)):
        tagged = kvkernels.tag_blocks(ids, kind)
        assert torch.equal(tagged >> 28, torch.full_like(ids, number))
        assert torch.equal(tagged & ((1 << 28) - 1), ids)
    with pytest.raises(ValueError, match="kind: expected one of"):
        kvkernels.tag_blocks(ids, "int2")
    with pytest.raises(ValueError, match=r"block_ids: expected dtype torch\.int32"):
        kvkernels.tag_blocks(ids.long(), "int8")
