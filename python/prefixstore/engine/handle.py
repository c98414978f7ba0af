"""What a caller holds of a request: its answer as it comes, and the way to cancel it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator

from prefixstore.engine.outputs import OutputDelta, RequestOutput


class RequestHandle:
    """One request's answer. Made by `Engine.submit`; may be read by several, from its beginning.

    Pieces that have come since the reader's last one are joined, so that a slow reader holds no
    more than the answer itself.
    """

    def __init__(self, request_id: str, cancel: Callable[[RequestHandle], None]) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._condition = threading.Condition()
        self._deltas: list[OutputDelta] = []
        self._wakers: list[Callable[[], None]] = []  # of event loops that wait

    def cancel(self) -> None:
        """Let the engine stop; the last piece then says CANCELLED. A finished one stays."""
        self._cancel(self)

    @property
    def is_finished(self) -> bool:
        """Whether the last piece of the answer is there; it may still be unread."""
        with self._condition:
            return self._is_finished()

    def __iter__(self) -> Iterator[OutputDelta]:
        """The answer's pieces as they come; the last one has a `finish_reason`."""
        num_read = 0
        while True:
            with self._condition:
                self._condition.wait_for(lambda: len(self._deltas) > num_read)  # noqa: B023
                fresh = self._deltas[num_read:]
            num_read += len(fresh)
            delta = _join(fresh)
            yield delta
            if delta.finish_reason is not None:
                return

    async def __aiter__(self) -> AsyncIterator[OutputDelta]:
        """The same in an event loop."""
        loop, event, num_read = asyncio.get_running_loop(), asyncio.Event(), 0

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:
                # Nobody reads in a closed event loop; the engine goes on with other requests.
                if not loop.is_closed():
                    raise

        with self._condition:
            self._wakers.append(wake)
        try:
            while True:
                event.clear()
                with self._condition:
                    fresh = self._deltas[num_read:]
                if not fresh:
                    await event.wait()
                    continue
                num_read += len(fresh)
                delta = _join(fresh)
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            with self._condition:
                self._wakers.remove(wake)

    def result(self, timeout_s: float | None = None) -> RequestOutput:
        """The whole answer, once it is there.

        Raises:
            TimeoutError: If that takes longer.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        with self._condition:
            while not self._is_finished():
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(
                        f"request {self.request_id}: expected an answer within {timeout_s} s"
                    )
                self._condition.wait(left)
            whole = _join(self._deltas)
        assert whole.finish_reason is not None and whole.report is not None
        return RequestOutput(
            text=whole.text,
            token_ids=whole.token_ids,
            finish_reason=whole.finish_reason,
            report=whole.report,
            error=whole.error,
            logprobs=whole.logprobs,
        )

    def put(self, delta: OutputDelta) -> None:
        """For the engine: the next piece."""
        with self._condition:
            assert not self._is_finished(), "a finished answer goes on"
            self._deltas.append(delta)
            self._condition.notify_all()
            wakers = list(self._wakers)
        for wake in wakers:
            wake()

    def _is_finished(self) -> bool:
        return bool(self._deltas) and self._deltas[-1].finish_reason is not None


def _join(deltas: list[OutputDelta]) -> OutputDelta:
    """Neighbouring pieces as one."""
    last = deltas[-1]
    if len(deltas) == 1:
        return last
    logprobs = [one for delta in deltas for one in delta.logprobs or ()]
    return OutputDelta(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(one for delta in deltas for one in delta.token_ids),
        finish_reason=last.finish_reason,
        report=last.report,
        error=last.error,
        logprobs=tuple(logprobs) if any(one.logprobs is not None for one in deltas) else None,
    )
