"""Whether tiers are worth waiting for until they have said what they hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Of the newest look-up. A slow one counts for more, as it is the slow ones that are left too soon.
_UP_WEIGHT, _DOWN_WEIGHT = 0.7, 0.1
_SHARE_WEIGHT = 0.3
_LEAST_S = 1e-6  # a clock may stand still
_MOST_TIMES = 2.0  # a look-up that takes this many times the usual time may never be over


@dataclass(frozen=True)
class LookUpEstimate:
    """What is known of look-ups.

    Attributes:
        seconds: Until all tiers have answered, where that is slow; None before the first time.
        saved_share: Of the time of computing a prompt, what its look-up lets save, on average over
            the newest.
    """

    seconds: float | None = None
    saved_share: float = 0.0

    def patience_s(self, prefill_s: float) -> float:
        """How long the look-up of a prompt is worth being waited for; 0 where it is not.

        Args:
            prefill_s: To compute the prompt.
        """
        worth_s = self.saved_share * prefill_s
        if self.seconds is None or self.seconds >= worth_s:
            return 0.0
        return min(worth_s, _MOST_TIMES * self.seconds)


class LookUpRate:
    """Learns it; not thread-safe."""

    def __init__(self) -> None:
        self._log_s: float | None = None
        self._share = 0.0

    def observe(self, seconds: float, saved_share: float) -> None:
        """The answer came after so long, and let save so much, or would have if waited for.

        Raises:
            ValueError: If `seconds` is negative, or `saved_share` not within 0 and 1.
        """
        if not seconds >= 0:
            raise ValueError(f"seconds: expected 0 or more, got {seconds}")
        if not 0 <= saved_share <= 1:
            raise ValueError(f"saved_share: expected 0 to 1, got {saved_share}")
        log_s = math.log(max(seconds, _LEAST_S))
        before = log_s if self._log_s is None else self._log_s
        self._log_s = before + (_UP_WEIGHT if log_s > before else _DOWN_WEIGHT) * (log_s - before)
        self._share += _SHARE_WEIGHT * (saved_share - self._share)

    def observe_left(self) -> None:
        """It was waited for in vain; `observe` may follow."""
        self._share -= _SHARE_WEIGHT * self._share

    def snapshot(self) -> LookUpEstimate:
        """What is believed now."""
        seconds = None if self._log_s is None else math.exp(self._log_s)
        return LookUpEstimate(seconds, self._share)
