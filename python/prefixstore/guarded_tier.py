"""A tier as the store sees it: it verifies, counts, and never raises `TierError`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from prefixstore.breaker import Breaker, BreakerConfig
from prefixstore.errors import BlockCorrupted, TierError, TierFull
from prefixstore.record import BlockHash, BlockKey, RecordHeader, check_header
from prefixstore.store_stats import Counts, TierUse
from prefixstore.tiers.base import Tier

logger = logging.getLogger(__name__)

T = TypeVar("T")


class GuardedTier:
    """One tier behind its breaker. With `Store` the only place that catches `TierError`."""

    def __init__(self, tier: Tier, config: BreakerConfig) -> None:
        self._tier = tier
        self._breaker = Breaker(tier.name, config)
        self._counts = Counts()
        self._is_full = False

    @property
    def name(self) -> str:
        return self._tier.name

    def use(self) -> TierUse:
        counts = self._counts.as_dict()
        return TierUse(self.name, is_down=self._breaker.is_down, **counts)

    def contains_many(self, block_hashes: Sequence[BlockHash]) -> list[bool] | None:
        """One answer each, or None where the tier gave none."""
        return self._attempt(lambda: self._tier.contains_many(block_hashes))

    def fetch(self, key: BlockKey, record: np.ndarray) -> RecordHeader | None:
        """Read a record and verify its header; a wrong one is deleted from the tier.

        Args:
            key: What it must agree with.
            record: `key.layout.max_record_bytes` or more, begins with the record afterwards where
                there is one. Its payload is to be verified, and then `accept` or `reject` called.
        """
        try:
            num_read = self._attempt(
                lambda: self._tier.get(key.block_hash, record.data), lets_through=BlockCorrupted
            )
            if num_read is None:
                self._counts.add(num_misses=1)
                return None
            return check_header(record[:num_read], key)
        except BlockCorrupted as error:
            self.reject(key, str(error))
            return None

    def accept(self, num_bytes: int) -> None:
        """A record of so many bytes was right."""
        self._counts.add(num_hits=1, read_bytes=num_bytes)

    def reject(self, key: BlockKey, problem: str) -> None:
        """A record was wrong: it is deleted from the tier, and a miss."""
        logger.warning("tier %s: block %s: %s", self.name, key.block_hash.hex(), problem)
        self._counts.add(num_corrupted=1, num_misses=1)
        self._attempt(lambda: self._tier.delete(key.block_hash))

    def put(self, key: BlockKey, record: np.ndarray) -> None:
        """Write a record, or count why not."""

        def put() -> bool:
            self._tier.put(key.block_hash, record.data)
            return True

        if self._attempt(put):
            self._set_full(None)
            self._counts.add(num_written=1, written_bytes=record.nbytes)

    def check(self) -> list[str]:
        try:
            return self._tier.check()
        except TierError as error:
            return [f"{self.name}: cannot be checked: {error}"]

    def close(self) -> None:
        try:
            self._tier.close()
        except TierError as error:
            logger.warning("tier %s: cannot be closed: %s", self.name, error)

    def mark_down(self, error: BaseException) -> None:
        """Leave the tier alone for a pause: it did what no tier may do."""
        self._counts.add(num_errors=1)
        self._breaker.trip(error)

    def _attempt(
        self, call: Callable[[], T], lets_through: type[TierError] | tuple[()] = ()
    ) -> T | None:
        """The call's answer; None if the tier is down or failed."""
        if not self._breaker.allows():
            self._counts.add(num_skipped=1)
            return None
        try:
            answer = call()
        except lets_through:
            self._breaker.succeeded()  # it answered, if wrongly
            raise
        except TierFull as error:
            self._breaker.succeeded()  # no reason to stop reading from it
            self._counts.add(num_full=1)
            self._set_full(error)
            return None
        except TierError as error:
            self._counts.add(num_errors=1)
            self._breaker.failed(error)
            return None
        self._breaker.succeeded()
        return answer

    def _set_full(self, error: TierFull | None) -> None:
        if (error is not None) != self._is_full:
            self._is_full = error is not None
            logger.warning("tier %s: %s", self.name, error or "has room again")
