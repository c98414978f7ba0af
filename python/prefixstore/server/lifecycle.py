"""Whether a server still takes requests, and what it is busy with."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from prefixstore.server.generation import Generation


class Lifecycle:
    """State of one server; belongs to its event loop.

    Attributes:
        is_draining: Finishing what was accepted, and taking nothing new.
        num_accepted: Requests that were read, and are not answered to the end.
    """

    def __init__(self) -> None:
        self.is_draining = False
        self.num_accepted = 0
        self._active: set[Generation] = set()
        self._changed = asyncio.Event()

    @contextmanager
    def accepted(self) -> Iterator[None]:
        """Around all that is done for a request."""
        self.num_accepted += 1
        try:
            yield
        finally:
            self.num_accepted -= 1
            self._changed.set()

    def add(self, generation: Generation) -> None:
        self._active.add(generation)

    def remove(self, generation: Generation) -> None:
        """Cancel what is left of a generation, and forget it. May be called again."""
        generation.cancel()
        self._active.discard(generation)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until every accepted request is answered; False if time ran out first."""
        try:
            await asyncio.wait_for(self._wait_idle(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    def cut_off(self) -> int:
        """Cancel what is computed; returns how many requests were still answered."""
        for generation in self._active:
            generation.cancel()
        return self.num_accepted

    async def _wait_idle(self) -> None:
        while self.num_accepted:
            self._changed.clear()
            await self._changed.wait()
