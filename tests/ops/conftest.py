"""The implementations that tests of the ops run on."""

import codec_blocks
import pytest
import quick_interpreter
import torch

import kvkernels
from kvkernels import native

quick_interpreter.make_quick()


@pytest.fixture(params=codec_blocks.IMPLEMENTATIONS)
def codec_implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """What the ops of `kvkernels` are for a test."""
    if request.param == "reference":
        yield request.param
    elif request.param == "triton":
        monkeypatch.setattr(kvkernels, "encode_blocks", codec_blocks.encode_by_triton)
        monkeypatch.setattr(kvkernels, "decode_blocks", codec_blocks.decode_by_triton)
        yield request.param
    else:
        with native.use_isa(request.param):
            yield request.param


# Of the ops that run on the CPU alone.
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
    """Whatever the machine: what is compared is run with one thread, then with three."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
