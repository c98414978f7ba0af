"""A thread for what takes milliseconds of a processor: it is not to hold up others' answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from prefixstore.server.errors import overloaded

T = TypeVar("T")


class Worker:
    """Does one thing after the other, for callers on an event loop.

    Attributes:
        num_refused: Callers that found all places taken.

    Args:
        name: Of its thread.
        max_waiting: Callers that may wait, the one being served among them.
        retry_after_s: What one more is told to wait.
    """

    def __init__(self, name: str, max_waiting: int, retry_after_s: float) -> None:
        self._max_waiting = max_waiting
        self._retry_after_s = retry_after_s
        self._num_waiting = 0
        self.num_refused = 0
        self._thread = ThreadPoolExecutor(1, name)

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """What the function gives; not called at all where the caller is cancelled before its turn.

        Raises:
            ApiError: 429 if as many wait as may.
        """
        if self._num_waiting >= self._max_waiting:
            self.num_refused += 1
            message = f"expected fewer than {self._max_waiting} requests that wait to be read"
            raise overloaded(message, self._retry_after_s)
        self._num_waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, function, *arguments)
        finally:
            self._num_waiting -= 1
