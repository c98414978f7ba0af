"""Requests that wait, so that no tenant's many delay another's few."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from prefixstore.errors import EngineOverloaded

T = TypeVar("T", bound=Hashable)

_MAX_IDLE_TENANTS = 1024  # whose finish tags are kept; a forgotten tenant gets one turn early


@dataclass
class _Tenant(Generic[T]):
    """A tenant in turn.

    Attributes:
        start: Its first item's start tag.
        costs: Its items in order, and what each costs.
    """

    start: float
    costs: OrderedDict[T, float] = field(default_factory=OrderedDict)


class FairQueue(Generic[T]):
    """A bounded queue that serves tenants in turn, by cost, and each tenant's items in order.

    Start-time fair queueing (Goyal, Vin and Cheng, "Start-time fair queueing: a scheduling
    algorithm for integrated services packet switching networks", SIGCOMM 1996). An item's start tag
    is the finish tag of its tenant's item before, or the virtual time if that is later; its finish
    tag is `cost / weight` more. The item with the smallest start tag is next, and the virtual time
    is the start tag of the last one taken::

        a: three of cost 2      [0, 2) [2, 4) [4, 6)
        b: one of cost 1        [0, 1)
        c: one of cost 1        [0, 1)      though it came after the first of a was taken
        taken: a, b, c, a, a

    So of two tenants that both have items waiting, neither is served more than the other by more
    than the cost of one item of each, and one that comes with a single item waits for at most one
    item of each other tenant. A tenant that was idle has saved nothing up.

    Items may be passed over while they are not ready (`pop_ready`). Then the turn is that of the
    tenant's next ready one, and the virtual time stays with the least tag that waits.

    A tag is only worked out when its item becomes its tenant's first: a removed item costs nothing.

    Invariants: every tenant in `_heap` is in `_tenants` and the other way round; their start tags
    are at least the virtual time. A tenant may be there without items, if its last was removed: had
    it an item again before its turn, the start tag would be the same.

    Not thread-safe: an engine calls it under its own lock.
    """

    def __init__(self, max_items: int, weights: Mapping[str, float] | None = None) -> None:
        """An empty queue.

        Args:
            max_items: How many items may wait, 0 or more.
            weights: Shares of tenants, above 0; those not named have 1.

        Raises:
            ValueError: If a number is out of range.
        """
        if max_items < 0:
            raise ValueError(f"max_items: expected 0 or more, got {max_items}")
        for tenant, weight in (weights or {}).items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"weights: expected a number above 0 for {tenant!r}, got {weight}")
        self._max_items = max_items
        self._weights = dict(weights or {})
        self._virtual_time = 0.0
        self._num_turns = 0  # tells tenants of equal start tags apart: first come, first served
        self._heap: list[tuple[float, int, str]] = []  # start tag, turn, tenant
        self._tenants: dict[str, _Tenant[T]] = {}
        self._tenant_of: dict[T, str] = {}  # of the items in `_tenants`
        self._finish_tags: OrderedDict[str, float] = OrderedDict()  # of idle tenants
        self._returned: OrderedDict[T, None] = OrderedDict()  # by `push_front`

    def __len__(self) -> int:
        return len(self._tenant_of) + len(self._returned)

    def push(self, tenant: str, cost: float, item: T) -> None:
        """Put `item` behind the others of its tenant.

        Args:
            tenant: Whose turn it takes.
            cost: Above 0, such as the tokens that a request asks for.
            item: Hashable; not in the queue.

        Raises:
            EngineOverloaded: If `max_items` wait.
            ValueError: If the cost is out of range, or `item` waits already.
        """
        if not 0 < cost < float("inf"):
            raise ValueError(f"cost: expected a number above 0, got {cost}")
        self._check_new(item)
        if len(self) >= self._max_items:
            raise EngineOverloaded(
                f"queue: expected at most {self._max_items} waiting requests, got one more"
            )
        if tenant not in self._tenants:
            start = max(self._virtual_time, self._finish_tags.pop(tenant, 0.0))
            self._tenants[tenant] = _Tenant(start)
            heapq.heappush(self._heap, self._turn(start, tenant))
        self._tenants[tenant].costs[item] = cost
        self._tenant_of[item] = tenant

    def push_front(self, item: T) -> None:
        """Put an item back that was taken, before all others and free of charge.

        It has been charged already, and the start tag it was taken with is not above any that
        waits: it is next. Of several the last one put back is next. The bound does not count: the
        item was accepted before.

        Raises:
            ValueError: If `item` waits already.
        """
        self._check_new(item)
        self._returned[item] = None
        self._returned.move_to_end(item, last=False)

    def peek(self) -> T | None:
        """The item that `pop` would take; None if none waits."""
        if self._returned:
            return next(iter(self._returned))
        tenant = self._next_tenant()
        return None if tenant is None else next(iter(tenant.costs))

    def pop(self) -> T:
        """Take the next item and charge its tenant.

        Raises:
            IndexError: If none waits.
        """
        item = self.pop_ready(lambda _: True)
        if item is None:
            raise IndexError("pop from an empty queue")
        return item

    def pop_ready(self, is_ready: Callable[[T], bool]) -> T | None:
        """Take the first item in turn for which `is_ready`, and charge its tenant; None without.

        Those passed over keep their turns.
        """
        returned = next(filter(is_ready, self._returned), None)
        if returned is not None:
            del self._returned[returned]
            return returned
        passed: list[tuple[float, int, str]] = []
        try:
            while (tenant := self._next_tenant()) is not None:
                item = next(filter(is_ready, tenant.costs), None)
                if item is not None:
                    # Not past the turns that are kept.
                    self._virtual_time = passed[0][0] if passed else tenant.start
                    self._take(tenant, item)
                    return item
                passed.append(heapq.heappop(self._heap))
            return None
        finally:
            for turn in passed:
                heapq.heappush(self._heap, turn)

    def _take(self, tenant: _Tenant[T], item: T) -> None:
        """Take an item of the tenant at the top of the heap out, and charge for it."""
        name = self._heap[0][2]
        tenant.start += tenant.costs.pop(item) / self._weights.get(name, 1.0)
        del self._tenant_of[item]
        if tenant.costs:
            heapq.heapreplace(self._heap, self._turn(tenant.start, name))
        else:
            heapq.heappop(self._heap)
            self._rest(name)

    def remove(self, item: T) -> bool:
        """Take `item` out without charging for it; whether it waited."""
        if item in self._returned:
            del self._returned[item]
            return True
        name = self._tenant_of.pop(item, None)
        if name is None:
            return False
        del self._tenants[name].costs[item]
        # Rebuild the heap only when half of it is stale, so that removing takes constant time on
        # average.
        if len(self._heap) > 2 * len(self._tenant_of) + 64:
            self._rest_all_without_items()
        return True

    def displace(self, tenant: str) -> T | None:
        """Take out the last item of whoever has the most, to make room for one more of `tenant`.

        Returns:
            The item; None if that one would then have fewer than `tenant`.
        """
        counts = {name: len(one.costs) for name, one in self._tenants.items()}
        name = max(counts, key=counts.__getitem__, default=tenant)
        if counts.get(name, 0) < counts.get(tenant, 0) + 2:
            return None
        item = next(reversed(self._tenants[name].costs))
        self.remove(item)
        return item

    def check(self) -> list[str]:
        """Recount; a description of each thing that is wrong."""
        wrong = []
        counted = {item: name for name, one in self._tenants.items() for item in one.costs}
        if counted != self._tenant_of:
            wrong.append(f"queue: expected {len(counted)} items, got {len(self._tenant_of)}")
        in_turn = sorted((start, name) for start, _, name in self._heap)
        if in_turn != sorted((one.start, name) for name, one in self._tenants.items()):
            wrong.append(f"queue: expected {len(self._tenants)} tenants in turn, got {in_turn}")
        if in_turn and in_turn[0][0] < self._virtual_time:
            wrong.append(f"queue: expected tags from {self._virtual_time} on, got {in_turn[0][0]}")
        return wrong

    def _check_new(self, item: T) -> None:
        if item in self._tenant_of or item in self._returned:
            raise ValueError(f"item: expected one that does not wait yet, got {item!r}")

    def _turn(self, start: float, tenant: str) -> tuple[float, int, str]:
        self._num_turns += 1
        return start, self._num_turns, tenant

    def _next_tenant(self) -> _Tenant[T] | None:
        """The tenant at the top of the heap, once those without items are gone from there."""
        while self._heap:
            tenant = self._tenants[self._heap[0][2]]
            if tenant.costs:
                return tenant
            self._rest(heapq.heappop(self._heap)[2])
        return None

    def _rest_all_without_items(self) -> None:
        for _, _, name in self._heap:
            if not self._tenants[name].costs:
                self._rest(name)
        self._heap = [turn for turn in self._heap if turn[2] in self._tenants]
        heapq.heapify(self._heap)

    def _rest(self, name: str) -> None:
        """Remember an idle tenant's tag, for if it comes again soon."""
        self._finish_tags[name] = self._tenants.pop(name).start
        if len(self._finish_tags) > _MAX_IDLE_TENANTS:
            self._finish_tags.popitem(last=False)
