"""One call at a time in a thread beside its caller's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future


class Beside:
    """Runs a call while whoever started it goes on. For one thread.

    A thread is begun for each call, and is a daemon: a pool's would keep the process from ending
    where a call hangs, and would be missing in a forked one. Where none is to be had, as when the
    interpreter ends, the call is run at once.
    """

    def __init__(self) -> None:
        self._under_way: Future[None] | None = None

    def start(self, call: Callable[[], None]) -> None:
        """Run it; what was started before must have been waited for."""
        assert self._under_way is None
        future = self._under_way = Future()

        def run() -> None:
            try:
                call()
            except BaseException as error:  # for whoever waits
                future.set_exception(error)
            else:
                future.set_result(None)

        try:
            threading.Thread(target=run, name="prefixstore-beside", daemon=True).start()
        except RuntimeError:  # no thread can be begun: `run` itself raises nothing
            run()

    def wait(self) -> None:
        """Return once it is done; raise what it raised, once."""
        future, self._under_way = self._under_way, None
        if future is not None:
            future.result()
