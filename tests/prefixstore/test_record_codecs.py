"""Records of every codec: what comes back, and what is refused."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from sample_blocks import make_keys
from test_record import is_refused, with_right_crc

from kvkernels import CODECS, KVPool, decode_blocks, encode_blocks
from kvkernels.reference import codecs as reference
from prefixstore.errors import BlockCorrupted
from prefixstore.record import (
    BlockKey,
    check_header,
    check_headers,
    decode,
    encode,
    read_header,
)
from prefixstore.record_layout import DTYPES, RecordLayout

SHAPE = (2, 1, 16, 32)  # layers, heads, head_dim, block_size
MIXED = RecordLayout(*SHAPE, "bfloat16", 0, ("l12", "q4"))
LATENT = RecordLayout(*SHAPE, "bfloat16", 0, ("q8",), latent_dim=12)
LAYOUTS = [
    RecordLayout(*SHAPE, dtype, 0, (codec,))
    for codec in CODECS
    for dtype in DTYPES
    if codec != "l12" or dtype == "bfloat16"
]
LAYOUTS += [MIXED, LATENT, replace(LATENT, codecs=("q2", "raw")), replace(LATENT, codecs=("l12",))]
# A layout where the header is 64 bytes shorter without the list of codecs.
LONG_LIST = RecordLayout(6, 1, 16, 16, "bfloat16", 0, ("q8", *("raw",) * 5))


def make_block(layout: RecordLayout, seed: int = 0) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(layout.block_format.layout.block_shape, generator=generator)
    return numbers.to(DTYPES[layout.dtype]).view(torch.uint8).numpy().reshape(-1)


def with_infinity(layout: RecordLayout) -> np.ndarray:
    block = make_block(layout)
    numbers = torch.from_numpy(block).view(DTYPES[layout.dtype])
    numbers[-1] = float("inf")
    numbers[3] = float("inf")
    return block


def make_record(key: BlockKey, block: np.ndarray) -> bytearray:
    record = bytearray(b"\xee" * key.layout.max_record_bytes)
    return record[: encode(key, block, record)]


def restore(record: bytes | bytearray, key: BlockKey) -> np.ndarray:
    out = np.full(key.layout.block_bytes, 0xEE, np.uint8)
    decode(record, key, out)
    return out


def name_of(layout: RecordLayout) -> str:
    latent = f"-{layout.latent_dim}" if layout.latent_dim else ""
    return f"{'+'.join(layout.codecs)}-{layout.dtype}{latent}"


@pytest.mark.parametrize("layout", [*LAYOUTS, LONG_LIST], ids=name_of)
def test_a_record_restores_what_its_codecs_restore(layout: RecordLayout) -> None:
    (key,) = make_keys(1, layout)
    block = make_block(layout)
    record = make_record(key, block)
    assert len(record) == layout.record_bytes
    shape = layout.block_format.layout
    pool = KVPool.over(
        shape, torch.from_numpy(block).view(shape.dtype)[None].view(1, *shape.block_shape)
    )
    encoded = encode_blocks(pool, torch.tensor([0]), layout.block_format)
    assert bytes(record[layout.header_bytes :]) == encoded.payload(0).numpy().tobytes()
    want = KVPool(shape, 1)
    assert decode_blocks(encoded, want, torch.tensor([0])).all()
    assert np.array_equal(restore(record, key), want.block_data(0).numpy())
    assert read_header(record).key.layout == layout


@pytest.mark.parametrize("layout", [*LAYOUTS, LONG_LIST], ids=name_of)
def test_what_the_codecs_do_not_hold_is_a_raw_record(layout: RecordLayout) -> None:
    if layout.codecs == ("l12",):
        pytest.skip("holds it")
    (key,) = make_keys(1, layout)
    block = with_infinity(layout)
    record = make_record(key, block)
    assert read_header(record).key.layout == layout.raw
    assert len(record) == layout.raw.record_bytes
    assert np.array_equal(restore(record, key), block)


@pytest.mark.parametrize("codec", ["l12", "q8", "q2"])
def test_every_flipped_bit_is_found(codec: str) -> None:
    (key,) = make_keys(1, RecordLayout(1, 1, 8, 16, "bfloat16", 0, (codec,)))
    right = make_record(key, make_block(key.layout))
    for bit in range(len(right) * 8):
        flipped = bytearray(right)
        flipped[bit // 8] ^= 1 << bit % 8
        assert is_refused(flipped, key), f"bit {bit % 8} of byte {bit // 8}"


def test_a_record_of_other_codecs_is_refused() -> None:
    """It may be a good approximation of the block, but not the one that was asked for."""
    keys = {
        codec: make_keys(1, RecordLayout(*SHAPE, "bfloat16", 0, (codec,)))[0] for codec in CODECS
    }
    assert len({key.block_hash for key in keys.values()}) == 1
    block = make_block(keys["raw"].layout)
    for written, key in keys.items():
        record = make_record(key, block)
        for wanted, other in keys.items():
            if written in (wanted, "raw", "l12"):
                assert len(record) <= other.layout.max_record_bytes
                restore(record, other)
                continue
            with pytest.raises(BlockCorrupted, match="layout: expected"):
                restore(record, other)


CODEC_AT, LATENT_AT, LIST_AT = 8, 84, 96 + 4 * 32 + 24 * 2


def test_a_list_of_codecs_is_as_the_format_has_it() -> None:
    (key,) = make_keys(1, MIXED)
    right = make_record(key, make_block(MIXED))
    assert right[CODEC_AT] == 255
    assert list(right[LIST_AT : LIST_AT + 2]) == [CODECS["l12"].code, CODECS["q4"].code]
    for codes in ((5, 2), (2, 3), (2, 0), (2, 8), (2, 255), (1, 1)):
        record = bytearray(right)
        record[LIST_AT : LIST_AT + 2] = bytes(codes)
        assert is_refused(with_right_crc(record), key), codes
    # One codec for all layers is named in the header, without a list.
    (key,) = make_keys(1, replace(MIXED, codecs=("q4",)))
    record = make_record(key, make_block(MIXED))
    record[CODEC_AT] = 255
    record[LIST_AT : LIST_AT + 2] = bytes([5, 5])
    with pytest.raises(BlockCorrupted, match="codec: expected 5, got 255"):
        restore(with_right_crc(record), key)


def test_latents_are_as_the_format_has_them() -> None:
    (key,) = make_keys(1, LATENT)
    right = make_record(key, make_block(LATENT))
    assert struct.unpack_from("<H", right, LATENT_AT) == (12,)
    for wrong in (0, 1, 11, 13, 16, 17, 65535):
        record = bytearray(right)
        struct.pack_into("<H", record, LATENT_AT, wrong)
        assert is_refused(with_right_crc(record), key), wrong
    struct.pack_into("<H", right, LATENT_AT, 17)
    with pytest.raises(BlockCorrupted, match="latent_dim: expected 1 to 16, got 17"):
        restore(with_right_crc(right), key)
    # With separate keys and values the field is zero, so those records' bytes are unchanged.
    (key,) = make_keys(1, replace(LATENT, latent_dim=None))
    assert make_record(key, make_block(key.layout))[LATENT_AT : LATENT_AT + 2] == bytes(2)


def put_right_sums(record: bytearray, layout: RecordLayout) -> None:
    """Put the sums of the payload's bytes into the table."""
    payload = torch.frombuffer(bytearray(record[layout.header_bytes :]), dtype=torch.uint8)
    sums = reference.sum_layers(payload, layout.block_format)
    for layer, pair in enumerate(sums.tolist()):
        place = 96 + 4 * layout.block_size + 24 * layer + 8
        struct.pack_into("<qq", record, place, *pair)


