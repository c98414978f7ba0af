"""The implementations that tests of the codecs run on."""

import codec_blocks
import pytest

import kvkernels
from kvkernels import native


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
