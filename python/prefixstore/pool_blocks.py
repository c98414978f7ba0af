"""The blocks of a layer group's pool, as a store takes and restores them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby

import numpy as np
import torch

from kvkernels import EncodedBlocks, KVPool
from kvkernels.transfer import BlockTransfer, Eviction, Restoration, all_done
from prefixstore.record import BlockKey, RecordLayout, write_header
from prefixstore.store.block_sources import MAX_RECORDS, MAX_RECORDS_BYTES
from prefixstore.store.block_targets import FetchedRecord

_MIN_SLOTS = 4


class PoolBlocks:
    """Moves blocks between a pool and records.

    Args:
        pool: The pool.
        layouts: All layouts that its records may have.
    """

    def __init__(self, pool: KVPool, layouts: Sequence[RecordLayout]) -> None:
        self._headroom = max(layout.header_bytes for layout in layouts)
        longest = max(layout.encode_bytes for layout in layouts)
        self.transfer = BlockTransfer(
            pool,
            num_slots=min(max(MAX_RECORDS_BYTES // longest, _MIN_SLOTS), MAX_RECORDS),
            headroom=self._headroom,
            payload_bytes=max(layout.payload_bytes for layout in layouts),
        )

    def source(self, block_id: int) -> PoolBlock:
        """A block to be saved. Until its record was made, it must not be written."""
        return PoolBlock(self, block_id)

    def target(self, block_ids: Sequence[int]) -> PoolTarget:
        """Blocks to be restored, by their index among those asked for."""
        return PoolTarget(self.transfer, block_ids)

    @property
    def max_records(self) -> int:
        """See `RecordMaker`."""
        return self.transfer.num_slots

    @contextmanager
    def records(
        self, keys: Sequence[BlockKey], sources: Sequence[PoolBlock]
    ) -> Iterator[list[np.ndarray]]:
        """See `RecordMaker`."""
        with ExitStack() as evictions:
            records: list[np.ndarray] = []
            pairs = zip(keys, sources, strict=True)
            for layout, run in groupby(pairs, lambda pair: pair[0].layout):
                alike = list(run)
                block_ids = torch.tensor([source.block_id for _, source in alike])
                written = all_done([source.written for _, source in alike])
                eviction = evictions.enter_context(
                    self.transfer.evict(block_ids, layout.block_format, written)
                )
                records += self._finish([key for key, _ in alike], layout, eviction)
            yield records

    def _finish(
        self, keys: Sequence[BlockKey], layout: RecordLayout, eviction: Eviction
    ) -> Iterator[np.ndarray]:
        """Put headers before payloads, once these are there."""
        encoded = eviction.wait()
        slots = eviction.slots.numpy()
        for key, is_raw, sums, slot in zip(
            keys, encoded.is_raw.tolist(), encoded.sums, slots, strict=True
        ):
            written = layout.raw if is_raw else layout
            start = self._headroom - written.header_bytes
            record = slot[start : start + written.record_bytes]
            write_header(key, written, sums, record)
            yield record

    def close(self) -> None:
        """Wait for what is on its way."""
        self.transfer.close()


class PoolBlock:
    """One block on its way out; see `BlockSource`."""

    def __init__(self, blocks: PoolBlocks, block_id: int) -> None:
        self.maker = blocks
        self.block_id = block_id
        self.written = blocks.transfer.mark()

    @property
    def num_bytes(self) -> int:
        return self.maker.transfer.pool.layout.block_bytes


class PoolTarget:
    """Blocks on their way in; see `BlockTarget` and `LayerTarget`."""

    def __init__(self, transfer: BlockTransfer, block_ids: Sequence[int]) -> None:
        self._transfer = transfer
        self._block_ids = torch.tensor(block_ids, dtype=torch.int64)
        self._free = transfer.mark()  # what still reads them was queued before
        self._restorations: list[Restoration] = []

    def restore(self, records: Sequence[FetchedRecord]) -> list[str | None]:
        self.begin(records)
        self.add_layers(range(self._transfer.pool.layout.num_layers))
        return self.end()

    def begin(self, records: Sequence[FetchedRecord]) -> None:
        self._restorations = [self._begin_run(run) for run in _runs(records)]

    def add_layers(self, layers: range) -> None:
        for restoration in self._restorations:
            restoration.add_layers(layers)

    def wait_layer(self, layer: int) -> None:
        """See `Restoration.wait_layer`; for any thread."""
        for restoration in self._restorations:
            restoration.wait_layer(layer)

    def end(self) -> list[str | None]:
        return [
            _problem(is_layer_good)
            for restoration in self._restorations
            for is_layer_good in restoration.wait()
        ]

    def _begin_run(self, records: list[FetchedRecord]) -> Restoration:
        """Restore records of one layout at equal distances."""
        layout = records[0].header.key.layout
        payload = records[0].data[layout.header_bytes :]
        step = _distance(records[0], records[1]) if len(records) > 1 else payload.nbytes
        shape = (len(records), payload.nbytes)
        rows = np.lib.stride_tricks.as_strided(payload, shape, (step, 1))
        encoded = EncodedBlocks(
            layout.block_format,
            torch.from_numpy(rows),
            torch.stack([record.header.sums for record in records]),
            torch.zeros(len(records), dtype=torch.bool),
        )
        block_ids = self._block_ids[[record.index for record in records]]
        return self._transfer.begin_restore(encoded, block_ids, after=self._free)


def _problem(is_layer_good: torch.Tensor) -> str | None:
    """What is wrong with a record, in words."""
    wrong = (~is_layer_good).nonzero()[:, 0].tolist()
    if not wrong:
        return None
    return f"payload: expected the table's checksums, got others in layers {wrong}"


def _runs(records: Sequence[FetchedRecord]) -> Iterator[list[FetchedRecord]]:
    """Records of one layout at equal distances, so that a call decodes them where they lie."""
    run: list[FetchedRecord] = []
    for record in records:
        if run and not _continues(run, record):
            yield run
            run = []
        run.append(record)
    if run:
        yield run


def _continues(run: list[FetchedRecord], record: FetchedRecord) -> bool:
    if record.header.key.layout != run[-1].header.key.layout:
        return False
    step = _distance(run[-1], record)
    return step >= record.data.nbytes and (len(run) == 1 or step == _distance(run[0], run[1]))


def _distance(first: FetchedRecord, second: FetchedRecord) -> int:
    """Bytes from where one lies to where the other does."""
    return second.data.ctypes.data - first.data.ctypes.data
