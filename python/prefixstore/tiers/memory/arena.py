"""The memory tier's books: one arena, cut into slabs of equal slots, and what lies in them.

    arena  | slab 0: slots of 4 KiB x 16 | slab 1: slots of 20 KiB x 3 | slab 2: unused | ...

Invariants: a slab serves one slot size at a time; a slot is free, being written, or holds one
record; a record is in the table only once it is whole. A new record takes the place of one of its
own size, the least recently used of the lowest priority, unless a slab of another size holds
nothing of a higher one and has been idle for longer: then that whole slab changes sides.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator

from prefixstore.block_key import BlockHash, RecordName
from prefixstore.errors import TierFull, TierUnavailable
from prefixstore.tiers.base import EvictionListener
from prefixstore.tiers.memory.slots import Record, Slab, Tenant
from prefixstore.tiers.pages import PAGE_BYTES, page_aligned, round_up


class Arena:
    """Slots and the records in them. Not thread-safe: its owner has the lock.

    Args:
        tier_name: For messages.
        num_slabs: How many slabs the arena has.
        slab_bytes: Of each, whole pages.
        quota_bytes: Of one identity; None for no bound.

    Attributes:
        memory: All of it, uint8.

    Raises:
        TierUnavailable: If the system does not give so much memory.
    """

    def __init__(
        self, tier_name: str, num_slabs: int, slab_bytes: int, quota_bytes: int | None
    ) -> None:
        self.records: dict[BlockHash, Record] = {}
        self.tenants: dict[bytes, Tenant] = {}
        self.used_bytes = 0
        self.num_evictions = 0
        self.listener: EvictionListener | None = None
        self._tier_name = tier_name
        self._slab_bytes = slab_bytes
        self._quota_bytes = quota_bytes
        num_bytes = num_slabs * slab_bytes
        try:
            self.memory = page_aligned(num_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise TierUnavailable(
                f"{tier_name}: expected room for {num_bytes} bytes of memory, got: {error}"
            ) from error
        self._slabs = [Slab(i * slab_bytes) for i in range(num_slabs)]
        # by slot size and priority; least recently used first, without what the user pinned
        self._lru: dict[int, dict[int, OrderedDict[BlockHash, Record]]] = {}
        self._clock = 0

    def allocate(self, name: RecordName, num_bytes: int, priority: int) -> Record:
        """A pinned slot, not yet in the table.

        Raises:
            TierFull: If nothing may be evicted for it.
        """
        slot_bytes = round_up(max(num_bytes, 1), PAGE_BYTES)
        if slot_bytes > self._slab_bytes:
            raise TierFull(
                f"{self._tier_name}: expected records of at most {self._slab_bytes} bytes"
                f" (slab_bytes), got {num_bytes}"
            )
        self._keep_quota(name.identity, num_bytes)
        slab = self._find_slab(slot_bytes, priority)
        offset = slab.free_offsets.pop()
        data = self.memory[offset : offset + num_bytes]
        record = Record(name, priority, slab, offset, data, self._tenant_of(name.identity))
        slab.records.add(record)
        record.tenant.num_bytes += num_bytes
        self.pin(record)
        return record

    def publish(self, record: Record, expires_s: float) -> bool:
        """Enter a record that is whole, and let its pin go; False where it was not needed."""
        block_hash = record.name.block_hash
        if block_hash in self.records:
            self.unpin(record)  # another thread has put the same block: free this slot
            return False
        record.is_published = True
        self.records[block_hash] = record
        record.order = self._order_of(record)
        record.order[block_hash] = record
        record.tenant = self._tenant_of(record.name.identity)
        record.tenant.records[block_hash] = record
        record.slab.num_by_priority[record.priority] += 1
        self.used_bytes += record.data.size
        self.touch(record, expires_s)
        self.unpin(record)
        return True

    def remove(self, record: Record) -> None:
        """Take a record out of the table; its slot is free once no copy uses it."""
        if record.is_kept:
            self.keep(record, False)
        record.is_published = False
        del self.records[record.name.block_hash]
        del record.order[record.name.block_hash]
        del record.tenant.records[record.name.block_hash]
        record.slab.num_by_priority[record.priority] -= 1
        self.used_bytes -= record.data.size
        if record.num_pins == 0:
            self._free(record)

    def touch(self, record: Record, expires_s: float) -> None:
        """Mark as used."""
        self._clock += 1
        record.last_used = record.slab.last_used = self._clock
        record.expires_s = expires_s
        block_hash = record.name.block_hash
        record.tenant.records.move_to_end(block_hash)
        if not record.is_kept:
            record.order.move_to_end(block_hash)

    def pin(self, record: Record) -> None:
        """Keep the slot as it is: a copy uses it."""
        record.num_pins += 1
        record.slab.num_pins += 1

    def unpin(self, record: Record) -> None:
        """The copy is done."""
        record.num_pins -= 1
        record.slab.num_pins -= 1
        if record.num_pins == 0 and not record.is_published:
            self._free(record)

    def keep(self, record: Record, is_kept: bool) -> None:
        """Take a record out of the order of use, or put it back as the last used."""
        if record.is_kept == is_kept:
            return
        record.is_kept = is_kept
        if is_kept:
            del record.order[record.name.block_hash]
            self.pin(record)
        else:
            record.order[record.name.block_hash] = record
            self.touch(record, record.expires_s)
            self.unpin(record)

    def clear(self) -> None:
        """Forget every record; a slot that a copy is using stays taken until the copy ends."""
        self.records.clear()
        self.tenants.clear()
        self._lru.clear()
        self.used_bytes = 0
        for slab in self._slabs:
            for record in slab.records:
                record.num_pins -= record.is_kept
                record.is_kept = record.is_published = False
            slab.records = {record for record in slab.records if record.num_pins}
            slab.num_pins = sum(record.num_pins for record in slab.records)
            slab.num_by_priority.clear()
            for record in slab.records:
                record.tenant = self._tenant_of(record.name.identity)
                record.tenant.num_bytes += record.data.size
            busy = {record.offset for record in slab.records}
            slab.free_offsets = [offset for offset in self._offsets(slab) if offset not in busy]

    def check(self) -> list[str]:
        """What does not add up, in words."""
        problems = [problem for slab in self._slabs for problem in self._check_slab(slab)]
        return [*problems, *self._check_tables(), *self._check_tenants()]

    def _evict(self, record: Record) -> None:
        if self.listener is not None:
            self.listener(record.name, record.priority, record.data)
        self.remove(record)
        self.num_evictions += 1

    def _free(self, record: Record) -> None:
        record.slab.records.discard(record)
        record.slab.free_offsets.append(record.offset)
        tenant = record.tenant
        tenant.num_bytes -= record.data.size
        identity = record.name.identity
        if not tenant.num_bytes and not tenant.records and self.tenants.get(identity) is tenant:
            del self.tenants[identity]

    def _tenant_of(self, identity: bytes) -> Tenant:
        tenant = self.tenants.get(identity)
        if tenant is None:
            tenant = self.tenants[identity] = Tenant()
        return tenant

    def _order_of(self, record: Record) -> OrderedDict[BlockHash, Record]:
        by_priority = self._lru.setdefault(record.slab.slot_bytes, {})
        return by_priority.setdefault(record.priority, OrderedDict())

    # ---- making room -------------------------------------------------------------------------

    def _keep_quota(self, identity: bytes, num_bytes: int) -> None:
        """Let the identity's least recently used records give way until so much more fits.

        None does where all that may would not be enough.
        """
        if self._quota_bytes is None:
            return
        tenant = self.tenants.get(identity, Tenant())
        excess = tenant.num_bytes + num_bytes - self._quota_bytes
        victims = []
        for record in tenant.records.values():
            if excess <= 0:
                break
            if record.num_pins == 0:
                victims.append(record)
                excess -= record.data.size
        if excess > 0:
            raise TierFull(
                f"{self._tier_name}: expected room for {num_bytes} bytes within"
                f" {self._quota_bytes} (quota_bytes), which no records of the identity can give"
            )
        for victim in victims:
            self._evict(victim)

    def _find_slab(self, slot_bytes: int, priority: int) -> Slab:
        """A slab of this slot size with a free slot, evicting for it if need be."""
        unused = None
        for slab in self._slabs:
            if slab.slot_bytes == slot_bytes and slab.free_offsets:
                return slab
            if not slab.records and (slab.slot_bytes == 0 or unused is None):
                unused = slab
        if unused is not None:
            return self._assign(unused, slot_bytes)
        victim = self._find_victim(slot_bytes)
        coldest = self._find_coldest(slot_bytes)
        is_colder = coldest is not None and (
            victim is None or coldest.worth < (victim.priority, victim.last_used)
        )
        if coldest is not None and is_colder and coldest.worth[0] <= priority:
            for record in list(coldest.records):
                self._evict(record)
            return self._assign(coldest, slot_bytes)
        if victim is None or victim.priority > priority:
            raise TierFull(
                f"{self._tier_name}: expected a slot of {slot_bytes} bytes that is free or may be"
                f" evicted for priority {priority}, got none"
            )
        self._evict(victim)
        return victim.slab

    def _find_victim(self, slot_bytes: int) -> Record | None:
        """The record of this slot size that is worth least."""
        for _, lru in sorted(self._lru.get(slot_bytes, {}).items()):
            for record in lru.values():
                if record.num_pins == 0:
                    return record
        return None

    def _find_coldest(self, slot_bytes: int) -> Slab | None:
        """The slab of another slot size that is worth least."""
        others = [s for s in self._slabs if s.slot_bytes != slot_bytes and not s.num_pins]
        return min(others, key=lambda slab: slab.worth, default=None)

    def _assign(self, slab: Slab, slot_bytes: int) -> Slab:
        slab.slot_bytes = slot_bytes
        slab.free_offsets = self._offsets(slab)[::-1]
        return slab

    def _offsets(self, slab: Slab) -> list[int]:
        num_slots = self._slab_bytes // slab.slot_bytes if slab.slot_bytes else 0
        return [slab.offset + i * slab.slot_bytes for i in range(num_slots)]

    # ---- recounting --------------------------------------------------------------------------

    def _check_slab(self, slab: Slab) -> Iterator[str]:
        where = f"{self._tier_name}: slab at {slab.offset}"
        offsets = slab.free_offsets + [record.offset for record in slab.records]
        wanted = self._offsets(slab)
        if sorted(offsets) != wanted:
            yield f"{where}: expected each of {len(wanted)} slots once, got {sorted(offsets)}"
        num_pins = sum(record.num_pins for record in slab.records)
        if num_pins != slab.num_pins:
            yield f"{where}: expected {num_pins} pins, got {slab.num_pins}"
        for record in slab.records:
            if record.data.size > slab.slot_bytes or record.slab is not slab:
                yield f"{where}: record {record.name.block_hash.hex()} does not fit its slot"
            if record.is_published != (self.records.get(record.name.block_hash) is record):
                yield f"{where}: record {record.name.block_hash.hex()} is not as published"
        priorities = Counter(record.priority for record in slab.records if record.is_published)
        if priorities != +slab.num_by_priority:
            yield f"{where}: expected priorities {priorities}, got {slab.num_by_priority}"

    def _check_tables(self) -> Iterator[str]:
        used_bytes = sum(record.data.size for record in self.records.values())
        if used_bytes != self.used_bytes:
            yield f"{self._tier_name}: expected {used_bytes} used bytes, got {self.used_bytes}"
        orders = [lru for by_priority in self._lru.values() for lru in by_priority.values()]
        ordered = {h: record for lru in orders for h, record in lru.items()}
        if ordered != {h: record for h, record in self.records.items() if not record.is_kept}:
            yield f"{self._tier_name}: expected one order of use for all records but those pinned"
        for lru in orders:
            ticks = [record.last_used for record in lru.values()]
            if ticks != sorted(ticks):
                yield f"{self._tier_name}: records are not in order of use: {ticks}"

    def _check_tenants(self) -> Iterator[str]:
        owned = {h: r for tenant in self.tenants.values() for h, r in tenant.records.items()}
        if owned != self.records:
            yield f"{self._tier_name}: expected every record to belong to its identity"
        num_bytes: Counter[bytes] = Counter()
        for slab in self._slabs:
            for record in slab.records:
                num_bytes[record.name.identity] += record.data.size
        counted = {identity: tenant.num_bytes for identity, tenant in self.tenants.items()}
        if +num_bytes != +Counter(counted):
            yield f"{self._tier_name}: expected bytes by identity {num_bytes}, got {counted}"
