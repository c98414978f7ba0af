"""One call on many records: under the generation of each identity, and again where that may help.

A record's key holds its identity's generation. Every call asks for the generation beside the
records, in the same round trip, and what was done under another one is done again: so nothing that
was deleted with its identity is found, though the generation is remembered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar, cast

from prefixstore.block_key import RecordName
from prefixstore.errors import BlockCorrupted, TierError
from prefixstore.tiers.base import is_past
from prefixstore.tiers.redis.batch import BatchReply, CommandBatch
from prefixstore.tiers.redis.bulk import UNSETTLED, Bulk, Unsettled
from prefixstore.tiers.redis.errors import ConnectionLost, PassingTrouble, tier_error
from prefixstore.tiers.redis.exchange import Exchange
from prefixstore.tiers.redis.lanes import Operation
from prefixstore.tiers.redis.records import Keys, as_generation, fetch_generation, make_generation
from prefixstore.tiers.redis.servers import Servers
from prefixstore.tiers.redis.wire import ErrorReply

T = TypeVar("T")
Generations: TypeAlias = "dict[bytes, bytes | TierError | None]"  # by identity

# Pauses before each further try. A failover takes seconds and is not waited for; a moved slot is
# found at once.
_PAUSES_S = (0.0, 0.02, 0.05)
_MAX_REMEMBERED = 10_000  # identities
_ERRORS = (ErrorReply, TierError)
# Records sent before the commands of the next are prepared, so that both sides work at once: 16 of
# 64 KiB keep a server busy for 0.7 ms; with portions of 64 it waited. Batches below
# `_LEAST_PORTIONED_BYTES` are prepared as a whole.
_PORTION = 16
_LEAST_PORTIONED_BYTES = 1 << 20


@dataclass(frozen=True)
class Call(Generic[T]):
    """What is to be done with each of many records.

    Attributes:
        names: Which records.
        start: The operation on the record of that index, whose key and generation are given.
        absent: What to answer for a record whose identity holds nothing.
        begins: Whether an identity without a generation gets one.
        bulk: What settles most records with one command for each, where there is such a thing.
    """

    names: Sequence[RecordName]
    start: Callable[[int, bytes, bytes], Operation[T]]
    absent: T | TierError
    begins: bool = False
    bulk: Bulk[T] | None = None


@dataclass
class _Findings(Generic[T]):
    """What one try of a call has found out.

    Attributes:
        identities: Of the records that are tried.
        keys: Theirs, by their index in the call.
        generations: That those identities have now.
        outcomes: Of the operations on the records, by index.
    """

    identities: list[bytes]
    keys: dict[int, bytes] = field(default_factory=dict)
    generations: Generations = field(default_factory=dict)
    outcomes: dict[int, T | TierError] = field(default_factory=dict)


class Caller:
    """Makes calls on the servers of a tier. Thread-safe."""

    def __init__(self, servers: Servers, keys: Keys) -> None:
        self._servers = servers
        self._keys = keys
        self._generations: dict[bytes, bytes] = {}

    def run(self, call: Call[T], deadline: float) -> list[T | TierError]:
        """For each record what its operation returned, or why it did not."""
        outcomes: list[T | TierError] = [call.absent] * len(call.names)
        pending = list(range(len(call.names)))
        troubles: list[object] = []
        for pause_s in _PAUSES_S:
            if not pending:
                break
            if troubles:  # an identity that only has another generation now is asked at once
                _pause(pause_s, deadline)
            pending = self._run_once(call, pending, outcomes, deadline)
            troubles = [outcomes[i] for i in pending if isinstance(outcomes[i], PassingTrouble)]
            if troubles and not self._may_pass(troubles, deadline):
                break
        return outcomes

    def run_one(self, make: Callable[[], Operation[T]], deadline: float) -> T:
        """One operation of its own, as often as may help.

        Raises:
            TierError: Why it did not succeed.
        """
        failures: list[TierError] = []
        for pause_s in _PAUSES_S:
            _pause(pause_s, deadline)
            (outcome,) = self.exchange([make()], deadline)
            if not isinstance(outcome, TierError):
                return outcome
            failures.append(outcome)
            if not isinstance(outcome, PassingTrouble) or not self._may_pass([outcome], deadline):
                break
        raise failures[-1]

    def exchange(self, operations: Iterable[Operation[T]], deadline: float) -> list[T | TierError]:
        """Operations beside each other, once."""
        exchange: Exchange[T] = Exchange(self._servers, deadline)
        return exchange.run(operations)

    def forget(self, identity: bytes) -> None:
        """Ask for an identity's generation before the next call."""
        self._generations.pop(identity, None)

    def _may_pass(self, troubles: Sequence[object], deadline: float) -> bool:
        is_lost = any(isinstance(trouble, ConnectionLost) for trouble in troubles)
        may_have_changed = self._servers.refresh(deadline) or is_lost
        return may_have_changed and not is_past(deadline)  # else what they met is all there is

    def _run_once(
        self,
        call: Call[T],
        pending: Sequence[int],
        outcomes: list[T | TierError],
        deadline: float,
    ) -> list[int]:
        """Fills in outcomes; returns the records that are worth another try."""
        wanted = {call.names[i].identity for i in pending}
        known = self._known_generations(wanted, call.begins, deadline)
        generations = {i: found for i, found in known.items() if isinstance(found, bytes)}
        found: _Findings[T] = _Findings(list(generations))
        keys = found.keys
        num_bytes = 0 if call.bulk is None else call.bulk.num_bytes
        portion = _PORTION if num_bytes >= _LEAST_PORTIONED_BYTES else len(pending)
        portions = self._keys_of(call.names, pending, generations, portion)
        if call.bulk is not None and self._servers.can_batch:
            expected = (len(pending), num_bytes) if portion < len(pending) else (0, 0)
            self._run_bulk(call.bulk, portions, expected, found, deadline)
        else:
            for some in portions:
                keys.update(some)
        if len(keys) < len(pending):
            for i in set(pending).difference(keys):
                why = known[call.names[i].identity]
                outcomes[i] = why if isinstance(why, TierError) else call.absent
        self._run_rest(call, known, found, deadline)
        for i in keys:
            outcomes[i] = found.outcomes[i]
        current = found.generations
        stale = {i for i in found.identities if self._is_stale(i, current, known)}
        # One that may have been deleted: nobody can say.
        unsure = {i: why for i, why in current.items() if isinstance(why, TierError)}
        if stale or unsure:
            for i in keys:
                identity = call.names[i].identity
                if identity in unsure:
                    outcomes[i] = unsure[identity]
                elif identity in stale:
                    outcomes[i] = call.absent
        return [
            i
            for i in pending
            if isinstance(outcomes[i], PassingTrouble)
            or (stale and call.names[i].identity in stale)
        ]

    def _keys_of(
        self,
        names: Sequence[RecordName],
        indices: Sequence[int],
        generations: Mapping[bytes, bytes],
        num_at_once: int,
    ) -> Iterator[dict[int, bytes]]:
        """The records' keys by index, so many at a time; of identities without a generation
        none.
        """
        for start in range(0, len(indices), num_at_once):
            some = indices[start : start + num_at_once]
            yield self._keys.records(((i, names[i]) for i in some), generations)

    def _run_bulk(
        self,
        bulk: Bulk[T],
        portions: Iterable[Mapping[int, bytes]],
        expected: tuple[int, int],
        found: _Findings[T],
        deadline: float,
    ) -> None:
        """One command for each record and generation; fills in what that tells.

        Args:
            bulk: What the commands are.
            portions: The records' keys by index.
            expected: Commands and bytes, where a server is to begin while others are prepared.
            found: To be filled in.
            deadline: Of `time.monotonic()`.
        """
        own: list[BatchReply] = []
        with CommandBatch(self._servers, deadline, *expected) as batch:
            batch.add([((b"GET", self._keys.generation(i)), None, 0) for i in found.identities])
            places = []
            for keys in portions:
                found.keys.update(keys)
                places.append((batch.add(bulk.commands(keys)), len(keys)))
            replies = batch.run()
        for identity, reply in zip(found.identities, replies, strict=False):
            generation = self._meaning(reply)
            if generation is UNSETTLED:
                continue
            if isinstance(generation, BlockCorrupted) or not isinstance(generation, TierError):
                generation = as_generation(generation)  # as `fetch_generation` takes it
            found.generations[identity] = generation
        for first, num_keys in places:
            own += replies[first : first + num_keys]
        settled = bulk.settle(found.keys, own)
        kinds = set(map(type, own))
        if UNSETTLED not in settled and not any(issubclass(kind, _ERRORS) for kind in kinds):
            found.outcomes.update(zip(found.keys, cast("list[T]", settled), strict=True))
            return
        for i, reply, one in zip(found.keys, own, settled, strict=True):
            outcome = self._meaning(reply) if isinstance(reply, _ERRORS) else one
            if not isinstance(outcome, Unsettled):
                found.outcomes[i] = outcome

    def _run_rest(
        self, call: Call[T], known: Generations, found: _Findings[T], deadline: float
    ) -> None:
        """An operation for each record and generation that nothing is known of; fills in."""
        identities = [i for i in found.identities if i not in found.generations]
        rest = [i for i in found.keys if i not in found.outcomes]
        if not identities and not rest:
            return
        operations: list[Operation[Any]] = [
            fetch_generation(self._keys.generation(identity)) for identity in identities
        ]
        for i in rest:
            generation = known[call.names[i].identity]
            assert isinstance(generation, bytes)
            operations.append(call.start(i, found.keys[i], generation))
        outcomes = self.exchange(operations, deadline)
        found.generations.update(zip(identities, outcomes, strict=False))
        found.outcomes.update(zip(rest, outcomes[len(identities) :], strict=True))

    def _meaning(self, reply: Any) -> Any:
        """A reply as it is, the error it stands for, or `UNSETTLED` where another server is to be
        asked.
        """
        if not isinstance(reply, ErrorReply):
            return reply
        if self._servers.redirected(reply) is not None:
            return UNSETTLED
        return tier_error(self._servers.config.name, reply)

    def _is_stale(self, identity: bytes, current: Generations, known: Generations) -> bool:
        """Whether an identity has another generation now than it was known to have."""
        generation = current[identity]
        if isinstance(generation, TierError) or generation == known[identity]:
            return False
        self._remember(identity, generation)
        return True

    def _known_generations(
        self, identities: Iterable[bytes], begins: bool, deadline: float
    ) -> Generations:
        """Each identity's generation: remembered, or the server's."""
        known: Generations = {}
        unknown = []
        for identity in identities:
            known[identity] = self._generations.get(identity)
            if known[identity] is None:
                unknown.append(identity)
        if unknown:
            ask = make_generation if begins else fetch_generation
            operations = [ask(self._keys.generation(identity)) for identity in unknown]
            for identity, found in zip(unknown, self.exchange(operations, deadline), strict=True):
                known[identity] = found
                if not isinstance(found, TierError):
                    self._remember(identity, found)
        return known

    def _remember(self, identity: bytes, generation: bytes | None) -> None:
        if generation is None:
            self.forget(identity)
            return
        if len(self._generations) >= _MAX_REMEMBERED:
            self._generations.clear()
        self._generations[identity] = generation


def _pause(pause_s: float, deadline: float) -> None:
    pause_s = min(pause_s, deadline - time.monotonic())
    if pause_s > 0:
        time.sleep(pause_s)
