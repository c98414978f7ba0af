"""Deletes records from every tier, with what is still on its way there.

    queue of blocks | loads -> tier 0 -> queue of tier 1 -> tier 1 -> queue of tier 2 -> ...

A tier gets records from the queues and from faster tiers, so they are emptied from left to right,
each queue before its tier: what was deleted cannot come again from behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from prefixstore.block_key import RecordName
from prefixstore.store.block_writer import BlockWriter
from prefixstore.store.config import StoreConfig
from prefixstore.store.guarded_tier import GuardedTier
from prefixstore.store.loader import Loader
from prefixstore.store.stats import Counts
from prefixstore.store.write_queue import Chooser


class Deleter:
    """The way out.

    Args:
        tiers: Fastest first.
        writer: Has what is on its way to them.
        loader: Finds what is to go to faster ones.
        counts: Of the store.
        config: Bounds.
    """

    def __init__(
        self,
        tiers: Sequence[GuardedTier],
        writer: BlockWriter,
        loader: Loader,
        counts: Counts,
        config: StoreConfig,
    ) -> None:
        self._tiers = tiers
        self._writer = writer
        self._loader = loader
        self._counts = counts
        self._config = config

    def delete_many(self, names: Sequence[RecordName], deadline: float | None) -> list[str]:
        """See `Store.delete_many`."""
        return self._delete(
            frozenset(names).__contains__,
            lambda tier: tier.delete_many(names, deadline),
            deadline,
        )

    def delete_identity(self, identity: bytes) -> list[str]:
        """See `Store.delete_identity`."""
        return self._delete(
            lambda name: name.identity == identity,
            lambda tier: tier.delete_identity(identity),
            None,
        )

    def _delete(
        self, is_meant: Chooser, delete: Callable[[GuardedTier], bool], deadline: float | None
    ) -> list[str]:
        """Delete tier after tier; the names of those that could not, or may get some of it yet."""
        if deadline is None:  # no write under way takes longer
            deadline = time.monotonic() + self._config.write_timeout_s
        failed = []
        with self._loader.passing_over(is_meant):
            self._counts.add(num_dropped=self._writer.drop_blocks(is_meant))
            awaited = self._writer.wait_written(is_meant, deadline)
            for number, tier in enumerate(self._tiers):
                is_quiet = self._writer.drop_records(number, is_meant, deadline)
                if not delete(tier) or not is_quiet or number in awaited:
                    failed.append(tier.name)
        return failed
