"""Fixtures: the implementations that tests of the ops run on."""

import codec_blocks
import pytest
import quick_interpreter
import torch

import kvkernels
from kvkernels import native

quick_interpreter.make_quick()


@pytest.fixture(params=codec_blocks.IMPLEMENTATIONS)
def codec_implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Which implementation the codec ops of `kvkernels` use in a test."""
    if request.param == "reference":
        yield request.param
    elif request.param == "triton":
        monkeypatch.setattr(kvkernels, "encode_blocks", codec_blocks.encode_by_triton)
        monkeypatch.setattr(kvkernels, "decode_blocks", codec_blocks.decode_by_triton)
        yield request.param
    else:
        with native.use_isa(request.param):
            yield request.param


# Implementations of the ops that exist only on the CPU.
ISAS = native.available_isas() or ("reference",)


@pytest.fixture(params=ISAS)
def _isa(request):
    if request.param == "reference":
        yield
        return
    with native.use_isa(request.param):
        yield


@pytest.fixture
def _one_thread():
    """Start with one thread on any machine; comparisons then run with three."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
