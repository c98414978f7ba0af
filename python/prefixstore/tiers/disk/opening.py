"""Opening a disk tier's directory: who else is there, and bringing index and slabs into line."""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prefixstore.errors import TierTimeout, TierUnavailable
from prefixstore.tiers.disk import schema, slab_table, slot_table
from prefixstore.tiers.disk.clock import Clock, open_clock
from prefixstore.tiers.disk.config import DiskTierConfig
from prefixstore.tiers.disk.damage import find_damage, rebuild_indexes, refuse_unreadable_pages
from prefixstore.tiers.disk.files import Slab, SlabFiles
from prefixstore.tiers.disk.headers import find_records
from prefixstore.tiers.disk.index import SlotIndex
from prefixstore.tiers.disk.slot_table import NOBODY, SlotRef
from prefixstore.tiers.disk.sql import MARK_OF_DAMAGE, Connection, IndexDamaged
from prefixstore.tiers.disk.transfers import Transfers

logger = logging.getLogger(__name__)


class Directory:
    """A tier's directory, and the lock that tells whether others have it open.

    Raises:
        TierUnavailable: If it cannot be made or written.
    """

    def __init__(self, config: DiskTierConfig) -> None:
        self._config = config
        self._lock_fd = -1
        with self._errors():
            config.path.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(config.path / "tier.lock", os.O_RDWR | os.O_CREAT, 0o644)

    def open_index(self, files: SlabFiles, transfers: Transfers, clock: Clock | None) -> SlotIndex:
        """The index, after mending it where nobody else has the tier open.

        Args:
            files: The slabs.
            transfers: Wipes what was cut off.
            clock: The tier's time; None for the one of clock.py.

        Raises:
            TierUnavailable: If the directory cannot be written, holds files of a newer version, or
                has a damaged, older or removed index that other processes have open.
            TierTimeout: If another process is mending it for too long.
        """
        with self._errors(), self._locked() as is_alone:
            files.list_slabs()  # refuses a newer version before anything is touched
            try:
                return self._open(files, transfers, clock, is_alone)
            except IndexDamaged as error:
                if not is_alone:
                    raise
                logger.warning(
                    "%s: rebuilding the index from the slabs: %s", self._config.name, error
                )
                self._set_index_aside()
                return self._open(files, transfers, clock, is_alone)

    def close(self) -> None:
        """Let others mend it."""
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)

    def _open(
        self, files: SlabFiles, transfers: Transfers, clock: Clock | None, is_alone: bool
    ) -> SlotIndex:
        path, config = self._config.path / "index.sqlite", self._config
        if not is_alone and not path.exists():  # a new one would give their slots away
            raise TierUnavailable(
                f"{config.name}: {path}: expected the index that other processes have open, got"
                " none; it can be rebuilt once they have closed the tier"
            )
        writer = Connection(path, config.name, config.timeout_s)
        try:
            if is_alone:
                refuse_unreadable_pages(writer)
            schema.prepare(writer, is_alone)
            if is_alone and writer.mark.exists():
                _mend(writer)
            with writer.writing() as sql:
                clock = clock or open_clock(sql)
                if config.quota_bytes is not None:
                    schema.prepare_quotas(sql)
                if is_alone:
                    reconcile(sql, files, transfers, clock())
                dropped = slab_table.shrink(sql, config.capacity_bytes)
            for slab in dropped:
                files.remove(slab)
            reader = Connection(path, config.name, config.timeout_s)
            index = SlotIndex(reader, writer, config.limits, clock)
            index.look_ups.version()  # lets the reader open its files while they exist
        except BaseException:
            writer.close()
            raise
        return index

    def _set_index_aside(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            path = self._config.path / f"index.sqlite{suffix}"
            if path.exists():
                path.rename(path.with_name(f"damaged-index.sqlite{suffix}"))
        (self._config.path / MARK_OF_DAMAGE).unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """True if no other process has the tier open; keeps a shared lock in the end."""
        deadline = time.monotonic() + self._config.timeout_s
        is_alone = self._try_lock(fcntl.LOCK_EX)
        while not is_alone and not self._try_lock(fcntl.LOCK_SH):
            if time.monotonic() > deadline:
                where = f"{self._config.name}: {self._config.path}"
                raise TierTimeout(f"{where}: another process is mending")
            time.sleep(0.01)
        yield is_alone
        fcntl.flock(self._lock_fd, fcntl.LOCK_SH)

    def _try_lock(self, kind: int) -> bool:
        try:
            fcntl.flock(self._lock_fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = f"{self._config.name}: {self._config.path}"
            raise TierUnavailable(f"{where}: {error.strerror}") from error


def reconcile(sql: sqlite3.Connection, files: SlabFiles, transfers: Transfers, now: int) -> None:
    """Bring index and slabs into line, in one transaction; nobody else has the tier open."""
    cut_off = slot_table.take_dead(sql, now + 1, now)
    errors = transfers.wipe_many([(ref.slab, ref.offset) for ref in cut_off])
    wiped = [ref for ref, error in zip(cut_off, errors, strict=True) if error is None]
    slot_table.release_wiped(sql, wiped)
    on_disk = {slab.slab_id: slab for slab in files.list_slabs()}
    for slab in slab_table.list_slabs(sql):
        if on_disk.get(slab.slab_id) == slab:
            del on_disk[slab.slab_id]
        else:  # the file is missing, or has another shape and is read anew below
            slab_table.drop_slab(sql, slab)
    for slab in on_disk.values():
        read_anew(sql, files, slab, min(files.modified_ns(slab), now), now)
    num_taken_over = schema.take_over_version_1(sql, now)
    if num_taken_over is not None:
        logger.info("took over %d records of an index of version 1", num_taken_over)


def read_anew(
    sql: sqlite3.Connection, files: SlabFiles, slab: Slab, last_used: int, now: int
) -> None:
    """Enter a slab with the records that are found in it, last used then.

    What lies in a slot that cannot be read may show again some day, though it was deleted. So the
    slot is a writer's that began now: once that lease is over, it is wiped before it is free.
    """
    records, unreadable = find_records(files, slab, range(slab.num_slots))
    slab_table.insert_slab(sql, slab, last_used)
    slab_table.fill_slab(sql, slab, records, last_used)
    slot_table.take(sql, [SlotRef(slab, slot, 0, NOBODY, 0) for slot in unreadable], now)
    logger.info("found %d records in %s", len(records), slab.file_name)
    if unreadable:
        slot, error = next(iter(unreadable.items()))
        logger.warning(
            "%s: cannot read %d slots, the first of them %d: they stay out of use for now",
            error,
            len(unreadable),
            slot,
        )


def _mend(connection: Connection) -> None:
    """Mend what a call has found; raises IndexDamaged where making the indexes anew was not all."""
    with connection.writing() as sql:
        rebuild_indexes(sql)
    problems = find_damage(connection)
    if problems:
        raise IndexDamaged(problems[0])
    connection.mark.unlink()
    logger.warning("%s: a call found the index damaged; mended it", connection.tier_name)
