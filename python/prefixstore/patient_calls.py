"""Calls that may hang: each in a thread of its own, and waited for only so long."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class CallLeftError(Exception):
    """A call was not over in time; it goes on without anybody who waits for it."""


class PatientCalls:
    """Begins calls, waits for them, and keeps count of those that go on by themselves.

    A thread for each: a pool would have to survive forks, and a call would wait for those before it
    that hang. Starting one takes 0.1 ms.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: set[Future[Any]] = set()
        self._left: set[Future[Any]] = set()

    @property
    def num_under_way(self) -> int:
        """Calls that are not over."""
        return len(self._under_way)

    @property
    def num_left(self) -> int:
        """Those of them that nobody waits for."""
        return len(self._left)

    def run(self, call: Callable[[], T], until: float | None) -> T:
        """What a call returns or raises.

        Args:
            call: What is to be called.
            until: Of `time.monotonic()`; None to wait for as long as it takes.

        Raises:
            CallLeftError: If it takes longer; whatever it raises is logged then.
        """
        future = self._begin(call)
        try:
            wait([future], None if until is None else max(0.0, until - time.monotonic()))
        finally:  # whoever is interrupted leaves it, too
            if not future.done():
                self._leave(future)
        if future.done():
            return future.result()
        raise CallLeftError

    def begin(self, call: Callable[[], object]) -> None:
        """Have something done that nobody waits for; what it raises is logged."""
        self._leave(self._begin(call))

    def close(self) -> None:
        """Wait for all that are under way."""
        with self._lock:
            under_way = [*self._under_way]
        wait(under_way)

    def _begin(self, call: Callable[[], T]) -> Future[T]:
        thread = ThreadPoolExecutor(1, thread_name_prefix="prefixstore-load")
        try:
            future = thread.submit(call)
        except RuntimeError:  # no thread can be begun, as when the interpreter ends
            # it has kept the call, and would make it again if it had a thread later
            thread.shutdown(cancel_futures=True)
            future = Future()
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            return future
        thread.shutdown(wait=False)
        with self._lock:
            self._under_way.add(future)
        future.add_done_callback(self._end)
        return future

    def _leave(self, future: Future[Any]) -> None:
        with self._lock:
            if future in self._under_way:
                self._left.add(future)
                return
        self._log(future)

    def _end(self, future: Future[Any]) -> None:
        with self._lock:
            self._under_way.discard(future)
            is_left = future in self._left
            self._left.discard(future)
        if is_left:
            self._log(future)

    def _log(self, future: Future[Any]) -> None:
        """Errors of tiers are handled in the store, so this is a bug of ours."""
        error = future.exception()
        if error is not None:
            logger.error("a call that nobody waits for failed", exc_info=error)
