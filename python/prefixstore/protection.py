"""Records under a secret key: authenticated, or sealed, for stores that others can reach.

    | fixed header 96    | token ids, table ... payload             | trailer 88                  |
    | flags, sizes, the  | as they were (authenticated), or         | key id 8 | seed 16 |        |
    | name it is kept by | encrypted (sealed)                       | names 48 | tag 16           |

Both are AES-256-GCM, with a key for each record that comes from the secret, the record's name and a
seed of 16 random bytes: a key is used once, so no limit of nonces matters. What is not encrypted is
its associated data, so the tag covers every byte but the header's checksum, which is over the bytes
as they lie there. Authenticating alone is GCM's own MAC: on a processor with instructions for it a
dozen times as fast as BLAKE2b with a key and six times as fast as HMAC-SHA256, either of which
would make a restore wait for the processor and not for the disk.

A block's hash is of its tokens and would let anyone confirm a guess of a prompt, so a record is
kept under a name that only the key can find: its identity as one encrypted block, so that a holder
can tell which identities a tier holds, and a keyed digest for its block hash. These stand in the
header, so that tiers need not know; the real names, parent_hash too, are in the trailer. So records
of different keys never meet: who has another key finds nothing, and neither uses nor deletes what
others wrote.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from prefixstore.block_key import DIGEST_BYTES, BlockHash, RecordName
from prefixstore.errors import BlockCorrupted, ConfigError
from prefixstore.keys import KEY_BYTES, ProtectionConfig
from prefixstore.record_header import (
    AUTHENTICATED,
    CRC_OFFSET,
    FIXED,
    FIXED_BYTES,
    PROTECTIONS,
    SEALED,
    TRAILER_BYTES,
    FixedHeader,
    corrupted,
    header_crc,
    read_fixed,
)

KEY_ID_BYTES = 8
_SEED_BYTES = 16
_TAG_BYTES = 16
_TRAILER = struct.Struct(f"{KEY_ID_BYTES}s{_SEED_BYTES}s{3 * DIGEST_BYTES}s{_TAG_BYTES}s")
assert _TRAILER.size == TRAILER_BYTES
_NAMES = slice(KEY_ID_BYTES + _SEED_BYTES, TRAILER_BYTES - _TAG_BYTES)  # in the trailer
_NONCE = bytes(12)  # each record has a key of its own
_NO_PARENT = bytes(DIGEST_BYTES)
_PERSONS = {AUTHENTICATED: b"kvkernels auth 1", SEALED: b"kvkernels seal 1"}
_KNOWN_IDENTITIES = 256


class Protection(NamedTuple):
    """How a record is protected, as it says itself.

    Attributes:
        flag: AUTHENTICATED or SEALED.
        key_id: 8 bytes: of the key that did it.
    """

    flag: int
    key_id: bytes

    def __str__(self) -> str:
        return f"{PROTECTIONS[self.flag]} with key {self.key_id.hex()}"


class RecordKey:
    """Protects records with one secret, and opens them.

    Args:
        secret: 32 bytes.
        flag: AUTHENTICATED or SEALED: what it does. One secret serves for both: what is derived
            from it differs.

    Raises:
        ConfigError: If `cryptography` is not installed.
    """

    def __init__(self, secret: bytes, flag: int) -> None:
        _import_cryptography()

        def derive(purpose: bytes) -> bytes:
            person = _PERSONS[flag]
            return blake2b(purpose, key=secret, digest_size=KEY_BYTES, person=person).digest()

        self.protection = Protection(flag, derive(b"key id")[:KEY_ID_BYTES])
        self._record_root = derive(b"records")
        self._name_root = derive(b"names")
        self._identity_root = derive(b"identities")
        self.stored_identity = lru_cache(_KNOWN_IDENTITIES)(self._encrypt_identity)

    def __repr__(self) -> str:
        return f"RecordKey({self.protection})"

    def stored_name(self, name: RecordName) -> RecordName:
        """The name under which a record is kept."""
        block_hash = blake2b(b"".join(name), key=self._name_root, digest_size=DIGEST_BYTES)
        return RecordName(self.stored_identity(name.identity), BlockHash(block_hash.digest()))

    def plain_identity(self, stored: bytes) -> bytes:
        """The identity that is stored as this; of what another key stored, one of nobody."""
        return self._identity_cipher().decryptor().update(stored)

    def _encrypt_identity(self, identity: bytes) -> bytes:
        return self._identity_cipher().encryptor().update(identity)

    def _identity_cipher(self) -> Any:
        """A permutation of 16 bytes: one block of AES and no more, so no mode of operation."""
        ciphers = _import_cryptography()
        return ciphers.Cipher(ciphers.AES256(self._identity_root), ciphers.ECB())

    def protect(self, name: RecordName, record: memoryview, out: memoryview) -> int:
        """Write the protected form of a record.

        Args:
            name: What it is asked for by.
            record: All of it.
            out: As long as the record and TRAILER_BYTES, or longer; written in place.

        Returns:
            Bytes written.

        Raises:
            BlockCorrupted: If the bytes are not a plain record of that name, with an intact header.
        """
        fixed = read_fixed(record)
        if fixed.flags:
            raise corrupted("flags", "a plain record", fixed.flags)
        if record.nbytes != fixed.record_bytes:
            raise corrupted("record", f"{fixed.record_bytes} bytes", record.nbytes)
        _check_name(name, fixed)
        stored = self.stored_name(name)
        seed = os.urandom(_SEED_BYTES)
        protected = fixed._replace(
            flags=self.protection.flag,
            identity=stored.identity,
            block_hash=stored.block_hash,
            parent_hash=_NO_PARENT,
        )
        FIXED.pack_into(out, 0, *protected)
        names = name.identity + name.block_hash + fixed.parent_hash
        trailer = out[record.nbytes : record.nbytes + TRAILER_BYTES]
        trailer[: _NAMES.start] = self.protection.key_id + seed
        encryptor = self._cipher(stored, seed).encryptor()
        body = out[FIXED_BYTES : record.nbytes]
        source = record[FIXED_BYTES:]
        if self.protection.flag == AUTHENTICATED:
            trailer[_NAMES] = names
            np.copyto(np.frombuffer(body, np.uint8), np.frombuffer(source, np.uint8))
        # nothing that is to be sealed is in `out` for even a moment
        self._feed(encryptor, out[:FIXED_BYTES], (names, trailer[_NAMES]), (source, body))
        encryptor.finalize()
        trailer[-_TAG_BYTES:] = encryptor.tag
        _write_crc(out[: fixed.header_bytes])
        return record.nbytes + TRAILER_BYTES

    def open(self, data: memoryview) -> tuple[RecordName, int]:
        """Verify a protected record and make it a plain one, in place.

        Args:
            data: All of it, writable; the record lies at its start afterwards. Garbage if this
                raises.

        Returns:
            The record's name, and its bytes.

        Raises:
            BlockCorrupted: If any byte is not what `protect` wrote with this key.
        """
        fixed = read_fixed(data)
        found = _protection(fixed, data)
        if found != self.protection:
            raise corrupted("protection", self.protection, found or "a plain record")
        end = data.nbytes - TRAILER_BYTES
        trailer = data[end:]
        _, seed, names, tag = _TRAILER.unpack_from(trailer)
        stored = RecordName(fixed.identity, BlockHash(fixed.block_hash))
        decryptor = self._cipher(stored, seed, tag).decryptor()
        body = data[FIXED_BYTES:end]
        self._feed(decryptor, data[:FIXED_BYTES], (names, trailer[_NAMES]), (body, body))
        try:
            decryptor.finalize()  # compares in constant time
        except _import_cryptography().InvalidTag:
            raise BlockCorrupted("tag: expected that of the key, got another") from None
        identity, block_hash, parent_hash = struct.unpack("16s16s16s", trailer[_NAMES])
        plain = fixed._replace(
            flags=0, identity=identity, block_hash=block_hash, parent_hash=parent_hash
        )
        FIXED.pack_into(data, 0, *plain)
        _write_crc(data[: fixed.header_bytes])
        return RecordName(identity, BlockHash(block_hash)), end

    def _feed(self, cipher: Any, header: memoryview, *parts: tuple[Any, memoryview]) -> None:
        """Pass a record through a cipher: the fixed header, then sources and their targets."""
        clear = [header[:CRC_OFFSET], header[CRC_OFFSET + 4 :], self.protection.key_id]
        if self.protection.flag == AUTHENTICATED:
            clear += [source for source, _ in parts]
        for part in clear:
            cipher.authenticate_additional_data(part)
        if self.protection.flag == SEALED:
            for source, target in parts:
                cipher.update_into(source, target)

    def _cipher(self, stored: RecordName, seed: bytes, tag: bytes | None = None) -> Any:
        """AES-256-GCM with the key of one record."""
        key = blake2b(
            seed + b"".join(stored),
            key=self._record_root,
            digest_size=KEY_BYTES,
            person=b"kvkernels record",
        )
        ciphers = _import_cryptography()
        return ciphers.Cipher(ciphers.AES256(key.digest()), ciphers.GCM(_NONCE, tag))


def make_record_keys(config: ProtectionConfig) -> list[RecordKey]:
    """The keys of a configuration; the first is to write.

    Raises:
        ConfigError: If `cryptography` is not installed.
    """
    return [RecordKey(secret, SEALED) for secret in config.seal_keys] + [
        RecordKey(secret, AUTHENTICATED) for secret in config.auth_keys
    ]


def protection_of(data: memoryview) -> Protection | None:
    """How a whole record is protected; None for a plain one.

    Raises:
        BlockCorrupted: If its header is not intact, or it is longer or shorter than its protection
            leaves it.
    """
    return _protection(read_fixed(data), data)


def find_key(protection: Protection, keys: Iterable[RecordKey]) -> RecordKey | None:
    """The key that opens such records, if it is among these."""
    return next((key for key in keys if key.protection == protection), None)


def _protection(fixed: FixedHeader, data: memoryview) -> Protection | None:
    if fixed.flags not in PROTECTIONS:
        return None
    if data.nbytes != fixed.record_bytes:
        raise corrupted("record", f"{fixed.record_bytes} bytes", data.nbytes)
    start = data.nbytes - TRAILER_BYTES
    return Protection(fixed.flags, bytes(data[start : start + KEY_ID_BYTES]))


def _check_name(name: RecordName, fixed: FixedHeader) -> None:
    found = RecordName(fixed.identity, BlockHash(fixed.block_hash))
    if found != name:
        raise corrupted("name", b"".join(name).hex(), b"".join(found).hex())


def _write_crc(header: memoryview) -> None:
    struct.pack_into("<I", header, CRC_OFFSET, header_crc(header))


class _Ciphers(NamedTuple):
    Cipher: Any
    AES256: Any
    ECB: Any
    GCM: Any
    InvalidTag: Any


@lru_cache(maxsize=1)
def _import_cryptography() -> _Ciphers:
    """What is used of `cryptography`, which only protected stores need."""
    try:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import AES256
        from cryptography.hazmat.primitives.ciphers.modes import ECB, GCM
    except ModuleNotFoundError:
        raise ConfigError(
            "auth_key, seal_key: expected cryptography to be installed; run:"
            " pip install 'kvkernels[seal]'"
        ) from None
    return _Ciphers(Cipher, AES256, ECB, GCM, InvalidTag)
