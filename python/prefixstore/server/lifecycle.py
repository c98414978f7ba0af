"""Whether a server still takes requests, and what it is busy with."""

from __future__ import annotations

from prefixstore.server.generation import Generation


class Lifecycle:
    """State of one server; belongs to its event loop.

    Attributes:
        is_draining: Finishing what was accepted, and taking nothing new.
    """

    def __init__(self) -> None:
        self.is_draining = False
        self._active: set[Generation] = set()

    def add(self, generation: Generation) -> None:
        self._active.add(generation)

    def remove(self, generation: Generation) -> None:
        """Cancel what is left of a generation, and forget it. May be called again."""
        generation.cancel()
        self._active.discard(generation)

    def cut_off(self) -> int:
        """Cancel everything; returns how many requests were still answered."""
        for generation in self._active:
            generation.cancel()
        return len(self._active)
