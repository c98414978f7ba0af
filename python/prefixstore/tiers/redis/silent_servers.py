"""Servers that are silent while others answer: left alone for a while, for longer each time.

A call has waited for such a server until its deadline, and so would every other one: to the store
the tier is there, for the records of the other servers got their answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prefixstore.tiers.redis.address import Address

_MIN_WAIT_S = 0.05  # a server may be too busy to answer sooner
# The same pause as the store's breaker has by default.
_PAUSE_S = 1.0
_MAX_PAUSE_S = 60.0


@dataclass
class _Pause:
    seconds: float
    # Start of the pause or of its last trial; calls begun earlier say nothing about it.
    since: float
    until: float
    is_tried: bool = False  # the pause is over and a trial is under way


class SilentServers:
    """Who was silent, and until when nobody asks it; then one call tries it again.

    Where none answers it is the tier that is silent, which is for the store to judge. Without a
    lock, which a fork might leave held: at the worst two calls try a server at once.

    Args:
        pause_s: How long a server is first left alone; each trial that it lets pass doubles that.
        clock: In place of `time.monotonic`.
    """

    def __init__(
        self, pause_s: float = _PAUSE_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pause_s = pause_s
        self._clock = clock
        self._pauses: dict[Address, _Pause] = {}

    def may_ask(self, address: Address, now: float) -> bool:
        """Whether to ask a server now; where it was silent, others wait for what comes of it."""
        pause = self._pauses.get(address)
        if pause is None:
            return True
        if now < pause.until:
            return False
        pause.since, pause.is_tried = now, True
        pause.until = now + pause.seconds  # if the trial never ends, another may begin
        return True

    def note_call(self, answered: Mapping[Address, float], silent: Mapping[Address, float]) -> None:
        """What came of a call.

        Args:
            answered: Servers that gave an answer, to whatever it was, and when they were asked.
            silent: Those that gave none in the time they had.
        """
        for address, asked_at in answered.items():
            pause = self._pauses.get(address)
            if pause is not None and asked_at >= pause.since:
                self._pauses.pop(address, None)
        now = self._clock()
        for address, asked_at in silent.items() if answered else ():
            pause = self._pauses.get(address)
            if now - asked_at < _MIN_WAIT_S:
                continue
            if pause is None:
                self._pauses[address] = _Pause(self._pause_s, now, now + self._pause_s)
            elif pause.is_tried and asked_at >= pause.since:
                seconds = min(2 * pause.seconds, _MAX_PAUSE_S)
                self._pauses[address] = _Pause(seconds, now, now + seconds)
