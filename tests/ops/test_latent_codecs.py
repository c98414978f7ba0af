"""Codecs on latent rows, which are keys and values at once, and attention over restored ones."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from codec_blocks import (
    CODECS_AND_DTYPES,
    LOSSY,
    LOSSY_AND_DTYPES,
    as_bytes,
    assert_any_bytes_decode,
    assert_bits_are_found,
    assert_is_reference,
    decode,
    encode,
    is_interpreted,
    make_pool,
)

import kvkernels
from kvkernels import CODECS, BlockFormat, KVLayout, KVPool
from kvkernels.reference import codecs as reference

# NumPy, in which Triton's interpreter runs, warns of non-finite numbers.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def latents(
    num_layers: int,
    num_kv_heads: int,
    latent_dim: int,
    rotary_dim: int,
    block_size: int,
    dtype: torch.dtype = torch.bfloat16,
) -> KVLayout:
    head_dim = latent_dim + rotary_dim
    return KVLayout(num_layers, num_kv_heads, head_dim, block_size, dtype, latent_dim)


DEEPSEEK = (1, 1, 512, 64, 32)
# DeepSeek's; one smaller than a vector; two heads, with channels that fill no word; a tiny one
# without a rotary part.
SHAPES = [DEEPSEEK, (2, 1, 96, 16, 16), (2, 2, 20, 3, 16), (1, 1, 12, 0, 32), (2, 1, 4, 100, 16)]
SMALL = (2, 1, 20, 4, 16)


def fits(codec: str, shape: tuple[int, ...]) -> bool:
    try:
        BlockFormat(latents(*shape), codec)
    except ValueError:
        return False
    return True


CASES = [(*pair, shape) for pair in CODECS_AND_DTYPES for shape in SHAPES if fits(pair[0], shape)]


def rotary_of(pool: KVPool) -> torch.Tensor:
    return pool.data[..., pool.layout.latent_dim :]


@pytest.mark.parametrize(("codec", "dtype", "shape"), CASES, ids=str)
def test_bytes_are_those_of_the_reference(
    codec: str, dtype: torch.dtype, shape: tuple[int, ...], codec_implementation: str
) -> None:
    if is_interpreted(codec_implementation) and shape == DEEPSEEK and dtype != torch.bfloat16:
        pytest.skip("too much for the interpreter")
    pool = make_pool(latents(*shape, dtype), 3)
    pool.data[2, 0, 0, :, :, 1:3] = 0  # a scale of zero
    pool.data[1, 0] *= 2.0**-128  # some are subnormal
    encoded = encode(pool, codec)
    assert_is_reference(encoded, pool)
    restored = decode(encoded)
    for index in range(pool.num_blocks):
        want = reference.decode_block(encoded.payload(index), encoded.format_of(index))
        assert torch.equal(as_bytes(restored[index]), as_bytes(want))


@pytest.mark.parametrize("codec", ["raw", "q8"])
def test_a_layer_that_fills_no_line(codec: str, codec_implementation: str) -> None:
    """32 bytes in the pool take 64 in the payload; the next layer's bytes are not touched."""
    pool = make_pool(latents(3, 1, 1, 0, 16), 2)
    encoded = encode(pool, codec)
    assert_is_reference(encoded, pool)
    target = KVPool(pool.layout, 2)
    target.data.fill_(7.0)
    is_good = kvkernels.decode_blocks(encoded, target, torch.arange(2), layers=range(1, 2))
    assert is_good.all()
    assert (target.data[:, [0, 2]] == 7).all()
    if codec == "raw":
        assert torch.equal(target.data[:, 1], pool.data[:, 1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("codec", "dtype"), LOSSY_AND_DTYPES, ids=str)
def test_latents_are_half_a_scale_away_and_rotary_parts_stay(
    codec: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    pool = make_pool(latents(*shape, dtype), 2, seed=3)
    encoded = encode(pool, codec)
    restored = decode(encoded)
    assert not encoded.is_raw.any()
    rotary = restored[..., pool.layout.latent_dim :]
    assert torch.equal(as_bytes(rotary), as_bytes(rotary_of(pool)))
    steps = (1 << CODECS[codec].key_bits) - 1
    unit = torch.finfo(dtype).eps * pool.data.double().abs()
    errors = (restored.double() - pool.data.double()).abs()
    for index in range(pool.num_blocks):
        for layer, layer_format in enumerate(encoded.block_format.layers):
            side = layer_format.sides[0]
            payload = encoded.payload(index)[layer_format.offset :]
            scales = reference._read(payload, side.parts[1])[..., 0].double()
            scales = scales.repeat_interleave(pool.layout.block_size // side.num_groups, 1)
            # Rounding the scale to float16 shifts the range's end.
            bound = scales * (0.5 + steps * 2**-11) + steps * 2**-25
            place = (index, layer, 0, ..., slice(pool.layout.latent_dim))
            assert (errors[place] <= bound + unit[place]).all()


@pytest.mark.parametrize("codec", ["raw", "l12"])
def test_without_loss_every_bit_comes_back(codec: str, codec_implementation: str) -> None:
    """All 65,536 patterns, all NaNs included; "l12" writes such blocks raw."""
    pool = KVPool(latents(1, 1, 48, 16, 64), 16)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    pool.data.copy_(every.view(pool.data.shape))
    assert torch.equal(as_bytes(decode(encode(pool, codec))), as_bytes(pool.data))
    pool.data.uniform_(1, 1000)
    encoded = encode(pool, codec)
    assert not encoded.is_raw.any() or codec == "raw"
    assert torch.equal(as_bytes(decode(encoded)), as_bytes(pool.data))


@pytest.mark.parametrize("codec", CODECS)
def test_they_are_written_as_keys_are(codec: str) -> None:
    """Codes and scales of the latent (losslessly, whole rows) have the same bytes as keys'."""
    pool = make_pool(latents(1, 2, 32, 8, 32), 1)
    is_exact = codec in ("raw", "l12")
    width = pool.layout.head_dim if is_exact else 32
    plain = KVPool(replace(pool.layout, head_dim=width, latent_dim=None), 1)
    plain.data[0, 0, :] = pool.data[0, 0, 0, :, :, :width]
    ours, theirs = encode(pool, codec), encode(plain, codec)
    side = ours.block_format.layers[0].sides[0]
    keys = theirs.block_format.layers[0].sides[0]
    assert side.parts == keys.parts and side.num_groups == keys.num_groups
    assert torch.equal(ours.payload(0)[: side.end], theirs.payload(0)[: keys.end])
    rest = ours.payload(0)[side.end :]
    rotary = as_bytes(rotary_of(pool)).flatten()
    assert torch.equal(rest[: len(rotary)], rotary) or is_exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("codec", LOSSY)
def test_decoded_and_encoded_again_the_bytes_stay(codec: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        pool = make_pool(latents(*shape, dtype), 4, seed=1)
        first = encode(pool, codec)
        pool.data.copy_(decode(first))
        again = encode(pool, codec)
        for index in range(pool.num_blocks):
            assert torch.equal(again.payload(index), first.payload(index))


@pytest.mark.parametrize(("codec", "dtype"), LOSSY_AND_DTYPES, ids=str)
def test_any_rotary_part_is_held(codec: str, dtype: torch.dtype, codec_implementation: str) -> None:
    """Numbers in it that no code can hold are no reason to write the block raw."""
    pool = make_pool(latents(*SMALL, dtype), 2)
    pool.data *= 1e-3
    odd = [torch.finfo(dtype).max, torch.finfo(dtype).min, torch.inf, -torch.inf, torch.nan, -0.0]
    rotary_of(pool)[0, 0, 0, 0, : len(odd), 2] = torch.tensor(odd, dtype=dtype)
    rotary_of(pool)[1, ..., 1] = torch.finfo(dtype).max
    encoded = encode(pool, codec)
    assert not encoded.is_raw.any()
    assert_is_reference(encoded, pool)
    restored = KVPool.over(pool.layout, decode(encoded))
    assert torch.equal(as_bytes(rotary_of(restored)), as_bytes(rotary_of(pool)))
    latent = slice(pool.layout.latent_dim)
    rotary_of(pool).fill_(0)
    assert torch.equal(decode(encode(pool, codec))[..., latent], restored.data[..., latent])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 65536.0])
@pytest.mark.parametrize("codec", LOSSY)
def test_what_a_codec_does_not_hold_is_written_raw(
    codec: str, number: float, codec_implementation: str
) -> None:
    pool = make_pool(latents(*SMALL), 3)
    pool.data[1, 1, 0, 0, 5, 19] = number  # the latent's last channel
    encoded = encode(pool, codec)
    assert encoded.is_raw.tolist() == [False, True, False]
    assert_is_reference(encoded, pool)
    assert torch.equal(as_bytes(decode(encoded)[1]), as_bytes(pool.data[1]))


def test_a_codec_for_each_layer(codec_implementation: str) -> None:
    pool = make_pool(latents(4, 1, 32, 8, 16), 2)
    block_format = BlockFormat(pool.layout, ["raw", "k8v4", "q4", "l12"])
    encoded = kvkernels.encode_blocks(pool, torch.tensor([1, 0]), block_format)
    restored = decode(encoded)
    for layer, codec in enumerate(block_format.codecs):
        alone = KVPool(replace(pool.layout, num_layers=1), 2)
        alone.data[:, 0] = pool.data[[1, 0], layer]
        assert torch.equal(restored[:, layer], decode(encode(alone, codec))[:, 0])


@pytest.mark.parametrize("codec", CODECS)
def test_a_flipped_bit_is_found_in_its_layer(codec: str, codec_implementation: str) -> None:
    num_bits = 8 if is_interpreted(codec_implementation) else 100
    assert_bits_are_found(make_pool(latents(3, 1, 12, 4, 16), 1), codec, num_bits)


@pytest.mark.parametrize("codec", CODECS)
def test_any_bytes_with_the_right_sums_decode_to_something(
    codec: str, codec_implementation: str
) -> None:
    assert_any_bytes_decode(latents(*SMALL), codec)


def test_coded_latents_are_as_much_smaller_as_documented() -> None:
    """Ratios of bfloat16 bytes to stored bytes, for 512 latent and 64 rotary channels."""
    expected = {"raw": 1.0, "l12": 1.31, "q8": 1.71, "k8v4": 1.71, "q4": 2.57, "k4v2": 2.77}
    for codec, ratio in (expected | {"q2": 4.0}).items():
        block_format = BlockFormat(latents(8, 1, 512, 64, 64), codec)
        found = block_format.raw.payload_bytes / block_format.payload_bytes
        assert found == pytest.approx(ratio, rel=0.01)


# Allowed error of attention's output, relative to its norm: 1.5 times the measured error.
ERRORS = {"raw": 0.0, "l12": 0.0, "q8": 0.012, "k8v4": 0.012, "q4": 0.15, "k4v2": 0.18, "q2": 0.95}


@pytest.mark.parametrize("codec", CODECS)
def test_attention_over_restored_latents_is_that_of_the_codec(codec: str) -> None:
    """Keys have 576 channels, values are the first 512, and one KV head serves 16 query heads."""
    layout = latents(2, 1, 512, 64, 64)
    generator = torch.Generator().manual_seed(0)
    pool = KVPool(layout, 5)
    pool.data.copy_(torch.randn(pool.data.shape, generator=generator))
    rotary_of(pool).mul_(20)
    restored = KVPool.over(layout, decode(encode(pool, codec)))
    query = torch.randn(2, 16, 576, generator=generator).bfloat16()
    query[..., 512:] *= 0.05
    table = torch.tensor([[4, 0, 2], [1, 3, 0]], dtype=torch.int32)
    lens = torch.tensor([180, 70], dtype=torch.int32)
    for layer in range(2):
        before, after = (
            kvkernels.paged_attention(
                query, one.key_cache(layer), one.value_cache(layer), table, lens
            ).float()
            for one in (pool, restored)
        )
        assert before.shape == (2, 16, 512)
        assert (after - before).norm() <= ERRORS[codec] * before.norm()


def test_bad_arguments_are_named() -> None:
    def refuses(message: str):
        return pytest.raises(ValueError, match=re.escape(message))

    with refuses("codecs: expected a latent_dim that is a multiple of 4 for q2, got 6"):
        BlockFormat(latents(1, 1, 6, 2, 16), "q2")
    with refuses("codecs: expected a head_dim that is a multiple of 2 for l12, got 7"):
        BlockFormat(latents(1, 1, 4, 3, 16), "l12")
    with refuses("codecs: expected a head_dim of at most 1024 for q8, got 1025"):
        BlockFormat(latents(1, 1, 1, 1024, 16), "q8")
    layout = latents(1, 1, 4, 4, 16)
    plain = replace(layout, latent_dim=None)
    with refuses("block_format: expected one of KVLayout("):
        kvkernels.encode_blocks(KVPool(layout, 1), torch.arange(1), BlockFormat(plain, "raw"))
    with refuses("layout: expected keys and values, got latents: KVLayout("):
        kvkernels.QuantizedPool(layout, "int8", 1)
