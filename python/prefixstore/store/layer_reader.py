"""Reads records of one tier a few layers at a time, all of them in step.

    row of a record   | header | layers 0-3 | 4-7 | 8-11 | ...
    begin             -------------------->
    read_to                               ----->           of every record, then the next layers

Records of one load may be written differently, each as its header says: each has its own offsets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefixstore.errors import BlockCorrupted, TierError
from prefixstore.record import BlockKey, RecordHeader, RecordLayout, check_head
from prefixstore.record_header import corrupted
from prefixstore.store.block_targets import FetchedRecord
from prefixstore.store.guarded_tier import GuardedTier
from prefixstore.tiers.base import ReadOutcome


class LayerReader:
    """One load, from one tier.

    Args:
        tier: Where from.
        keys: Of all blocks of the load.
        rows: For each of `keys` room for its record; see `record_room`.
        deadline: What is not there by then does not come.
    """

    def __init__(
        self,
        tier: GuardedTier,
        keys: Sequence[BlockKey],
        rows: Sequence[np.ndarray],
        deadline: float,
    ) -> None:
        self._tier = tier
        self._keys = keys
        self._rows = rows
        self._deadline = deadline
        self._records: list[FetchedRecord] = []
        self._num_read: dict[int, int] = {}  # bytes of each record, by index; lost ones are not in

    def begin(self, indices: Sequence[int], num_layers: int) -> list[FetchedRecord]:
        """Read headers and the first layers; the records whose header is right."""
        keys = [self._keys[i] for i in indices]
        outs = [self._rows[i][: _end(self._keys[i].layout, num_layers)] for i in indices]
        outcomes = self._tier.fetch_parts(keys, outs, [0] * len(keys), self._deadline)
        for i, out, outcome in zip(indices, outs, outcomes, strict=True):
            header = self._check_head(self._keys[i], out, outcome)
            if header is not None:
                data = self._rows[i][: header.key.layout.record_bytes]
                self._records.append(FetchedRecord(i, self._keys[i], header, data))
                self._num_read[i] = min(out.nbytes, data.nbytes)
        return self._records

    def read_to(self, num_layers: int) -> None:
        """Read on until so many layers of each record are there, or it is lost."""
        wanted = []
        for record in self._records:
            start = self._num_read.get(record.index)
            end = _end(record.header.key.layout, num_layers)
            if start is not None and start < end:
                wanted.append((record, start, end))
        if not wanted:
            return
        keys = [record.key for record, _, _ in wanted]
        outs = [record.data[start:end] for record, start, end in wanted]
        offsets = [start for _, start, _ in wanted]
        outcomes = self._tier.fetch_parts(keys, outs, offsets, self._deadline)
        for (record, start, end), outcome in zip(wanted, outcomes, strict=True):
            if outcome == end - start:
                self._num_read[record.index] = end
                continue
            del self._num_read[record.index]
            if isinstance(outcome, int):
                outcome = corrupted("record", f"{end} bytes and more", start + outcome)
            self._lose(record.key, outcome)

    @property
    def num_whole(self) -> int:
        """Records of which all came that was asked for."""
        return len(self._num_read)

    def is_whole(self, record: FetchedRecord) -> bool:
        """Whether all of a record came that was asked for."""
        return record.index in self._num_read

    def _check_head(
        self, key: BlockKey, out: np.ndarray, outcome: ReadOutcome
    ) -> RecordHeader | None:
        """What the first bytes of a record say; None for a miss, which is counted."""
        if outcome is None or isinstance(outcome, TierError):
            self._lose(key, outcome)
            return None
        try:
            header = check_head(out[:outcome], key)
            num_bytes = min(out.nbytes, header.key.layout.record_bytes)
            if outcome != num_bytes:
                raise corrupted("record", f"{num_bytes} bytes and more", outcome)
        except BlockCorrupted as error:
            self._lose(key, error)
            return None
        return header

    def _lose(self, key: BlockKey, error: TierError | None) -> None:
        """Count a record that does not come, and reject one that is wrong."""
        if isinstance(error, BlockCorrupted):
            self._tier.reject(key, str(error))
        else:
            self._tier.count_misses(1)


def _end(layout: RecordLayout, num_layers: int) -> int:
    """Bytes of a record up to the end of its first layers."""
    offset, num_bytes = layout.layer_places[num_layers - 1].tolist()
    return int(offset + num_bytes)
