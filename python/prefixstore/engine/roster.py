"""The requests that an engine has taken on, from their arrival to the end of their answers."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from prefixstore.engine.config import EngineConfig
from prefixstore.engine.handle import RequestHandle
from prefixstore.engine.outputs import FinishReason, RequestReport
from prefixstore.engine.request import Request
from prefixstore.engine.scheduler import Scheduler
from prefixstore.engine.stats import EngineCounts
from prefixstore.errors import EngineClosed, EngineOverloaded

logger = logging.getLogger(__name__)

NUM_RECENT = 256  # reports of finished requests that are kept


class Roster:
    """Who is there, who is to go, and what became of the others. Called under the engine's lock.

    Attributes:
        counts: What was taken on, refused and finished.
        recent: Reports of the last finished requests, the newest last.
        is_draining: No more are taken on.

    Args:
        scheduler: Has those that wait and those that run.
        config: Bounds.
        changed: The engine's condition; notified when someone came or went.
    """

    def __init__(
        self, scheduler: Scheduler, config: EngineConfig, changed: threading.Condition
    ) -> None:
        self.counts = EngineCounts()
        self.recent: deque[RequestReport] = deque(maxlen=NUM_RECENT)
        self.is_draining = False
        self._failure: str | None = None  # what it was abandoned for
        self._scheduler = scheduler
        self._config = config
        self._changed = changed
        self._requests: dict[str, Request] = {}
        self._cancelled: set[str] = set()  # ids of `_requests` that are to end

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def has_room(self) -> bool:
        """Whether one more may wait. Requests that enter the batch at the next step do not count as
        waiting."""
        num_places = self._config.max_running - len(self._scheduler.running)
        return self._scheduler.num_waiting < self._config.max_queued + num_places

    def check_open(self) -> None:
        """Raises EngineClosed if no more requests are taken on."""
        if self._failure is not None:
            raise EngineClosed(
                f"engine: expected an open engine, got one that has failed: {self._failure}"
            )
        if self.is_draining:
            raise EngineClosed("engine: expected an open engine, got one that drains or is closed")

    def accept(self, request: Request) -> None:
        """Let a request wait for its turn.

        Raises:
            EngineClosed: If no more are taken on.
            EngineOverloaded: If as many wait as may.
            ValueError: If there is one of its id.
        """
        self.check_open()
        if request.request_id in self._requests:
            raise ValueError(
                f"request_id: expected one that does not run, got {request.request_id!r}"
            )
        if not self.has_room:
            self.counts.num_refused += 1
            raise EngineOverloaded(
                f"engine: expected at most {self._config.max_queued} waiting requests, got one more"
            )
        self._scheduler.queue.push(request.tenant, request.max_tokens, request)
        self._requests[request.request_id] = request
        self.counts.num_submitted += 1
        self._changed.notify_all()

    def cancel(self, handle: RequestHandle) -> None:
        """Have a request ended at the next step, if it is still there.

        Not another of its id: once a request has ended, the next may have it.
        """
        request = self._requests.get(handle.request_id)
        if request is not None and request.answer.handle is handle:
            self._cancelled.add(request.request_id)
            self._changed.notify_all()

    def end_cancelled(self) -> None:
        """End the requests that were cancelled since the last step."""
        for request_id in list(self._cancelled):
            self.end(self._requests[request_id], FinishReason.CANCELLED)

    def end_all(self, reason: FinishReason, error: str | None = None) -> None:
        """End every request, for the same reason."""
        for request in list(self._requests.values()):
            self.end(request, reason, error)

    def end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """Give a request's blocks and place back, and its reader the end of the answer."""
        if request.sequence is not None:
            self._scheduler.stop(request)
        else:
            self._scheduler.queue.remove(request)
        del self._requests[request.request_id]
        self._cancelled.discard(request.request_id)
        report = request.report(time.monotonic())
        self.counts.add_finished(reason, report)
        self.recent.append(report)
        request.answer.end(reason, report, error)
        self._changed.notify_all()

    def abandon(self, error: str) -> None:
        """End all answers and take on no more, for it is not known any more whose blocks are whose.

        So they are left as they are; but nobody is left to wait.
        """
        self.is_draining, self._failure = True, error
        for request in self._requests.values():
            _try_end(request, error)
        self._requests.clear()
        self._cancelled.clear()
        self._changed.notify_all()

    def check(self) -> list[str]:
        """Recount; returns one line for each thing that is wrong."""
        problems = [f"queue: {line}" for line in self._scheduler.queue.check()]
        num_held = self._scheduler.num_waiting + len(self._scheduler.running)
        if num_held != len(self._requests):
            problems.append(f"engine: {len(self._requests)} requests, {num_held} in its lists")
        return problems


def _try_end(request: Request, error: str) -> None:
    """End an answer; what fails in it may be what stopped the engine, and must not reach others."""
    try:
        request.answer.end(FinishReason.ERROR, request.report(time.monotonic()), error)
    except BaseException:
        logger.exception("request %s was not told its end", request.request_id)
