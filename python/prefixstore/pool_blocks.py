"""The blocks of a layer group's pool, as a store takes and restores them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from kvkernels import EncodedBlocks, KVPool
from kvkernels.transfer import BlockTransfer, Eviction, Restoration, all_done
from prefixstore.record import BlockKey, RecordLayout, stack_sums, write_headers
from prefixstore.store.block_sources import MAX_RECORDS, MAX_RECORDS_BYTES
from prefixstore.store.block_targets import FetchedRecord

_MIN_SLOTS = 4
# Programs that encode leaving blocks on a GPU: few, so that they take few multiprocessors from the
# model. On an H100, beside a decoding batch of an 8B model, 12 programs make decoding 1.06 times as
# slow and encode 22 GB/s; with all of them it is 1.9 times, for 73 GB/s, more than any tier takes.
_EVICT_PROGRAMS = 12


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
            num_programs=_EVICT_PROGRAMS,
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
    ) -> list[np.ndarray]:
        """Put headers before payloads, once these are there."""
        encoded = eviction.wait()
        slots, is_raw = eviction.slots.numpy(), encoded.is_raw
        records: dict[int, np.ndarray] = {}
        for written, chosen in ((layout, ~is_raw), (layout.raw, is_raw)):
            start = self._headroom - written.header_bytes
            own = {
                number: slots[number, start : start + written.record_bytes]
                for number in chosen.nonzero()[:, 0].tolist()
            }
            own_keys = [keys[number] for number in own]
            write_headers(own_keys, written, encoded.sums[chosen], [*own.values()])
            records |= own
        return [records[number] for number in range(len(keys))]

    @property
    def writes_anywhere(self) -> bool:
        """See `RecordMaker`."""
        return self.transfer.can_evict_into

    def write(
        self,
        keys: Sequence[BlockKey],
        sources: Sequence[PoolBlock],
        places: Sequence[np.ndarray],
    ) -> list[bool]:
        """See `RecordMaker`."""
        alike: defaultdict[RecordLayout, list[_Place]] = defaultdict(list)
        for number, (key, data) in enumerate(zip(keys, places, strict=True)):
            alike[key.layout].append(_place(number, data))
        written: set[int] = set()
        for layout, unsorted in alike.items():
            for run in _runs(sorted(unsorted)):
                written.update(self._write_run(keys, sources, layout, run))
        return [number in written for number in range(len(keys))]

    def _write_run(
        self,
        keys: Sequence[BlockKey],
        sources: Sequence[PoolBlock],
        layout: RecordLayout,
        run: Sequence[_Place],
    ) -> list[int]:
        """Make records of one layout; returns which of those given are there."""
        own = [sources[place.number] for place in run]
        block_ids = torch.tensor([source.block_id for source in own])
        written = all_done([source.written for source in own])
        payloads = _payloads(run, layout)
        eviction = self.transfer.evict_into(block_ids, layout.block_format, payloads, written)
        encoded = eviction.wait()
        is_there = ~encoded.is_raw  # raw payloads would not have fitted, and were not written
        there = [place for place, is_own in zip(run, is_there.tolist(), strict=True) if is_own]
        numbers = [place.number for place in there]
        data = [place.data for place in there]
        write_headers([keys[number] for number in numbers], layout, encoded.sums[is_there], data)
        return numbers

    def close(self) -> None:
        """Wait for what is on its way."""
        self.transfer.close()


class PoolBlock:
    """One block on its way out; see `BlockSource`."""

    held_bytes = 0

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
        # The point in the stream before which the blocks may still be read.
        self._free = transfer.mark()
        self._ways: list[_Way] = []

    def start(self, records: Sequence[FetchedRecord]) -> Callable[[], list[str | None]]:
        ways = self._begin(records)
        layers = range(self._transfer.pool.layout.num_layers)
        try:
            for way in ways:
                way.restoration.add_layers(layers)
        except BaseException:
            _wait(ways)  # the blocks may belong to somebody else next
            raise
        return partial(_problems, ways)

    def begin(self, records: Sequence[FetchedRecord]) -> None:
        self._ways = self._begin(records)

    def add_layers(self, layers: range) -> None:
        for way in self._ways:
            way.restoration.add_layers(layers)

    def wait_layer(self, layer: int) -> None:
        """See `Restoration.wait_layer`; for any thread."""
        for way in self._ways:
            way.restoration.wait_layer(layer)

    def end(self) -> list[str | None]:
        return _problems(self._ways)

    def _begin(self, records: Sequence[FetchedRecord]) -> list[_Way]:
        """Restore records of each layout together, in the order in which they lie in memory."""
        alike: defaultdict[RecordLayout, list[_Place]] = defaultdict(list)
        for number, record in enumerate(records):
            alike[record.header.key.layout].append(_place(number, record.data))
        return [
            self._begin_alike(layout, sorted(places), records) for layout, places in alike.items()
        ]

    def _begin_alike(
        self, layout: RecordLayout, places: list[_Place], records: Sequence[FetchedRecord]
    ) -> _Way:
        encoded = [_encoded(run, layout, records) for run in _runs(places)]
        block_ids = self._block_ids[[records[place.number].index for place in places]]
        restoration = self._transfer.begin_restore(encoded, block_ids, after=self._free)
        return _Way([place.number for place in places], restoration)


class _Place(NamedTuple):
    """Where a record lies or is to lie, and which of those given it is."""

    address: int
    number: int
    data: np.ndarray


def _place(number: int, data: np.ndarray) -> _Place:
    return _Place(data.__array_interface__["data"][0], number, data)


@dataclass(frozen=True)
class _Way:
    """Records on their way in together: which of those given, and what becomes of them."""

    numbers: list[int]
    restoration: Restoration


def _wait(ways: Sequence[_Way]) -> None:
    """Wait for all of them, whatever one of them raises."""
    with ExitStack() as waits:
        for way in ways:
            waits.callback(way.restoration.wait)


def _problems(ways: Sequence[_Way]) -> list[str | None]:
    """What is wrong with each record, once they are there."""
    _wait(ways)
    found: dict[int, str | None] = {}
    for way in ways:
        is_good = way.restoration.wait()
        is_whole = is_good.all(1).tolist()
        for number, is_right, of_layers in zip(way.numbers, is_whole, is_good, strict=True):
            found[number] = None if is_right else _problem(of_layers)
    return [found[number] for number in range(len(found))]


def _problem(is_layer_good: torch.Tensor) -> str:
    """What is wrong with a record, in words."""
    wrong = (~is_layer_good).nonzero()[:, 0].tolist()
    return f"payload: expected the table's checksums, got others in layers {wrong}"


def _encoded(
    run: Sequence[_Place], layout: RecordLayout, records: Sequence[FetchedRecord]
) -> EncodedBlocks:
    """The payloads of a run, where they lie."""
    return EncodedBlocks(
        layout.block_format,
        _payloads(run, layout),
        stack_sums([records[place.number].header for place in run]),
        torch.zeros(len(run), dtype=torch.bool),
    )


def _payloads(run: Sequence[_Place], layout: RecordLayout) -> torch.Tensor:
    """``[num_records, payload_bytes]``, uint8: those of records of one layout in a run."""
    payload = run[0].data[layout.header_bytes : layout.record_bytes]
    distance = run[1].address - run[0].address if len(run) > 1 else payload.nbytes
    rows = np.lib.stride_tricks.as_strided(payload, (len(run), payload.nbytes), (distance, 1))
    return torch.from_numpy(rows)


def _runs(places: Sequence[_Place]) -> Iterator[list[_Place]]:
    """Records at equal distances, so that a call reads or writes them where they lie."""
    run: list[_Place] = []
    for place in places:
        if run and not _continues(run, place):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def _continues(run: Sequence[_Place], place: _Place) -> bool:
    """Whether a record lies as far behind a run as its records do, and in the same memory."""
    data, before = place.data, run[-1].data
    distance = place.address - run[-1].address
    if distance < before.nbytes or data.base is None or data.base is not before.base:
        return False
    return len(run) == 1 or distance == run[1].address - run[0].address
