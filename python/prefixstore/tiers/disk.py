"""Records on a local disk: payload files in slots, an index in SQLite, shared by processes.

    DIR/index.sqlite (-wal, -shm)     which slot holds which block; can be rebuilt from the slabs
    DIR/slab-v1-000001-...kvb         records, see disk_files.py
    DIR/tier.lock                     held shared while the tier is open, alone while it is mended

A record is written whole before the index shows it, and hidden before its slot is used again. The
payload is not flushed to the platters first: after a kill -9 the page cache still has it, and
after a power cut a torn record fails its checksums and is a miss. Flushing every record would cost
more than the cache wins. Every reader must verify what it gets. The directory must be on a local
file system (SQLite's WAL needs shared memory between the processes).
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prefixstore.block_key import BlockHash
from prefixstore.errors import BlockCorrupted, ConfigError, TierTimeout, TierUnavailable
from prefixstore.tiers import disk_slabs
from prefixstore.tiers.base import PAGE_BYTES, TierCounters, TierStats, check_bytes, round_up
from prefixstore.tiers.disk_files import Slab, SlabFiles
from prefixstore.tiers.disk_index import READY, SlotIndex
from prefixstore.tiers.disk_slabs import Limits
from prefixstore.tiers.disk_sql import Connection, IndexDamaged

logger = logging.getLogger(__name__)

_MAX_SLAB_BYTES = 256 << 20
_QUICK_CHECK = "SELECT quick_check FROM pragma_quick_check WHERE quick_check != 'ok'"
_SELECT_SLOTS = (
    "SELECT slot, slot_bytes, state, block_hash, record_bytes FROM slots"
    " WHERE slab_id = ? ORDER BY slot"
)


@dataclass(frozen=True)
class DiskTierConfig:
    """Where a disk tier lies and how large it may grow.

    Attributes:
        path: Directory, made if absent; may be shared by processes with equal settings.
        capacity_bytes: Bound on the payload files together; the index comes on top (about 200
            bytes a record).
        slab_bytes: Size of one payload file. Default: a sixteenth of the capacity, at most 256 MiB;
            a longer record gets a file of its own.
        timeout_s: How long to wait for another process's transaction.
        write_lease_s: After this long an unfinished write counts as dead and its slot is reused.
        name: In messages and statistics.
    """

    path: Path
    capacity_bytes: int
    slab_bytes: int | None = None
    timeout_s: float = 5.0
    write_lease_s: float = 60.0
    name: str = "disk"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        check_bytes("capacity_bytes", self.capacity_bytes, PAGE_BYTES)
        if self.slab_bytes is not None:
            check_bytes("slab_bytes", self.slab_bytes, PAGE_BYTES)
        for name in ("timeout_s", "write_lease_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: expected more than 0, got {getattr(self, name)}")

    @property
    def limits(self) -> Limits:
        default = max(min(self.capacity_bytes // 16, _MAX_SLAB_BYTES), PAGE_BYTES)
        slab_bytes = self.slab_bytes or default
        return Limits(self.name, self.capacity_bytes, slab_bytes, self.write_lease_s)


class DiskTier:
    """A bounded tier in a directory; least recently used records give way.

    Raises:
        TierUnavailable: On opening, if the directory cannot be written, holds the files of a newer
            version, or has a damaged index that other processes have open.
    """

    def __init__(self, config: DiskTierConfig) -> None:
        self._config = config
        self._counters = TierCounters()
        self._counters_lock = threading.Lock()
        self._files = SlabFiles(config.path, config.name)
        try:
            config.path.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(config.path / "tier.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise TierUnavailable(f"{config.name}: {config.path}: {error.strerror}") from error
        try:
            self._index = self._open_index()
        except OSError as error:
            os.close(self._lock_fd)
            raise TierUnavailable(f"{config.name}: {config.path}: {error.strerror}") from error
        except BaseException:
            os.close(self._lock_fd)
            raise

    @property
    def name(self) -> str:
        return self._config.name

    def get(self, block_hash: BlockHash, out: memoryview) -> int | None:
        num_read = self.peek(block_hash, out)
        if num_read is None:
            self._count(num_misses=1)
            return None
        self._index.touch(block_hash)
        self._count(num_hits=1, read_bytes=num_read)
        return num_read

    def peek(self, block_hash: BlockHash, out: memoryview) -> int | None:
        """`get` for who only looks: the record does not count as used."""
        ref = self._index.find(block_hash)
        if ref is not None and ref.record_bytes > out.nbytes:
            raise BlockCorrupted(
                f"{self.name}: expected a record of at most {out.nbytes} bytes,"
                f" got {ref.record_bytes}"
            )
        num_read = 0
        if ref is not None:
            num_read = self._files.read(ref.slab, ref.slot, out[: ref.record_bytes])
        # an eviction shows in the index before the slot is overwritten: still there means intact
        return num_read if ref is not None and self._index.holds(ref) else None

    def put(self, block_hash: BlockHash, record: memoryview) -> None:
        if self._index.find(block_hash) is not None:
            return
        slot_bytes = round_up(max(record.nbytes, 1), PAGE_BYTES)
        ref, evicted = self._index.allocate(block_hash, record.nbytes, slot_bytes)
        try:
            for slab in evicted.slabs:
                self._files.remove(slab)
            self._files.write(ref.slab, ref.slot, record)
        except BaseException:
            self._index.abandon(ref)
            raise
        finally:
            self._count(num_evictions=evicted.num_records)
        if not self._index.publish(ref):
            raise TierTimeout(
                f"{self.name}: expected a write within {self._config.write_lease_s} s, got more"
            )
        self._count(num_puts=1, written_bytes=record.nbytes)

    def contains(self, block_hash: BlockHash) -> bool:
        return self._index.find(block_hash) is not None

    def delete(self, block_hash: BlockHash) -> bool:
        ref = self._index.unpublish(block_hash)
        if ref is None:
            return False
        try:
            self._files.wipe(ref.slab, ref.slot)
        except BaseException:
            self._index.abandon(ref)
            raise
        self._index.release(ref)
        self._count(num_deletes=1)
        return True

    def contains_many(self, block_hashes: Sequence[BlockHash]) -> list[bool]:
        found = self._index.find_many(block_hashes)
        return [block_hash in found for block_hash in block_hashes]

    def list_records(self) -> list[tuple[BlockHash, int]]:
        """Hash and bytes of every record there is now, in the order in which they lie."""
        return self._index.list_records()

    def stats(self) -> TierStats:
        num_records, used_bytes = self._index.totals()
        with self._counters_lock:
            return self._counters.stats(self._config.capacity_bytes, used_bytes, num_records)

    def check(self) -> list[str]:
        with self._index.frozen() as sql:
            problems = [f"{self.name}: index: {row[0]}" for row in sql.execute(_QUICK_CHECK)]
            slabs = disk_slabs.list_slabs(sql)
            total_bytes = sum(slab.num_bytes for slab in slabs)
            if total_bytes > self._config.capacity_bytes:
                bound = self._config.capacity_bytes
                problems.append(f"{self.name}: expected at most {bound} bytes, got {total_bytes}")
            for slab in slabs:
                rows = sql.execute(_SELECT_SLOTS, (slab.slab_id,)).fetchall()
                problems += self._check_slab(slab, rows)
        return problems

    def close(self) -> None:
        try:
            self._index.close()
        finally:
            self._files.close()
            fd, self._lock_fd = self._lock_fd, -1
            if fd >= 0:
                os.close(fd)

    # ---- opening -----------------------------------------------------------------------------

    def _open_index(self) -> SlotIndex:
        with self._locked_directory() as is_alone:
            self._files.list_slabs()  # refuses a newer version before anything is touched
            try:
                return self._read_index(is_alone)
            except IndexDamaged as error:
                if not is_alone:
                    raise
                logger.warning("%s: rebuilding the index from the slabs: %s", self.name, error)
                self._set_index_aside()
                return self._read_index(is_alone)

    def _read_index(self, is_alone: bool) -> SlotIndex:
        connection = self._connect(is_alone)
        try:
            index = SlotIndex(connection, self._config.limits)
            if is_alone:
                self._reconcile(index)
            with index.frozen() as sql:
                dropped = disk_slabs.shrink(sql, self._config.capacity_bytes)
            for slab in dropped:
                self._files.remove(slab)
        except BaseException:
            connection.close()
            raise
        return index

    def _connect(self, is_alone: bool) -> Connection:
        path = self._config.path / "index.sqlite"
        connection = Connection(path, self.name, self._config.timeout_s)
        if is_alone:
            try:
                with connection.reading() as sql:
                    problem = sql.execute(_QUICK_CHECK).fetchone()
                if problem is not None:
                    raise IndexDamaged(f"{self.name}: {path}: {problem[0]}")
            except BaseException:
                connection.close()
                raise
        return connection

    def _reconcile(self, index: SlotIndex) -> None:
        """Bring index and slabs into line; nobody else has the tier open."""
        files = {slab.slab_id: slab for slab in self._files.list_slabs()}
        with index.frozen() as sql:
            sql.execute("UPDATE slots SET state = 0 WHERE state = 1")  # cut off while writing
            for slab in disk_slabs.list_slabs(sql):
                if files.get(slab.slab_id) == slab:
                    del files[slab.slab_id]
                else:  # a file of that number but of another shape is read anew below
                    disk_slabs.drop_slab(sql, slab)
            for slab in files.values():
                slots = (self._files.find_record(slab, slot) for slot in range(slab.num_slots))
                found = [record for record in slots if record is not None]
                last_used = self._files.modified_ns(slab)
                disk_slabs.insert_slab(sql, slab, last_used)
                disk_slabs.fill_slab(sql, slab, found, last_used)
                logger.info("%s: found %d records in %s", self.name, len(found), slab.file_name)
            disk_slabs.clamp_last_used(sql, time.time_ns())

    def _set_index_aside(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            path = self._config.path / f"index.sqlite{suffix}"
            if path.exists():
                path.rename(path.with_name(f"damaged-index.sqlite{suffix}"))

    @contextmanager
    def _locked_directory(self) -> Iterator[bool]:
        """True if no other process has the tier open; keeps a shared lock in the end."""
        deadline = time.monotonic() + self._config.timeout_s
        is_alone = self._try_lock(fcntl.LOCK_EX)
        while not is_alone and not self._try_lock(fcntl.LOCK_SH):
            if time.monotonic() > deadline:
                raise TierTimeout(f"{self.name}: {self._config.path}: another process is mending")
            time.sleep(0.01)
        yield is_alone
        fcntl.flock(self._lock_fd, fcntl.LOCK_SH)

    def _try_lock(self, kind: int) -> bool:
        try:
            fcntl.flock(self._lock_fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    # ---- helpers -----------------------------------------------------------------------------

    def _check_slab(self, slab: Slab, rows: list[tuple]) -> Iterator[str]:
        where = f"{self.name}: {slab.file_name}"
        if [row[0] for row in rows] != list(range(slab.num_slots)):
            yield f"{where}: expected {slab.num_slots} slots, got {len(rows)}"
        for slot, slot_bytes, state, block_hash, record_bytes in rows:
            if slot_bytes != slab.slot_bytes or record_bytes > slot_bytes:
                yield f"{where}: slot {slot} does not fit its slab"
            if state == READY:
                found = self._files.find_record(slab, slot)
                if found is None or (found.block_hash, found.record_bytes) != (
                    block_hash,
                    record_bytes,
                ):
                    yield f"{where}: slot {slot} does not hold the record {block_hash.hex()}"

    def _count(self, **increments: int) -> None:
        with self._counters_lock:
            for name, increment in increments.items():
                setattr(self._counters, name, getattr(self._counters, name) + increment)
