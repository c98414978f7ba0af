"""Records: what was written comes back; anything else is refused."""

import dataclasses
import hashlib
import json
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import make_record_vectors
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_blocks import IDENTITY, LARGE_LAYOUT, LAYOUT, make_keys, make_payload, make_record

from kvkernels import native
from prefixstore import checksum
from prefixstore.checksum import crc32c
from prefixstore.errors import BlockCorrupted
from prefixstore.record import (
    BlockKey,
    RecordLayout,
    chain_keys,
    check_head,
    check_header,
    check_headers,
    decode,
    encode,
    read_header,
    verify,
)

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "record-format.md"
LAYOUTS = {
    "smallest": RecordLayout(1, 1, 1, 16, "float16"),
    "padding": LAYOUT,
    "second group": LARGE_LAYOUT,
    "no padding": RecordLayout(4, 1, 8, 16, "float32", 7),
    "latents": RecordLayout(2, 1, 576, 64, "bfloat16", latent_dim=512),
    "SmolLM2-135M": RecordLayout(30, 3, 64, 64, "bfloat16"),
}
KEY = make_keys(1)[0]
VECTORS = json.loads(make_record_vectors.PATH.read_text())


def with_right_crc(record: bytearray) -> bytearray:
    """The record with its header's right checksum, as far as its length makes sense."""
    header_bytes = struct.unpack_from("<H", record, 6)[0]
    record[80:84] = bytes(4)
    record[80:84] = crc32c(bytes(record[:header_bytes])).to_bytes(4, "little")
    return record


def is_refused(record: bytes | bytearray, key: BlockKey = KEY) -> bool:
    try:
        decode(record, key, bytearray(key.layout.block_bytes))
    except BlockCorrupted:
        return True
    return False


@pytest.mark.parametrize("has_native", [True, False], ids=["native", "fallback"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gives_back_what_was_written(layout, has_native, monkeypatch):
    if not has_native:
        monkeypatch.setattr(checksum, "_kvkernels", None)
        monkeypatch.setattr(native, "is_available", False)
    for key in make_keys(2, layout):
        out = np.full(layout.payload_bytes, 7, np.uint8)
        decode(make_record(key), key, out)
        assert np.array_equal(out, make_payload(key))


def test_writes_every_byte_of_the_record():
    records = []
    for filling in (0x00, 0xFF):
        record = bytearray([filling]) * LAYOUT.record_bytes
        encode(KEY, make_payload(KEY), record)
        records.append(record)
    assert records[0] == records[1]


def test_bytes_never_change():
    """Otherwise later version-1 readers could not read records written today."""
    key = chain_keys(LAYOUT, IDENTITY, range(16))[0]
    record = bytearray(LAYOUT.record_bytes)
    encode(key, bytes(i * i % 251 for i in range(LAYOUT.payload_bytes)), record)
    assert key.block_hash.hex() == "71012b9cfd425300186b2d26affe69ea"
    assert (
        hashlib.sha256(record).hexdigest()
        == "5bc5814136f02011065c4f7b3e71996ff933c68f6568a84c2a28e863a77bdc32"
    )


def test_every_flipped_bit_is_found():
    right = make_record(KEY)
    for bit in range(len(right) * 8):
        flipped = bytearray(right)
        flipped[bit // 8] ^= 1 << bit % 8
        assert is_refused(flipped), f"bit {bit % 8} of byte {bit // 8}"


def test_every_truncation_and_an_extra_byte_are_found():
    record = make_record(KEY)
    assert all(is_refused(record[:num_bytes]) for num_bytes in range(len(record)))
    assert is_refused(record + b"\0")


def other_keys() -> dict[str, BlockKey]:
    first, second = make_keys(2)
    tokens = KEY.tokens.copy()
    tokens[3] ^= 1
    return {
        "identity": replace(KEY, identity=bytes(16)),
        "parent_hash": replace(KEY, parent_hash=first.block_hash),
        "block_hash": replace(KEY, block_hash=second.block_hash),
        "tokens": replace(KEY, tokens=tokens),
        "layout": replace(KEY, layout=replace(LAYOUT, dtype="float16")),
    }


@pytest.mark.parametrize("what", other_keys())
def test_refuses_the_record_of_another_block(what):
    key = other_keys()[what]
    with pytest.raises(BlockCorrupted, match=what):
        decode(make_record(KEY), key, bytearray(key.layout.block_bytes))


FIELDS = {  # offset, struct code, wrong values for a version-1 record of LAYOUT
    "magic": (0, "I", (0, 0x3242564B)),
    "version": (4, "H", (0, 2, 65535)),
    "header_bytes": (6, "H", (0, 95, 96, 192, 320, 65472, 65535)),
    "codec": (8, "B", (0, 2, 255)),
    "dtype": (9, "B", (0, 2, 4, 255)),
    "flags": (10, "H", (1, 0x8000)),
    "num_layers": (12, "H", (0, 2, 4, 65535)),
    "num_kv_heads": (14, "H", (0, 2, 65535)),
    "head_dim": (16, "H", (0, 17, 65535)),
    "block_size": (18, "H", (0, 15, 32, 65535)),
    "num_tokens": (20, "H", (0, 15, 17)),
    "layer_group": (22, "H", (1, 65535)),
    "payload_bytes": (24, "Q", (0, 3071, 3136, 2**64 - 1)),
    "reserved": (84, "Q", (1, 1 << 63)),
    "reserved end": (92, "I", (1,)),
    "layer offset": (160, "I", (0, 255, 320, 2**32 - 1)),
    "layer bytes": (164, "I", (0, 1023, 2**32 - 1)),
    "sum": (168, "Q", (0,)),
    "weighted sum": (176, "Q", (0,)),
    "padding": (232, "Q", (1,)),
}


@pytest.mark.parametrize("field", FIELDS)
def test_refuses_a_wrong_field_under_a_right_checksum(field):
    offset, code, values = FIELDS[field]
    for value in values:
        record = make_record(KEY)
        struct.pack_into("<" + code, record, offset, value)
        assert is_refused(with_right_crc(record)), value


def test_names_the_version_it_refuses():
    record = make_record(KEY)
    struct.pack_into("<H", record, 4, 2)
    with pytest.raises(BlockCorrupted, match=r"version: expected 1.*got 2"):
        read_header(with_right_crc(record))


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_random_bytes_are_only_ever_corrupted(data, with_magic):
    assert is_refused(b"KVB1\1\0" + data if with_magic else data)


@settings(max_examples=600, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 255), st.binary(min_size=1, max_size=9)), min_size=1),
    st.integers(256, LAYOUT.record_bytes),
)
def test_random_headers_under_a_right_checksum_are_only_ever_corrupted(changes, num_bytes):
    right = make_record(KEY)
    record = bytearray(right)
    for offset, data in changes:
        record[offset : offset + len(data)] = data
    record = with_right_crc(record[: LAYOUT.record_bytes])
    if num_bytes < LAYOUT.record_bytes or record != right:
        assert is_refused(record[:num_bytes])


