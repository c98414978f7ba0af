"""Arguments that the codecs refuse, and the messages."""

from __future__ import annotations

import re

import pytest
import torch
from codec_blocks import encode, make_pool

import kvkernels
from kvkernels import BlockFormat, EncodedBlocks, KVLayout


def refuses(message: str):
    return pytest.raises(ValueError, match=re.escape(message))


def test_bad_arguments_are_named() -> None:
    layout = KVLayout(2, 1, 64, 16)
    pool = make_pool(layout, 2)
    ids = torch.arange(2)
    block_format = BlockFormat(layout, "q8")
    with refuses("codecs: expected one of ('raw', 'l12', 'q8', 'k8v4', 'q4', 'k4v2', 'q2'), got"):
        BlockFormat(layout, "q7")
    with refuses("codecs: expected one name or 2, one a layer, got 3"):
        BlockFormat(layout, ["q8"] * 3)
    with refuses("codecs: expected blocks of bfloat16 for l12, got torch.float16"):
        BlockFormat(KVLayout(1, 1, 64, dtype=torch.float16), "l12")
    with refuses("codecs: expected a head_dim that is a multiple of 4 for k4v2, got 6"):
        BlockFormat(KVLayout(1, 1, 6), "k4v2")
    with refuses("codecs: expected a head_dim of at most 1024 for q8, got 2048"):
        BlockFormat(KVLayout(1, 1, 2048), "q8")
    with refuses("block_format: expected one of KVLayout(num_layers=2"):
        kvkernels.encode_blocks(pool, ids, BlockFormat(KVLayout(1, 1, 64, 16), "q8"))
    with refuses("block_ids: expected 0 to 1, got 0 to 2"):
        kvkernels.encode_blocks(pool, torch.arange(3), block_format)
    with refuses("block_ids: expected dtype torch.int64, got torch.int32"):
        kvkernels.encode_blocks(pool, ids.int(), block_format)
    row_bytes = block_format.payload_bytes
    with refuses(f"payloads: expected rows of {row_bytes} bytes or more, got 64"):
        payloads = torch.empty(2, 64, dtype=torch.uint8)
        kvkernels.encode_blocks(pool, ids, block_format, payloads=payloads)
    rows = torch.empty(2 * row_bytes + 8, dtype=torch.uint8)
    with refuses(f"payloads: expected rows that lie {row_bytes} bytes apart or more, got 0"):
        one = rows[:row_bytes].expand(2, -1)
        kvkernels.encode_blocks(pool, ids, block_format, payloads=one)
    with refuses("payloads: expected rows that start at multiples of 4 bytes, got address"):
        odd = rows[1 : 1 + 2 * row_bytes].view(2, row_bytes)
        kvkernels.encode_blocks(pool, ids, block_format, payloads=odd)
    encoded = encode(pool, "q8")
    for layers in (range(3), range(-1, 1), range(0, 2, 2)):
        with refuses(f"layers: expected a range within range(0, 2), got {layers}"):
            kvkernels.decode_blocks(encoded, pool, ids, layers=layers)
    with refuses("block_ids: expected distinct ids, got one twice"):
        kvkernels.decode_blocks(encoded, pool, torch.tensor([1, 1]))
    with refuses("payloads: expected shape [2, any], got [1, "):
        short = EncodedBlocks(block_format, encoded.payloads[:1], encoded.sums, encoded.is_raw)
        kvkernels.decode_blocks(short, pool, ids)
    with refuses("encoded.sums: expected shape [2, 2, 2], got [1, 2, 2]"):
        one = EncodedBlocks(block_format, encoded.payloads, encoded.sums[:1], encoded.is_raw)
        kvkernels.decode_blocks(one, pool, ids)
    with refuses("encoded.is_raw: expected shape [1], got [2]"):
        kvkernels.decode_blocks(encoded, pool, ids[:1])
    with refuses("num_programs: expected a positive integer, got 0"):
        kvkernels.encode_blocks(pool, ids, block_format, num_programs=0)
    with refuses("num_programs: expected a positive integer, got 1.0"):
        kvkernels.decode_blocks(encoded, pool, ids, num_programs=1.0)


@pytest.mark.parametrize("codec", ["raw", "l12", "q8", "q4"])
def test_a_default_device_is_not_that_of_tensors_on_the_cpu(codec: str) -> None:
    layout = KVLayout(2, 1, 64, 16)
    pool, ids = make_pool(layout, 2), torch.arange(2)
    expected = kvkernels.encode_blocks(pool, ids, BlockFormat(layout, codec))
    with torch.device("meta"):
        encoded = kvkernels.encode_blocks(pool, ids, BlockFormat(layout, codec))
        is_good = kvkernels.decode_blocks(encoded, pool, ids)
    assert torch.equal(encoded.sums, expected.sums)
    assert is_good.all()
