"""The codecs: the same bytes from every implementation, verified and restored."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import kvkernels
from kvkernels import CODECS, BlockFormat, EncodedBlocks, KVLayout, KVPool, native
from kvkernels.reference import codecs as reference

LOSSY = ("q8", "k8v4", "q4", "k4v2", "q2")
# Layers, heads, head_dim, block_size: usual ones, and tails of vectors of every length.
SHAPES = [(2, 3, 64, 64), (1, 2, 128, 64), (2, 1, 80, 32), (1, 1, 256, 16), (1, 2, 12, 64)]
SHAPES += [(1, 1, 576, 32), (1, 1, 4, 16), (1, 1, 100, 128)]

if not native.is_available:
    ISAS = ["reference"]
else:
    # The others share these three.
    ISAS = [isa for isa in ("avx512", "avx2", "portable") if isa in native.available_isas()]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    if request.param == "reference":
        yield request.param
        return
    with native.use_isa(request.param):
        yield request.param


def make_pool(layout: KVLayout, num_blocks: int, seed: int = 0) -> KVPool:
    """Channels of different sizes, some far from zero in all tokens, as real keys have."""
    generator = torch.Generator().manual_seed(seed)

    def powers(*shape: int) -> torch.Tensor:
        return 10 ** torch.empty(shape).uniform_(-3, 2, generator=generator)

    pool = KVPool(layout, num_blocks)
    shape = tuple(pool.data.shape)
    channels = (*shape[:4], 1, shape[5])
    numbers = torch.randn(shape, generator=generator) * powers(*channels)
    numbers += torch.randn(channels, generator=generator) * powers(*channels)
    pool.data.copy_(numbers)
    return pool


def encode(pool: KVPool, codec: str) -> EncodedBlocks:
    ids = torch.arange(pool.num_blocks)
    return kvkernels.encode_blocks(pool, ids, BlockFormat(pool.layout, codec))


def decode(encoded: EncodedBlocks) -> torch.Tensor:
    """The blocks, all of which must be found right."""
    pool = KVPool(encoded.block_format.layout, len(encoded.is_raw))
    pool.data.fill_(float("nan"))
    assert kvkernels.decode_blocks(encoded, pool, torch.arange(pool.num_blocks)).all()
    return pool.data


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def assert_is_reference(encoded: EncodedBlocks, pool: KVPool) -> None:
    for index, block in enumerate(pool.data):
        want = reference.encode_block(block, encoded.block_format)
        assert encoded.is_raw[index] == (want is None)
        if want is None:
            want = reference.encode_block(block, encoded.block_format.raw)
        assert want is not None
        assert torch.equal(encoded.payload(index), want)
        sums = reference.sum_layers(want, encoded.format_of(index))
        assert torch.equal(encoded.sums[index], sums)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_bytes_are_those_of_the_reference(
    codec: str, shape: tuple[int, int, int, int], dtype: torch.dtype, isa: str
) -> None:
    if codec == "l12" and dtype != torch.bfloat16:
        pytest.skip("only for bfloat16")
    pool = make_pool(KVLayout(*shape, dtype=dtype), 3)
    pool.data[2, 0, 1] = 0  # a scale of zero
    encoded = encode(pool, codec)
    assert_is_reference(encoded, pool)
    restored = decode(encoded)
    for index in range(pool.num_blocks):
        want = reference.decode_block(encoded.payload(index), encoded.format_of(index))
        assert torch.equal(as_bytes(restored[index]), as_bytes(want))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_decoded_and_encoded_again_the_bytes_stay(codec: str, dtype: torch.dtype) -> None:
    if codec == "l12" and dtype != torch.bfloat16:
        pytest.skip("only for bfloat16")
    for shape in SHAPES:
        pool = make_pool(KVLayout(*shape, dtype=dtype), 4, seed=1)
        first = encode(pool, codec)
        pool.data.copy_(decode(first))
        again = encode(pool, codec)
        for index in range(pool.num_blocks):
            assert torch.equal(again.payload(index), first.payload(index))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("codec", LOSSY)
def test_an_element_is_half_a_scale_away_at_most(codec: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        pool = make_pool(KVLayout(*shape, dtype=dtype), 2, seed=2)
        encoded = encode(pool, codec)
        errors = (decode(encoded).double() - pool.data.double()).abs()
        unit = torch.finfo(dtype).eps * pool.data.double().abs()
        for index in range(pool.num_blocks):
            for layer, layer_format in enumerate(encoded.block_format.layers):
                payload = encoded.payload(index)[layer_format.offset :]
                keys = reference._read(payload, layer_format.keys.parts[1])[..., 0].double()
                values = reference._read(payload, layer_format.values.parts[1])[..., 0].double()
                keys = keys.repeat_interleave(pool.layout.block_size // keys.shape[1], 1)
                values = values.repeat_interleave(pool.layout.head_dim // values.shape[2], 2)
                for side, scales, bits in (
                    (0, keys, CODECS[codec].key_bits),
                    (1, values, CODECS[codec].value_bits),
                ):
                    # A scale is rounded to float16, and so may all of the range be missed by.
                    steps = (1 << bits) - 1
                    bound = scales * (0.5 + steps * 2**-11) + steps * 2**-25
                    assert (errors[index, layer, side] <= bound + unit[index, layer, side]).all()


@pytest.mark.parametrize("codec", ["raw", "l12"])
def test_every_bfloat16_comes_back(codec: str, isa: str) -> None:
    """All 65,536 patterns, payloads of NaN included, beside others of like size."""
    layout = KVLayout(1, 1, 64, 64)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    pool = KVPool(layout, 8)
    pool.data.copy_(every.view(pool.data.shape))
    encoded = encode(pool, codec)
    assert torch.equal(as_bytes(decode(encoded)), as_bytes(pool.data))
    # Sorted by magnitude, a channel spans few exponents: the codec itself, not raw, holds them.
    order = torch.arange(1 << 15).view(-1, 64, 64)  # [blocks, channel, token]
    spread = order.transpose(1, 2).reshape(8, 1, 64, 64).to(torch.int16)
    pool.data[:, :, 0] = spread.view(torch.bfloat16)[:, None]
    pool.data[:, :, 1] = (spread | -(1 << 15)).view(torch.bfloat16)[:, None]
    encoded = encode(pool, codec)
    assert not encoded.is_raw.any() or codec == "raw"
    assert torch.equal(as_bytes(decode(encoded)), as_bytes(pool.data))


@pytest.mark.parametrize("num_far", [16, 17])
def test_as_many_escapes_as_fit(num_far: int, isa: str) -> None:
    pool = KVPool(KVLayout(2, 2, 64, 64), 1)
    pool.data.fill_(1.0)
    pool.data[0, 1, 1, 1].view(-1)[torch.arange(num_far) * 251] = 2.0**-15
    pool.data[0, 0, 0, 1].view(-1)[::3] = 0.0  # an exponent of zero needs no escape
    encoded = encode(pool, "l12")
    assert encoded.is_raw.tolist() == [num_far > 16]
    assert_is_reference(encoded, pool)
    assert torch.equal(as_bytes(decode(encoded)), as_bytes(pool.data))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 65536.0])
@pytest.mark.parametrize("codec", LOSSY)
def test_what_a_codec_does_not_hold_is_written_raw(codec: str, number: float, isa: str) -> None:
    pool = make_pool(KVLayout(2, 1, 64, 32), 3)
    pool.data[1, 1, 1, 0, 5, 63] = number
    encoded = encode(pool, codec)
    assert encoded.is_raw.tolist() == [False, True, False]
    assert_is_reference(encoded, pool)
    assert torch.equal(as_bytes(decode(encoded)[1]), as_bytes(pool.data[1]))


def test_biases_of_keys_cost_nothing(isa: str) -> None:
    """Channels 600 away from zero, as Qwen2's keys have: a scale of their own each."""
    pool = KVPool(KVLayout(1, 2, 64, 64, torch.float32), 1)
    pool.data.normal_()
    plain = decode(encode(pool, "q8"))[0, 0, 0] - pool.data[0, 0, 0]
    pool.data[0, 0, 0, :, :, 7] += 600
    biased = decode(encode(pool, "q8"))[0, 0, 0] - pool.data[0, 0, 0]
    assert biased[..., :7].abs().max() <= 2 * plain.abs().max()
    assert biased[..., 7].abs().max() <= 2 * plain.abs().max()


