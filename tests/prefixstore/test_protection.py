"""Records under keys: protected ones come back; tampered ones never do."""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import ECB
from sample_blocks import IDENTITY, LARGE_LAYOUT, LAYOUT, make_keys, make_payload, make_record

from prefixstore import protection
from prefixstore.block_key import RecordName
from prefixstore.checksum import crc32c
from prefixstore.errors import BlockCorrupted, ConfigError
from prefixstore.keys import ProtectionConfig
from prefixstore.protection import RecordKey, find_key, make_record_keys, protection_of
from prefixstore.record import BlockKey, RecordLayout, read_header, verify
from prefixstore.record_header import AUTHENTICATED, SEALED, TRAILER_BYTES, read_fixed

SECRET = bytes(range(100, 132))
SMALL_LAYOUT = RecordLayout(1, 1, 1, 16, "float16")
LAYOUTS = {"smallest": SMALL_LAYOUT, "padding": LAYOUT, "larger": LARGE_LAYOUT}
DIGESTS = {  # of a small record in each form, where the seed is zeros
    AUTHENTICATED: "0a6c1793c5db652f140355a8dee02388",
    SEALED: "ea1ced5e0e5552e3fe6898bc58bdd916",
}
HEADER_BITS = 8 * SMALL_LAYOUT.header_bytes


@pytest.fixture(params=[AUTHENTICATED, SEALED], ids=["authenticated", "sealed"])
def record_key(request) -> RecordKey:
    return RecordKey(SECRET, request.param)


def protect(record_key: RecordKey, key: BlockKey, record: bytes | None = None) -> bytearray:
    record = bytes(make_record(key)) if record is None else record
    out = bytearray(len(record) + TRAILER_BYTES)
    assert record_key.protect(key.name, memoryview(record), memoryview(out)) == len(out)
    return out


def opened(record_key: RecordKey, data: bytes) -> tuple[RecordName, bytes]:
    copy = bytearray(data)
    name, num_bytes = record_key.open(memoryview(copy))
    return name, bytes(copy[:num_bytes])


def is_refused(record_key: RecordKey, data: bytes) -> bool:
    try:
        opened(record_key, data)
    except BlockCorrupted:
        return True
    return False


def with_right_crc(data: bytearray) -> bytearray:
    """Mend the header's checksum, as an attacker without the key can."""
    header_bytes = struct.unpack_from("<H", data, 6)[0]
    crc = crc32c(data[84:header_bytes], crc32c(bytes(4), crc32c(data[:80])))
    data[80:84] = crc.to_bytes(4, "little")
    return data


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gives_back_what_was_protected(record_key, layout):
    (key,) = make_keys(1, layout)
    record = bytes(make_record(key))
    data = protect(record_key, key)
    assert opened(record_key, data) == (key.name, record)
    assert read_fixed(memoryview(data)).record_bytes == len(data) == len(record) + TRAILER_BYTES
    again = protect(record_key, key)
    assert again != data  # another seed gives another record key
    assert opened(record_key, again) == (key.name, record)


