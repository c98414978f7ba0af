"""Blocks of a pool to payloads of records, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvkernels import native
from kvkernels.checks import check_device, check_dtype, check_last_stride, check_shape
from kvkernels.codecs import BlockFormat
from kvkernels.pool import KVPool
from kvkernels.reference import codecs as reference


@dataclass(frozen=True)
class EncodedBlocks:
    """Payloads of blocks, and what verifies them.

    Attributes:
        block_format: How those are written that are not `is_raw`.
        payloads: ``[num_blocks, row_bytes]``, uint8: a payload is the first `payload_bytes` of a
            row.
        sums: ``[num_blocks, num_layers, 2]``, int64: of the u32 words w_i of a layer's bytes, the
            sum of w_i and that of (i + 1) * w_i, modulo 2^64.
        is_raw: ``[num_blocks]``, bool: which blocks are written in `block_format.raw`, since the
            codec does not hold them.
    """

    block_format: BlockFormat
    payloads: torch.Tensor
    sums: torch.Tensor
    is_raw: torch.Tensor

    def payload(self, index: int) -> torch.Tensor:
        """View of one block's payload, `[payload_bytes]`."""
        return self.payloads[index, : self.format_of(index).payload_bytes]

    def format_of(self, index: int) -> BlockFormat:
        """How one block is written."""
        return self.block_format.raw if self.is_raw[index] else self.block_format


def encode_blocks(
    pool: KVPool,
    block_ids: torch.Tensor,
    block_format: BlockFormat,
    *,
    payloads: torch.Tensor | None = None,
    num_programs: int | None = None,
) -> EncodedBlocks:
    """Write blocks as payloads of records, in one pass with their checksums.

    The same bytes on every processor. What a codec of fewer bits makes of an element is at most
    half a scale away from it; "raw" and "l12" keep all bits. A block that its codec does not hold
    (elements that are not finite or past 65,408, exponents too far apart) is written raw.

    On a GPU nobody waits for the device: the results are there once the current stream is.

    Args:
        pool: Holds the blocks, full of numbers in every slot.
        block_ids: ``[num_blocks]``, int64, which blocks; on the pool's device.
        block_format: How; of the pool's layout.
        payloads: Where: ``[num_blocks, row_bytes]``, uint8, last stride 1, rows of
            ``block_format.payload_bytes`` or more; on the pool's device, or of a pool on a GPU in
            pinned memory of the host. Default a new tensor. In rows too narrow for raw blocks
            (``block_format.raw.payload_bytes``) a block that must be raw is not written: all that
            is right of it is its `is_raw`.
        num_programs: On a GPU, at most so many programs run at once, each on one multiprocessor,
            so that others remain to whoever computes beside; default no bound.

    Raises:
        ValueError: If layouts, shapes, dtypes or devices disagree, or (on the CPU; on a GPU looking
            would stop the stream) a block id is out of range.
    """
    _check_blocks(pool, block_ids, block_format)
    _check_num_programs(num_programs)
    device = pool.data.device
    num_blocks, num_layers = len(block_ids), len(block_format.layers)
    if payloads is None:
        row_bytes = max(block_format.payload_bytes, block_format.raw.payload_bytes)
        payloads = torch.empty(num_blocks, row_bytes, dtype=torch.uint8, device=device)
    _check_payloads(payloads, num_blocks, block_format.payload_bytes, device)
    sums = torch.empty(num_blocks, num_layers, 2, dtype=torch.int64, device=device)
    if device.type == "cuda":
        from kvkernels.triton_kernels import codecs as triton_kernels

        is_raw = torch.empty(num_blocks, dtype=torch.bool, device=device)
        ids = block_ids.contiguous()
        triton_kernels.encode_blocks(
            pool.data, ids, block_format, payloads, sums, is_raw, num_programs
        )
        return EncodedBlocks(block_format, payloads, sums, is_raw)
    is_good = torch.empty(num_blocks, num_layers, dtype=torch.bool, device="cpu")
    _encode(pool, block_ids.contiguous(), block_format, payloads, sums, is_good)
    encoded = EncodedBlocks(block_format, payloads, sums, ~is_good.all(1))
    if payloads.shape[1] < block_format.raw.payload_bytes:
        return encoded
    for index in encoded.is_raw.nonzero()[:, 0].tolist():
        one = slice(index, index + 1)
        raw = block_format.raw
        ids = block_ids[one].contiguous()
        _encode(pool, ids, raw, payloads[one], sums[one], is_good[one])
    return encoded


