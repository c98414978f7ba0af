"""Settings of a disk tier."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefixstore.errors import ConfigError
from prefixstore.settings import MAX_WAIT_S, check_seconds
from prefixstore.tiers.base import check_bytes
from prefixstore.tiers.disk.slab_table import Limits
from prefixstore.tiers.pages import PAGE_BYTES

_MAX_SLAB_BYTES = 256 << 20
_IO = ("auto", "direct", "buffered")


@dataclass(frozen=True)
class DiskTierConfig:
    """Where a disk tier lies and how large it may grow.

    Attributes:
        path: Directory, made if absent; may be shared by processes with equal settings.
        capacity_bytes: Bound on the payload files together; the index comes on top (about 150
            bytes a record).
        slab_bytes: Size of one payload file. Default: a sixteenth of the capacity, at most 256 MiB;
            a longer record gets a file of its own.
        ttl_s: Seconds after which a record expires; None for never. It goes into the index with
            the record: another setting is for what is put or used from then on.
        refresh_ttl: Whether the time counts from a record's last use, to a sixteenth of it, and
            not only from its last put.
        quota_bytes: Records of one identity, a model and salt, take no more; then its own least
            recently used ones give way. None for no bound but the capacity.
        io: "direct" past the page cache (O_DIRECT), "buffered" through it, or "auto": direct where
            the file system takes it.
        num_threads: How many transfers run at once.
        timeout_s: How long to wait for another process's transaction.
        write_lease_s: After this long an unfinished write counts as dead and its slot is reused; no
            write is begun once half of it is over, whatever the deadline.
        name: In messages and statistics.
    """

    path: Path
    capacity_bytes: int
    slab_bytes: int | None = None
    ttl_s: float | None = None
    refresh_ttl: bool = True
    quota_bytes: int | None = None
    io: str = "auto"
    num_threads: int = 4
    timeout_s: float = 5.0
    write_lease_s: float = 60.0
    name: str = "disk"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        check_bytes("capacity_bytes", self.capacity_bytes, PAGE_BYTES)
        if self.slab_bytes is not None:
            check_bytes("slab_bytes", self.slab_bytes, PAGE_BYTES)
        if self.quota_bytes is not None:
            check_bytes("quota_bytes", self.quota_bytes, 1)
        if self.ttl_s is not None:
            check_seconds("ttl_s", self.ttl_s)
        if self.io not in _IO:
            raise ConfigError(f"io: expected one of {', '.join(_IO)}, got {self.io!r}")
        if not isinstance(self.num_threads, int) or self.num_threads < 1:
            raise ConfigError(f"num_threads: expected at least 1, got {self.num_threads!r}")
        check_seconds("timeout_s", self.timeout_s, MAX_WAIT_S)
        check_seconds("write_lease_s", self.write_lease_s)

    @property
    def limits(self) -> Limits:
        default = max(min(self.capacity_bytes // 16, _MAX_SLAB_BYTES), PAGE_BYTES)
        slab_bytes = self.slab_bytes or default
        return Limits(
            self.name, self.capacity_bytes, slab_bytes, self.write_lease_s, self.quota_bytes
        )
