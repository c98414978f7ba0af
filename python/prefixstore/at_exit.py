"""Ends threads before the interpreter does.

A daemon thread that the interpreter's end meets amid C++ takes the whole process with it
("terminate called without an active exception"), and what it had still to write is lost.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 - so that it asks before this does
import itertools
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
    key = next(_numbers)
    reference = weakref.WeakMethod(close, lambda _: _registered.pop(key, None))
    _registered[key] = os.getpid(), reference


# In the order of registration. Every access is one atomic step of the interpreter, so threads need
# no lock, and a forked process cannot inherit a lock that is held.
_registered: dict[int, tuple[int, weakref.WeakMethod[Callable[[], Any]]]] = {}
_numbers = itertools.count()


def _close_all() -> None:
    while _registered:
        _, (pid, reference) = _registered.popitem()
        close = reference()
        if close is None or pid != os.getpid():
            continue
        try:
            close()
        except Exception:  # one failure must not keep the others open
            logger.exception("%s failed at the end of the process", close.__qualname__)


# Functions registered with `atexit` run too late: by then `concurrent.futures`, whose pools the
# tiers write with, has shut them through this same hook. Hooks run in reverse order of
# registration, and the import above made sure that its hook is registered before ours.
vars(threading).get("_register_atexit", atexit.register)(_close_all)
