"""Processes that are ended with all their children, such as compilers and test workers."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_running: set["subprocess.Popen[bytes]"] = set()
_lock = threading.Lock()


@contextmanager
def started(
    command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that is ended at the end of the block; its output goes to `log`."""
    with _lock, log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, start_new_session=True
        )
        _running.add(process)
    try:
        yield process
    finally:
        _end(process)
        with _lock:
            _running.remove(process)


def end_all() -> None:
    """End the processes of all threads, which then find theirs ended."""
    with _lock:
        for process in _running:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and its children, if it still runs."""
    if process.poll() is None:
        with suppress(ProcessLookupError):  # another thread has just reaped it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
