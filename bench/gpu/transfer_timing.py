"""Times moving blocks out of a pool and back, from the call until they have arrived: unlike rates
of kernels, with the processor's part.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import torch

import kvkernels
from bench.gpu import events
from kvkernels import BlockFormat, EncodedBlocks, KVLayout, KVPool
from kvkernels.transfer import BlockTransfer, Restoration

MAX_ROUNDS = 7
LAYERS_PER_STEP = 8
HEADER_BYTES = 1152  # of a record of 32 layers and 64 tokens
PAGE_BYTES = 4096
MAX_LINK_BYTES = 256 << 20  # of a plain copy: larger ones are no faster

Row = dict[str, Any]


def _median_s(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call on an idle device, after first calls that compile and allocate."""
    for _ in range(2):
        call()
    times_s = []
    for _ in range(min(MAX_ROUNDS, events.NUM_ROUNDS)):
        _synchronize(device)
        begin = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - begin)
    return statistics.median(times_s)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)
    _synchronize(target.device if target.is_cuda else source.device)


def _empty(shape: tuple[int, ...], is_pinned: bool) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.uint8, pin_memory=is_pinned)


def make_records(pool: KVPool, codec: str) -> EncodedBlocks:
    """All blocks of a pool in host memory, in slots of whole pages as in a memory tier."""
    block_format = BlockFormat(pool.layout, codec)
    ids = torch.arange(pool.num_blocks, device=pool.device)
    encoded = kvkernels.encode_blocks(pool, ids, block_format)
    if encoded.is_raw.any():
        raise RuntimeError(f"{codec}: expected blocks that it holds, got others")
    num_bytes = block_format.payload_bytes
    slot_bytes = -(-(HEADER_BYTES + num_bytes) // PAGE_BYTES) * PAGE_BYTES
    slots = _empty((pool.num_blocks, slot_bytes), pool.device.type == "cuda")
    payloads = slots[:, HEADER_BYTES : HEADER_BYTES + num_bytes]
    for target, source in zip(payloads, encoded.payloads, strict=True):  # contiguous rows
        target.copy_(source[:num_bytes])
    return EncodedBlocks(block_format, payloads, encoded.sums.cpu(), encoded.is_raw.cpu())


def _scatter(encoded: EncodedBlocks) -> list[EncodedBlocks]:
    """Every payload as a separate part, none adjacent to its neighbour."""
    order = list(range(0, len(encoded.is_raw), 2)) + list(range(1, len(encoded.is_raw), 2))
    return [
        EncodedBlocks(encoded.block_format, *(one[i : i + 1] for one in tensors))
        for tensors in [(encoded.payloads, encoded.sums, encoded.is_raw)]
        for i in order
    ]


def _make_pool(layout: KVLayout, num_blocks: int, device: torch.device) -> KVPool:
    pool = KVPool(layout, num_blocks, device)
    pool.data.normal_()
    return pool


def time_restore(
    layout: KVLayout, codec: str, num_blocks: int, device: torch.device | str = "cuda"
) -> Row:
    """GB/s of records: whole, a few layers at a time, and from scattered slots."""
    device = torch.device(device)
    pool = _make_pool(layout, num_blocks, device)
    encoded, ids = make_records(pool, codec), torch.randperm(num_blocks)
    num_bytes = num_blocks * encoded.block_format.payload_bytes
    parts = _scatter(encoded)
    with closing(BlockTransfer(pool)) as transfer:

        def check(restoration: Restoration) -> None:
            if not (is_good := restoration.wait()).all():
                bad, total = int((~is_good).sum()), is_good.numel()
                raise RuntimeError(f"{codec}: expected all {total} layers right, got {bad} wrong")

        def restore(layers_per_step: int | None) -> None:
            check(transfer.restore(encoded, ids, layers_per_step=layers_per_step))

        def restore_first_layer() -> None:
            restoration = transfer.restore(encoded, ids, layers_per_step=LAYERS_PER_STEP)
            restoration.wait_layer(0)
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

        def restore_scattered() -> None:
            restoration = transfer.begin_restore(parts, ids)
            restoration.add_layers(range(layout.num_layers))
            check(restoration)

        seconds = {
            "": _median_s(partial(restore, None), device),
            "layered_": _median_s(partial(restore, LAYERS_PER_STEP), device),
            "scattered_": _median_s(restore_scattered, device),
        }
        first_layer_s = _median_s(restore_first_layer, device)
    link_bytes = min(num_bytes, MAX_LINK_BYTES)
    here = encoded.payloads.as_strided((link_bytes,), (1,))
    there = torch.empty(link_bytes, dtype=torch.uint8, device=device)
    link = link_bytes / _median_s(partial(_copy, there, here), device) / 1e9
    row: Row = {"num_bytes": num_bytes, "link_gbytes_per_s": link}
    row |= {f"{name}ms": 1e3 * one for name, one in seconds.items()}
    row |= {f"{name}gbytes_per_s": num_bytes / one / 1e9 for name, one in seconds.items()}
    return row | {
        "first_layer_ms": 1e3 * first_layer_s,
        "share_of_link": row["gbytes_per_s"] / link,
    }


def time_evict(
    layout: KVLayout, codec: str, num_blocks: int, device: torch.device | str = "cuda"
) -> Row:
    """GB/s of records, with as many programs as help and with as many as a store uses."""
    device = torch.device(device)
    pool = _make_pool(layout, num_blocks, device)
    block_format, ids = BlockFormat(layout, codec), torch.randperm(num_blocks)
    num_bytes = num_blocks * block_format.payload_bytes

    def measure_s(num_programs: int | None) -> float:
        transfer = BlockTransfer(pool, num_slots=num_blocks, num_programs=num_programs)

        def evict() -> None:
            with transfer.evict(ids, block_format, transfer.mark()) as eviction:
                eviction.wait()

        with closing(transfer):
            return _median_s(evict, device)

    row: Row = {"num_bytes": num_bytes}
    for name, num_programs in (("", None), ("programs_12_", 12)):
        seconds = measure_s(num_programs)
        row |= {f"{name}ms": 1e3 * seconds, f"{name}gbytes_per_s": num_bytes / seconds / 1e9}
    link_bytes = min(num_bytes, MAX_LINK_BYTES)
    there = torch.empty(link_bytes, dtype=torch.uint8, device=device)
    here = _empty((link_bytes,), device.type == "cuda")
    row["link_gbytes_per_s"] = link_bytes / _median_s(partial(_copy, here, there), device) / 1e9
    return row | {"share_of_link": row["gbytes_per_s"] / row["link_gbytes_per_s"]}