def damage(record: bytearray, random: np.random.Generator, layout: RecordLayout) -> bytearray:
    """Damage a record in a way that may pass the checks."""
    kind = random.integers(0, 5)
    if kind == 0:  # a field of the header
        offset = int(random.integers(4, 32))
        record[offset] = random.integers(0, 256)
    elif kind == 1:  # the table, the codecs, or the padding
        offset = int(random.integers(96 + 4 * layout.block_size, layout.header_bytes))
        record[offset] = random.integers(0, 256)
    elif kind == 2:  # codes, scales and escapes that no encoder writes
        first = int(random.integers(layout.header_bytes, len(record)))
        length = int(random.integers(1, 64))
        noise = random.integers(0, 256, length, dtype=np.uint8).tobytes()
        record[first : first + length] = noise[: len(record) - first]
        put_right_sums(record, layout)
    elif kind == 3:  # the length
        length = int(random.integers(0, len(record) + 64))
        record = record[:length].ljust(length, b"\0")
    else:  # the dtype or the codec of another layout, or several things at once
        record[CODEC_AT] = random.choice([*range(9), 255])
        record[9] = random.integers(0, 5)
        struct.pack_into("<H", record, 16, int(random.choice([0, 1, 8, 16, 17, 32, 65535])))
        if layout.latent_dim:
            struct.pack_into(
                "<H", record, LATENT_AT, int(random.choice([0, 1, 4, 8, 12, 16, 17, 65535]))
            )
    return with_right_crc(record) if len(record) >= 96 else record


def test_ten_thousand_hostile_records_are_refused_or_give_the_declared_bytes() -> None:
    random = np.random.default_rng(0)
    rights = []
    for layout in LAYOUTS:
        (key,) = make_keys(1, layout)
        rights.append((key, make_record(key, make_block(layout))))
    num_refused = num_decoded = 0
    for number in range(10_000):
        key, right = rights[number % len(rights)]
        record = damage(bytearray(right), random, key.layout)
        try:
            out = restore(record, key)
        except BlockCorrupted:
            num_refused += 1
            continue
        num_decoded += 1
        if num_decoded % 10 and record != right:
            continue  # the reference is slow
        payload = torch.from_numpy(
            np.frombuffer(record, np.uint8)[key.layout.header_bytes :].copy()
        )
        want = reference.decode_block(payload, key.layout.block_format)
        found = torch.from_numpy(out).view(want.dtype).view(want.shape)
        assert torch.equal(found.nan_to_num(1.0), want.nan_to_num(1.0))
        assert torch.equal(found.isnan(), want.isnan())
    assert num_refused > 5000 and num_decoded > 1000


def test_headers_of_many_are_those_of_each():
    """Right, damaged, another block's, of another length, raw: each gets its own result."""
    layouts = MIXED, RecordLayout(*SHAPE, "bfloat16", 0, ("raw",))
    pairs = zip(*(make_keys(8, layout) for layout in layouts), strict=True)
    keys = [key for pair in pairs for key in pair]
    records = []
    for number, key in enumerate(keys):
        written = replace(key, layout=key.layout.raw) if number in (4, 10) else key
        record = np.array(make_record(written, make_block(key.layout)))
        records.append(record[:-4] if number == 6 else record)
    for number, byte in ((2, 3), (3, 40), (8, 100), (9, 300)):
        records[number][byte] ^= 1
    records[12], records[14] = records[14], records[12]
    for number, header in enumerate(check_headers(records, keys)):
        try:
            expected = check_header(records[number], keys[number])
        except BlockCorrupted as error:
            assert isinstance(header, BlockCorrupted) and str(header) == str(error), number
            continue
        assert header.key.layout == expected.key.layout, number
        assert header.table.tolist() == expected.table.tolist(), number
    assert check_headers([], []) == []