def decode_blocks(
    encoded: EncodedBlocks,
    pool: KVPool,
    block_ids: torch.Tensor,
    *,
    layers: range | None = None,
    num_programs: int | None = None,
) -> torch.Tensor:
    """Write payloads into blocks of a pool, each layer once its checksum has been found right.

    Args:
        encoded: What `encode_blocks` gave, or a tier brought back; rows need lie only as far apart
            as `layers` are long, since nothing else is read. For a pool on a GPU, all on its
            device, or the payloads in pinned memory of the host, from which they are read twice.
        pool: Gets the blocks; of the format's layout.
        block_ids: ``[num_blocks]``, int64, distinct: where they go.
        layers: Neighbouring layers, to write only those; default all.
        num_programs: As for `encode_blocks`.

    Returns:
        ``[num_blocks, num_layers]``, bool: whether the layer's bytes are those that its checksum is
        of. Where not, the pool was not touched. Of `layers` only, where those are given.

    Raises:
        ValueError: Like `encode_blocks`; if `layers` are not layers of the pool in their order; and
            (on the CPU alone) if ids are not distinct or rows are too narrow for raw blocks among
            them; on a GPU such blocks are not right.
    """
    block_format = encoded.block_format
    _check_blocks(pool, block_ids, block_format)
    num_blocks, num_layers = len(block_ids), len(block_format.layers)
    check_shape("encoded.is_raw", encoded.is_raw, (num_blocks,))
    check_dtype("encoded.is_raw", encoded.is_raw, torch.bool)
    check_shape("encoded.sums", encoded.sums, (num_blocks, num_layers, 2))
    check_dtype("encoded.sums", encoded.sums, torch.int64)
    device = pool.data.device
    check_device("encoded.is_raw", encoded.is_raw, device)
    check_device("encoded.sums", encoded.sums, device)
    layers = range(num_layers) if layers is None else layers
    if layers.step != 1 or not 0 <= layers.start <= layers.stop <= num_layers:
        raise ValueError(f"layers: expected a range within {range(num_layers)}, got {layers}")
    _check_num_programs(num_programs)
    if device.type == "cuda":
        return _decode_cuda(encoded, pool, block_ids, layers, num_programs)
    _check_payloads(encoded.payloads, num_blocks, 0, device)
    if len(set(block_ids.tolist())) != num_blocks:
        raise ValueError("block_ids: expected distinct ids, got one twice")
    num_raw = int(encoded.is_raw.sum())
    if num_raw in (0, num_blocks):
        alike = block_format.raw if num_raw else block_format
        return _decode_alike(encoded, pool, block_ids, alike, layers)
    is_good = torch.empty(num_blocks, len(layers), dtype=torch.bool, device="cpu")
    for is_chosen, alike in (
        (~encoded.is_raw, block_format),
        (encoded.is_raw, block_format.raw),
    ):
        rows = is_chosen.nonzero()[:, 0]
        chosen = EncodedBlocks(
            block_format, encoded.payloads[rows], encoded.sums[rows], encoded.is_raw[rows]
        )
        is_good[rows] = _decode_alike(chosen, pool, block_ids[rows], alike, layers)
    return is_good


def _decode_cuda(
    encoded: EncodedBlocks,
    pool: KVPool,
    block_ids: torch.Tensor,
    layers: range,
    num_programs: int | None,
) -> torch.Tensor:
    """Decode blocks of which only the device knows which are written raw."""
    from kvkernels.triton_kernels import codecs as triton_kernels

    block_format, payloads = encoded.block_format, encoded.payloads
    num_blocks, device = len(block_ids), pool.data.device
    held = [block_format]
    if payloads.shape[-1] >= block_format.raw.payload_bytes:
        held.append(block_format.raw)
    span = _span(held, layers)
    _check_payloads(payloads, num_blocks, block_format.payload_bytes, device, span)
    is_good = torch.empty(num_blocks, len(block_format.layers), dtype=torch.bool, device=device)
    triton_kernels.decode_blocks(
        pool.data,
        block_ids.contiguous(),
        block_format,
        payloads,
        encoded.sums.contiguous(),
        encoded.is_raw.contiguous(),
        is_good,
        layers,
        num_programs,
    )
    return is_good[:, layers.start : layers.stop]


