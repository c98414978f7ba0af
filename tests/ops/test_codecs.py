"""Codecs: every implementation writes the same bytes, verifies and restores them."""

from __future__ import annotations

import pytest
import torch
from codec_blocks import (
    CODECS_AND_DTYPES,
    IMPLEMENTATIONS,
    LOSSY,
    LOSSY_AND_DTYPES,
    as_bytes,
    assert_any_bytes_decode,
    assert_bits_are_found,
    assert_is_reference,
    decode,
    decode_by_triton,
    encode,
    encode_by_triton,
    is_interpreted,
    make_pool,
)

import kvkernels
from kvkernels import CODECS, BlockFormat, EncodedBlocks, KVLayout, KVPool
from kvkernels.reference import codecs as reference

# NumPy, in which Triton's interpreter runs, warns of non-finite numbers.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

# Layers, heads, head_dim, block_size: usual ones, and every length of vector tails.
SHAPES = [(2, 3, 64, 64), (1, 2, 128, 64), (2, 1, 80, 32), (1, 1, 256, 16), (1, 2, 12, 64)]
SHAPES += [(1, 1, 576, 32), (1, 1, 4, 16), (1, 1, 100, 128)]

# A subset for Triton's interpreter, which is slow.
SMALL_SHAPES = {
    torch.bfloat16: [(2, 1, 80, 32), (1, 1, 256, 16), (1, 2, 12, 64), (1, 1, 4, 16)],
    torch.float16: [(2, 1, 80, 32), (1, 1, 4, 16)],
    torch.float32: [(1, 1, 256, 16), (1, 2, 12, 64)],
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("codec", "dtype"), CODECS_AND_DTYPES, ids=str)
def test_bytes_are_those_of_the_reference(
    codec: str, shape: tuple[int, int, int, int], dtype: torch.dtype, codec_implementation: str
) -> None:
    if is_interpreted(codec_implementation) and shape not in SMALL_SHAPES[dtype]:
        pytest.skip("too much for the interpreter")
    pool = make_pool(KVLayout(*shape, dtype=dtype), 3)
    pool.data[2, 0, 1] = 0  # a scale of zero
    pool.data[1, 0] *= 2.0**-128  # some are subnormal
    encoded = encode(pool, codec)
    assert_is_reference(encoded, pool)
    restored = decode(encoded)
    for index in range(pool.num_blocks):
        want = reference.decode_block(encoded.payload(index), encoded.format_of(index))
        assert torch.equal(as_bytes(restored[index]), as_bytes(want))


