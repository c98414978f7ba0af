"""A tier whose records only the holders of a key can write, or read: for stores that are shared.

It wraps any tier, which then keeps protected records under names of the key; protection.py says
how. What comes back is verified in the caller's buffer and is the plain record, or `BlockCorrupted`
with the reason: the key of another, no protection, a wrong tag, a record under another's name.

A record may be an older one that somebody kept and put back: it was written under the same name, so
it holds the KV of the same tokens, and nothing more is promised of when it was written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prefixstore.block_key import RecordName
from prefixstore.errors import BlockCorrupted, TierError
from prefixstore.keys import ProtectionConfig
from prefixstore.protection import RecordKey, make_record_keys
from prefixstore.record_header import TRAILER_BYTES
from prefixstore.tiers.base import Held, LookOutcome, ReadOutcome, Swept, Tier, TierStats
from prefixstore.tiers.outcomes import raise_if_all
from prefixstore.tiers.protected_reading import Reading
from prefixstore.tiers.scratch import Scratch, batches_of


class ProtectedTier(Tier):
    """Another tier under keys. Owns it: `close` closes it.

    Its name, bounds and statistics are those of the other tier, trailers and all. It does not tell
    what gives way (`on_evict`): that would have to be opened under the other tier's lock.

    Args:
        tier: Where protected records are kept. Nothing else should put records there, but for
            tiers with other keys: they do not meet.
        config: The keys. The first writes; records of the others are found too, at the price of
            one more look-up of what the first does not find.

    Raises:
        ConfigError: If `cryptography` is not installed.
    """

    def __init__(self, tier: Tier, config: ProtectionConfig) -> None:
        self._tier = tier
        self._keys = make_record_keys(config)
        # two memories: a write that the inner tier gave up may still be reading its own, and must
        # find nothing there but protected records
        self._to_write = Scratch()
        self._to_read = Scratch()

    @property
    def name(self) -> str:
        return self._tier.name

    def get_many(
        self,
        names: Sequence[RecordName],
        outs: Sequence[memoryview],
        *,
        offsets: Sequence[int] | None = None,
        deadline: float | None = None,
    ) -> list[ReadOutcome]:
        """See `Tier.get_many`.

        A whole record is verified where it is read, in a buffer that is TRAILER_BYTES longer than
        the record; in a shorter one it arrives by way of another buffer and a second look-up. A
        part cannot be verified alone, so with `offsets` whole records are read, after their
        headers, and the parts copied out.
        """
        if offsets is None:
            return self._get_whole(names, outs, deadline, may_abandon=False)
        return self._get_each(
            names,
            deadline,
            lambda reading, numbers: reading.parts(
                [names[i] for i in numbers],
                [outs[i] for i in numbers],
                [offsets[i] for i in numbers],
            ),
        )

    def get_or_abandon_many(
        self,
        names: Sequence[RecordName],
        outs: Sequence[memoryview],
        *,
        deadline: float | None = None,
    ) -> list[ReadOutcome]:
        return self._get_whole(names, outs, deadline, may_abandon=True)

    @property
    def knows_what_it_holds(self) -> bool:
        return self._tier.knows_what_it_holds

    @property
    def gives_parts(self) -> bool:
        return False  # one tag covers the whole record

    def put_many(
        self,
        names: Sequence[RecordName],
        records: Sequence[memoryview],
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> list[TierError | None]:
        """See `Tier.put_many`; `BlockCorrupted` for what is not a plain record of that name."""
        outcomes: list[TierError | None] = [None] * len(names)
        sizes = [record.nbytes + TRAILER_BYTES for record in records]
        for run in batches_of(sizes):
            protected: list[tuple[int, memoryview]] = []
            for i, row in zip(run, self._to_write.rows([sizes[i] for i in run]), strict=True):
                error = _protect(self._keys[0], names[i], records[i], row)
                if error is None:
                    protected.append((i, row))
                outcomes[i] = error
            errors = self._tier.put_many(
                [self._keys[0].stored_name(names[i]) for i, _ in protected],
                [row for _, row in protected],
                priority=priority,
                deadline=deadline,
            )
            for (i, _), failure in zip(protected, errors, strict=True):
                outcomes[i] = failure
        return outcomes

    def contains_many(
        self, names: Sequence[RecordName], *, deadline: float | None = None
    ) -> list[LookOutcome]:
        outcomes: list[LookOutcome] = [False] * len(names)
        for key in self._keys:
            missing = [i for i, outcome in enumerate(outcomes) if outcome is not True]
            if not missing:
                break
            stored = [key.stored_name(names[i]) for i in missing]
            try:
                answers = self._tier.contains_many(stored, deadline=deadline)
            except TierError as error:  # answers under other keys still count
                answers = [error] * len(missing)
            for i, answer in zip(missing, answers, strict=True):
                # "not there" must not overwrite that another key got no answer.
                if answer is not False:
                    outcomes[i] = answer
        raise_if_all(outcomes, TierError)
        return outcomes

    def delete_many(
        self, names: Sequence[RecordName], *, deadline: float | None = None
    ) -> list[LookOutcome]:
        by_key = [
            self._tier.delete_many([key.stored_name(name) for name in names], deadline=deadline)
            for key in self._keys
        ]
        return [
            next((one for one in outcomes if isinstance(one, TierError)), any(outcomes))
            for outcomes in zip(*by_key, strict=True)
        ]

    def delete_identity(self, identity: bytes) -> None:
        for key in self._keys:
            self._tier.delete_identity(key.stored_identity(identity))

    def pin_many(self, names: Sequence[RecordName], is_pinned: bool = True) -> list[bool]:
        by_key = [
            self._tier.pin_many([key.stored_name(name) for name in names], is_pinned)
            for key in self._keys
        ]
        return [any(outcomes) for outcomes in zip(*by_key, strict=True)]

    def list_identities(self) -> dict[bytes, Held]:
        """See `Tier.list_identities`; bytes with the trailers.

        What the first key did not write is there under an identity of nobody, which
        `delete_identity` forgets like any.
        """
        held = self._tier.list_identities()
        return {self._keys[0].plain_identity(stored): held[stored] for stored in held}

    def listed_as(self, identity: bytes) -> list[bytes]:
        """Under which identities `list_identities` has what any of the keys wrote of this one."""
        stored = (key.stored_identity(identity) for key in self._keys)
        return [self._keys[0].plain_identity(each) for each in stored]

    def stats(self) -> TierStats:
        return self._tier.stats()

    def check(self, fix: bool = False) -> list[str]:
        return self._tier.check(fix)

    def sweep(self) -> Swept:
        return self._tier.sweep()

    def close(self) -> None:
        self._tier.close()

    def _get_whole(
        self,
        names: Sequence[RecordName],
        outs: Sequence[memoryview],
        deadline: float | None,
        may_abandon: bool,
    ) -> list[ReadOutcome]:
        return self._get_each(
            names,
            deadline,
            lambda reading, numbers: reading.records(
                [names[i] for i in numbers], [outs[i] for i in numbers], may_abandon
            ),
        )

    def _get_each(
        self,
        names: Sequence[RecordName],
        deadline: float | None,
        get: Callable[[Reading, list[int]], list[ReadOutcome]],
    ) -> list[ReadOutcome]:
        """What `get` says of each, asked with one key after the other of what is still missing."""
        outcomes: list[ReadOutcome] = [None] * len(names)
        for key in self._keys:
            missing = [i for i, outcome in enumerate(outcomes) if outcome is None]
            found = get(Reading(self._tier, key, self._to_read, deadline), missing)
            for i, outcome in zip(missing, found, strict=True):
                outcomes[i] = outcome
        return outcomes


def _protect(
    key: RecordKey, name: RecordName, record: memoryview, out: memoryview
) -> BlockCorrupted | None:
    """Fill `out` with the protected record; why not, where it is none to be kept."""
    try:
        key.protect(name, record, out)
    except BlockCorrupted as error:
        return error
    return None
