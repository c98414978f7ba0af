"""Calls of one tier that are under way at the same time share it, and each takes longer."""

from __future__ import annotations


class Contention:
    """Which calls of a tier are under way. Not thread-safe.

    Beside `n - 1` others, a call takes up to `1 + sharing * (n - 1)` times as long: with a
    `sharing` of 1 they divide one link among them, or wait for it in turn; with 0 they do not
    disturb each other.

    Attributes:
        tier: Its name.
        sharing: As it is believed to be.
    """

    def __init__(self, tier: str = "", sharing: float = 1.0) -> None:
        self.tier = tier
        self.sharing = sharing
        self._calls: list[ContendedCall] = []
        self._counted_at = self._calls_s = 0.0

    @property
    def num_calls(self) -> int:
        """Under way."""
        return len(self._calls)

    def begin(self, now: float) -> ContendedCall:
        """A call begins; `end` is to follow."""
        self._calls_s, self._counted_at = self.calls_s(now), now
        call = ContendedCall(self, now)
        self._calls.append(call)
        for one in self._calls:
            one.peak = max(one.peak, len(self._calls))
        return call

    def end(self, call: ContendedCall, now: float) -> None:
        """It is over."""
        self._calls_s, self._counted_at = self.calls_s(now), now
        self._calls.remove(call)

    def calls_s(self, now: float) -> float:
        """Seconds of all calls until now: two at the same time for one second took two."""
        return self._calls_s + (now - self._counted_at) * len(self._calls)

    def factor(self, num_calls: float) -> float:
        """How many times as long as alone a call takes that is one of so many."""
        return 1.0 + self.sharing * max(0.0, num_calls - 1)


class ContendedCall:
    """A call of a tier, among others.

    Attributes:
        began: When.
        peak: Most calls, itself included, that have been under way at once since.
    """

    def __init__(self, contention: Contention, now: float) -> None:
        self.began = now
        self.peak = 1
        self._contention = contention
        self._calls_s = contention.calls_s(now)

    @property
    def tier(self) -> str:
        """Whose call it is."""
        return self._contention.tier

    @property
    def longest(self) -> float:
        """How many times as long as alone it takes at most: if it was the last in line when there
        were most.
        """
        return self._contention.factor(self.peak)

    @property
    def tier_s(self) -> float:
        """Seconds of the tier's time that one of a call alone is now: less where calls pass side by
        side.
        """
        num_calls = max(1, self._contention.num_calls)
        return self._contention.factor(num_calls) / num_calls

    def num_beside(self, now: float) -> float:
        """How many others were under way, on average since it began."""
        if now <= self.began:
            return 0.0
        calls_s = self._contention.calls_s(now) - self._calls_s
        return max(0.0, calls_s / (now - self.began) - 1.0)

    def mean_factor(self, now: float) -> float:
        """How many times as long as alone it has taken by now, on average."""
        return self._contention.factor(1.0 + self.num_beside(now))
