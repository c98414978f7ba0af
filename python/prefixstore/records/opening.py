"""Opens protected records for the commands that look at them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from prefixstore.errors import StoreError
from prefixstore.keys import ProtectionConfig
from prefixstore.protection import RecordKey, find_key, make_record_keys, protection_of


class KeyNeeded(StoreError):
    """A record is protected with a key that was not given."""


def key_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option `--key`, of each command that reads records."""
    return click.option(
        "--key",
        "key_files",
        multiple=True,
        type=click.Path(dir_okay=False, path_type=Path),
        help="File with a key of protected records; may be repeated. Default: those that"
        " KVKERNELS_AUTH_KEY_FILE and KVKERNELS_SEAL_KEY_FILE name.",
    )(command)


def read_keys(key_files: Sequence[Path]) -> list[RecordKey]:
    """Everything that the secrets in these files, or else those of the environment, can open.

    Raises:
        ConfigError: If a file cannot be read or holds no key.
    """
    config = ProtectionConfig(key_files) if key_files else ProtectionConfig.from_environment()
    if config is None:
        return []
    secrets = config.auth_keys + config.seal_keys
    return make_record_keys(ProtectionConfig(secrets, secrets))


def plain_record(record: bytes, keys: Sequence[RecordKey]) -> bytes:
    """The record without its protection.

    Raises:
        KeyNeeded: If none of the keys is that of the record.
        BlockCorrupted: If its header is not intact, or a byte is not as the key left it.
    """
    protection = protection_of(memoryview(record))
    if protection is None:
        return record
    key = find_key(protection, keys)
    if key is None:
        raise KeyNeeded(f"{protection}, expected that key (--key), got {len(keys) // 2} others")
    opened = bytearray(record)
    _, num_bytes = key.open(memoryview(opened))
    return bytes(opened[:num_bytes])
