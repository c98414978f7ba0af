"""The blocks of a layer group's pool, as a store takes and restores them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from kvkernels import EncodedBlocks, KVPool
from kvkernels.transfer import BlockTransfer
from prefixstore.block_targets import FetchedRecord, RecordBatch
from prefixstore.record import BlockKey, RecordLayout, write_header


class PoolBlocks:
    """Moves blocks between a pool and records.

    Args:
        pool: The pool.
        layouts: All layouts that its records may have.
        num_slots: Records that may be on their way out.
    """

    def __init__(self, pool: KVPool, layouts: Sequence[RecordLayout], num_slots: int = 4) -> None:
        self.headroom = max(layout.header_bytes for layout in layouts)
        self.transfer = BlockTransfer(
            pool,
            num_slots=num_slots,
            headroom=self.headroom,
            payload_bytes=max(layout.payload_bytes for layout in layouts),
        )

    def source(self, block_id: int) -> PoolBlock:
        """A block to be saved. Until its record was made, it must not be written."""
        return PoolBlock(self, block_id)

    def target(self, block_ids: Sequence[int]) -> PoolTarget:
        """Blocks to be restored, by their index among those asked for."""
        return PoolTarget(self.transfer, block_ids)

    def close(self) -> None:
        """Wait for what is on its way."""
        self.transfer.close()


class PoolBlock:
    """One block on its way out; see `BlockSource`."""

    def __init__(self, blocks: PoolBlocks, block_id: int) -> None:
        self._blocks = blocks
        self._block_ids = torch.tensor([block_id])
        self._written = blocks.transfer.mark()

    @property
    def num_bytes(self) -> int:
        return self._blocks.transfer.pool.layout.block_bytes

    @contextmanager
    def record(self, key: BlockKey) -> Iterator[np.ndarray]:
        layout, headroom = key.layout, self._blocks.headroom
        transfer = self._blocks.transfer
        with transfer.evict(self._block_ids, layout.block_format, self._written) as eviction:
            encoded = eviction.wait()
            layout = layout.raw if encoded.is_raw[0] else layout
            first, end = headroom - layout.header_bytes, headroom + layout.payload_bytes
            record = eviction.slots[0, first:end].numpy()
            write_header(key, layout, encoded.sums[0], record)
            yield record


class PoolTarget:
    """Blocks on their way in; see `BlockTarget`."""

    def __init__(self, transfer: BlockTransfer, block_ids: Sequence[int]) -> None:
        self._transfer = transfer
        self._block_ids = torch.tensor(block_ids, dtype=torch.int64)
        self._free = transfer.mark()  # what still reads them was queued before

    def restore(self, batch: RecordBatch) -> list[str | None]:
        by_layout: dict[RecordLayout, list[int]] = {}
        for row, record in enumerate(batch.records):
            by_layout.setdefault(record.header.key.layout, []).append(row)
        problems: list[str | None] = [None] * len(batch.records)
        for layout, rows in by_layout.items():
            is_good = self._restore_alike(layout, batch, rows)
            for row, is_layer_good in zip(rows, is_good, strict=True):
                if not is_layer_good.all():
                    wrong = (~is_layer_good).nonzero()[:, 0].tolist()
                    problems[row] = (
                        f"payload: expected the table's checksums, got others in layers {wrong}"
                    )
        return problems

    def _restore_alike(
        self, layout: RecordLayout, batch: RecordBatch, rows: list[int]
    ) -> torch.Tensor:
        """Restore the records in these rows, all of one layout: `[num_rows, num_layers]`."""
        records: list[FetchedRecord] = [batch.records[row] for row in rows]
        # Neighbouring rows are decoded where they lie; else they are copied together.
        is_run = rows[-1] - rows[0] == len(rows) - 1
        slab = batch.slab[rows[0] : rows[-1] + 1] if is_run else batch.slab[rows]
        encoded = EncodedBlocks(
            layout.block_format,
            torch.from_numpy(slab)[:, layout.header_bytes :],
            torch.stack([record.header.sums for record in records]),
            torch.zeros(len(rows), dtype=torch.bool),
        )
        block_ids = self._block_ids[[record.index for record in records]]
        return self._transfer.restore(encoded, block_ids, after=self._free).wait()
