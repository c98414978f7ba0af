"""A tier on a plain dict, which is obviously right and fails on demand, and ways to fail."""

from collections.abc import Callable

from sample_blocks import make_record

from prefixstore.block_key import BlockKey
from prefixstore.errors import BlockCorrupted, TierError, TierFull, TierTimeout
from prefixstore.tiers.base import Swept, Tier, TierCounters, TierStats

CAPACITY = 4 << 20


class DictTier(Tier):
    """A tier that is obviously right, and fails on demand: `fail` runs before every call."""

    name = ""

    def __init__(self, name: str, fail: Callable[[str], None] = lambda call: None) -> None:
        self.name = name
        self.fail = fail
        self.records: dict[bytes, bytes] = {}
        self.calls: list[str] = []

    def _enter(self, call: str) -> None:
        self.calls.append(call)
        self.fail(call)

    def get_many(self, names, outs, *, offsets=None, deadline=None):
        if offsets is None:
            items = zip(names, outs, strict=True)
            return [self._attempt("get", self._read, *item) for item in items]
        parts = zip(names, outs, offsets, strict=True)
        return [self._attempt("get", self._read_part, *part) for part in parts]

    def put_many(self, names, records, *, priority=0, deadline=None):
        items = zip(names, records, strict=True)
        return [self._attempt("put", self._write, *item) for item in items]

    def contains_many(self, names, *, deadline=None):
        self._enter("contains")
        return [name.block_hash in self.records for name in names]

    def delete_many(self, names, *, deadline=None):
        self._enter("delete")
        return [self.records.pop(name.block_hash, None) is not None for name in names]

    def delete_identity(self, identity):
        self.records.clear()

    def list_identities(self):
        return {}

    def pin_many(self, names, is_pinned=True):
        return [name.block_hash in self.records for name in names]

    def stats(self) -> TierStats:
        used_bytes = sum(map(len, self.records.values()))
        return TierCounters().stats(CAPACITY, used_bytes, len(self.records))

    def check(self, fix=False) -> list[str]:
        self._enter("check")
        return []

    def sweep(self) -> Swept:
        return Swept()

    def close(self) -> None:
        self._enter("close")

    def _read(self, name, out):
        record = self.records.get(name.block_hash)
        if record is None:
            return None
        out[: len(record)] = record
        return len(record)

    def _read_part(self, name, out, offset):
        record = bytearray(len(self.records.get(name.block_hash, b"")))
        num_bytes = self._read(name, record)
        if num_bytes is None:
            return None
        part = record[offset : min(offset + len(out), num_bytes)]
        out[: len(part)] = part
        return len(part)

    def _write(self, name, record):
        self.records.setdefault(name.block_hash, bytes(record))

    def _attempt(self, call, run, *args):
        """A record's outcome; `TierUnavailable` fails the whole call."""
        try:
            self._enter(call)
            return run(*args)
        except (TierFull, BlockCorrupted, TierTimeout) as error:
            return error


def raises(error: type[TierError], *calls: str) -> Callable[[str], None]:
    def fail(call: str) -> None:
        if not calls or call in calls:
            raise error(f"injected into {call}")

    return fail


def fill(tier: DictTier, keys: list[BlockKey]) -> None:
    for key in keys:
        tier.records[key.block_hash] = bytes(make_record(key))


def held(tier: DictTier, keys: list[BlockKey]) -> list[bool]:
    return [key.block_hash in tier.records for key in keys]
