"""Records in a Redis or Valkey that machines share: one server, Sentinel or a cluster.

    get_many -> Caller      under each identity's generation, tried again where that may help
             -> CommandBatch   one command for each record, while all goes well
             -> Exchange    the rest: operations beside each other on many connections, one deadline
             -> Channel     RESP to and from the caller's memory

How records lie there: see records.py. The server bounds its memory and chooses what gives
way.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from prefixstore.block_key import RecordName
from prefixstore.errors import BlockCorrupted, TierError, TierTimeout, TierUnavailable
from prefixstore.tiers.base import (
    Held,
    LookOutcome,
    ReadOutcome,
    Swept,
    Tier,
    TierStats,
    check_priority,
)
from prefixstore.tiers.outcomes import (
    SharedCounters,
    of_each_mention,
    raise_first,
    raise_if_all,
)
from prefixstore.tiers.pages import flat_bytes
from prefixstore.tiers.redis.address import Address
from prefixstore.tiers.redis.bulk import Bulk, BulkLooks, BulkRanges, BulkReads, BulkWrites
from prefixstore.tiers.redis.calls import Call, Caller
from prefixstore.tiers.redis.config import RedisTierConfig
from prefixstore.tiers.redis.info import ServerUse, fetch_use
from prefixstore.tiers.redis.lanes import Operation
from prefixstore.tiers.redis.pins import end_generation, pin_record, unpin_record
from prefixstore.tiers.redis.records import (
    Keys,
    delete_record,
    holds,
    read_range,
    read_record,
    write_record,
)
from prefixstore.tiers.redis.servers import open_servers
from prefixstore.tiers.redis.sweep import Sweeper, list_problems

T = TypeVar("T")

_SAMPLE = 64  # own writes that `check` looks at
_RENEWAL_SHARE = 1 / 16  # share of the time to live that passes before a hit renews it
_MAX_REMEMBERED = 1 << 15  # keys of renewed records
_SWEEP_TIMEOUT_S = 300.0


class RedisTier(Tier):
    """A tier in a Redis or Valkey. Opening it does not need the server: calls do.

    The server knows no priorities. Pins keep records from expiry, and from eviction where the
    server evicts only what expires (`volatile-*` policies). Safe to use in a forked process.
    """

    def __init__(self, config: RedisTierConfig) -> None:
        self._config = config
        self._keys = Keys(config.prefix)
        self._servers = open_servers(config)
        self._caller = Caller(self._servers, self._keys)
        self._counters = SharedCounters()
        self._renewed: dict[bytes, float] = {}  # by key: when its next renewal is due
        self._written: deque[bytes] = deque(maxlen=_SAMPLE)  # keys

    @property
    def name(self) -> str:
        return self._config.name

    def get_many(
        self,
        names: Sequence[RecordName],
        outs: Sequence[memoryview],
        *,
        offsets: Sequence[int] | None = None,
        deadline: float | None = None,
    ) -> list[ReadOutcome]:
        views = [flat_bytes(out) for out in outs]
        due: set[bytes] = set()  # a record that is asked for twice in a call is renewed both times
        now = time.monotonic()

        def is_due(key: bytes) -> bool:
            if self._is_to_be_renewed(key, now):
                due.add(key)
            return key in due

        def start(i: int, key: bytes, generation: bytes) -> Operation[int | None]:
            if offsets is None:
                return read_record(key, views[i], self._config, is_due(key))
            return read_range(key, views[i], offsets[i], self._config, is_due(key))

        bulk = self._bulk_of(views, offsets, is_due)
        call: Call[int | None] = Call(names, start, absent=None, bulk=bulk)
        outcomes = self._caller.run(call, self._deadline(deadline))
        self._counters.add_reads(outcomes)
        raise_if_all(outcomes, TierUnavailable, TierTimeout)
        return outcomes

    def put_many(
        self,
        names: Sequence[RecordName],
        records: Sequence[memoryview],
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> list[TierError | None]:
        check_priority(priority)
        keys: dict[int, bytes] = {}

        def start(i: int, key: bytes, generation: bytes) -> Operation[bool]:
            keys[i] = key
            is_known = bulk is not None and i in bulk.known
            return write_record(key, flat_bytes(records[i]), self._config, is_known)

        bulk = BulkWrites(records, self._config, keys) if self._are_single(records) else None
        deleted = TierUnavailable(f"{self.name}: the identity was deleted again and again")
        call: Call[bool] = Call(names, start, absent=deleted, begins=True, bulk=bulk)
        outcomes = self._caller.run(call, self._deadline(deadline))
        written = [i for i, outcome in enumerate(outcomes) if outcome is True]
        written_bytes = sum([records[i].nbytes for i in written])
        self._counters.add(num_puts=len(written), written_bytes=written_bytes)
        self._written.extend([keys[i] for i in written])
        raise_if_all(outcomes, TierUnavailable, TierTimeout)
        return [outcome if isinstance(outcome, TierError) else None for outcome in outcomes]

    def contains_many(
        self, names: Sequence[RecordName], *, deadline: float | None = None
    ) -> list[LookOutcome]:
        """See `Tier.contains_many`; to the server's own choice of victims it is a use."""
        call: Call[bool] = Call(
            names,
            lambda i, key, generation: holds(key),
            absent=False,
            bulk=BulkLooks(len(names)),
        )
        answers = self._answer(call, deadline)
        raise_if_all(answers, TierUnavailable, TierTimeout)
        return answers

    def delete_many(
        self, names: Sequence[RecordName], *, deadline: float | None = None
    ) -> list[LookOutcome]:
        different = list(dict.fromkeys(names))

        def start(i: int, key: bytes, generation: bytes) -> Operation[bool]:
            return delete_record(key, self._keys.pinned(different[i].identity, generation))

        outcomes = self._caller.run(Call(different, start, absent=False), self._deadline(deadline))
        self._counters.add(num_deletes=outcomes.count(True))
        raise_if_all(outcomes, TierError)
        return of_each_mention(names, dict(zip(different, outcomes, strict=True)))

    def delete_identity(self, identity: bytes) -> None:
        """Forget every record of an identity, in one step: it begins a new generation.

        The old one's records expire, except the pinned ones, which are deleted: for that it takes
        the time of a sweep, beyond `timeout_s`. Where this fails, the next call goes on with it.
        """
        deadline = self._deadline(None)
        try:
            self._caller.run_one(lambda: end_generation(self._keys, identity), deadline)
        finally:
            self._caller.forget(identity)
        self._sweeper().drop_ended(identity)

    def pin_many(self, names: Sequence[RecordName], is_pinned: bool = True) -> list[bool]:
        def start(i: int, key: bytes, generation: bytes) -> Operation[bool]:
            identity = names[i].identity
            pinned_key = self._keys.pinned(identity, generation)
            if not is_pinned:
                return unpin_record(key, pinned_key, self._config)
            return pin_record(key, pinned_key, self._keys.generation(identity), generation)

        return raise_first(self._answer(Call(names, start, absent=False), None))

    def list_identities(self) -> dict[bytes, Held]:
        """Records and bytes of each identity, for which it walks through every key."""
        sweeper, primaries = self._start_walk()
        return sweeper.weigh(sweeper.survey(primaries))

    def stats(self) -> TierStats:
        """What this process did, and of the servers as a whole, whoever uses them: their bound
        (0 for none), memory in use, number of keys, and keys evicted and expired since they run.
        """
        deadline = self._deadline(None)
        primaries = self._servers.primaries(deadline)
        pool = self._servers.pool
        use = ServerUse.sum(fetch_use(pool, address, deadline) for address in primaries)
        counters = self._counters.copy()
        counters.num_evictions, counters.num_expired = use.num_evicted, use.num_expired
        return counters.stats(use.max_bytes, use.used_bytes, use.num_keys)

    def check(self, fix: bool = False) -> list[str]:
        """Look whether records are whole: the last ones that this process wrote and that are still
        there; with `fix` all there are, which takes a walk through every key of the servers.

        What others wrote and delete meanwhile cannot be recounted without stopping them, so
        nothing is said about numbers and bytes.
        """
        self._servers.pool.check_open()
        if not fix:
            sweeper = Sweeper(self._config, self._caller, self._keys, self._deadline(None))
            return list(list_problems(self.name, sweeper.find_broken(list(self._written))))
        sweeper, primaries = self._start_walk()
        survey = sweeper.survey(primaries)
        broken = sweeper.find_broken(list(survey.manifests))
        sweeper.drop(broken)
        return list(list_problems(self.name, broken))

    def sweep(self) -> Swept:
        """Delete parts without a record and all that is left of ended generations, for which it
        walks through every key. Without it they go when they expire; what is pinned never does.
        """
        sweeper, primaries = self._start_walk()
        return sweeper.reclaim(sweeper.survey(primaries))

    def close(self) -> None:
        self._servers.close()

    def _answer(self, call: Call[bool], deadline: float | None) -> list[LookOutcome]:
        """An answer for each record, or why there is none.

        What is there but is no record is a no, and the next writer mends it.
        """
        outcomes = self._caller.run(call, self._deadline(deadline))
        return [False if isinstance(o, BlockCorrupted) else o for o in outcomes]

    def _bulk_of(
        self,
        outs: Sequence[memoryview],
        offsets: Sequence[int] | None,
        is_due: Callable[[bytes], bool],
    ) -> Bulk[int | None] | None:
        """How to read records that have one part each; None where some have more for certain."""
        begins = offsets or [0] * len(outs)
        ends = [begin + len(out) for begin, out in zip(begins, outs, strict=True)]
        if max(ends, default=0) > self._config.part_bytes or not all(outs):
            return None
        if offsets is None:
            return BulkReads(outs, self._config, is_due)
        return BulkRanges(outs, offsets, self._config, is_due)

    def _are_single(self, records: Sequence[memoryview]) -> bool:
        """Whether records of at most these lengths have one part each."""
        return max([r.nbytes for r in records], default=0) <= self._config.part_bytes

    def _is_to_be_renewed(self, key: bytes, now: float) -> bool:
        """Whether a hit begins the record's time anew; not if that was done a short while ago, for
        it costs a command for each read of a record, and those that are read most need it least.
        """
        if not self._config.refresh_ttl or now < self._renewed.get(key, -math.inf):
            return False
        if len(self._renewed) >= _MAX_REMEMBERED:
            self._renewed.clear()
        self._renewed[key] = now + self._config.ttl_s * _RENEWAL_SHARE
        return True

    def _start_walk(self) -> tuple[Sweeper, list[Address]]:
        """A sweeper with time for all keys, and the servers that hold them."""
        sweeper = self._sweeper()
        return sweeper, self._servers.primaries(sweeper.deadline)

    def _sweeper(self) -> Sweeper:
        deadline = time.monotonic() + _SWEEP_TIMEOUT_S
        return Sweeper(self._config, self._caller, self._keys, deadline)

    def _deadline(self, deadline: float | None) -> float:
        return time.monotonic() + self._config.timeout_s if deadline is None else deadline