def test_header_can_be_read_without_the_payload():
    header = read_header(make_record(KEY)[: LAYOUT.header_bytes])
    assert header.key.layout == LAYOUT
    assert header.key.block_hash == KEY.block_hash
    assert np.array_equal(header.key.tokens, KEY.tokens)
    assert header.table["offset"].tolist() == [256, 1280, 2304]


def test_refuses_buffers_of_other_sizes():
    payload = make_payload(KEY)
    with pytest.raises(ValueError, match="block: expected 3072 bytes, got 3071"):
        encode(KEY, payload[:-1], bytearray(LAYOUT.record_bytes))
    with pytest.raises(ValueError, match="out: expected 3328 bytes or more, got 3327"):
        encode(KEY, payload, bytearray(LAYOUT.record_bytes - 1))
    with pytest.raises(ValueError, match="out: expected a writable"):
        encode(KEY, payload, bytes(LAYOUT.record_bytes))
    with pytest.raises(ValueError, match="block_out: expected 3072 bytes, got 0"):
        decode(make_record(KEY), KEY, bytearray())
    with pytest.raises(ValueError, match="block: expected a contiguous"):
        encode(KEY, np.zeros((3072, 2), np.uint8)[:, 0], bytearray(LAYOUT.record_bytes))
    with pytest.raises(ValueError, match="block_out: expected a writable"):
        decode(make_record(KEY), KEY, bytes(3072))


