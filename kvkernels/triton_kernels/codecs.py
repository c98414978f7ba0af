"""Blocks of a pool to payloads, and back, with Triton kernels.

Writing::

    for each codec   layers of that codec -> codes, their sums, and which blocks they do not hold
    at the end       those blocks once more, as they are

and bringing back::

    sums of all layers -> which are good
    for each codec   good layers of that codec -> the pool
"""

from __future__ import annotations

import torch

from kvkernels.codecs import BlockFormat
from kvkernels.triton_kernels.codecs_plan import (
    holds_raw,
    plan_decode,
    plan_encode,
    plan_encode_raw,
    plan_sums,
)
from kvkernels.triton_kernels.codecs_work import Work
from kvkernels.triton_kernels.launch import device_of, run


def encode_blocks(
    blocks: torch.Tensor,
    block_ids: torch.Tensor,
    block_format: BlockFormat,
    payloads: torch.Tensor,
    sums: torch.Tensor,
    is_raw: torch.Tensor,
    num_programs: int | None = None,
) -> None:
    """Write blocks as payloads; see `kvkernels.encode_blocks`. Nobody waits for the device.

    Args:
        blocks: ``[num_blocks, *block_shape]``, a pool's data.
        block_ids: ``[num_rows]``, int64, contiguous.
        block_format: How.
        payloads: ``[num_rows, row_bytes]``, uint8, last stride 1, rows a multiple of 4 bytes apart;
            on the device, or in pinned memory of the host. Where they are too narrow for raw
            blocks, such are not written.
        sums: ``[num_rows, num_layers, 2]``, int64, contiguous, is written.
        is_raw: ``[num_rows]``, bool, contiguous, is written.
        num_programs: At most so many run at once and take multiprocessors from others; None for no
            bound.
    """
    if len(block_ids) == 0:
        return
    work = Work(blocks, block_ids, block_format, payloads, is_raw, device_of(blocks), num_programs)
    sums.zero_()
    is_raw.zero_()
    run(plan_encode(work, sums), blocks)
    if set(block_format.codecs) != {"raw"} and holds_raw(work):
        sums.masked_fill_(is_raw[:, None, None], 0)
        run(plan_encode_raw(work, sums), blocks)


def decode_blocks(
    blocks: torch.Tensor,
    block_ids: torch.Tensor,
    block_format: BlockFormat,
    payloads: torch.Tensor,
    sums: torch.Tensor,
    is_raw: torch.Tensor,
    is_good: torch.Tensor,
    layers: range | None = None,
    num_programs: int | None = None,
) -> None:
    """Write layers of payloads into blocks where their sums are right.

    Args:
        blocks: Like the others as for `encode_blocks`, but written.
        block_ids: Distinct.
        block_format: How the payloads are written that are not raw.
        payloads: Are read twice, so better on the device; rows wide enough for `block_format`.
        sums: Those that the payloads should have.
        is_raw: Which payloads are raw; such are not good where rows are too narrow for them.
        is_good: ``[num_rows, num_layers]``, bool, contiguous, is written: which layers were right.
        layers: Neighbouring layers, to look at those alone; default all.
        num_programs: As for `encode_blocks`.
    """
    layers = range(block_format.layout.num_layers) if layers is None else layers
    if len(block_ids) == 0 or len(layers) == 0:
        return
    device = device_of(blocks)
    work = Work(blocks, block_ids, block_format, payloads, is_raw, device, num_programs, layers)
    missing = sums.neg()  # becomes zero where the payload's own sums, added to it, are right
    run(plan_sums(work, missing), blocks)
    torch.any(missing, 2, out=is_good)
    if not holds_raw(work):
        is_good.logical_or_(is_raw[:, None])
    is_good.logical_not_()
    run(plan_decode(work, is_good), blocks)