@pytest.mark.parametrize(
    ("codec", "dtype"), [pair for pair in CODECS_AND_DTYPES if pair[1] != torch.float32], ids=str
)
def test_decoded_and_encoded_again_the_bytes_stay(codec: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        pool = make_pool(KVLayout(*shape, dtype=dtype), 4, seed=1)
        first = encode(pool, codec)
        pool.data.copy_(decode(first))
        again = encode(pool, codec)
        for index in range(pool.num_blocks):
            assert torch.equal(again.payload(index), first.payload(index))


def make_small_pool(dtype: torch.dtype, num_blocks: int) -> KVPool:
    """Channels and tokens with numbers around float16's smallest normal one."""
    generator = torch.Generator().manual_seed(4)
    pool = KVPool(KVLayout(1, 1, 64, 32, dtype), num_blocks)

    def powers(*shape: int) -> torch.Tensor:
        return 10 ** torch.empty(shape).uniform_(-8, -1, generator=generator)

    for side, shape in ((0, (num_blocks, 1, 1, 1, 64)), (1, (num_blocks, 1, 1, 32, 1))):
        numbers = torch.randn(pool.data[:, :, 0].shape, generator=generator) * powers(*shape)
        signs = torch.randint(-1, 2, shape, generator=generator)
        pool.data[:, :, side].copy_(numbers + signs * powers(*shape))
    return pool


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("codec", LOSSY)
def test_sets_with_subnormal_scales_encode_to_the_same_bytes_again(
    codec: str, dtype: torch.dtype, codec_implementation: str
) -> None:
    """With subnormal scales all write the same bytes; 16-bit floats encode to the same again."""
    pool = make_small_pool(dtype, 4 if is_interpreted(codec_implementation) else 64)
    encoded = encode(pool, codec)
    assert_is_reference(encoded, pool)
    restored = KVPool.over(pool.layout, decode(encoded))
    again = encode(restored, codec)
    assert dtype == torch.float32 or torch.equal(again.sums, encoded.sums)


@pytest.mark.parametrize(("codec", "dtype"), LOSSY_AND_DTYPES, ids=str)
def test_an_element_is_half_a_scale_away_at_most(codec: str, dtype: torch.dtype) -> None:
    pools = [make_pool(KVLayout(*shape, dtype=dtype), 2, seed=2) for shape in SHAPES]
    for pool in [*pools, make_small_pool(dtype, 64)]:
        encoded = encode(pool, codec)
        errors = (decode(encoded).double() - pool.data.double()).abs()
        unit = torch.finfo(dtype).eps * pool.data.double().abs()
        for index in range(pool.num_blocks):
            for layer, layer_format in enumerate(encoded.block_format.layers):
                payload = encoded.payload(index)[layer_format.offset :]
                for side in layer_format.sides:
                    scales = reference._read(payload, side.parts[1])[..., 0].double()
                    length = pool.layout.block_size if side.is_key else pool.layout.head_dim
                    axis = 1 if side.is_key else 2
                    scales = scales.repeat_interleave(length // side.num_groups, axis)
                    # A scale is rounded to float16, a small one twice: that shifts the end.
                    steps = (1 << side.bits) - 1
                    bound = scales * (0.5 + steps * 2**-11) + steps * 2**-24
                    bound += unit[index, layer, side.plane]
                    assert (errors[index, layer, side.plane] <= bound).all()


@pytest.mark.parametrize("codec", ["raw", "l12"])
def test_every_bfloat16_comes_back(codec: str, codec_implementation: str) -> None:
    """All 65,536 patterns, all NaNs included, among others of similar magnitude."""
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
def test_as_many_escapes_as_fit(num_far: int, codec_implementation: str) -> None:
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
def test_what_a_codec_does_not_hold_is_written_raw(
    codec: str, number: float, codec_implementation: str
) -> None:
    pool = make_pool(KVLayout(2, 1, 64, 32), 3)
    pool.data[1, 1, 1, 0, 5, 63] = number
    encoded = encode(pool, codec)
    assert encoded.is_raw.tolist() == [False, True, False]
    assert_is_reference(encoded, pool)
    assert torch.equal(as_bytes(decode(encoded)[1]), as_bytes(pool.data[1]))


@pytest.mark.parametrize(("codec", "dtype"), LOSSY_AND_DTYPES, ids=str)
def test_the_largest_numbers_stay_finite(
    codec: str, dtype: torch.dtype, codec_implementation: str
) -> None:
    """Rounding a scale up may make the last code exceed the largest element."""
    pool = make_pool(KVLayout(1, 1, 64, 32, dtype), 4)
    for block, greatest in enumerate((65408.0, 65440.0)):
        pool.data[block, 0, :, 0, ::3] = greatest
        pool.data[block, 0, :, 0, 1::3] = -greatest
    for seed, block in enumerate(pool.data[2:]):
        generator = torch.Generator().manual_seed(seed)
        block.copy_(torch.empty(block.shape).uniform_(-65408, 65408, generator=generator))
    encoded = encode(pool, codec)
    # bfloat16's own neighbours of these are 65280 and 65536.
    assert encoded.is_raw.tolist() == [dtype == torch.bfloat16, True, False, False]
    assert_is_reference(encoded, pool)
    assert decode(encoded).isfinite().all()


def test_biases_of_keys_cost_nothing(codec_implementation: str) -> None:
    """Channels around 600, as in Qwen2's keys, lose no accuracy: each has its own scale."""
    pool = KVPool(KVLayout(1, 2, 64, 64, torch.float32), 1)
    pool.data.normal_()
    plain = decode(encode(pool, "q8"))[0, 0, 0] - pool.data[0, 0, 0]
    pool.data[0, 0, 0, :, :, 7] += 600
    biased = decode(encode(pool, "q8"))[0, 0, 0] - pool.data[0, 0, 0]
    assert biased[..., :7].abs().max() <= 2 * plain.abs().max()
    assert biased[..., 7].abs().max() <= 2 * plain.abs().max()


def test_a_codec_for_each_layer(codec_implementation: str) -> None:
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
def test_a_flipped_bit_is_found_in_its_layer(codec: str, codec_implementation: str) -> None:
    num_bits = 8 if is_interpreted(codec_implementation) else 100
    assert_bits_are_found(make_pool(KVLayout(3, 1, 16, 16), 1), codec, num_bits)


@pytest.mark.parametrize("codec", CODECS)
def test_any_bytes_with_the_right_sums_decode_to_something(
    codec: str, codec_implementation: str
) -> None:
    assert_any_bytes_decode(KVLayout(2, 1, 20, 16), codec)


def test_sizes_are_those_of_the_table() -> None:
    """Stored bytes against bfloat16's, by head_dim."""
    expected = {"raw": 1.0, "l12": 1.31, "q8": 1.9, "k8v4": 2.46, "q4": 3.2, "k4v2": 4.57}
    for head_dim in (64, 128, 256):
        for codec, ratio in expected.items():
            block_format = BlockFormat(KVLayout(8, 8, head_dim, 64), codec)
            found = block_format.raw.payload_bytes / block_format.payload_bytes
            assert found == pytest.approx(ratio, rel=0.015)


def test_rows_may_be_wider_and_lie_apart(codec_implementation: str) -> None:
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


@pytest.mark.parametrize("start", [0, 4, 32, 64])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("codec", ["l12", "q8", "k4v2"])
def test_rows_and_pools_may_begin_anywhere(
    codec: str, head_dim: int, start: int, codec_implementation: str
) -> None:
    if codec_implementation == "triton" and (start, head_dim) not in ((0, 64), (32, 64)):
        pytest.skip("too much for the interpreter")
    pool = make_pool(KVLayout(2, 2, head_dim, 32), 3)
    pool.data[1, 0, 0, 1, 3, 5] = 2.0**-30  # an escape
    block_format = BlockFormat(pool.layout, codec)
    row_bytes = block_format.raw.payload_bytes
    whole = torch.full((3, row_bytes + 128), 170, dtype=torch.uint8)
    ids = torch.arange(3)
    encoded = kvkernels.encode_blocks(
        pool, ids, block_format, payloads=whole[:, start : start + row_bytes]
    )
    assert_is_reference(encoded, pool)
    assert (whole[:, :start] == 170).all()
    assert (whole[:, start + block_format.payload_bytes :] == 170).all()
    memory = torch.full((pool.data.numel() + 128,), 7, dtype=torch.bfloat16)
    inside = memory[start // 2 : start // 2 + pool.data.numel()].view_as(pool.data)
    assert kvkernels.decode_blocks(encoded, KVPool.over(pool.layout, inside), ids).all()
    for index in range(3):
        want = reference.decode_block(encoded.payload(index), block_format)
        assert torch.equal(inside[index].view(torch.int16), want.view(torch.int16))
    assert (memory[: start // 2] == 7).all() and (memory[start // 2 + inside.numel() :] == 7).all()


@pytest.mark.parametrize("codec", LOSSY)
def test_rows_too_narrow_for_raw_blocks_do_not_take_them(
    codec: str, codec_implementation: str
) -> None:
    pool = make_pool(KVLayout(2, 1, 64, 16), 3)
    pool.data[1, 1, 1, 0, 5, 63] = torch.inf
    block_format = BlockFormat(pool.layout, codec)
    num_bytes = block_format.payload_bytes
    whole = torch.full((3, num_bytes + 64), 170, dtype=torch.uint8)
    ids = torch.arange(3)
    narrow = kvkernels.encode_blocks(pool, ids, block_format, payloads=whole[:, :num_bytes])
    assert narrow.is_raw.tolist() == [False, True, False]
    assert (whole[:, num_bytes:] == 170).all()
    wide = encode(pool, codec)
    for row in (0, 2):
        assert torch.equal(narrow.payload(row), wide.payload(row))
        assert torch.equal(narrow.sums[row], wide.sums[row])


@pytest.mark.parametrize("num_programs", [1, 3])
@pytest.mark.parametrize("codecs", [["k8v4", "raw", "k8v4"], ["l12", "l12", "q2"]], ids=str)
def test_few_programs_write_the_same(
    codecs: list[str], num_programs: int, codec_implementation: str
) -> None:
    pool = make_pool(KVLayout(3, 2, 32, 16), 3)
    pool.data[1, 2, 0, 1, 3, 3] = torch.inf  # the last layer's codec cannot hold it
    ids = torch.tensor([2, 1, 0])
    block_format = BlockFormat(pool.layout, codecs)
    encoded = kvkernels.encode_blocks(pool, ids, block_format, num_programs=num_programs)
    assert encoded.is_raw.tolist() == [False, codecs[2] != "raw", False]
    pool.data.copy_(pool.data[ids])
    assert_is_reference(encoded, pool)
    target = KVPool(pool.layout, 3)
    assert kvkernels.decode_blocks(encoded, target, ids, num_programs=num_programs).all()
    assert torch.equal(as_bytes(target.data[ids]), as_bytes(decode(encoded)))


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="Triton is only on Linux")
def test_rows_too_narrow_for_raw_blocks_are_not_right() -> None:
    """A GPU cannot check the flags before; on the CPU it is an error."""
    pool = make_pool(KVLayout(2, 1, 16, 16), 2)
    encoded = encode_by_triton(pool, torch.arange(2), BlockFormat(pool.layout, "q4"))
    payloads = encoded.payloads[:, : encoded.block_format.payload_bytes]
    is_raw = torch.tensor([True, False])
    narrow = EncodedBlocks(encoded.block_format, payloads, 0 * encoded.sums, is_raw)
    narrow.sums[1] = encoded.sums[1]
    target = KVPool(pool.layout, 2)
    target.data.fill_(7.0)
    is_good = decode_by_triton(narrow, target, torch.arange(2))
    assert is_good.tolist() == [[False, False], [True, True]]
    assert (target.data[0] == 7).all() and not (target.data[1] == 7).all()


@pytest.mark.parametrize("layers", [range(1), range(1, 3), range(3, 4)], ids=str)
def test_some_layers_are_decoded_without_the_others(
    layers: range, codec_implementation: str
) -> None:
    """Also with a raw block among others, and with damage inside and outside of these layers."""
    pool = make_pool(KVLayout(4, 2, 32, 16), 3)
    pool.data[1, 0, 0, 0, 0, 0] = torch.inf
    block_format = BlockFormat(pool.layout, ["q8", "l12", "q8", "q4"])
    encoded = kvkernels.encode_blocks(pool, torch.arange(3), block_format)
    whole = decode(encoded)
    encoded.payloads[2, block_format.layers[2].offset] ^= 1
    target = KVPool(pool.layout, 3)
    target.data.fill_(7.0)
    is_good = kvkernels.decode_blocks(encoded, target, torch.arange(3), layers=layers)
    wanted = [[True] * 4, [True] * 4, [True, True, False, True]]
    assert is_good.tolist() == [row[layers.start : layers.stop] for row in wanted]
    for block in range(3):
        for layer in range(4):
            is_written = layer in layers and wanted[block][layer]
            expected = whole[block, layer] if is_written else torch.full_like(whole[0, 0], 7)
            assert torch.equal(as_bytes(target.data[block, layer]), as_bytes(expected))


def test_no_blocks_are_no_work(codec_implementation: str) -> None:
    pool = make_pool(KVLayout(1, 1, 64, 16), 1)
    ids = torch.empty(0, dtype=torch.int64)
    encoded = kvkernels.encode_blocks(pool, ids, BlockFormat(pool.layout, "q8"))
    assert encoded.payloads.shape[0] == 0
    assert kvkernels.decode_blocks(encoded, pool, ids).shape == (0, 1)
