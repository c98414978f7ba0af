"""Which prompt's blocks are loaded next, and how many calls of a tier are under way at once.

Of calls that divide one link, more at once bring no block sooner: each takes as much longer as
there are more. One at a time is over sooner on average. Where calls do not disturb each other, all
are better made at once. Most tiers lie between, and how far is learnt (`Contention`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefixstore.planner import TierEstimate

# With the logarithm of `sharing` less certain than that, calls are made to overlap, and tell. One
# that did is enough; calls alone then wear that out, a few dozen of them or half a minute.
_MOST_DOUBT = 0.7

_WEIGHTS = {"shortest": 3.0, "oldest": 1.0}  # of what a tenant has of a tier's time
_MAX_ROLES = 4096  # whose tags are kept; a forgotten one gets its next turn early

_Role = tuple[str, str, str]  # tier, tenant, and one of `_WEIGHTS`


@dataclass(frozen=True)
class Load:
    """A prompt's load: what a call of it brings now, or what is left of it between two calls.

    Attributes:
        tier: Which the call asks, or the next one will.
        call_s: What the call takes, or what is left of it; by itself, as all here.
        left_s: Until all is loaded.
        tenant: Whose it is.
    """

    tier: str
    call_s: float
    left_s: float
    tenant: str = ""


@dataclass(frozen=True)
class LoadTurn:
    """Whose turn it is.

    Attributes:
        index: Of the load, among those that wait.
        role: In which its time counts.
        call_s: Of its next call.
    """

    index: int
    role: _Role
    call_s: float


class LoadTurns:
    """Whose call begins next.

    Tenants have equal shares of a tier's time. Of one tenant's prompts the one with the least left
    to load has three quarters of that, so that it does not wait for long ones, and the oldest the
    last quarter, so that it does not wait for ever.

    This is start-time fair queueing (Goyal, Vin and Cheng, "Start-time fair queuing: a scheduling
    algorithm for integrated services packet switching networks", SIGCOMM 1996): a call's start tag
    is the finish tag of its role's call before, or the tag of the newest call if that is later; its
    finish tag is later by its seconds over the role's weight. The smallest start tag is next.
    """

    def __init__(self) -> None:
        self._now: dict[str, float] = {}  # per tier, the newest start tag
        self._finished: dict[_Role, float] = {}  # finish tags; the newest last

    def next(
        self,
        waiting: Sequence[Load],
        under_way: Sequence[Load],
        tiers: Mapping[str, TierEstimate],
    ) -> LoadTurn | None:
        """The load whose next call is to begin now, and then `take`s its turn; None for none.

        Args:
            waiting: The oldest first.
            under_way: Calls that are not overdue: others hold nobody up.
            tiers: What is known of each.
        """
        roles = _roles(waiting)
        for role in sorted(roles, key=self._start_tag):
            load = waiting[roles[role]]
            calls = [one.call_s for one in under_way if one.tier == load.tier]
            num_loads = len(calls) + sum(one.tier == load.tier for one in waiting)
            if _has_room(load, calls, best_num_calls(num_loads, tiers[load.tier])):
                return LoadTurn(roles[role], role, load.call_s)
        return None

    def take(self, turn: LoadTurn) -> None:
        """The call begins."""
        start = self._start_tag(turn.role)
        self._now[turn.role[0]] = start
        self._finished.pop(turn.role, None)
        self._finished[turn.role] = start + turn.call_s / _WEIGHTS[turn.role[2]]
        if len(self._finished) > _MAX_ROLES:
            del self._finished[next(iter(self._finished))]

    def _start_tag(self, role: _Role) -> float:
        return max(self._finished.get(role, 0.0), self._now.get(role[0], 0.0))


def best_num_calls(num_loads: int, tier: TierEstimate) -> float:
    """How many calls of a tier are best under way at once while so many prompts load from it.

    `k` equal loads, `n` at a time, go in `k / n` rounds that take `1 + sharing * (n - 1)` each, so
    that on average one is over after half of

        (1 + sharing * (n - 1)) * (k / n + 1)

    which is least for `n = sqrt(k * (1 - sharing) / sharing)`. Rounded up, as more loads may come.
    """
    if not tier.sharing:
        return math.inf
    best = math.ceil(math.sqrt(num_loads * (1 - tier.sharing) / tier.sharing))
    return max(best, 1 if tier.sharing_doubt <= _MOST_DOUBT else 2)


def _has_room(load: Load, calls: Sequence[float], best: float) -> bool:
    """Whether a load's next call may begin beside those under way.

    Also where these are enough, if they would hold it up for longer than it holds them up. Alone
    it takes `s`. Beside `n` calls that divide a link it takes `(n + 1) * s` and delays each by `s`;
    else it waits for `n * c`, where `c` is left of the first one to be over.
    """
    num_calls = len(calls)
    if num_calls < best:
        return True
    return load.left_s * (num_calls + 1) < min(calls) * num_calls


def _roles(waiting: Sequence[Load]) -> dict[_Role, int]:
    """Which load has the next turn of each role, among those of its tier and tenant."""
    roles: dict[_Role, int] = {}
    for index in sorted(range(len(waiting)), key=lambda i: waiting[i].left_s):
        roles.setdefault((waiting[index].tier, waiting[index].tenant, "shortest"), index)
    for index, load in enumerate(waiting):
        roles.setdefault((load.tier, load.tenant, "oldest"), index)
    return roles
