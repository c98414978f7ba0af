"""Processes that end together with all that they have started: compilers, workers of tests."""

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
    """A process that ends with the block at the latest; what it prints is in `log`."""
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
    """End those of all threads, which then see them ended."""
    with _lock:
        for process in _running:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and its children, where it still goes on."""
    if process.poll() is None:
        with suppress(ProcessLookupError):  # another thread has just seen it end
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
