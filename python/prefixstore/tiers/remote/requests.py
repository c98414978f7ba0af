"""Many requests in flight at once: on an event loop, in a thread of its own.

    caller's thread     enter the window -> begin ...            take pieces, outcomes -> leave
    event loop                             run: bytes as they come ->

Only the caller's thread touches the caller's memory. So what comes after the call is over touches
nothing, however late, and a request that is given up can be cancelled without waiting for it. The
alternative, blocking requests in a pool of threads, is as fast, but such a request cannot be given
up: it holds its thread until the client's own timeout.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, ClassVar, Generic, TypeVar

from prefixstore.errors import TierError, TierTimeout, TierUnavailable
from prefixstore.tiers.base import is_past, too_late

T = TypeVar("T")

HandOver = Callable[[Any], None]


class Request(ABC, Generic[T]):
    """One exchange with the store.

    Attributes:
        num_bytes: What it holds in memory while it is in flight.
    """

    num_bytes = 0

    def begin(self) -> None:
        """Called in the caller's thread once there is room for it."""

    @abstractmethod
    async def run(self, hand_over: HandOver) -> T:
        """Runs on the event loop; what it hands over goes to `take`, in order.

        Raises:
            TierError: What it met.
        """

    def take(self, piece: Any) -> None:
        """Called in the caller's thread while the call goes on."""
        raise NotImplementedError


class Window:
    """Bounds requests and their bytes in flight. Whoever waits is served in order."""

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._num_requests = self._num_bytes = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    def try_enter(self, num_bytes: int) -> bool:
        """Enter if there is room and nobody waits."""
        with self._changed:
            if self._waiting or not self._has_room(num_bytes):
                return False
            self._enter(num_bytes)
            return True

    def wait_to_enter(self, num_bytes: int, deadline: float) -> bool:
        """Enter when it is one's turn; False if that is not before the deadline."""
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            try:
                is_next = self._changed.wait_for(
                    lambda: self._waiting[0] is turn and self._has_room(num_bytes),
                    deadline - time.monotonic(),
                )
                if is_next:
                    self._enter(num_bytes)
                return is_next
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()

    def leave(self, num_bytes: int) -> None:
        with self._changed:
            self._num_requests -= 1
            self._num_bytes -= num_bytes
            self._changed.notify_all()

    def _has_room(self, num_bytes: int) -> bool:
        if self._num_requests == 0:
            return True  # a request larger than the bound goes alone
        fits = self._num_bytes + num_bytes <= self._max_bytes
        return fits and self._num_requests < self._max_requests

    def _enter(self, num_bytes: int) -> None:
        self._num_requests += 1
        self._num_bytes += num_bytes


@dataclass(frozen=True)
class _Ended:
    outcome: Any
    is_bug: bool = False  # an exception that no request may raise


