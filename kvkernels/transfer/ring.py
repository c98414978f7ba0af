"""Slots that are taken and given back in about the same order."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass


@dataclass(eq=False)
class _Run:
    first: int
    num_slots: int  # those skipped at the ring's end included
    is_given_back: bool = False


class Ring:
    """`num_slots` slots; a run of neighbours is free again once all runs before it are."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._runs: deque[_Run] = deque()  # oldest first
        self._next = 0
        self._changed = threading.Condition()

    def take(self, num_slots: int, timeout_s: float | None = None) -> int | None:
        """The first of `num_slots` neighbouring slots, waiting for them; None if time runs out."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._has_room(num_slots), timeout_s):
                return None
            skipped = self._skipped(num_slots)
            first = (self._next + skipped) % self.num_slots
            self._runs.append(_Run(first, skipped + num_slots))
            self._next = (first + num_slots) % self.num_slots
            return first

    def give_back(self, first: int) -> None:
        """Let the run that begins at `first` be used again."""
        with self._changed:
            run = next(run for run in self._runs if run.first == first and not run.is_given_back)
            run.is_given_back = True
            while self._runs and self._runs[0].is_given_back:
                self._runs.popleft()
            if not self._runs:
                self._next = 0
            self._changed.notify_all()

    def _has_room(self, num_slots: int) -> bool:
        num_taken = sum(run.num_slots for run in self._runs)
        return num_taken + self._skipped(num_slots) + num_slots <= self.num_slots

    def _skipped(self, num_slots: int) -> int:
        """Slots left unused at the end of the ring, so that the run lies in one piece."""
        left = self.num_slots - self._next
        return left if left < num_slots else 0
