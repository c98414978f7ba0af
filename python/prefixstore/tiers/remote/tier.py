"""Records in an object store: S3 and what speaks it, GCS, Azure, or a directory of files.

    {prefix}/1/{identity}/{first two digits of the hash}/{hash}.kvb     names in hex; 1: of names

A record is an object, written once: where the store can say "only if absent" it is asked to, else
the same bytes are written again. The store has no bound that this tier knows, and nothing gives way
to anything. A read costs one request, and one copy from the client's memory into the caller's
buffer, which the client offers no way around. See docs/remote.md for what requests cost.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from prefixstore.block_key import RecordName
from prefixstore.errors import TierError, TierUnavailable
from prefixstore.tiers.base import (
    Held,
    LookOutcome,
    ReadOutcome,
    Swept,
    Tier,
    TierStats,
    check_priority,
)
from prefixstore.tiers.outcomes import SharedCounters, of_each_mention, raise_first, raise_if_all
from prefixstore.tiers.pages import flat_bytes
from prefixstore.tiers.remote.config import RemoteTierConfig
from prefixstore.tiers.remote.objects import Objects
from prefixstore.tiers.remote.records import (
    DeleteRecord,
    FindRecord,
    ReadRecord,
    Records,
    Survey,
    WriteRecord,
    is_too_short,
)
from prefixstore.tiers.remote.requests import Request, Requests, T
from prefixstore.tiers.remote.staged import ANY_AGE_S, GRACE_S, StagedFiles


class RemoteTier(Tier):
    """A tier in an object store. Opening it does not need the server: calls do.

    Object stores know no priorities and no pins. A process that was forked from one which used
    remote tiers can use none: the client does not survive a fork.

    Raises:
        ConfigError: On opening, if obstore is not installed or refuses the configuration.
        TierUnavailable: On opening, if the directory of a local one cannot be made.
    """

    def __init__(self, config: RemoteTierConfig) -> None:
        self._config = config
        self._records = Records(config.name, Objects(config), config.root, config.ttl_s)
        self._staged = StagedFiles(config)
        self._requests = Requests(config.name, config.max_requests, config.max_in_flight_bytes)
        self._counters = SharedCounters()
        self._listed: dict[bytes, Held] = {}  # what the last `sweep` counted, by identity
        self._lock = threading.Lock()

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
        starts: Sequence[int | None] = [None] * len(names) if offsets is None else offsets
        gets = [
            ReadRecord(self._records, name, flat_bytes(out), start)
            for name, out, start in zip(names, outs, starts, strict=True)
        ]
        outcomes = self._run(gets, deadline)
        self._counters.add_reads(outcomes)
        self._counters.add(num_expired=sum(get.is_expired for get in gets))
        raise_if_all(outcomes, TierUnavailable)
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
        puts = [
            WriteRecord(self._records, name, flat_bytes(record))
            for name, record in zip(names, records, strict=True)
        ]
        outcomes = self._run(puts, deadline)
        written = [put for put, outcome in zip(puts, outcomes, strict=True) if outcome is True]
        written_bytes = sum(put.num_bytes for put in written)
        self._counters.add(num_puts=len(written), written_bytes=written_bytes)
        raise_if_all(outcomes, TierUnavailable)
        return [outcome if isinstance(outcome, TierError) else None for outcome in outcomes]

    def contains_many(
        self, names: Sequence[RecordName], *, deadline: float | None = None
    ) -> list[LookOutcome]:
        """See `Tier.contains_many`: a HEAD each, beside each other.

        Where there is no such bucket none is found: the answer to a HEAD does not tell.
        """
        different = list(dict.fromkeys(names))
        answers = self._run([FindRecord(self._records, name) for name in different], deadline)
        raise_if_all(answers, TierError)
        found = dict(zip(different, answers, strict=True))
        return [found[name] for name in names]

    def delete_many(
        self, names: Sequence[RecordName], *, deadline: float | None = None
    ) -> list[LookOutcome]:
        different = list(dict.fromkeys(names))
        answers = self._run([DeleteRecord(self._records, name) for name in different], deadline)
        self._counters.add(num_deletes=answers.count(True))
        raise_if_all(answers, TierError)
        return of_each_mention(names, dict(zip(different, answers, strict=True)))

    def delete_identity(self, identity: bytes) -> None:
        """List the records of an identity and delete them, a thousand a request where the store
        can. What others write meanwhile may stay, or be cut off in a directory.
        """
        folder = self._records.folder(identity)
        self._requests.check_usable()
        self._staged.remove(folder, ANY_AGE_S, self._until())
        survey = Survey(self._records, folder, lambda info: True)
        num_deleted = self._run_survey(survey)
        self._counters.add(num_deletes=num_deleted)

    def pin_many(self, names: Sequence[RecordName], is_pinned: bool = True) -> list[bool]:
        """False for all: an object store evicts nothing, and what expires it decides by age alone.

        Tags could mark objects for its rules to spare, but not all stores have tags, and a read
        would have to fetch them too.
        """
        self._requests.check_usable()
        return [False] * len(names)

    def list_identities(self) -> dict[bytes, Held]:
        """List all and count what there is of each; what has expired is among it until a sweep."""
        survey = Survey(self._records, self._records.root, lambda info: False)
        self._run_survey(survey)
        return survey.held

    def stats(self) -> TierStats:
        """What this process did; of what the store holds, what the last `sweep` counted (before:
        0), for to count is to list, which costs requests. It has no bound: 0.
        """
        with self._lock:
            num_records = sum(held.num_records for held in self._listed.values())
            used_bytes = sum(held.num_bytes for held in self._listed.values())
        return self._counters.copy().stats(0, used_bytes, num_records)

    def check(self, fix: bool = False) -> list[str]:
        """List all and tell names that are none of ours, records that are too short to be any, and
        what is left in a directory of writes that were cut off.

        Args:
            fix: Delete the latter two. Objects of other names are not this tier's to delete.
        """
        survey = Survey(
            self._records, self._records.root, is_too_short if fix else lambda info: False
        )
        self._run_survey(survey)
        search = self._staged.remove if fix else self._staged.find
        staged = search(self._records.root, GRACE_S, self._until())
        if not staged:
            return survey.problems
        return [
            *survey.problems,
            f"{self.name}: expected no writes that were cut off, got {len(staged)}, the first of"
            f" them {staged[0].path}",
        ]

    def sweep(self) -> Swept:
        """List all and delete what is past its time. A rule of the store does it for less.

        Orphans are what is left in a directory of writes that were cut off.
        """
        survey = Survey(self._records, self._records.root, self._records.is_expired)
        num_expired = self._run_survey(survey)
        self._counters.add(num_expired=num_expired)
        with self._lock:
            self._listed = survey.held
        staged = self._staged.remove(self._records.root, GRACE_S, self._until())
        num_bytes = survey.deleted_bytes + sum(file.num_bytes for file in staged)
        return Swept(num_expired, len(staged), num_bytes)

    def close(self) -> None:
        self._requests.close()

    def _run(self, requests: Sequence[Request[T]], deadline: float | None) -> list[T | TierError]:
        until = time.monotonic() + self._config.timeout_s if deadline is None else deadline
        return self._requests.run(requests, until)

    def _run_survey(self, survey: Survey) -> int:
        outcomes: list[int | TierError] = self._requests.run([survey], self._until())
        return raise_first(outcomes)[0]

    def _until(self) -> float:
        """The deadline of what lists the store and begins now."""
        return time.monotonic() + self._config.sweep_timeout_s
