"""The tiers in order of speed: verified loads, promotion, background writes.

    save -> block_writer.py -> record -> tier 0;  tier_writer.py -> tier 1;  -> tier 2 ...
    load -> tier 0? -> tier 1? -> ... -> verify -> block; the record goes up to faster tiers

What a tier gives is either verified or a counted miss. A failing tier costs its hits and nothing
else: see guarded_tier.py. A request waits for no writer, and for the tiers until its deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

import numpy as np

from prefixstore.block_key import BlockKey, RecordName
from prefixstore.errors import ConfigError
from prefixstore.store.block_sources import BlockSource
from prefixstore.store.block_targets import BlockTarget, LayerProgress, LayerTarget
from prefixstore.store.block_writer import BlockWriter
from prefixstore.store.config import LOOK_UP_SHARE, StoreConfig, TierPolicy
from prefixstore.store.deletion import Deleter
from prefixstore.store.guarded_tier import GuardedTier
from prefixstore.store.holders import Holders, find_holders
from prefixstore.store.load import LoadProgress
from prefixstore.store.loader import Loader, LoadObserver
from prefixstore.store.recent_names import RecentNames
from prefixstore.store.stats import Counts, StoreStats
from prefixstore.store.tier_writer import TierJob
from prefixstore.store.write_queue import WriteJob, noop
from prefixstore.tiers.base import Swept, Tier, TierStats

# Share of a request's time; in the rest the thread wakes up and restores what came.
_TIERS_SHARE = 0.95
_REUSE_S = 60.0  # after which a reused block is offered again to second-touch tiers


class Store:
    """Records in tiers, fastest first. Thread-safe. Owns its tiers: `close` closes them.

    Args:
        tiers: In order of speed, with distinct names.
        config: Bounds and policies.
        observer: See `observe_loads`.

    Raises:
        ConfigError: If two tiers share a name, a policy names a tier that is not there, or a tier
            is written back to that no tier evicts into.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        config: StoreConfig | None = None,
        observer: LoadObserver | None = None,
    ) -> None:
        self._config = config if config is not None else StoreConfig()
        names = [tier.name for tier in tiers]
        if len(set(names)) != len(names):
            raise ConfigError(f"tiers: expected distinct names, got {names}")
        for name in self._config.policies:
            if name not in names:
                raise ConfigError(f"policies: expected one of {names}, got {name!r}")
        self._policies = [self._config.policies.get(name, TierPolicy()) for name in names]
        self._tiers = [
            GuardedTier(tier, self._config.breaker, policy.negative_ttl_s)
            for tier, policy in zip(tiers, self._policies, strict=True)
        ]
        self._write_through = self._numbers_of("write_through")
        self._second_touch = self._numbers_of("write_second_touch")
        self._saved = RecentNames()  # blocks saved once; saving one again shows that it was reused
        # Reused blocks that second-touch tiers were offered.
        self._reused = RecentNames(ttl_s=_REUSE_S)
        self._quarantined = RecentNames()
        self._counts = Counts()
        self._is_closed = False
        self._connect_evictions(tiers)
        self._writer = BlockWriter(self._tiers, self._config)
        self._loader = Loader(
            *(self._tiers, self._policies, self._writer, self._counts),
            *(self._found_again, self._quarantined),
        )
        self._deleter = Deleter(self._tiers, self._writer, self._loader, self._counts, self._config)
        if observer is not None:
            self.observe_loads(observer)

    def observe_loads(self, observer: LoadObserver) -> Callable[[], None]:
        """Have `observer` told what each load took, until what is returned is called.

        It is called at the end of `load_many`, in that thread, once for each tier that was asked:
        `observer(tier_name, num_records, num_bytes, seconds)`. The records are those that were
        right, none where all were misses; the bytes are theirs, as stored; the seconds are what
        the load spent on reading and decoding them, and on hearing what is not there. It must not
        raise: the load would.
        """
        return self._loader.observe(observer)

    @property
    def tier_names(self) -> list[str]:
        """Fastest first."""
        return [tier.name for tier in self._tiers]

    def deadline(self) -> float:
        """When the tiers' time is over for a request that begins now, on `time.monotonic`."""
        return time.monotonic() + _TIERS_SHARE * self._config.load_timeout_s

    def look_up(
        self,
        groups: Sequence[Sequence[BlockKey]],
        deadline: float,
        progress: Callable[[Holders], None] | None = None,
    ) -> list[Holders]:
        """Who holds the blocks of a request that is to load them; all its groups at once.

        Args:
            groups: Per group, the keys of its blocks.
            deadline: Of the request; a part of the time until then is for this.
            progress: Told in this thread, before each tier is asked, what the faster ones said of
                all keys; of what they do not hold nothing is known by then.
        """
        now, keys = time.monotonic(), list(chain.from_iterable(groups))
        found = self._find(keys, now + LOOK_UP_SHARE * (deadline - now), progress)
        return found.split([len(own) for own in groups])

    def contains_many(
        self, keys: Sequence[BlockKey], deadline: float | None = None
    ) -> list[str | None]:
        """For each key the name of the fastest tier that says it holds it, or None."""
        return list(self._find(keys, self.deadline() if deadline is None else deadline).tiers)

    def _find(
        self,
        keys: Sequence[BlockKey],
        deadline: float,
        progress: Callable[[Holders], None] | None = None,
    ) -> Holders:
        names = [key.name for key in keys]
        is_barred = self._quarantined.contains_many(names)
        return find_holders(self._tiers, names, is_barred, deadline, progress)

    def load_many(
        self,
        keys: Sequence[BlockKey],
        target: BlockTarget,
        deadline: float | None = None,
        progress: LoadProgress | None = None,
    ) -> list[str | None]:
        """Restore blocks, each from the fastest tier that has it right.

        Of each tier they come in the order of `keys`, some 32 or 64 MiB at a time; the next are
        read while these are decoded. Any order is as fast.

        Args:
            keys: What the records must agree with.
            target: Gets the blocks, by their index among `keys`; of a miss, garbage.
            deadline: What is not there by then is a miss; default see `StoreConfig`.
            progress: Called in this thread whenever blocks have arrived, with their indices; where
                it returns False no more are loaded, and the rest are None and no misses.

        Returns:
            For each the tier's name, or None: a miss, which does not stop the rest.
        """
        deadline = self.deadline() if deadline is None else deadline
        return self._loader.load_many(keys, target, deadline, progress)

    @property
    def lent_memory(self) -> np.ndarray | None:
        """Where records lie that are restored where they lie, uint8; None if they are not."""
        return self._tiers[0].lent_memory if self._tiers else None

    @property
    def layered_tiers(self) -> list[str]:
        """Names of the tiers that `load_layers` may ask."""
        return [tier.name for tier in self._tiers if tier.gives_layers]

    def load_layers(
        self,
        tier: str,
        keys: Sequence[BlockKey],
        target: LayerTarget,
        steps: Sequence[range],
        progress: LayerProgress,
        deadline: float,
    ) -> list[str | None]:
        """Restore blocks from one tier, the first layers of all of them first.

        A block is verified like one of `load_many`: each layer before it is written, and a block
        with a wrong one is a miss.

        Args:
            tier: One of `layered_tiers`.
            keys: What the records must agree with; of one layer group.
            target: Gets the layers.
            steps: All layers, in order: those of one step are read together, in one call.
            progress: Told in this thread of each step.
            deadline: What is not there by then is a miss.

        Returns:
            For each the tier's name, or None: a miss.
        """
        return self._loader.load_layers(tier, keys, target, steps, progress, deadline)

    def save(
        self,
        key: BlockKey,
        source: BlockSource,
        done: Callable[[], None] = noop,
        *,
        priority: int = 0,
        is_reuse: bool = False,
    ) -> bool:
        """Hand a block to the background writer; never waits.

        Args:
            key: What the block is.
            source: The block, which must stay alive and unchanged until `done()`.
            done: Called once, from this or the writer's thread, when the block is no longer read.
            priority: Of its record in the tiers, -8 to 7.
            is_reuse: `touch` asked for it.

        Returns:
            False if the queue was full or closed: the block is dropped, and counted.

        Raises:
            ValueError: If the block has another size than the key's; `done` is not called.
        """
        if source.num_bytes != key.layout.block_bytes:
            raise ValueError(
                f"source: expected {key.layout.block_bytes} bytes, got {source.num_bytes}"
            )
        numbers = self._write_through
        if self._second_touch:
            was_saved = not self._saved.add([key.name])[0]
            if is_reuse or was_saved:
                self._reused.add([key.name])
                numbers = tuple(sorted(numbers + self._second_touch))
        # A quarantined block goes to no tier.
        if not numbers or self._quarantined.contains_many([key.name])[0]:
            done()
            return True
        is_taken = self._writer.offer(WriteJob(key, source, numbers, priority, done))
        if is_taken:
            self._counts.add(num_saved=1)
        else:
            self._counts.add(num_dropped=1)
            done()
        return is_taken

    def note_dropped(self) -> None:
        """Count a block that is not even handed over, for there was no room to keep it for that."""
        self._counts.add(num_dropped=1)

    def touch(self, keys: Sequence[BlockKey]) -> list[int]:
        """Blocks were used again that did not have to be loaded.

        Returns:
            Which of them a tier now wants that no faster tier can give: to be saved, as a reuse.
        """
        if not self._second_touch:
            return []
        is_new = self._reused.add([key.name for key in keys])
        fresh = [i for i, is_first in enumerate(is_new) if is_first]
        if self._second_touch[0] == 0:
            return fresh
        self._hand_down([keys[i] for i in fresh], 0)
        return []

    def pin_many(self, keys: Sequence[BlockKey], is_pinned: bool = True) -> list[list[str]]:
        """Keep records from eviction and expiry, or no longer.

        Returns:
            For each the names of the tiers that hold it and did so.
        """
        names = [key.name for key in keys]
        answers = [tier.pin_many(names, is_pinned) for tier in self._tiers]
        return [
            [tier.name for tier, did in zip(self._tiers, column, strict=True) if did]
            for column in zip(*answers, strict=True)
        ] or [[] for _ in keys]

    def quarantine(self, keys: Sequence[BlockKey]) -> None:
        """Neither load nor save these again, as long as the last 65,536 of them are remembered.

        What a record said was right and is wrong may come back from a tier that others fill, or
        that does not delete. So it is for the life of this store, whatever is saved meanwhile.
        """
        self._quarantined.add([key.name for key in keys])

    def delete_many(self, keys: Sequence[BlockKey], deadline: float | None = None) -> list[str]:
        """Delete records from every tier, and what is on its way there.

        Args:
            keys: Which ones.
            deadline: Of `time.monotonic()`; default `write_timeout_s` for what is being written
                just now, and the tiers' own timeouts.

        Returns:
            The names of the tiers that could not, or that may get some of them yet.
        """
        return self._deleter.delete_many([key.name for key in keys], deadline)

    def delete_identity(self, identity: bytes) -> list[str]:
        """Forget every record of an identity, see `stored_identity`, and what is on its way.

        What is being written just now is waited for, at most `write_timeout_s`, and each tier then
        has its own timeouts.

        Returns:
            The names of the tiers that could not, or that may get some of them yet.
        """
        return self._deleter.delete_identity(identity)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was saved is written or given up; False if that takes longer."""
        return self._writer.flush(timeout_s)

    def wait_blocks(self, timeout_s: float) -> bool:
        """Wait until no saved block is read any more; False if that takes longer."""
        return self._writer.wait_blocks(timeout_s)

    def stats(self) -> StoreStats:
        """What it has done."""
        entries, num_bytes = self._writer.sizes()
        return StoreStats(
            tiers=tuple(tier.use() for tier in self._tiers),
            queue_entries=entries,
            queue_bytes=num_bytes,
            **self._counts.as_dict(),
        )

    def tier_stats(self) -> dict[str, TierStats | None]:
        """What each tier holds, by name; None where it gave no answer."""
        return {tier.name: tier.stats() for tier in self._tiers}

    def check(self, fix: bool = False) -> list[str]:
        """Recount the queues and every tier; what does not add up, in words."""
        problems = [problem for tier in self._tiers for problem in tier.check(fix)]
        return self._writer.check() + problems

    def sweep(self) -> dict[str, Swept]:
        """Give back what expired or was left behind; by tier name."""
        return {tier.name: tier.sweep() for tier in self._tiers}

    def close(self) -> None:
        """Write what is queued, for at most `close_timeout_s`, and close the tiers."""
        if self._is_closed:
            return
        self._is_closed = True
        self._counts.add(num_dropped=self._writer.close())
        for tier in self._tiers:
            tier.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- policies ----------------------------------------------------------------------------

    def _numbers_of(self, write: str) -> tuple[int, ...]:
        return tuple(i for i, policy in enumerate(self._policies) if policy.write == write)

    def _found_again(self, key: BlockKey, number: int) -> None:
        """A record of a tier was used: those behind may wait for that."""
        if self._second_touch and self._reused.add([key.name])[0]:
            self._hand_down([key], number)

    def _hand_down(self, keys: Sequence[BlockKey], number: int) -> None:
        """Queue records that this tier or a faster one holds, for those that wait for a reuse."""
        for slower in self._second_touch:
            if slower > number:
                for key in keys:
                    job = TierJob(key.name, key.layout.max_record_bytes)
                    self._writer.hand_on(slower, job)

    def _connect_evictions(self, tiers: Sequence[Tier]) -> None:
        """Have the tiers tell what they evict."""
        tells = [tier.on_evict(partial(self._evicted, i)) for i, tier in enumerate(tiers)]
        for number in self._numbers_of("write_back"):
            if number == 0 or not tells[number - 1]:
                raise ConfigError(
                    f"policies: {tiers[number].name}: expected a tier before it that tells what it"
                    f" evicts, for write_back; got {tiers[number - 1].name if number else None}"
                )

    def _evicted(self, number: int, name: RecordName, priority: int, record: np.ndarray) -> None:
        """A tier gives a record up; its bytes are lent for this call."""
        if number + 1 < len(self._policies) and self._policies[number + 1].write == "write_back":
            job = TierJob(name, record.nbytes, priority, record.copy())
            self._writer.hand_on(number + 1, job)
        self._writer.rescue(number, name, record)
