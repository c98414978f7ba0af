"""Shared fixtures: the device, dtypes, the error rule and seeded randomness."""

import os

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
