"""Loads blocks from the tiers: tier after tier, verified, each fetched by one thread at a time."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager

import numpy as np

from prefixstore.block_key import BlockKey
from prefixstore.store.block_targets import (
    BlockTarget,
    FetchedRecord,
    LayerProgress,
    LayerTarget,
)
from prefixstore.store.block_writer import BlockWriter
from prefixstore.store.config import TierPolicy
from prefixstore.store.fetcher import Fetcher, Slabs, record_room
from prefixstore.store.guarded_tier import GuardedTier
from prefixstore.store.header_check import Found
from prefixstore.store.in_flight import InFlight
from prefixstore.store.layer_reader import LayerReader
from prefixstore.store.load import Load, LoadProgress
from prefixstore.store.promotion import Promoter
from prefixstore.store.recent_names import RecentNames
from prefixstore.store.stats import Counts
from prefixstore.store.write_queue import Chooser
from prefixstore.tiers.base import is_past

BATCH_BYTES = 32 << 20  # of records that are fetched and then restored together
LENT_BATCH_BYTES = (
    64 << 20
)  # the same of those that are read where they lie: a millisecond to a GPU

LoadObserver = Callable[[str, int, int, float], None]


class Loader:
    """The way in.

    Args:
        tiers: Fastest first.
        policies: Of each.
        writer: Takes what is to go to faster tiers.
        counts: Of the store.
        reused: Called with each block that was found, and the number of its tier.
        quarantined: Not to be loaded, whoever has it.
    """

    def __init__(
        self,
        tiers: Sequence[GuardedTier],
        policies: Sequence[TierPolicy],
        writer: BlockWriter,
        counts: Counts,
        reused: Callable[[BlockKey, int], None],
        quarantined: RecentNames,
    ) -> None:
        self._tiers = tiers
        self._counts = counts
        self._reused = reused
        self._quarantined = quarantined
        self._observers: tuple[LoadObserver, ...] = ()
        self._observers_lock = threading.Lock()
        self._in_flight = InFlight()
        self._slabs = Slabs()
        self._promoter = Promoter(policies, writer, counts, self._in_flight, self._slabs)

    def observe(self, observer: LoadObserver) -> Callable[[], None]:
        """See `Store.observe_loads`."""
        with self._observers_lock:
            self._observers = (*self._observers, observer)

        def stop() -> None:
            with self._observers_lock:
                self._observers = tuple(one for one in self._observers if one is not observer)

        return stop

    def load_many(
        self,
        keys: Sequence[BlockKey],
        target: BlockTarget,
        deadline: float,
        progress: LoadProgress | None = None,
    ) -> list[str | None]:
        """See `Store.load_many`."""
        load = Load(keys, deadline, target, progress)
        with self._promoting(load):
            is_barred = self._quarantined.contains_many([key.name for key in keys])
            self._load(load, [i for i, barred in enumerate(is_barred) if not barred])
            if load.elsewhere and not load.is_stopped:
                waited = sorted(load.elsewhere)
                self._take_shared(load, waited)
                self._delete_rejected(load)  # so that wrong records are not found again below
                load.elsewhere.clear()
                load.coalesces = False
                self._load(load, waited)  # those that the other threads did not get
        num_misses = 0 if load.is_stopped else load.found.count(None)
        num_found = len(keys) - load.found.count(None)
        self._counts.add(num_loads=num_found + num_misses, num_misses=num_misses)
        self._tell(load)
        return load.found

    def load_layers(
        self,
        tier_name: str,
        keys: Sequence[BlockKey],
        target: LayerTarget,
        steps: Sequence[range],
        progress: LayerProgress,
        deadline: float,
    ) -> list[str | None]:
        """See `Store.load_layers`."""
        number = [tier.name for tier in self._tiers].index(tier_name)
        load = Load(keys, deadline)
        with self._promoting(load), load.timed(number):
            self._load_layers(load, number, target, steps, progress)
        num_misses = load.found.count(None)
        self._counts.add(num_loads=len(keys), num_misses=num_misses)
        self._tell(load)
        return load.found

    def passing_over(self, is_meant: Chooser) -> AbstractContextManager[None]:
        """Of loads that are under way or begin in the context, these go to no faster tier."""
        return self._promoter.passing_over(is_meant)

    def _load_layers(
        self,
        load: Load,
        number: int,
        target: LayerTarget,
        steps: Sequence[range],
        progress: LayerProgress,
    ) -> None:
        # Not claimed: other threads that want these blocks fetch whole ones themselves, which come
        # sooner.
        row_bytes = max(map(record_room, load.keys))
        slab = self._slabs.take(len(load.keys) * row_bytes)
        rows = slab.memory[: len(load.keys) * row_bytes].reshape(-1, row_bytes)
        reader = LayerReader(self._tiers[number], load.keys, list(rows), load.deadline)
        is_barred = self._quarantined.contains_many([key.name for key in load.keys])
        wanted = [i for i, barred in enumerate(is_barred) if not barred]
        records = reader.begin(wanted, steps[0].stop)
        try:
            target.begin(records)  # reads nothing until `add_layers`
            for layers in steps:
                reader.read_to(layers.stop)
                target.add_layers(layers)
                if reader.num_whole == len(load.keys):
                    progress.add_layers(layers.stop)
                else:
                    progress.fail()
        finally:
            problems = target.end()  # even on errors, as somebody else may get the blocks next
        whole = [i for i, record in enumerate(records) if reader.is_whole(record)]
        own = self._judge(load, number, [records[i] for i in whole], [problems[i] for i in whole])
        self._promoter.add(load, number, own, slab)

    def _tell(self, load: Load) -> None:
        for observer in self._observers:
            for number, work in sorted(load.work.items()):
                observer(self._tiers[number].name, work.num_records, work.num_bytes, work.seconds)

    def _load(self, load: Load, indices: Sequence[int]) -> None:
        """Ask tier after tier, each for all that the faster ones lack; hand on what was found."""
        for number, tier in enumerate(self._tiers):
            missing = [i for i in indices if load.found[i] is None and i not in load.elsewhere]
            if number == 1 and load.coalesces:
                missing = self._claim(load, missing)
            if not missing or load.is_stopped:
                continue
            is_lent = number == 0 and tier.lends
            if not is_lent and is_past(load.deadline):
                tier.count_misses(len(missing))  # it is out of time through no fault of its own
                continue
            with load.timed(number):
                if is_lent:
                    # What the fastest tier lends is promoted nowhere.
                    batches = _batches(load.keys, missing, _record_bytes, LENT_BATCH_BYTES)
                    self._load_lent(load, batches)
                else:
                    batches = _batches(load.keys, missing, record_room, BATCH_BYTES)
                    self._load_fetched(load, number, batches)
        self._promote(load)  # before waiting for other threads, which may wait for these

    def _load_lent(self, load: Load, batches: Sequence[Sequence[int]]) -> None:
        """Have a batch under way while the next is borrowed and its headers are verified."""
        with ExitStack() as before:
            for number, batch in enumerate(batches):
                with ExitStack() as own:
                    own.enter_context(self._borrowed(load, batch))
                    before.close()
                    if number and not load.goes_on_after(batches[number - 1]):
                        return
                    before.enter_context(own.pop_all())
        load.goes_on_after(batches[-1])

    @contextmanager
    def _borrowed(self, load: Load, batch: Sequence[int]) -> Iterator[None]:
        """A borrowed batch; at the end it is there, and given back."""
        with self._tiers[0].lend_many([load.keys[i] for i in batch]) as lent:
            finish = self._start(load, 0, batch, lent)
            try:
                yield
            finally:
                finish()

    def _load_fetched(self, load: Load, number: int, batches: Sequence[Sequence[int]]) -> None:
        """Fetch each batch in a thread of its own while the one before is decoded in this one."""
        fetcher = Fetcher(self._tiers[number], load.keys, load.deadline, self._slabs)
        with closing(fetcher.fetch_ahead(batches)) as fetched:
            for batch, found, slab in fetched:
                own = self._start(load, number, batch, found)()
                self._promoter.add(load, number, own, slab)
                if not load.goes_on_after(batch):
                    return

    def _start(
        self, load: Load, number: int, indices: Sequence[int], found: Sequence[Found | None]
    ) -> Callable[[], list[FetchedRecord]]:
        """Begin to put what a tier had of these where it belongs, verified; finish it later.

        What is returned finishes it, and returns what `_judge` does.
        """
        records = [
            FetchedRecord(i, load.keys[i], one[0], one[1][: one[0].key.layout.record_bytes])
            for i, one in zip(indices, found, strict=True)
            if one is not None
        ]
        assert load.target is not None
        wait = load.target.start(records) if records else None

        def finish() -> list[FetchedRecord]:
            problems = wait() if wait else ()
            if load.is_stopped:  # the load was stopped meanwhile
                return []
            return self._judge(load, number, records, problems)

        return finish

    def _judge(
        self,
        load: Load,
        number: int,
        records: Sequence[FetchedRecord],
        problems: Sequence[str | None],
    ) -> list[FetchedRecord]:
        """Payloads of a tier's records were verified; returns those that are right and were read
        from it.
        """
        tier = self._tiers[number]
        right = []
        for record, problem in zip(records, problems, strict=True):
            if problem is None:
                right.append(record)
            else:
                tier.reject(record.key, problem)
        # What another thread fetched is counted and promoted by that one.
        own = [record for record in right if record.index not in load.elsewhere]
        num_bytes = sum(record.data.nbytes for record in own)
        tier.accept(len(right), num_bytes)
        if own:
            load.work[number].num_records += len(own)
            load.work[number].num_bytes += num_bytes
        for record in right:
            load.found[record.index] = tier.name
            self._reused(record.key, number)
        return own

    def _take_shared(self, load: Load, indices: Sequence[int]) -> None:
        """Wait for other threads' records, and restore those that they found."""
        self._counts.add(num_coalesced=len(indices))
        shared = self._in_flight.wait([load.keys[i].name for i in indices], load.deadline)
        of_tier: defaultdict[int, dict[int, np.ndarray]] = defaultdict(dict)
        for i, record in zip(indices, shared, strict=True):
            if record is not None:
                of_tier[record.number][i] = record.data
        for number, data in of_tier.items():
            for batch in _batches(load.keys, [*data], _record_bytes, LENT_BATCH_BYTES):
                # This load's own keys: they may demand more than those of the thread that fetched.
                keys = [load.keys[i] for i in batch]
                found = self._tiers[number].verified(keys, [data[i] for i in batch])
                self._start(load, number, batch, found)()
                if not load.goes_on_after(batch):
                    return

    def _claim(self, load: Load, indices: Sequence[int]) -> list[int]:
        """Those that no other thread is fetching; they are this one's now."""
        is_mine = self._in_flight.claim([load.keys[i].name for i in indices])
        mine = [i for i, is_own in zip(indices, is_mine, strict=True) if is_own]
        load.elsewhere.update(indices)
        load.elsewhere.difference_update(mine)
        load.claimed.update(mine)
        return mine

    @contextmanager
    def _promoting(self, load: Load) -> Iterator[None]:
        """A load; at its end, whatever happened, what it has for faster tiers is handed on."""
        with self._promoter.under_way(load):
            try:
                yield
            finally:
                self._promote(load)

    def _promote(self, load: Load) -> None:
        """Hand records on to faster tiers; what was claimed and is not among them will not come."""
        self._in_flight.release([load.keys[i].name for i in load.claimed])
        load.claimed.clear()
        # First: a tier is not given records that it still seems to hold.
        self._delete_rejected(load)
        self._promoter.hand_on(load)

    def _delete_rejected(self, load: Load) -> None:
        for tier in self._tiers:
            tier.delete_rejected(load.deadline)


def _record_bytes(key: BlockKey) -> int:
    return key.layout.record_bytes


def _batches(
    keys: Sequence[BlockKey],
    indices: Sequence[int],
    bytes_of: Callable[[BlockKey], int],
    batch_bytes: int,
) -> list[Sequence[int]]:
    """Cut into as many at a time as find room in a batch, whatever their order."""
    longest = max(bytes_of(keys[i]) for i in indices)
    num_rows = max(1, batch_bytes // longest)
    return [indices[first : first + num_rows] for first in range(0, len(indices), num_rows)]
