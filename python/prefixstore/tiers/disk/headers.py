"""What lies in the slots of a slab, by the records' own headers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from prefixstore.block_key import BlockHash, RecordName
from prefixstore.errors import BlockCorrupted, TierUnavailable
from prefixstore.record_header import MAX_HEADER_BYTES, read_fixed
from prefixstore.tiers.disk.files import Slab, SlabFiles
from prefixstore.tiers.pages import PAGE_BYTES, page_aligned, round_up


@dataclass(frozen=True)
class FoundRecord:
    """A record whose header was read back from a slot."""

    slot: int
    name: RecordName
    record_bytes: int


class Findings(NamedTuple):
    """What the slots' own headers tell.

    Attributes:
        records: Those that are whole.
        unreadable: Of slots of which nobody knows what they hold: why they cannot be read.
    """

    records: list[FoundRecord]
    unreadable: dict[int, TierUnavailable]


def find_records(files: SlabFiles, slab: Slab, slots: Iterable[int]) -> Findings:
    """What lies in these slots.

    Raises:
        TierUnavailable: If the file cannot be opened, for what is wrong then is no single slot.
    """
    buffer = page_aligned(round_up(MAX_HEADER_BYTES, PAGE_BYTES)).data
    file_bytes = files.num_bytes(slab) or 0
    files.read(slab, 0, [])  # opens the file, or raises here rather than for each slot
    found = Findings([], {})
    for slot in slots:
        try:
            record = _find_record(files, slab, slot, buffer, file_bytes)
        except TierUnavailable as error:
            found.unreadable[slot] = error
            continue
        if record is not None:
            found.records.append(record)
    return found


def _find_record(
    files: SlabFiles, slab: Slab, slot: int, buffer: memoryview, file_bytes: int
) -> FoundRecord | None:
    offset, longest = slot * slab.slot_bytes, min(slab.slot_bytes, buffer.nbytes)
    if offset >= file_bytes:
        return None
    for num_bytes in (PAGE_BYTES, longest):  # few headers are longer than a page
        num_read = files.read(slab, offset, [buffer[:num_bytes]])
        try:
            header = read_fixed(buffer[:num_read])
        except BlockCorrupted:
            continue
        record_bytes = header.record_bytes
        if record_bytes > slab.slot_bytes or offset + record_bytes > file_bytes:
            return None
        name = RecordName(header.identity, BlockHash(header.block_hash))
        return FoundRecord(slot, name, record_bytes)
    return None
