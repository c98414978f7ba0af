"""How long forward passes take, without waiting for a GPU."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

PassObserver = Callable[[int, int, float, bool], None]


@dataclass(frozen=True)
class TimedPass:
    """A forward pass that has begun.

    Attributes:
        num_new: Tokens in it.
        context: Tokens before them.
        began: When, by `time.perf_counter`, or as marked in the stream of a GPU.
        is_loading: Whether blocks were being loaded then.
    """

    num_new: int
    context: int
    began: float | torch.cuda.Event
    is_loading: bool


class PassTimer:
    """Tells an observer of passes: `observer(num_new, context, seconds, is_loading)`.

    On a GPU a pass is over later than its call. It is told of when the next one begins, or at
    `collect`, if it is over by then. Thread-safe.

    Args:
        device: That computes.
        observer: Is told; in the thread that calls.
        is_loading: Whether blocks are being loaded now. A pass beside which they were loaded for a
            part of it is not told of.
    """

    def __init__(
        self, device: torch.device, observer: PassObserver, is_loading: Callable[[], bool]
    ) -> None:
        self._device = device
        self._observer = observer
        self._is_loading = is_loading
        self._pending: deque[tuple[TimedPass, torch.cuda.Event]] = deque()

    def begin(self, num_new: int, context: int) -> TimedPass | None:
        """A pass begins; None if it cannot be timed."""
        self.collect()
        if self._device.type == "cpu":
            return TimedPass(num_new, context, time.perf_counter(), self._is_loading())
        if self._device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return None
        return TimedPass(num_new, context, self._mark(), self._is_loading())

    def end(self, timed: TimedPass) -> None:
        """It is computed, or all of it is queued."""
        if timed.is_loading != self._is_loading():
            return
        if isinstance(timed.began, float):
            self._tell(timed, time.perf_counter() - timed.began)
        else:
            self._pending.append((timed, self._mark()))

    def collect(self) -> None:
        """Tell of passes that a GPU has finished."""
        while self._pending:
            try:
                timed, ended = self._pending.popleft()
            except IndexError:  # another thread was faster
                return
            if not ended.query():
                self._pending.appendleft((timed, ended))
                return
            assert not isinstance(timed.began, float)
            self._tell(timed, timed.began.elapsed_time(ended) / 1e3)

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _tell(self, timed: TimedPass, seconds: float) -> None:
        if seconds > 0:
            self._observer(timed.num_new, timed.context, seconds, timed.is_loading)
