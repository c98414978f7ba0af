"""A tier as the store sees it: it verifies, counts, and never raises `TierError`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np

from prefixstore.block_key import BlockKey, RecordName
from prefixstore.errors import BlockCorrupted, TierError, TierFull, TierTimeout
from prefixstore.store.absent_names import AbsentNames
from prefixstore.store.breaker import BreakerConfig
from prefixstore.store.header_check import Found, find_right
from prefixstore.store.stats import Counts, TierUse
from prefixstore.store.tier_calls import TierCalls, was_deleted, was_kept, was_read
from prefixstore.tiers.base import LookOutcome, ReadOutcome, Swept, Tier, TierStats, is_past

logger = logging.getLogger(__name__)


class GuardedTier:
    """One tier, its calls behind breakers.

    Args:
        tier: The tier.
        config: When it is left alone.
        negative_ttl_s: How long to remember that a record is not there; 0 for not at all.
    """

    def __init__(self, tier: Tier, config: BreakerConfig, negative_ttl_s: float = 0.0) -> None:
        self._tier = tier
        self._counts = Counts()
        self._calls = TierCalls(tier.name, config, self._counts, tier.knows_what_it_holds)
        self._is_full = False
        self._absent = AbsentNames(negative_ttl_s) if negative_ttl_s else None
        self._rejected: dict[RecordName, None] = {}
        self._lock = threading.Lock()  # guards `_rejected`

    @property
    def name(self) -> str:
        """The tier's name."""
        return self._tier.name

    def use(self) -> TierUse:
        """What the store asked of the tier so far, and what came of it."""
        counts = self._counts.as_dict()
        return TierUse(self.name, is_down=self._calls.is_down, **counts)

    def contains_many(
        self, names: Sequence[RecordName], deadline: float | None = None
    ) -> list[bool | None]:
        """For each whether the tier holds it; None where it gave no answer."""
        if self._absent is None:
            return self._look(names, deadline)
        return self._absent.look_up(names, lambda asked: self._look(asked, deadline))

    def fetch_many(
        self,
        keys: Sequence[BlockKey],
        rows: Sequence[np.ndarray],
        deadline: float,
        abandon: Callable[[], None],
    ) -> list[Found | None]:
        """Read records and verify their headers; wrong ones are rejected.

        The payload of what is found is to be verified, and then `accept` or `reject` called.

        Args:
            keys: What they must agree with.
            rows: For each `key.layout.max_record_bytes` or more; the records are read into these.
            deadline: Of `time.monotonic()`.
            abandon: Called where the tier may write to rows later: none is to be used again that
                does not hold a record now.
        """
        outcomes = self._get_many([key.name for key in keys], rows, deadline, abandon)
        if outcomes is None:
            self._counts.add(num_misses=len(keys))
            return [None] * len(keys)
        records = [
            row[:outcome] if isinstance(outcome, int) else outcome
            for row, outcome in zip(rows, outcomes, strict=True)
        ]
        return self.verified(keys, records)

    def fetch_parts(
        self,
        keys: Sequence[BlockKey],
        outs: Sequence[np.ndarray],
        offsets: Sequence[int],
        deadline: float,
    ) -> list[ReadOutcome]:
        """Parts of records, see `Tier.get_many`; not verified, and no misses are counted."""
        names, views = [key.name for key in keys], [out.data for out in outs]
        outcomes = self._calls.attempt(
            "reads",
            lambda: self._tier.get_many(names, views, offsets=offsets, deadline=deadline),
            was_read,
            deadline,
        )
        return [None] * len(keys) if outcomes is None else outcomes

    def count_misses(self, num_records: int) -> None:
        """So many records did not come, or could not have come in time."""
        self._counts.add(num_misses=num_records)

    @property
    def gives_layers(self) -> bool:
        """Whether layers of records come sooner than whole ones."""
        return self._tier.gives_parts and not self._tier.lends

    @property
    def lends(self) -> bool:
        """Whether `lend_many` is there."""
        return self._tier.lends

    @property
    def lent_memory(self) -> np.ndarray | None:
        """See `Tier.lent_memory`."""
        return self._tier.lent_memory

    @contextmanager
    def lend_many(self, keys: Sequence[BlockKey]) -> Iterator[list[Found | None]]:
        """`fetch_many` of records where they lie, for as long as the context lasts."""
        with ExitStack() as lent:
            names = [key.name for key in keys]
            records = self._calls.attempt(
                "reads", lambda: lent.enter_context(self._tier.lend_many(names))
            )
            yield self.verified(keys, records or [None] * len(keys))

    def verified(
        self, keys: Sequence[BlockKey], records: Sequence[np.ndarray | TierError | None]
    ) -> list[Found | None]:
        """Records of this tier whose headers are right; the others are counted misses.

        Args:
            keys: What they must agree with.
            records: What the tier gave for each.
        """
        found, wrong = find_right(keys, records)
        for i, error in wrong.items():
            self.reject(keys[i], str(error))
        num_misses = found.count(None) - len(wrong)
        if num_misses:
            self._counts.add(num_misses=num_misses)
        return found

    def accept(self, num_records: int, num_bytes: int) -> None:
        """So many records, of so many bytes in all, were right."""
        self._counts.add(num_hits=num_records, read_bytes=num_bytes)

    def reject(self, key: BlockKey, problem: str) -> None:
        """A record was wrong: a miss, to be deleted from the tier by `delete_rejected`."""
        logger.warning("tier %s: block %s: %s", self.name, key.block_hash.hex(), problem)
        self._counts.add(num_corrupted=1, num_misses=1)
        with self._lock:
            self._rejected[key.name] = None

    def delete_rejected(self, deadline: float) -> None:
        """Delete what was wrong, all of it in one call; after the deadline, the next time."""
        if not self._rejected or is_past(deadline):
            return
        with self._lock:
            names, self._rejected = [*self._rejected], {}
        # A record that is not reached is rejected again at its next hit.
        self.delete_many(names, deadline)

    def read_many(
        self,
        names: Sequence[RecordName],
        rows: Sequence[np.ndarray],
        deadline: float,
        abandon: Callable[[], None],
    ) -> list[np.ndarray | None]:
        """Records to be handed on as they are; not verified, and no hits. See `fetch_many`."""
        outcomes = self._get_many(names, rows, deadline, abandon)
        if outcomes is None:
            return [None] * len(names)
        return [
            row[:outcome] if isinstance(outcome, int) else None
            for row, outcome in zip(rows, outcomes, strict=True)
        ]

    def put_many(
        self,
        names: Sequence[RecordName],
        records: Sequence[np.ndarray],
        priorities: Sequence[int],
        deadline: float,
    ) -> list[bool]:
        """Write records; for each whether the tier took it. Counts why not."""
        kept = [False] * len(names)
        for priority in dict.fromkeys(priorities):
            chosen = [i for i, own in enumerate(priorities) if own == priority]
            outcomes = self._put_alike(
                [names[i] for i in chosen], [records[i] for i in chosen], priority, deadline
            )
            if outcomes is None:
                self.count_dropped(len(chosen))
                continue
            for i, error in zip(chosen, outcomes, strict=True):
                kept[i] = error is None
        return kept

    @property
    def reserves(self) -> bool:
        """Whether `reserve_many` is there."""
        return self._tier.reserves

    @contextmanager
    def reserve_many(
        self, names: Sequence[RecordName], sizes: Sequence[int], priority: int
    ) -> Iterator[list[np.ndarray | None]]:
        """See `Tier.reserve_many`; what is not made there is for `put_many`."""
        with ExitStack() as reserved:
            reservation = self._tier.reserve_many(names, sizes, priority=priority)
            places = self._calls.attempt("writes", lambda: reserved.enter_context(reservation))
            places = [None] * len(names) if places is None else places
            yield places
        written = [i for i, place in enumerate(places) if place is not None]
        if self._absent is not None:
            self._absent.note_written(names[i] for i in written)
        num_bytes = sum(sizes[i] for i in written)
        self._counts.add(num_written=len(written), written_bytes=num_bytes)
        if len(written) == len(names):
            self._set_full(None)

    @property
    def takes_writes(self) -> bool:
        """Whether a write would be tried now: for one that would not, no record need be made."""
        return not self._calls.refuses("writes")

    def skip_writes(self, num_records: int) -> None:
        """So many records were dropped because the tier takes no writes."""
        self._counts.add(num_skipped=1, num_dropped=num_records)

    def count_present(self, num_records: int) -> None:
        """So many records that were to be written were there already."""
        self._counts.add(num_present=num_records)

    def count_dropped(self, num_records: int) -> None:
        """So many records were not written: see `TierUse.num_dropped`."""
        self._counts.add(num_dropped=num_records)

    def delete_many(self, names: Sequence[RecordName], deadline: float | None = None) -> bool:
        """Forget records; False where the tier could not forget all of them."""

        def delete() -> list[LookOutcome]:
            return self._tier.delete_many(names, deadline=deadline)

        # Try all the same, to hide the records, but blame the tier for nothing.
        if is_past(deadline):
            answers = self._calls.ask(delete)
        else:
            answers = self._calls.attempt("writes", delete, was_deleted)
        return answers is not None and not any(isinstance(one, TierError) for one in answers)

    def delete_identity(self, identity: bytes) -> bool:
        """Forget all of an identity; False where the tier could not."""

        def delete() -> bool:
            self._tier.delete_identity(identity)
            return False  # deleting nothing shows nothing of the tier

        return self._calls.attempt("writes", delete, was_deleted) is not None

    def pin_many(self, names: Sequence[RecordName], is_pinned: bool) -> list[bool]:
        """For each whether the tier holds it, and has pinned it or let it go."""
        answers = self._calls.ask(lambda: self._tier.pin_many(names, is_pinned))
        return [False] * len(names) if answers is None else answers

    def stats(self) -> TierStats | None:
        """What it holds; None where it gave no answer."""
        return self._calls.ask(self._tier.stats)

    def sweep(self) -> Swept:
        """What expired or was left behind is given back."""
        return self._calls.ask(self._tier.sweep) or Swept()

    def check(self, fix: bool = False) -> list[str]:
        """The tier's own recount."""
        try:
            return self._tier.check(fix)
        except TierError as error:
            self._calls.count_error(error)
            return [f"{self.name}: cannot be checked: {error}"]

    def close(self) -> None:
        """Close the tier; that it fails is logged."""
        try:
            self._tier.close()
        except TierError as error:
            logger.warning("tier %s: cannot be closed: %s", self.name, error)

    def mark_down(self, error: BaseException) -> None:
        """Leave the tier alone for a pause: it did what no tier may do."""
        self._calls.leave_alone(error)

    def _look(self, names: Sequence[RecordName], deadline: float | None) -> list[bool | None]:
        """What the tier itself says, counted."""
        outcomes = self._calls.attempt(
            "look-ups", lambda: self._tier.contains_many(names, deadline=deadline)
        )
        if outcomes is None:
            return [None] * len(names)
        return [None if isinstance(outcome, TierError) else outcome for outcome in outcomes]

    def _get_many(
        self,
        names: Sequence[RecordName],
        rows: Sequence[np.ndarray],
        deadline: float,
        abandon: Callable[[], None],
    ) -> list[ReadOutcome] | None:
        """The outcomes, counted; None where the tier gave none."""

        def get() -> list[ReadOutcome]:
            outs = [row.data for row in rows]
            try:
                outcomes = self._tier.get_or_abandon_many(names, outs, deadline=deadline)
            except TierError:
                abandon()
                raise
            if any(isinstance(outcome, TierTimeout) for outcome in outcomes):
                abandon()
            return outcomes

        return self._calls.attempt("reads", get, was_read, deadline)

    def _put_alike(
        self,
        names: Sequence[RecordName],
        records: Sequence[np.ndarray],
        priority: int,
        deadline: float,
    ) -> list[TierError | None] | None:
        """The outcomes of records of one priority, counted; None where the tier gave none."""
        views = [record.data for record in records]
        outcomes = self._calls.attempt(
            "writes",
            lambda: self._tier.put_many(names, views, priority=priority, deadline=deadline),
            was_kept,
            deadline,
        )
        if self._absent is not None:  # even a write that came too late may have stored its records
            self._absent.note_written(names)
        if outcomes is None:
            return None
        written = [r.nbytes for r, error in zip(records, outcomes, strict=True) if error is None]
        self._counts.add(
            num_written=len(written),
            written_bytes=sum(written),
            num_corrupted=sum(isinstance(error, BlockCorrupted) for error in outcomes),
        )
        full = [error for error in outcomes if isinstance(error, TierFull)]
        if full or written:
            self._set_full(full[-1] if full else None)
        return outcomes

    def _set_full(self, error: TierFull | None) -> None:
        if (error is not None) != self._is_full:
            self._is_full = error is not None
            logger.warning("tier %s: %s", self.name, error or "has room again")
