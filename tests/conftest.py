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

# Worker processes share the processors; as many threads as processors in each would be slower.
NUM_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if NUM_WORKERS > 1:
    torch.set_num_threads(max(1, torch.get_num_threads() // NUM_WORKERS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest tests, those with a time limit of their own, while others remain to run
    beside them."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Describe a failure with no garbage collection beside it.

    pytest parses the source of what failed. Before 3.11.8, Python 3.11 does not stand it when
    another parse begins within that one (python/cpython#106905): pytest then ends the session with
    "AST constructor recursion depth mismatch" and shows no failure. A collection begins one where
    it finds futures whose errors nobody asked for, as a browser leaves them, for their tracebacks
    are logged; and while it runs, so may other threads.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return (yield)
    finally:
        if was_enabled:
            gc.enable()


def pytest_terminal_summary(terminalreporter) -> None:
    """Print what a test recorded as `in_summary`, from worker processes too."""
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
