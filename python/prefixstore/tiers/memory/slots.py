"""What the memory tier's arena is made of: slabs, records in their slots, and their owners."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

import numpy as np

from prefixstore.block_key import BlockHash, RecordName


@dataclass(eq=False)
class Slab:
    """A piece of the arena that holds slots of one size."""

    offset: int
    slot_bytes: int = 0  # 0: serves no size yet
    free_offsets: list[int] = field(default_factory=list)
    records: set[Record] = field(default_factory=set)
    num_by_priority: Counter[int] = field(default_factory=Counter)  # only of published records
    num_pins: int = 0  # of its records, together
    last_used: int = 0

    @property
    def worth(self) -> tuple[float, int]:
        """What decides which of two slabs goes first."""
        highest = max((p for p, count in self.num_by_priority.items() if count), default=-math.inf)
        return highest, self.last_used


@dataclass(eq=False)
class Tenant:
    """What one identity has: the bytes of its slots, and its records in the table.

    A slot counts until it is free again, so that no quota is passed while copies run.
    """

    num_bytes: int = 0
    # Least recently used first.
    records: OrderedDict[BlockHash, Record] = field(default_factory=OrderedDict)


@dataclass(eq=False)
class Record:
    """A record in its slot."""

    name: RecordName
    priority: int
    slab: Slab
    offset: int
    data: np.ndarray  # its bytes in the arena
    tenant: Tenant
    # The order of eviction that it stands in.
    order: OrderedDict[BlockHash, Record] = field(default_factory=OrderedDict)
    num_pins: int = 0  # readers of the slot, plus one if `is_kept`
    is_kept: bool = False  # pinned by the user
    is_published: bool = False
    last_used: int = 0
    expires_s: float = math.inf