class _Call(Generic[T]):
    """The requests of one call, as the event loop has them."""

    def __init__(self, tier_name: str, requests: Sequence[Request[T]]) -> None:
        self.reports: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        self._tier_name = tier_name
        self._requests = requests
        self._tasks: list[asyncio.Future[T]] = []

    def start(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            hand_over = partial(self._report, number)
            task = asyncio.ensure_future(self._requests[number].run(hand_over))
            task.add_done_callback(partial(self._end, number))
            self._tasks.append(task)

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _report(self, number: int, report: Any) -> None:
        self.reports.put((number, report))

    def _end(self, number: int, task: asyncio.Future[T]) -> None:
        if task.cancelled():  # cancelled by `close`, or by `cancel`, after which nobody reads this
            closed = TierUnavailable(f"{self._tier_name}: closed while a request was open")
            self._report(number, _Ended(closed))
        elif (error := task.exception()) is None:
            self._report(number, _Ended(task.result()))
        else:
            self._report(number, _Ended(error, is_bug=not isinstance(error, TierError)))


class Requests:
    """Runs requests for any number of threads. The event loop starts with the first."""

    # The process in which the client's runtime was started. There is one for all tiers of a
    # process, and it does not survive a fork.
    _runtime_pid: ClassVar[int] = 0

    def __init__(self, tier_name: str, max_requests: int, max_bytes: int) -> None:
        self._tier_name = tier_name
        self._window = Window(max_requests, max_bytes)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        self._stop: Callable[[], Any] = lambda: None

    def run(self, requests: Sequence[Request[T]], deadline: float) -> list[T | TierError]:
        """The outcome of each; `TierTimeout` for what has none at the deadline.

        Raises:
            TierUnavailable: As `check_usable` says.
        """
        self.check_usable()
        call = _Call(self._tier_name, requests)
        outcomes: list[T | TierError] = [too_late(self._tier_name)] * len(requests)
        waiting, running = deque(range(len(requests))), set[int]()
        try:
            while (waiting or running) and not is_past(deadline):
                entered = self._enter(requests, waiting, running, deadline)
                if entered:
                    self._start(call, entered)
                if running:
                    self._receive(call, requests, outcomes, running, deadline)
        finally:
            if running:
                self._give_up(call)
                for number in running:
                    outcomes[number] = TierTimeout(
                        f"{self._tier_name}: expected an answer before the deadline, got none"
                    )
                    self._window.leave(requests[number].num_bytes)
        return outcomes

    def close(self) -> None:
        """End the event loop; what waits for it gets `TierUnavailable`."""
        with self._lock:
            self._is_closed = True
            if Requests._runtime_pid == os.getpid():
                self._stop()

    def _enter(
        self,
        requests: Sequence[Request[T]],
        waiting: deque[int],
        running: set[int],
        deadline: float,
    ) -> list[int]:
        """Begin those for which there is room; wait for it only where nothing else is awaited."""
        entered: list[int] = []
        while waiting:
            number, num_bytes = waiting[0], requests[waiting[0]].num_bytes
            if not self._window.try_enter(num_bytes) and (
                running or not self._window.wait_to_enter(num_bytes, deadline)
            ):
                break
            running.add(waiting.popleft())
            requests[number].begin()
            entered.append(number)
        return entered

    def _receive(
        self,
        call: _Call[T],
        requests: Sequence[Request[T]],
        outcomes: list[T | TierError],
        running: set[int],
        deadline: float,
    ) -> None:
        """Wait for one report."""
        try:
            number, report = call.reports.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            return
        if not isinstance(report, _Ended):
            requests[number].take(report)
            return
        running.remove(number)
        self._window.leave(requests[number].num_bytes)
        if report.is_bug:
            raise report.outcome
        outcomes[number] = report.outcome

    def _start(self, call: _Call[T], numbers: Sequence[int]) -> None:
        with self._lock:
            self._check_open()
            if self._loop is None:
                Requests._runtime_pid = os.getpid()
                self._loop, stop = _start_loop(self._tier_name)
                # also stops the loop if nobody calls `close`, before the interpreter exits
                self._stop = weakref.finalize(self, stop)
            self._loop.call_soon_threadsafe(call.start, numbers)

    def _give_up(self, call: _Call[T]) -> None:
        with self._lock:
            if self._loop is not None and not self._is_closed:  # otherwise `close` has cancelled it
                self._loop.call_soon_threadsafe(call.cancel)

    def check_usable(self) -> None:
        """Raise `TierUnavailable` if this is closed, or this process was forked from one that used
        a remote tier.
        """
        if Requests._runtime_pid not in (0, os.getpid()):
            raise TierUnavailable(
                f"{self._tier_name}: expected a process that was not forked from one which used"
                " remote tiers"
            )
        with self._lock:
            self._check_open()

    def _check_open(self) -> None:
        if self._is_closed:
            raise TierUnavailable(f"{self._tier_name}: expected an open tier, got a closed one")


def _start_loop(name: str) -> tuple[asyncio.AbstractEventLoop, Callable[[], None]]:
    """An event loop in a thread, and what ends both and waits for that."""
    started: SimpleQueue[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = SimpleQueue()

    async def serve() -> None:
        is_over = asyncio.Event()
        started.put((asyncio.get_running_loop(), is_over))
        await is_over.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name=name, daemon=True)
    thread.start()
    loop, is_over = started.get()

    def stop() -> None:
        loop.call_soon_threadsafe(is_over.set)
        # The finalizer may run in any thread, the loop's own too.
        if threading.current_thread() is not thread:
            thread.join()

    return loop, stop
