"""Numbers near the end of float16's range: restored ones can be encoded again."""

from __future__ import annotations

import pytest
import torch
from codec_blocks import LOSSY, decode, encode

from kvkernels import KVLayout, KVPool

LIMIT = 65408.0  # largest magnitude that codes hold


@pytest.mark.parametrize("codec", LOSSY)
def test_what_comes_back_past_the_limit_is_kept_raw(codec: str) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = KVPool(KVLayout(1, 3, 100, 16, torch.float16), 16)
    numbers = torch.randn(pool.data.shape, generator=generator) * 30000
    pool.data.copy_(numbers.clamp(-LIMIT, LIMIT))
    encoded = encode(pool, codec)
    assert not encoded.is_raw.any()
    restored = KVPool.over(pool.layout, decode(encoded))
    is_past = restored.data.float().abs().flatten(1).amax(1) > LIMIT
    assert is_past.any() and restored.data.isfinite().all()
    again = encode(restored, codec)
    assert torch.equal(again.is_raw, is_past)
    assert torch.equal(decode(again), restored.data)
