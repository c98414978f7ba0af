"""Where transfers run beside the model: a stream of the GPU, or on a CPU a thread.

Both do what they are given one after the other, and both are waited for in two ways: by the host,
or by the work that the caller queues next. On a CPU those are the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch


class Done(Protocol):
    """A piece of work that was given to a lane."""

    def wait(self) -> None:
        """Return once it is done; raise what it raised."""
        ...

    def wait_on_stream(self) -> None:
        """Let what the caller queues from now on, on its stream, find it done."""
        ...


class Lane(Protocol):
    """Runs work in order."""

    def mark(self) -> Done:
        """All that the caller has queued on its stream so far."""
        ...

    def submit(self, work: Callable[[], None], after: Done | None = None) -> Done:
        """Run `work`, or what it queues on the current stream, once `after` is done.

        Where this raises, nothing of it is still to be done.
        """
        ...

    def run(self, work: Callable[[], None], after: Done | None = None) -> Done:
        """Like `submit`, for work that is waited for next: a CPU does it at once."""
        ...

    def close(self) -> None:
        """Wait for all work; take no more."""
        ...


class _Finished:
    """Work that is over, and what it raised."""

    def __init__(self, error: BaseException | None = None) -> None:
        self._error = error

    def wait(self) -> None:
        if self._error is not None:
            raise self._error

    wait_on_stream = wait


class _AllDone:
    def __init__(self, parts: Sequence[Done]) -> None:
        self._parts = parts

    def wait(self) -> None:
        for part in self._parts:
            part.wait()

    def wait_on_stream(self) -> None:
        for part in self._parts:
            part.wait_on_stream()


def all_done(parts: Sequence[Done]) -> Done:
    """Done once all parts are."""
    return _AllDone(parts)


class _FutureDone:
    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()

    wait_on_stream = wait


class ThreadLane:
    """A thread. What the caller's thread has written, it has written: there is nothing to mark."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kvkernels-transfer")
        self._pid = os.getpid()

    def mark(self) -> Done:
        return _Finished()

    def run(self, work: Callable[[], None], after: Done | None = None) -> Done:
        try:
            if after is not None:
                after.wait()
            work()
        except Exception as error:
            return _Finished(error)
        return _Finished()

    def submit(self, work: Callable[[], None], after: Done | None = None) -> Done:
        def run() -> None:
            if after is not None:
                after.wait()
            work()

        if os.getpid() != self._pid:  # a fork leaves the thread behind
            self._start()
        return _FutureDone(self._executor.submit(run))

    def close(self) -> None:
        self._executor.shutdown()


class _EventDone:
    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self.event = event
        self._device = device

    def wait(self) -> None:
        self.event.synchronize()

    def wait_on_stream(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self.event)


class StreamLane:
    """A stream of a GPU beside the one the model runs on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def mark(self) -> Done:
        return self._record(torch.cuda.current_stream(self._device))

    def submit(self, work: Callable[[], None], after: Done | None = None) -> Done:
        with torch.cuda.stream(self._stream):
            if after is not None:
                after.wait_on_stream()
            try:
                work()
            except BaseException:
                self._stream.synchronize()  # nobody is to wait for what it has queued before
                raise
            return self._record(self._stream)

    run = submit

    def close(self) -> None:
        self._stream.synchronize()

    def _record(self, stream: torch.cuda.Stream) -> Done:
        event = torch.cuda.Event()
        event.record(stream)
        return _EventDone(event, self._device)


def lane_of(device: torch.device) -> Lane:
    """A new lane for blocks on `device`."""
    return StreamLane(device) if device.type == "cuda" else ThreadLane()
