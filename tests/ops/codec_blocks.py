"""Shared by the tests of codecs: the implementations, and blocks like real ones."""

from __future__ import annotations

import importlib.util

import numpy as np
import torch

import kvkernels
from kvkernels import CODECS, BlockFormat, EncodedBlocks, KVLayout, KVPool, native
from kvkernels.reference import codecs as reference

LOSSY = ("q8", "k8v4", "q4", "k4v2", "q2")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CODECS_AND_DTYPES = [
    (codec, dtype)
    for codec in CODECS
    for dtype in DTYPES
    if codec != "l12" or dtype == torch.bfloat16
]
LOSSY_AND_DTYPES = [(codec, dtype) for codec in LOSSY for dtype in DTYPES]

if not native.is_available:
    IMPLEMENTATIONS = ["reference"]
else:
    # The other tests use these four.
    ISAS = ("avx512_bf16", "avx512", "avx2", "portable")
    IMPLEMENTATIONS = [isa for isa in ISAS if isa in native.available_isas()]
if importlib.util.find_spec("triton"):  # which exists only on Linux
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


def is_interpreted(implementation: str) -> bool:
    return implementation == "triton" and DEVICE.type == "cpu"


def make_pool(layout: KVLayout, num_blocks: int, seed: int = 0) -> KVPool:
    """Channels of different magnitudes, some far from zero in all tokens, as in real keys."""
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
    """The decoded blocks, all of which must verify."""
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


def assert_bits_are_found(pool: KVPool, codec: str, num_bits: int) -> None:
    """Flip some bits of a payload, one at a time: only its layer is refused and not written.

    Args:
        pool: One block.
        codec: Writes it.
        num_bits: How many to flip.
    """
    encoded = encode(pool, codec)
    generator = np.random.default_rng(0)
    for bit in generator.integers(0, 8 * encoded.block_format.payload_bytes, num_bits):
        payloads = encoded.payloads.clone()
        payloads[0, bit // 8] ^= 1 << int(bit % 8)
        broken = EncodedBlocks(encoded.block_format, payloads, encoded.sums, encoded.is_raw)
        target = KVPool(pool.layout, 2)
        target.data.fill_(7.0)
        is_good = kvkernels.decode_blocks(broken, target, torch.tensor([1]))
        offsets = [one.offset for one in encoded.block_format.layers]
        hit = sum(offset <= bit // 8 for offset in offsets) - 1
        assert is_good[0].tolist() == [layer != hit for layer in range(pool.layout.num_layers)]
        assert (target.data[0] == 7).all() and (target.data[1, hit] == 7).all()


def assert_any_bytes_decode(layout: KVLayout, codec: str) -> None:
    """Codes, scales and escapes that no encoder writes, under right sums, decode as the reference
    does, and nothing is read or written elsewhere.
    """
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
