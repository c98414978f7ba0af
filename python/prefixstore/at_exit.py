"""Ends threads before the interpreter does.

A daemon thread that the interpreter's end meets amid C++ takes the whole process with it
("terminate called without an active exception"), and what it had still to write is lost.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 - so that it asks before this does
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def close_at_exit(close: Callable[[], Any]) -> None:
    """Have a bound method called when the interpreter ends, in the process that asked for it.

    Whoever asked last is called first. The object is not kept alive by this; its method may be
    called though it was called before.
    """
    _registered[:] = [(pid, method) for pid, method in _registered if method() is not None]
    _registered.append((os.getpid(), weakref.WeakMethod(close)))


_registered: list[tuple[int, weakref.WeakMethod[Callable[[], Any]]]] = []


def _close_all() -> None:
    while _registered:
        pid, reference = _registered.pop()
        close = reference()
        if close is None or pid != os.getpid():
            continue
        try:
            close()
        except Exception:  # the others are to be closed too
            logger.exception("%s failed at the end of the process", close.__qualname__)


# Functions of `atexit` come too late: by then `concurrent.futures` has shut its pools, with which
# tiers write, by this same hook. Who registered last runs first.
vars(threading).get("_register_atexit", atexit.register)(_close_all)
