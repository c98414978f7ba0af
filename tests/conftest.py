"""Shared fixtures: the device, dtypes, the error rule and seeded randomness."""

import gc
import os
from collections.abc import Generator

import torch

# Set before the first import of triton: without a GPU the same kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

# Worker processes share the processors: each with all threads would be slower.
NUM_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if NUM_WORKERS > 1:
    torch.set_num_threads(max(1, torch.get_num_threads() // NUM_WORKERS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest tests, those with a time limit of their own, first, so that others run beside
    them."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Describe a failure without garbage collection meanwhile.

    pytest parses the source of what failed. Before 3.11.8, Python 3.11 fails when
    another parse begins within that one (python/cpython#106905): pytest then ends the session with
    "AST constructor recursion depth mismatch" and shows no failure. A collection begins one when
    it finds futures with errors that were never read, as a browser leaves them, because it logs
    their tracebacks; and while it runs, other threads may begin one.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return (yield)
    finally:
        if was_enabled:
            gc.enable()


def pytest_terminal_summary(terminalreporter) -> None:
    """Print what tests recorded as `in_summary`, also in worker processes."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "in_summary":
                terminalreporter.section(report.nodeid.rpartition("::")[2])
                terminalreporter.write_line(text.rstrip())


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
