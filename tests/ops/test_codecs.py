"""The codecs: the same bytes from every implementation, verified and restored."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest
import torch

import kvkernels
from kvkernels import CODECS, BlockFormat, EncodedBlocks, KVLayout, KVPool, native
from kvkernels.reference import codecs as reference

# NumPy, which interprets Triton's kernels, says where numbers are not finite.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

LOSSY = ("q8", "k8v4", "q4", "k4v2", "q2")
# Layers, heads, head_dim, block_size: usual ones, and tails of vectors of every length.
SHAPES = [(2, 3, 64, 64), (1, 2, 128, 64), (2, 1, 80, 32), (1, 1, 256, 16), (1, 2, 12, 64)]
SHAPES += [(1, 1, 576, 32), (1, 1, 4, 16), (1, 1, 100, 128)]

# Of those, what Triton's interpreter, which is slow, has time for.
SMALL_SHAPES = [(2, 1, 80, 32), (1, 1, 256, 16), (1, 2, 12, 64), (1, 1, 4, 16)]

if not native.is_available:
    IMPLEMENTATIONS = ["reference"]
else:
    # The others share these three.
    ISAS = ("avx512", "avx2", "portable")
    IMPLEMENTATIONS = [isa for isa in ISAS if isa in native.available_isas()]
if importlib.util.find_spec("triton"):  # which is only on Linux
    IMPLEMENTATIONS.append("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def encode_by_triton(
    pool: KVPool,
    block_ids: torch.Tensor,
    block_format: BlockFormat,
    *,
    payloads: torch.Tensor | None = None,
    num_programs: int | None = None,
) -> EncodedBlocks:
    """Like `kvkernels.encode_blocks`, for a pool on the CPU."""
    from kvkernels.triton_kernels import codecs

    num_blocks = len(block_ids)
    row_bytes = max(block_format.payload_bytes, block_format.raw.payload_bytes)
    if payloads is None:
        payloads = torch.empty(num_blocks, row_bytes, dtype=torch.uint8)
    there = payloads.to(DEVICE)
    sums = torch.full((num_blocks, len(block_format.layers), 2), 7, device=DEVICE)
    is_raw = torch.ones(num_blocks, dtype=torch.bool, device=DEVICE)
    codecs.encode_blocks(
        *(pool.data.to(DEVICE), block_ids.to(DEVICE), block_format),
        *(there, sums, is_raw, num_programs),
    )
    payloads.copy_(there)
    return EncodedBlocks(block_format, payloads, sums.cpu(), is_raw.cpu())


def decode_by_triton(
    encoded: EncodedBlocks,
    pool: KVPool,
    block_ids: torch.Tensor,
    *,
    layers: range | None = None,
    num_programs: int | None = None,
) -> torch.Tensor:
    """Like `kvkernels.decode_blocks`, for a pool on the CPU."""
    from kvkernels.triton_kernels import codecs

    blocks = pool.data.to(DEVICE)
    is_good = torch.empty(encoded.sums.shape[:2], dtype=torch.bool, device=DEVICE)
    tensors = (encoded.payloads, encoded.sums, encoded.is_raw)
    codecs.decode_blocks(
        *(blocks, block_ids.to(DEVICE), encoded.block_format),
        *(tensor.to(DEVICE) for tensor in tensors),
        *(is_good, layers, num_programs),
    )
    pool.data.copy_(blocks)
    return is_good.cpu()[:, slice(layers.start, layers.stop) if layers else slice(None)]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """What the ops of `kvkernels` are for a test."""
    if request.param == "reference":
        yield request.param
    elif request.param == "triton":
        monkeypatch.setattr(kvkernels, "encode_blocks", encode_by_triton)
        monkeypatch.setattr(kvkernels, "decode_blocks", decode_by_triton)
        yield request.param
    else:
        with native.use_isa(request.param):
            yield request.param


def is_interpreted(implementation: str) -> bool:
    return implementation == "triton" and DEVICE.type == "cpu"


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
    codec: str, shape: tuple[int, int, int, int], dtype: torch.dtype, implementation: str
) -> None:
    if codec == "l12" and dtype != torch.bfloat16:
        pytest.skip("only for bfloat16")
    if is_interpreted(implementation) and shape not in SMALL_SHAPES:
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
def test_every_bfloat16_comes_back(codec: str, implementation: str) -> None:
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
def test_as_many_escapes_as_fit(num_far: int, implementation: str) -> None:
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
    codec: str, number: float, implementation: str
) -> None:
    pool = make_pool(KVLayout(2, 1, 64, 32), 3)
    pool.data[1, 1, 1, 0, 5, 63] = number
    encoded = encode(pool, codec)
    assert encoded.is_raw.tolist() == [False, True, False]
    assert_is_reference(encoded, pool)
    assert torch.equal(as_bytes(decode(encoded)[1]), as_bytes(pool.data[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("codec", LOSSY)
def test_the_largest_numbers_stay_finite(
    codec: str, dtype: torch.dtype, implementation: str
) -> None:
    """A scale is rounded, and so the last code may stand for more than the greatest element."""
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


def test_biases_of_keys_cost_nothing(implementation: str) -> None:
    """Channels 600 away from zero, as Qwen2's keys have: a scale of their own each."""
    pool = KVPool(KVLayout(1, 2, 64, 64, torch.float32), 1)
    pool.data.normal_()
    plain = decode(encode(pool, "q8"))[0, 0, 0] - pool.data[0, 0, 0]
    pool.data[0, 0, 0, :, :, 7] += 600
    biased = decode(encode(pool, "q8"))[0, 0, 0] - pool.data[0, 0, 0]
    assert biased[..., :7].abs().max() <= 2 * plain.abs().max()
    assert biased[..., 7].abs().max() <= 2 * plain.abs().max()