@pytest.mark.parametrize("knows_crc", [False, True], ids=["accident", "with right checksum"])
def test_refuses_every_flipped_bit(record_key, knows_crc):
    (key,) = make_keys(1, SMALL_LAYOUT)
    data = protect(record_key, key)
    num_bits = HEADER_BITS if knows_crc else 8 * len(data)
    for bit in range(num_bits):
        if knows_crc and 640 <= bit < 672:
            continue  # the checksum itself, which would be mended
        wrong = bytearray(data)
        wrong[bit // 8] ^= 1 << bit % 8
        assert is_refused(record_key, with_right_crc(wrong) if knows_crc else wrong), f"bit {bit}"
    assert not is_refused(record_key, data)


def test_refuses_every_other_length(record_key):
    (key,) = make_keys(1, SMALL_LAYOUT)
    data = bytes(protect(record_key, key))
    assert all(is_refused(record_key, data[:end]) for end in range(len(data)))
    assert is_refused(record_key, data + b"\0")
    # cut out of the middle, with the payload's length put right
    shorter = bytearray(data[: -TRAILER_BYTES - 64] + data[-TRAILER_BYTES:])
    struct.pack_into("<Q", shorter, 24, SMALL_LAYOUT.payload_bytes - 64)
    assert is_refused(record_key, with_right_crc(shorter))


def test_refuses_a_record_whose_protection_was_stripped(record_key):
    (key,) = make_keys(1)
    plain = make_record(key)
    with pytest.raises(BlockCorrupted, match=r"protection: expected \w+ with key .*, got a plain"):
        opened(record_key, bytes(plain))
    data = protect(record_key, key)
    for flags in {0, 1, 2, 3, 4, 0xFFFF} - {record_key.protection.flag}:
        struct.pack_into("<H", data, 10, flags)
        assert is_refused(record_key, with_right_crc(data))
        assert is_refused(record_key, with_right_crc(data)[:-TRAILER_BYTES])


def test_refuses_parts_of_two_records(record_key):
    first, second = (protect(record_key, key) for key in make_keys(2))
    for cut in (96, LAYOUT.header_bytes, LAYOUT.record_bytes, LAYOUT.record_bytes + 72):
        assert is_refused(record_key, with_right_crc(first[:cut] + second[cut:]))


def test_each_key_opens_only_its_own():
    (key,) = make_keys(1)
    keys = [RecordKey(secret, flag) for secret in (SECRET, bytes(32)) for flag in (1, 2)]
    datas = [protect(one, key) for one in keys]
    for i, one in enumerate(keys):
        assert [not is_refused(one, data) for data in datas] == [j == i for j in range(4)]
        assert find_key(protection_of(memoryview(datas[i])), keys) is one
    assert len({one.stored_name(key.name) for one in keys}) == 4
    with pytest.raises(BlockCorrupted) as error:
        opened(keys[0], datas[2])
    assert (
        str(error.value) == f"protection: expected {keys[0].protection}, got {keys[2].protection}"
    )


def test_a_sealed_record_tells_neither_tokens_nor_names_nor_payload():
    key = make_keys(2)[1]  # with a parent
    record = bytes(make_record(key))
    data = bytes(protect(RecordKey(SECRET, SEALED), key))
    tokens = [token.to_bytes(4, "little") for token in key.tokens.tolist()]
    secrets = [*tokens, IDENTITY, key.block_hash, key.parent_hash, SECRET]
    secrets += [record[at : at + 16] for at in range(96, len(record), 16)]
    assert [secret for secret in secrets if any(secret) and secret in data] == []
    fixed, plain = read_fixed(memoryview(data)), read_fixed(memoryview(record))
    hidden = {"flags", "identity", "block_hash", "parent_hash", "crc"}
    for name in fixed._fields:
        assert (getattr(fixed, name) == getattr(plain, name)) == (name not in hidden)


def test_stored_names_tell_nothing_of_the_tokens_and_keep_identities_together():
    record_key = RecordKey(SECRET, SEALED)
    first, second = (record_key.stored_name(key.name) for key in make_keys(2))
    assert first.identity == second.identity == record_key.stored_identity(IDENTITY)
    other = record_key.stored_name(RecordName(bytes(16), make_keys(1)[0].block_hash))
    assert other.identity != first.identity and other.block_hash != first.block_hash
    assert record_key.stored_name(make_keys(1)[0].name) == first
    assert RecordKey(bytes(32), SEALED).stored_name(make_keys(1)[0].name) != first


def open_plainly(data: bytes, person: bytes) -> bytes:
    """Open a record as docs/record-format.md says, with other calls; returns names and the rest."""
    root = hashlib.blake2b(b"records", key=SECRET, digest_size=32, person=person).digest()
    key_id, seed, names, tag = data[-88:-80], data[-80:-64], data[-64:-16], data[-16:]
    record_key = hashlib.blake2b(
        seed + data[32:64], key=root, digest_size=32, person=b"kvkernels record"
    )
    cipher = AESGCM(record_key.digest())
    clear, body = data[:80] + data[84:96] + key_id, names + data[96:-88]
    if data[10] == SEALED:
        return cipher.decrypt(bytes(12), body + tag, clear)
    cipher.decrypt(bytes(12), tag, clear + body)
    return body


def test_the_document_says_how_to_open_a_record(record_key):
    key = make_keys(2)[1]
    data = bytes(protect(record_key, key))
    person = b"kvkernels auth 1" if data[10] == AUTHENTICATED else b"kvkernels seal 1"
    names = IDENTITY + key.block_hash + key.parent_hash
    assert open_plainly(data, person) == names + bytes(make_record(key))[96:]
    root = hashlib.blake2b(b"names", key=SECRET, digest_size=32, person=person).digest()
    stored = hashlib.blake2b(IDENTITY + key.block_hash, key=root, digest_size=16).digest()
    assert data[48:64] == stored
    root = hashlib.blake2b(b"identities", key=SECRET, digest_size=32, person=person).digest()
    assert data[32:48] == Cipher(AES256(root), ECB()).encryptor().update(IDENTITY)
    assert record_key.plain_identity(data[32:48]) == IDENTITY
    key_id = hashlib.blake2b(b"key id", key=SECRET, digest_size=32, person=person).digest()[:8]
    assert data[-88:-80] == key_id


def test_protects_the_same_in_every_version(record_key, monkeypatch):
    """Else an update would turn a store's records into misses; the digests are version 1's."""
    monkeypatch.setattr(protection.os, "urandom", bytes)
    (key,) = make_keys(1, SMALL_LAYOUT)
    digest = hashlib.sha256(protect(record_key, key)).hexdigest()
    assert digest[:32] == DIGESTS[record_key.protection.flag]


def altered(change: Callable[[bytearray], None]) -> bytes:
    record = make_record(make_keys(1)[0])
    change(record)
    return bytes(record)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (altered(lambda record: record.__setitem__(100, 255 - record[100])), "header checksum"),
        (altered(lambda record: record.append(0)), "record: expected 3328 bytes, got 3329"),
        (altered(lambda record: record.clear()), "record: expected at least 96 bytes, got 0"),
        (bytes(make_record(make_keys(2)[1])), "name: expected"),
        (bytes(protect(RecordKey(SECRET, SEALED), make_keys(1)[0])), "flags: expected a plain"),
    ],
    ids=["damaged header", "too long", "empty", "another's", "protected"],
)
def test_protects_nothing_but_a_plain_record_of_that_name(record_key, record, message):
    with pytest.raises(BlockCorrupted, match=message):
        protect(record_key, make_keys(1)[0], record)