@pytest.mark.parametrize(
    "read",
    [
        read_header,
        verify,
        lambda record: check_head(record, KEY),
        lambda record: check_header(record, KEY),
    ],
    ids=["read_header", "verify", "check_head", "check_header"],
)
def test_refuses_records_in_pieces(read):
    record = np.zeros((LAYOUT.record_bytes, 2), np.uint8)[:, 0]
    with pytest.raises(ValueError, match="record: expected a contiguous"):
        read(record)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_records_lie_anywhere_and_are_made_at_whole_words(offset):
    block, record = make_payload(KEY), make_record(KEY)
    aligned = np.zeros(LAYOUT.record_bytes + 8, np.uint8)
    place = memoryview(aligned)[offset : offset + LAYOUT.record_bytes]
    place[:] = record
    restored = bytearray(LAYOUT.block_bytes)
    decode(place, KEY, restored)
    assert restored == bytes(block)
    place[:] = bytes(LAYOUT.record_bytes)
    if offset % 4:
        with pytest.raises(ValueError, match="out: expected memory from a multiple of 4 bytes on"):
            encode(KEY, block, place)
    else:
        assert encode(KEY, block, place) == LAYOUT.record_bytes and place == record


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers: expected an integer 1 to 65535, got 0"),
        ({"head_dim": 1 << 16}, "head_dim: expected"),
        ({"num_kv_heads": 1.0}, "num_kv_heads: expected"),
        ({"block_size": 48}, "block_size: expected one of"),
        ({"codecs": ("q9",)}, "codecs: expected one of"),
        ({"codecs": ("q8", "raw")}, "codecs: expected one name or 3, one a layer, got 2"),
        ({"dtype": "float16", "codecs": ("l12",)}, "codecs: expected blocks of bfloat16"),
        ({"dtype": "int8"}, "dtype: expected one of"),
        ({"layer_group": -1}, "layer_group: expected"),
        ({"num_layers": 3000}, "at most 65472 header bytes"),
        ({"num_layers": 2000, "num_kv_heads": 999, "head_dim": 512}, "at most 2147483648 bytes"),
    ],
)
def test_refuses_layouts_that_no_record_can_hold(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(LAYOUT, **changes)


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """The script on the documentation page."""
    (script,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("reader") / "reader.py"
    path.write_text(script)
    return path


def run_reader(reader: Path, record: bytes, tmp_path: Path) -> subprocess.CompletedProcess:
    (tmp_path / "record").write_bytes(record)
    command = [sys.executable, "-I", "-S", str(reader), str(tmp_path / "record")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def expected_of_reader(key: BlockKey, codecs: tuple[str, ...], block: bytes) -> dict[str, object]:
    return {
        **dataclasses.asdict(key.layout),
        "codecs": list(codecs),
        "identity": key.identity.hex(),
        "block_hash": key.block_hash.hex(),
        "parent_hash": key.parent_hash.hex(),
        "tokens": key.tokens.tolist(),
        "block_sha256": hashlib.sha256(block).hexdigest(),
    }


@pytest.mark.parametrize("layout", [LAYOUT, LARGE_LAYOUT], ids=["padding", "second group"])
def test_documented_reader_agrees(reader, layout, tmp_path):
    key = make_keys(2, layout)[1]
    result = run_reader(reader, bytes(make_record(key)), tmp_path)
    assert result.returncode == 0, result.stderr
    block = make_payload(key).tobytes()
    assert json.loads(result.stdout) == expected_of_reader(key, ("raw",), block)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_the_documented_vectors_are_what_is_written_and_read(reader, vector, tmp_path):
    record, block = bytes.fromhex(vector["record"]), bytes.fromhex(vector["block"])
    decoded = bytes.fromhex(vector.get("decoded", vector["block"]))
    layout = make_record_vectors.layouts()[vector["name"]]
    (key,) = chain_keys(layout, make_record_vectors.IDENTITY, range(100, 116))
    written = bytearray(layout.max_record_bytes)
    assert written[: encode(key, block, written)] == record
    out = bytearray(layout.block_bytes)
    decode(record, key, out)
    assert out == decoded
    result = run_reader(reader, record, tmp_path)
    assert result.returncode == 0, result.stderr
    codecs = read_header(record).key.layout.codecs
    assert json.loads(result.stdout) == expected_of_reader(key, codecs, decoded)


def test_there_is_a_vector_of_everything():
    assert {vector["name"] for vector in VECTORS} == set(make_record_vectors.layouts())
    codes = {bytes.fromhex(vector["record"])[8] for vector in VECTORS}
    assert codes == {*range(1, 8), 255}


@pytest.mark.parametrize("offset", [5, 50, 90, 100, 170, 240, 1000])
def test_documented_reader_refuses_what_we_refuse(reader, offset, tmp_path):
    record = make_record(KEY)
    record[offset] ^= 16
    result = run_reader(reader, bytes(record), tmp_path)
    assert result.returncode == 1
    assert "not a valid record" in result.stderr


@pytest.mark.parametrize("byte", range(LAYOUT.header_bytes))
def test_a_flipped_bit_of_a_header_is_found_among_many(byte):
    keys = make_keys(3)
    records = [np.frombuffer(make_record(key), np.uint8).copy() for key in keys]
    records[1][byte] ^= 1 << byte % 8
    first, wrong, last = check_headers(records, keys)
    assert isinstance(wrong, BlockCorrupted)
    assert first.key is keys[0] and last.key is keys[2]
