"""System calls of the disk tier that hang at one offset until they are released."""

import os
import threading
from collections.abc import Callable

from disk_tiers import replace_preadv

# Seconds until the deadline, attempt by attempt: on a stalled machine calls that do not hang are
# late as well, and get more time.
WAITS_S = (0.3, 3, 20)


class Hanging:
    """A system call that hangs at one offset until it is released; `meanwhile` runs first."""

    def __init__(self, offset: int) -> None:
        self._offset = offset
        self.meanwhile: Callable[[], object] = lambda: None
        self.has_begun = threading.Event()
        self.may_go_on = threading.Event()
        self.is_over = threading.Event()

    def __call__(self, transfer, offset, num_bytes):
        if offset != self._offset:
            return transfer()
        self.has_begun.set()
        self.meanwhile()
        assert self.may_go_on.wait(60)
        try:
            return transfer()
        finally:
            self.is_over.set()


def hang_reading(monkeypatch, by_extension: bool, offset: int) -> Hanging:
    hanging = Hanging(offset)
    replace_preadv(monkeypatch, by_extension, hanging)
    return hanging


def hang_writing(monkeypatch, offset: int) -> Hanging:
    hanging, write = Hanging(offset), os.pwritev
    monkeypatch.setattr(
        os, "pwritev", lambda fd, buffers, at: hanging(lambda: write(fd, buffers, at), at, 0)
    )
    return hanging
