"""How payloads get from a pool to host memory and back, by where the pool lies.

All of it runs on a lane; on a GPU it only queues work there.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Protocol

import torch

from kvkernels import native
from kvkernels.codecs import BlockFormat
from kvkernels.ops.codecs import EncodedBlocks, decode_blocks, encode_blocks
from kvkernels.pool import KVPool
from kvkernels.transfer.staging import STAGE_BYTES, Staging


class Route(Protocol):
    """Between one pool and host memory."""

    def new_slots(self, shape: tuple[int, int]) -> torch.Tensor:
        """Host memory for payloads, uint8."""
        ...

    def new_flags(self, num_blocks: int) -> torch.Tensor:
        """``[num_blocks, num_layers]``, bool, in host memory, all False."""
        ...

    def encode(
        self, block_ids: torch.Tensor, block_format: BlockFormat, payloads: torch.Tensor
    ) -> Callable[[], EncodedBlocks]:
        """Write payloads in host memory; what is returned tells of them once that is done."""
        ...

    def decode(
        self, encoded: Sequence[EncodedBlocks], block_ids: torch.Tensor, is_good: torch.Tensor
    ) -> Callable[[range], None]:
        """What restores some layers from host memory, and says in `is_good` which were right."""
        ...


class HostRoute:
    """For a pool in host memory: the codecs read and write it where it lies."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool

    def new_slots(self, shape: tuple[int, int]) -> torch.Tensor:
        return native.empty_pool(shape, dtype=torch.uint8, device="cpu")

    def new_flags(self, num_blocks: int) -> torch.Tensor:
        return torch.zeros(num_blocks, self._pool.layout.num_layers, dtype=torch.bool, device="cpu")

    def encode(
        self, block_ids: torch.Tensor, block_format: BlockFormat, payloads: torch.Tensor
    ) -> Callable[[], EncodedBlocks]:
        encoded = encode_blocks(self._pool, block_ids, block_format, payloads=payloads)
        return lambda: encoded

    def decode(
        self, encoded: Sequence[EncodedBlocks], block_ids: torch.Tensor, is_good: torch.Tensor
    ) -> Callable[[range], None]:
        def decode_layers(layers: range) -> None:
            lengths = [len(part.is_raw) for part in encoded]
            parts = zip(encoded, block_ids.split(lengths), is_good.split(lengths), strict=True)
            for part, ids, flags in parts:
                found = decode_blocks(part, self._pool, ids, layers=layers)
                flags[:, layers.start : layers.stop] = found

        return decode_layers


class DeviceRoute:
    """For a pool on a GPU.

    Args:
        pool: The pool.
        is_staged: Encode into memory of the GPU, and copy that; otherwise the kernel writes host
            memory.
        num_programs: As many programs at most encode; None for all that help.
    """

    def __init__(self, pool: KVPool, is_staged: bool, num_programs: int | None) -> None:
        self._pool = pool
        self._is_staged = is_staged
        self._num_programs = num_programs
        self._staging = Staging(pool.device, min(STAGE_BYTES, pool.data.nbytes))
        self._lock = threading.Lock()  # of what is staged: several threads restore blocks

    def new_slots(self, shape: tuple[int, int]) -> torch.Tensor:
        return _pinned(shape, torch.uint8)

    def new_flags(self, num_blocks: int) -> torch.Tensor:
        # Layer-major: the flags of one layer are contiguous, so that copying them needs no wait.
        shape = (self._pool.layout.num_layers, num_blocks)
        return _pinned(shape, torch.bool).zero_().T

    def encode(
        self, block_ids: torch.Tensor, block_format: BlockFormat, payloads: torch.Tensor
    ) -> Callable[[], EncodedBlocks]:
        ids = _to_device(block_ids, self._pool.device)
        target = torch.empty_like(payloads, device=ids.device) if self._is_staged else payloads
        encoded = encode_blocks(
            self._pool, ids, block_format, payloads=target, num_programs=self._num_programs
        )
        num_bytes = block_format.payload_bytes
        if self._is_staged:
            _copy_rows(payloads, target, slice(0, num_bytes))
        sums, is_raw = _to_host(encoded.sums), _to_host(encoded.is_raw)

        def finish() -> EncodedBlocks:
            if self._is_staged:  # raw payloads are longer, and only now is it known which
                for row in is_raw.nonzero()[:, 0].tolist():
                    payloads[row, num_bytes:] = target[row, num_bytes:].cpu()
            return EncodedBlocks(block_format, payloads, sums, is_raw)

        return finish

    def decode(
        self, encoded: Sequence[EncodedBlocks], block_ids: torch.Tensor, is_good: torch.Tensor
    ) -> Callable[[range], None]:
        block_format = encoded[0].block_format
        num_blocks, num_layers = is_good.shape

        @functools.cache  # run once, by the first decode, and so on the lane's stream
        def upload() -> tuple[torch.Tensor, ...]:
            flags = torch.empty(num_layers, num_blocks, dtype=torch.bool, device=self._pool.device)
            return *_upload(encoded, block_ids, self._pool.device), flags

        def decode_layers(layers: range) -> None:
            with self._lock:
                ids, sums, is_raw, flags = upload()
                chosen = slice(layers.start, layers.stop)
                with closing(self._staging.chunks(encoded, layers)) as chunks:
                    for rows, payloads in chunks:
                        own = slice(rows.start, rows.stop)
                        staged = EncodedBlocks(block_format, payloads, sums[own], is_raw[own])
                        found = decode_blocks(staged, self._pool, ids[own], layers=layers)
                        flags[chosen, own] = found.T
                is_good.T[chosen].copy_(flags[chosen], non_blocking=True)

        return decode_layers


def route_of(pool: KVPool, is_staged: bool, num_programs: int | None) -> Route:
    """The route between a pool and host memory."""
    if pool.device.type == "cuda":
        return DeviceRoute(pool, is_staged, num_programs)
    return HostRoute(pool)


def _copy_rows(target: torch.Tensor, source: torch.Tensor, cut: slice) -> None:
    """Queue copies of the same bytes of each row; a row is one piece, all rows are not."""
    for target_row, source_row in zip(target, source, strict=True):
        target_row[cut].copy_(source_row[cut], non_blocking=True)


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Queue a copy out of pinned memory: out of other memory the caller would wait for the lane."""
    return tensor.pin_memory().to(device, non_blocking=True)


def _upload(
    encoded: Sequence[EncodedBlocks], block_ids: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, sums and `is_raw` of all parts, queued as one copy."""
    sums = torch.cat([part.sums for part in encoded])
    is_raw = torch.cat([part.is_raw for part in encoded])
    parts = [block_ids, sums, is_raw]
    lengths = [part.nbytes for part in parts]
    packed = _pinned((sum(lengths),), torch.uint8)
    for target, part in zip(packed.split(lengths), parts, strict=True):
        target.view(part.dtype).copy_(part.flatten())
    ids, sums_there, is_raw_there = (
        target.view(part.dtype).view(part.shape)
        for target, part in zip(
            packed.to(device, non_blocking=True).split(lengths), parts, strict=True
        )
    )
    return ids, sums_there, is_raw_there


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Queue a copy into host memory that the device writes by itself."""
    return _pinned(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)


def _pinned(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
