"""A thread for what takes milliseconds of a processor: it is not to hold up others' answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, TypeVar

from prefixstore.engine.fair_queue import FairQueue
from prefixstore.server.errors import overloaded

T = TypeVar("T")


class Worker:
    """Does one thing after the other, for callers on an event loop; tenants that wait take turns.

    Where all places are taken, a tenant with fewer of them than another gets that one's last.

    Attributes:
        num_refused: Callers that found no place, or lost theirs.

    Args:
        name: Of its thread.
        max_waiting: Callers that may wait, the one being served among them.
        retry_after_s: What one more is told to wait.
    """

    def __init__(self, name: str, max_waiting: int, retry_after_s: float) -> None:
        self._max_waiting = max_waiting
        self._retry_after_s = retry_after_s
        self.num_refused = 0
        self._lock = Lock()  # of the next two
        self._queue: FairQueue[_Work] = FairQueue(max_waiting)
        self._served: Future[Any] | None = None  # what is being done, but for a moment at its end
        self._thread = ThreadPoolExecutor(1, name)

    async def run(self, tenant: str, cost: int, function: Callable[..., T], *arguments: Any) -> T:
        """What the function gives; not called at all where the caller is cancelled before its turn.

        Args:
            tenant: Whose turn it takes.
            cost: How much there is to do, such as the bytes to be read.
            function: What to do.
            arguments: Its own.

        Raises:
            ApiError: 429 if as many wait as may.
        """
        work = _Work(function, arguments)
        with self._lock:
            # A result may be with its caller already, who comes again with the next part.
            is_serving = self._served is not None and not self._served.done()
            if len(self._queue) + is_serving >= self._max_waiting:
                self._make_room(tenant)
            self._queue.push(tenant, 1 + cost, work)
        self._thread.submit(self._serve_next)
        try:
            return await asyncio.wrap_future(work.result)
        finally:
            with self._lock:
                self._queue.remove(work)

    def _make_room(self, tenant: str) -> None:
        self.num_refused += 1
        message = f"expected fewer than {self._max_waiting} requests that wait to be read"
        error = overloaded(message, self._retry_after_s)
        displaced = self._queue.displace(tenant)
        if displaced is None:
            raise error
        displaced.refuse(error)

    def _serve_next(self) -> None:
        with self._lock:
            if not self._queue:
                return  # its caller has gone
            work = self._queue.pop()
            self._served = work.result
        work.do()
        with self._lock:
            self._served = None


class _Work:
    """A call to be made, unless its caller goes before."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._function = function
        self._arguments = arguments
        self.result: Future[Any] = Future()

    def do(self) -> None:
        if not self.result.set_running_or_notify_cancel():
            return
        try:
            value = self._function(*self._arguments)
        except BaseException as error:  # for whoever waits
            self.result.set_exception(error)
        else:
            self.result.set_result(value)

    def refuse(self, error: Exception) -> None:
        if self.result.set_running_or_notify_cancel():
            self.result.set_exception(error)