def _decode_alike(
    encoded: EncodedBlocks,
    pool: KVPool,
    block_ids: torch.Tensor,
    block_format: BlockFormat,
    layers: range,
) -> torch.Tensor:
    """Decode blocks that are all written in `block_format`."""
    span = _span([block_format], layers)
    device = pool.data.device
    _check_payloads(encoded.payloads, len(block_ids), block_format.payload_bytes, device, span)
    is_good = torch.empty(len(block_ids), len(layers), dtype=torch.bool, device="cpu")
    cut = slice(layers.start, layers.stop)
    _decode(
        pool.data[:, cut],
        block_ids.contiguous(),
        block_format,
        layers,
        encoded.payloads,
        encoded.sums[:, cut].contiguous(),
        is_good,
    )
    return is_good


def _check_blocks(pool: KVPool, block_ids: torch.Tensor, block_format: BlockFormat) -> None:
    if pool.layout != block_format.layout:
        raise ValueError(f"block_format: expected one of {pool.layout}, got {block_format}")
    check_shape("block_ids", block_ids, (None,))
    check_dtype("block_ids", block_ids, torch.int64)
    check_device("block_ids", block_ids, pool.data.device)
    if block_ids.is_cuda:  # looking at them would stop the stream
        return
    if len(block_ids) and not 0 <= int(block_ids.min()) <= int(block_ids.max()) < pool.num_blocks:
        raise ValueError(
            f"block_ids: expected 0 to {pool.num_blocks - 1}, got {int(block_ids.min())} to"
            f" {int(block_ids.max())}"
        )


def _check_num_programs(num_programs: int | None) -> None:
    if num_programs is not None and (not isinstance(num_programs, int) or num_programs < 1):
        raise ValueError(f"num_programs: expected a positive integer, got {num_programs!r}")


def _check_payloads(
    payloads: torch.Tensor,
    num_blocks: int,
    row_bytes: int,
    device: torch.device,
    distance: int | None = None,
) -> None:
    """Rows of so many bytes or more, that far apart or more; default as far as they are long."""
    distance = row_bytes if distance is None else distance
    check_shape("payloads", payloads, (num_blocks, None))
    check_dtype("payloads", payloads, torch.uint8)
    if device.type != "cuda" or not payloads.is_pinned():
        check_device("payloads", payloads, device)
    check_last_stride("payloads", payloads)
    if payloads.shape[1] < row_bytes:
        raise ValueError(
            f"payloads: expected rows of {row_bytes} bytes or more, got {payloads.shape[1]}"
        )
    if num_blocks > 1 and payloads.stride(0) < distance:
        raise ValueError(
            f"payloads: expected rows that lie {distance} bytes apart or more, got"
            f" {payloads.stride(0)}"
        )
    if payloads.data_ptr() % 4 or payloads.stride(0) % 4:  # they hold words
        raise ValueError(
            "payloads: expected rows that start at multiples of 4 bytes, got address"
            f" {payloads.data_ptr():#x} and rows {payloads.stride(0)} bytes apart"
        )


def _span(block_formats: Sequence[BlockFormat], layers: range) -> int:
    """Bytes from where the first of some layers begins to where the last one ends."""
    cuts = [one.cut(layers) for one in block_formats if layers]
    starts, ends = [cut.start for cut in cuts], [cut.stop for cut in cuts]
    return max(ends, default=0) - min(starts, default=0)


def _encode(
    pool: KVPool,
    block_ids: torch.Tensor,
    block_format: BlockFormat,
    payloads: torch.Tensor,
    sums: torch.Tensor,
    is_good: torch.Tensor,
) -> None:
    if native.is_available:
        native.encode_blocks(pool.data, block_ids, block_format.table, payloads, sums, is_good)
        return
    for index, block_id in enumerate(block_ids.tolist()):
        payload = reference.encode_block(pool.data[block_id], block_format)
        is_good[index] = payload is not None
        if payload is not None:
            payloads[index, : len(payload)] = payload
            sums[index] = reference.sum_layers(payload, block_format)


def _decode(
    blocks: torch.Tensor,
    block_ids: torch.Tensor,
    block_format: BlockFormat,
    layers: range,
    payloads: torch.Tensor,
    sums: torch.Tensor,
    is_good: torch.Tensor,
) -> None:
    """Decode `layers` into `blocks`, which are cut to them, as `sums` and `is_good` are."""
    cut = slice(layers.start, layers.stop)
    if native.is_available:
        table = block_format.table[cut]
        native.decode_blocks(blocks, block_ids, table, payloads, sums, is_good)
        return
    for index, block_id in enumerate(block_ids.tolist()):
        payload = payloads[index, : block_format.payload_bytes]
        is_good[index] = (reference.sum_layers(payload, block_format)[cut] == sums[index]).all(1)
        block = reference.decode_block(payload, block_format)[cut]
        blocks[block_id, is_good[index]] = block[is_good[index]]