def test_a_codec_for_each_layer(implementation: str) -> None:
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
def test_a_flipped_bit_is_found_in_its_layer(codec: str, implementation: str) -> None:
    layout = KVLayout(3, 1, 16, 16)
    pool = make_pool(layout, 1)
    encoded = encode(pool, codec)
    generator = np.random.default_rng(0)
    num_bits = 8 if is_interpreted(implementation) else 100
    for bit in generator.integers(0, 8 * encoded.block_format.payload_bytes, num_bits):
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
def test_any_bytes_with_the_right_sums_decode_to_something(codec: str, implementation: str) -> None:
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


def test_rows_may_be_wider_and_lie_apart(implementation: str) -> None:
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


@pytest.mark.parametrize("num_programs", [1, 3])
@pytest.mark.parametrize("codecs", [["k8v4", "raw", "k8v4"], ["l12", "l12", "q2"]], ids=str)
def test_few_programs_write_the_same(
    codecs: list[str], num_programs: int, implementation: str
) -> None:
    pool = make_pool(KVLayout(3, 2, 32, 16), 3)
    pool.data[1, 2, 0, 1, 3, 3] = torch.inf  # the last layer's codec does not hold it
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
    """On a GPU nobody looks at the flags before; on the CPU that is an error."""
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
def test_some_layers_alone(layers: range, implementation: str) -> None:
    """Also of a raw block among others, and with a fault inside and outside of them."""
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
    for layers in (range(3), range(-1, 1), range(0, 2, 2)):
        with refuses(f"layers: expected a range within range(0, 2), got {layers}"):
            kvkernels.decode_blocks(encoded, pool, ids, layers=layers)
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
    with refuses("num_programs: expected a positive integer, got 0"):
        kvkernels.encode_blocks(pool, ids, block_format, num_programs=0)
    with refuses("num_programs: expected a positive integer, got 1.0"):
        kvkernels.decode_blocks(encoded, pool, ids, num_programs=1.0)


def test_no_blocks_are_no_work(implementation: str) -> None:
    pool = make_pool(KVLayout(1, 1, 64, 16), 1)
    ids = torch.empty(0, dtype=torch.int64)
    encoded = kvkernels.encode_blocks(pool, ids, BlockFormat(pool.layout, "q8"))
    assert encoded.payloads.shape[0] == 0
    assert kvkernels.decode_blocks(encoded, pool, ids).shape == (0, 1)
