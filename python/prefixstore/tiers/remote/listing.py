"""Lists a directory of objects, past entries that the client cannot look at."""

from __future__ import annotations

import threading
from asyncio import wrap_future
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


async def list_directory(
    batches: Iterator[Sequence[T]], is_unreadable: Callable[[Exception], bool], batch_size: int
) -> AsyncIterator[list[T]]:
    """All that is in batches of one each, in larger ones.

    With an entry that cannot be looked at the client drops the batch it is in, so it is asked for
    entries one by one. A thread does that, in some 15 us an object: the event loop takes 90. (Of
    batches it would take 10, on a local disk.)

    Args:
        batches: The client's.
        is_unreadable: Whether an error is that of such an entry, which is left out.
        batch_size: Of what is given.
    """
    is_over = False
    while not is_over:
        batch, is_over = await _in_thread(lambda: _take(batches, is_unreadable, batch_size))
        yield batch


def _take(
    batches: Iterator[Sequence[T]], is_unreadable: Callable[[Exception], bool], batch_size: int
) -> tuple[list[T], bool]:
    """The next ones, and whether they are the last."""
    taken: list[T] = []
    while len(taken) < batch_size:
        batch: Sequence[T] = ()
        try:
            batch = next(batches)
        except StopIteration:
            return taken, True
        except Exception as error:
            if not is_unreadable(error):
                raise
        taken += batch
    return taken, False


async def _in_thread(call: Callable[[], T]) -> T:
    """What a call returns that may take long.

    Its thread is a daemon: a loop that ends waits for asyncio's own, and a directory may hang.
    """
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()  # whoever no longer waits leaves it running

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # for whoever waits
            future.set_exception(error)

    threading.Thread(target=run, name="prefixstore-listing", daemon=True).start()
    result: T = await wrap_future(future)
    return result
