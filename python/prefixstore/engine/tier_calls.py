"""The calls of tiers that an engine has under way."""

from __future__ import annotations

from collections.abc import Sequence

from prefixstore.planner import ContendedCall, Contention


class TierCalls:
    """Not thread-safe: everything happens under the engine's lock.

    Args:
        tier_names: Of the store.
    """

    def __init__(self, tier_names: Sequence[str]) -> None:
        self._contentions = {name: Contention(name) for name in tier_names}
        self._busy_s = self._busy_since = 0.0

    @property
    def num_calls(self) -> int:
        """Under way."""
        return sum(one.num_calls for one in self._contentions.values())

    def begin(self, tier: str, sharing: float, now: float) -> ContendedCall:
        """A call begins of a tier whose calls are believed to disturb each other so much."""
        self._busy_s, self._busy_since = self.busy_s(now), now
        self._contentions[tier].sharing = sharing
        return self._contentions[tier].begin(now)

    def end(self, call: ContendedCall, now: float) -> None:
        """It is over."""
        self._busy_s, self._busy_since = self.busy_s(now), now
        self._contentions[call.tier].end(call, now)

    def busy_s(self, now: float) -> float:
        """Seconds until now in which some call was under way."""
        return self._busy_s + (now - self._busy_since if self.num_calls else 0.0)
