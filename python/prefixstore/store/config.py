"""Bounds and policies of a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from prefixstore.errors import ConfigError
from prefixstore.settings import MAX_WAIT_S, check_count, check_seconds, check_seconds_or_0
from prefixstore.store.breaker import BreakerConfig
from prefixstore.tiers.base import check_bytes

WritePolicy = Literal["write_through", "write_second_touch", "write_back", "never"]


@dataclass(frozen=True)
class TierPolicy:
    """What goes into a tier.

    Attributes:
        write: "write_through": every block that is saved. "write_second_touch": a block that is
            used again after it was saved; most never are, and a slow tier is spared them.
            "write_back": what the tier before evicts; that one must tell, as the memory tier does.
            "never": nothing but promotions.
        promote: Also blocks that were found in a slower tier.
        negative_ttl_s: For so long an answer that a record is not there is remembered; 0 for not
            at all. Meanwhile what other processes write is not seen.
    """

    write: WritePolicy = "write_through"
    promote: bool = True
    negative_ttl_s: float = 0.0

    def __post_init__(self) -> None:
        if self.write not in get_args(WritePolicy):
            raise ConfigError(f"write: expected one of {get_args(WritePolicy)}, got {self.write!r}")
        check_seconds_or_0("negative_ttl_s", self.negative_ttl_s)


# The share of a load's or write's time in which a tier must say what it holds. The rest is kept for
# the records, even where a part of the tier is silent.
LOOK_UP_SHARE = 0.5
DEFAULT_QUEUE_BYTES = DEFAULT_HELD_BYTES = 256 << 20
DEFAULT_QUEUE_ENTRIES = 1024


@dataclass(frozen=True)
class StoreConfig:
    """Bounds of a store.

    Attributes:
        queue_bytes: Blocks that may wait to be written, in bytes, with records that are to go to
            faster tiers. None for 256 MiB, or for as many as the pool of a cache holds if that is
            more: its blocks wait where they lie.
        held_bytes: Memory that may be kept meanwhile for records that are to go to faster tiers;
            and, for each tier behind the first, for records that no faster tier keeps.
        queue_entries: Blocks and records that may wait to be written; for each tier as well. None
            for 1024, or for the blocks of the pool.
        load_timeout_s: How long a request waits for its tiers in all. They have 95 % of it: what
            came by then is restored in the rest, what did not is a miss.
        write_timeout_s: How long one write into a tier may take before it counts as failed.
        close_timeout_s: How long `close` waits for what is queued before it drops the rest.
        policies: By tier name; a tier not named has the default policy.
        breaker: When a failing tier is left alone.
    """

    queue_bytes: int | None = None
    held_bytes: int = DEFAULT_HELD_BYTES
    queue_entries: int | None = None
    load_timeout_s: float = 2.0
    write_timeout_s: float = 30.0
    close_timeout_s: float = 30.0
    policies: Mapping[str, TierPolicy] = field(default_factory=dict)
    breaker: BreakerConfig = field(default_factory=BreakerConfig)

    def __post_init__(self) -> None:
        if self.queue_bytes is not None:
            check_bytes("queue_bytes", self.queue_bytes, 1)
        check_bytes("held_bytes", self.held_bytes, 1)
        if self.queue_entries is not None:
            check_count("queue_entries", self.queue_entries, 1)
        for name in ("load_timeout_s", "write_timeout_s"):
            check_seconds(name, getattr(self, name), MAX_WAIT_S)
        check_seconds_or_0("close_timeout_s", self.close_timeout_s, MAX_WAIT_S)

    @property
    def max_queue_bytes(self) -> int:
        """`queue_bytes`, or its default."""
        return DEFAULT_QUEUE_BYTES if self.queue_bytes is None else self.queue_bytes

    @property
    def max_queue_entries(self) -> int:
        """`queue_entries`, or its default."""
        return DEFAULT_QUEUE_ENTRIES if self.queue_entries is None else self.queue_entries
