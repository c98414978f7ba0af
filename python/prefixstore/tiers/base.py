"""What every tier does: keeps records by name, in bytes, within a bound."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from prefixstore.block_key import RecordName
from prefixstore.errors import ConfigError, TierError, TierTimeout
from prefixstore.settings import MAX_BYTES

ReadOutcome = int | None | TierError
LookOutcome = bool | TierError
EvictionListener = Callable[[RecordName, int, np.ndarray], None]


@dataclass(frozen=True)
class TierStats:
    """What a tier holds now and has done since it was opened, by this process."""

    capacity_bytes: int
    used_bytes: int
    num_records: int
    num_hits: int
    num_misses: int
    num_puts: int
    num_deletes: int
    num_evictions: int
    num_expired: int
    read_bytes: int
    written_bytes: int


@dataclass(frozen=True)
class Held:
    """Records of one identity, and their bytes."""

    num_records: int
    num_bytes: int


@dataclass(frozen=True)
class Swept:
    """What a sweep gave back.

    Attributes:
        num_expired: Records past their time.
        num_orphans: Slots, files or parts of records that nothing refers to.
        num_bytes: Of both.
    """

    num_expired: int = 0
    num_orphans: int = 0
    num_bytes: int = 0


@dataclass
class TierCounters:
    """The counters behind `TierStats`; not locked, see `SharedCounters`."""

    num_hits: int = 0
    num_misses: int = 0
    num_puts: int = 0
    num_deletes: int = 0
    num_evictions: int = 0
    num_expired: int = 0
    read_bytes: int = 0
    written_bytes: int = 0

    def stats(self, capacity_bytes: int, used_bytes: int, num_records: int) -> TierStats:
        return TierStats(
            capacity_bytes=capacity_bytes,
            used_bytes=used_bytes,
            num_records=num_records,
            **vars(self),
        )


class Tier(ABC):
    """A place for records: bytes in, bytes out. Safe to call from several threads.

    A tier never looks into a record to answer: whoever gets one verifies it. Records are immutable
    under their name, so a tier keeps what it has when the same name is put again.

    Calls take many records, for a round trip or a transaction costs more than a record. What one
    record met is its outcome; what the whole call met is raised: any may raise `TierUnavailable`
    or `TierTimeout`, and then nothing that was held is lost. A `deadline` is a time of
    `time.monotonic()`; None leaves it to the tier's own timeout.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Unique among the tiers of one store; stands in messages and statistics."""

    @abstractmethod
    def get_many(
        self,
        names: Sequence[RecordName],
        outs: Sequence[memoryview],
        *,
        offsets: Sequence[int] | None = None,
        deadline: float | None = None,
    ) -> list[ReadOutcome]:
        """Read records, each into its own buffer, from the buffer's start, and mark them used.

        Args:
            names: Which ones.
            outs: Where to, writable and contiguous. Of whole records, as long as the record or
                longer.
            offsets: For parts of records, such as single layers: byte of each to begin at. So many
                bytes are then read as its buffer is long.
            deadline: What is not read by then is a `TierTimeout`, and nothing is written to its
                buffer any more.

        Returns:
            For each the bytes read; or None where there is no such record; or an error:
            `BlockCorrupted` for a record longer than its buffer, which is not the one that was
            asked for; another `TierError` where this one could not be read. Fewer bytes than were
            put mean that the tier's medium was truncated. Of a buffer whose outcome is no number,
            the contents are garbage.
        """

    def get_or_abandon_many(
        self,
        names: Sequence[RecordName],
        outs: Sequence[memoryview],
        *,
        deadline: float | None = None,
    ) -> list[ReadOutcome]:
        """`get_many` of whole records, by who lets go of buffers that came to nothing in time.

        To a buffer whose outcome is a `TierTimeout` the tier may write at any later time, and to
        all of them where this raises: nobody may use them again. Where a read that was begun cannot
        be called off, as of a disk, this spares copying every record once more.
        """
        return self.get_many(names, outs, deadline=deadline)

    @abstractmethod
    def put_many(
        self,
        names: Sequence[RecordName],
        records: Sequence[memoryview],
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> list[TierError | None]:
        """Keep records, evicting others for them. When this returns, `get_many` finds them.

        Where there is room for a part of them, the later may take the place of the earlier.

        Args:
            names: What they are called.
            records: Their bytes, contiguous; not read after this returns.
            priority: Records of lower priority give way to those of higher, of -8 to 7; a tier
                whose server chooses for itself does not know it.
            deadline: What is not kept by then is a `TierTimeout`; it may be there all the same.

        Returns:
            For each None, or why it is not kept: `TierFull` where there is no room even after
            evicting what may be evicted.
        """

    @abstractmethod
    def contains_many(
        self, names: Sequence[RecordName], *, deadline: float | None = None
    ) -> list[LookOutcome]:
        """For each whether `get_many` would find it now, or why nobody knows; marks none used.

        Where none of them got an answer, that is raised.
        """

    @abstractmethod
    def delete_many(
        self, names: Sequence[RecordName], *, deadline: float | None = None
    ) -> list[LookOutcome]:
        """Forget records, pinned ones too; False where there was none, or why it may be there yet.

        A name that comes again finds none any more, or meets the same error as before. Where none
        of them got an answer, that is raised.
        """

    @abstractmethod
    def delete_identity(self, identity: bytes) -> None:
        """Forget every record of an identity: of one model and salt. None is found afterwards."""

    @abstractmethod
    def pin_many(self, names: Sequence[RecordName], is_pinned: bool = True) -> list[bool]:
        """Keep records from eviction and expiry, or no longer; False where there was none."""

    @abstractmethod
    def list_identities(self) -> dict[bytes, Held]:
        """What it holds of each identity; may look at every record, so it is for tools."""

    @abstractmethod
    def stats(self) -> TierStats:
        """What it holds and has done."""

    @abstractmethod
    def check(self, fix: bool = False) -> list[str]:
        """Recount everything; what does not add up, in words. Empty when all is well.

        Args:
            fix: Mend what was found: records that cannot be trusted are dropped, never guessed.
        """

    @abstractmethod
    def sweep(self) -> Swept:
        """Give back what expired, and what a process that died left behind."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the tier holds open; any later call raises `TierUnavailable`."""

    @property
    def knows_what_it_holds(self) -> bool:
        """Whether it says without its medium what it lacks or has no room for, as a disk that hangs
        does by its index: only what it reads, keeps or deletes tells of the medium.
        """
        return False

    @property
    def gives_parts(self) -> bool:
        """Whether a part of a record comes sooner than all of it."""
        return True

    @property
    def lends(self) -> bool:
        """Whether `lend_many` is there."""
        return False

    def lend_many(
        self, names: Sequence[RecordName]
    ) -> AbstractContextManager[list[np.ndarray | None]]:
        """Records where they lie, to be read inside the context, not written; marks them used."""
        raise NotImplementedError(f"{self.name}: lends nothing")

    @property
    def lent_memory(self) -> np.ndarray | None:
        """All the memory that it lends from, uint8; None where that is not one piece."""
        return None

    @property
    def reserves(self) -> bool:
        """Whether `reserve_many` is there."""
        return False

    def reserve_many(
        self, names: Sequence[RecordName], sizes: Sequence[int], *, priority: int = 0
    ) -> AbstractContextManager[list[np.ndarray | None]]:
        """Memory of the tier to make records in, instead of copying them into it.

        Yields for each an array of uint8, as long as its record is to be, to be filled inside the
        context; None where there is none, and `put` is to be called. At the context's end the tier
        has all whose place still stands in the list: who sets one to None gives it back. After an
        exception it has none of them.
        """
        raise NotImplementedError(f"{self.name}: reserves nothing")

    def on_evict(self, listener: EvictionListener) -> bool:
        """Tell `listener` of every record that gives way to another, before it does.

        It is called with name, priority and bytes, which are lent for the call, under the tier's
        lock: it must not call the tier.

        Returns:
            False where the tier cannot tell.
        """
        return False

    # ---- one record at a time ----------------------------------------------------------------

    def get(self, name: RecordName, out: memoryview) -> int | None:
        """`get_many` of one; an error is raised."""
        (outcome,) = self.get_many([name], [out])
        if isinstance(outcome, TierError):
            raise outcome
        return outcome

    def put(self, name: RecordName, record: memoryview) -> None:
        """`put_many` of one; an error is raised."""
        (error,) = self.put_many([name], [record])
        if error is not None:
            raise error

    def contains(self, name: RecordName) -> bool:
        """`contains_many` of one; an error is raised."""
        (outcome,) = self.contains_many([name])
        if isinstance(outcome, TierError):
            raise outcome
        return outcome

    def delete(self, name: RecordName) -> bool:
        """`delete_many` of one; an error is raised."""
        (outcome,) = self.delete_many([name])
        if isinstance(outcome, TierError):
            raise outcome
        return outcome


def is_past(deadline: float | None) -> bool:
    """Whether it is later than that."""
    return deadline is not None and time.monotonic() > deadline


def too_late(tier_name: str) -> TierTimeout:
    """The outcome of a record whose turn did not come."""
    return TierTimeout(f"{tier_name}: expected its turn before the deadline, it came after")


def check_priority(priority: int) -> None:
    """Raise `ValueError` unless it is one."""
    if not isinstance(priority, int) or not -8 <= priority <= 7:
        raise ValueError(f"priority: expected -8 to 7, got {priority!r}")


def check_bytes(name: str, value: int, least: int) -> None:
    """Raise `ConfigError` unless a setting is a whole number of bytes in its range."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if value > MAX_BYTES:
        raise ConfigError(f"{name}: expected at most {MAX_BYTES}, got {value}")