def test_a_codec_for_each_layer(isa: str) -> None:
    layout = KVLayout(4, 2, 64, 64)
    pool = make_pool(layout, 2)
    block_format = BlockFormat(layout, ["raw", "q8", "q4", "l12"])
    encoded = kvkernels.encode_blocks(pool, torch.tensor([1, 0]), block_format)
    restored = decode(encoded)
    for layer, codec in enumerate(block_format.codecs):
        alone = KVPool(KVLayout(1, 2, 64, 64), 2)
        alone.data[:, 0] = pool.data[[1, 0], layer]
        assert torch.equal(restored[:, layer], decode(encode(alone, codec))[:, 0])


@pytest.mark.parametrize("codec", CODECS)
def test_a_flipped_bit_is_found_in_its_layer(codec: str, isa: str) -> None:
    layout = KVLayout(3, 1, 16, 16)
    pool = make_pool(layout, 1)
    encoded = encode(pool, codec)
    generator = np.random.default_rng(0)
    for bit in generator.integers(0, 8 * encoded.block_format.payload_bytes, 100):
        payloads = encoded.payloads.clone()
        payloads[0, bit // 8] ^= 1 << int(bit % 8)
        broken = EncodedBlocks(encoded.block_format, payloads, encoded.sums, encoded.is_raw)
        target = KVPool(layout, 2)
        target.data.fill_(7.0)
        is_good = kvkernels.decode_blocks(broken, target, torch.tensor([1]))
        offsets = [one.offset for one in encoded.block_format.layers]
        hit = sum(offset <= bit // 8 for offset in offsets) - 1
        assert is_good[0].tolist() == [layer != hit for layer in range(3)]
        assert (target.data[0] == 7).all() and (target.data[1, hit] == 7).all()


@pytest.mark.parametrize("codec", CODECS)
def test_any_bytes_with_the_right_sums_decode_to_something(codec: str, isa: str) -> None:
    """Codes, scales and escapes that no encoder writes: nothing is read or written elsewhere."""
    layout = KVLayout(2, 1, 20, 16)
    block_format = BlockFormat(layout, codec)
    generator = torch.Generator().manual_seed(3)
    shape = (8, block_format.payload_bytes)
    payloads = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    sums = torch.stack([reference.sum_layers(row, block_format) for row in payloads])
    encoded = EncodedBlocks(block_format, payloads, sums, torch.zeros(8, dtype=torch.bool))
    restored = decode(encoded)
    for index in range(8):
        want = reference.decode_block(payloads[index], block_format)
        same = as_bytes(restored[index]) == as_bytes(want)
        is_nan = restored[index].isnan() & want.isnan()
        assert (same | as_bytes(is_nan).repeat_interleave(layout.dtype.itemsize, -1)).all()


def test_sizes_are_those_of_the_table() -> None:
    """Stored bytes against bfloat16's, by head_dim."""
    expected = {"raw": 1.0, "l12": 1.31, "q8": 1.9, "k8v4": 2.46, "q4": 3.2, "k4v2": 4.57}
    for head_dim in (64, 128, 256):
        for codec, ratio in expected.items():
            block_format = BlockFormat(KVLayout(8, 8, head_dim, 64), codec)
            found = block_format.raw.payload_bytes / block_format.payload_bytes
            assert found == pytest.approx(ratio, rel=0.015)


def test_rows_may_be_wider_and_lie_apart(isa: str) -> None:
    pool = make_pool(KVLayout(2, 1, 64, 16), 3)
    block_format = BlockFormat(pool.layout, "q4")
    row_bytes = block_format.raw.payload_bytes
    whole = torch.full((3, row_bytes + 192), 170, dtype=torch.uint8)
    encoded = kvkernels.encode_blocks(
        pool, torch.arange(3), block_format, payloads=whole[:, 64 : 64 + row_bytes]
    )
    assert_is_reference(encoded, pool)
    assert (whole[:, :64] == 170).all()
    assert (whole[:, 64 + block_format.payload_bytes :] == 170).all()


def refuses(message: str):
    return pytest.raises(ValueError, match=re.escape(message))


def test_bad_arguments_are_named() -> None:
    layout = KVLayout(2, 1, 64, 16)
    pool = make_pool(layout, 2)
    ids = torch.arange(2)
    block_format = BlockFormat(layout, "q8")
    with refuses("codecs: expected one of ('raw', 'l12', 'q8', 'k8v4', 'q4', 'k4v2', 'q2'), got"):
        BlockFormat(layout, "q7")
    with refuses("codecs: expected one name or 2, one a layer, got 3"):
        BlockFormat(layout, ["q8"] * 3)
    with refuses("codecs: expected blocks of bfloat16 for l12, got torch.float16"):
        BlockFormat(KVLayout(1, 1, 64, dtype=torch.float16), "l12")
    with refuses("codecs: expected a head_dim that is a multiple of 4 for k4v2, got 6"):
        BlockFormat(KVLayout(1, 1, 6), "k4v2")
    with refuses("codecs: expected a head_dim of at most 1024 for q8, got 2048"):
        BlockFormat(KVLayout(1, 1, 2048), "q8")
    with refuses("block_format: expected one of KVLayout(num_layers=2"):
        kvkernels.encode_blocks(pool, ids, BlockFormat(KVLayout(1, 1, 64, 16), "q8"))
    with refuses("block_ids: expected 0 to 1, got 0 to 2"):
        kvkernels.encode_blocks(pool, torch.arange(3), block_format)
    with refuses("block_ids: expected dtype torch.int64, got torch.int32"):
        kvkernels.encode_blocks(pool, ids.int(), block_format)
    row_bytes = block_format.raw.payload_bytes
    with refuses(f"payloads: expected rows of {row_bytes} bytes or more, got 64"):
        payloads = torch.empty(2, 64, dtype=torch.uint8)
        kvkernels.encode_blocks(pool, ids, block_format, payloads=payloads)
    rows = torch.empty(2 * row_bytes + 8, dtype=torch.uint8)
    with refuses(f"payloads: expected rows that lie {row_bytes} bytes apart or more, got 0"):
        one = rows[:row_bytes].expand(2, -1)
        kvkernels.encode_blocks(pool, ids, block_format, payloads=one)
    with refuses("payloads: expected rows that start at multiples of 4 bytes, got address"):
        odd = rows[1 : 1 + 2 * row_bytes].view(2, row_bytes)
        kvkernels.encode_blocks(pool, ids, block_format, payloads=odd)
    encoded = encode(pool, "q8")
    with refuses("block_ids: expected distinct ids, got one twice"):
        kvkernels.decode_blocks(encoded, pool, torch.tensor([1, 1]))
    with refuses("payloads: expected shape [2, any], got [1, "):
        short = EncodedBlocks(block_format, encoded.payloads[:1], encoded.sums, encoded.is_raw)
        kvkernels.decode_blocks(short, pool, ids)
    with refuses("encoded.sums: expected shape [2, 2, 2], got [1, 2, 2]"):
        one = EncodedBlocks(block_format, encoded.payloads, encoded.sums[:1], encoded.is_raw)
        kvkernels.decode_blocks(one, pool, ids)
    with refuses("encoded.is_raw: expected shape [1], got [2]"):
        kvkernels.decode_blocks(encoded, pool, ids[:1])


def test_no_blocks_are_no_work() -> None:
    pool = make_pool(KVLayout(1, 1, 64, 16), 1)
    ids = torch.empty(0, dtype=torch.int64)
    encoded = kvkernels.encode_blocks(pool, ids, BlockFormat(pool.layout, "q8"))
    assert encoded.payloads.shape[0] == 0
    assert kvkernels.decode_blocks(encoded, pool, ids).shape == (0, 1)