def test_readers_of_plain_records_refuse_protected_ones(record_key):
    (key,) = make_keys(1)
    data = bytes(protect(record_key, key))
    message = r"flags: expected a plain record, got one (authenticated|sealed) with a key"
    for read in (read_header, verify):
        with pytest.raises(BlockCorrupted, match=message):
            read(data)


def test_damage_to_the_payload_before_it_was_protected_is_still_found(record_key):
    (key,) = make_keys(1)
    record = make_record(key)
    record[-1] ^= 1
    _, plain = opened(record_key, protect(record_key, key, bytes(record)))
    with pytest.raises(BlockCorrupted, match=r"layers \[2\]"):
        verify(plain)


def test_the_payload_is_read_from_any_buffer(record_key):
    (key,) = make_keys(1)
    record = make_record(key)
    assert bytes(make_payload(key)) in bytes(record)
    out = bytearray(len(record) + TRAILER_BYTES + 100)
    num_bytes = record_key.protect(key.name, memoryview(record).toreadonly(), memoryview(out))
    assert opened(record_key, out[:num_bytes]) == (key.name, bytes(record))
    assert out[num_bytes:] == bytes(100)


def test_says_what_to_install_where_cryptography_is_missing(monkeypatch):
    protection._import_cryptography.cache_clear()
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    for config in (ProtectionConfig(SECRET), ProtectionConfig(seal_key=SECRET)):
        with pytest.raises(ConfigError, match=r"pip install 'kvkernels\[seal\]'"):
            make_record_keys(config)
    monkeypatch.undo()
    assert make_record_keys(ProtectionConfig(SECRET))


def test_shows_no_secret(record_key):
    assert repr(record_key) == f"RecordKey({record_key.protection})"
    config = ProtectionConfig(auth_key=SECRET, seal_key=[SECRET])
    for text in (repr(config), str(config), repr(record_key), str(record_key.protection)):
        assert SECRET.hex() not in text and repr(SECRET)[2:-1] not in text
