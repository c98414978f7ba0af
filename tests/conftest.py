"""Shared fixtures: the device, dtypes, the error rule and seeded randomness."""

import os

import torch

# Set before the first import of triton: without a GPU the same kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
