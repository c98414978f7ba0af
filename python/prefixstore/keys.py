"""Secret keys of shared stores: where they are read from, and how a new one is made.

A key is 32 random bytes, in a file that only its owner may read. No message and no `repr` shows
one; `ConfigError` names the file and what is wrong with it.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prefixstore.errors import ConfigError

KEY_BYTES = 32
_HEX_DIGITS = 2 * KEY_BYTES
_MAX_FILE_BYTES = _HEX_DIGITS + 2  # with the end of the line

KeySource = bytes | str | Path


@dataclass(frozen=True)
class ProtectionConfig:
    """Which keys protect the records of a tier.

    Where there are several, the first writes and all read: put a new key in front, and drop the
    old one when what it wrote may be forgotten. With keys of both kinds records are sealed, and
    those that are authenticated are read too.

    Attributes:
        auth_key: Keys of 32 bytes, or the files they are in, as hexadecimal digits or as they
            are: nobody without one can write a record that is taken for right.
        seal_key: Like `auth_key`; nobody without one can read tokens and payload either.
        auth_keys: The keys themselves.
        seal_keys: Like `auth_keys`.

    Raises:
        ConfigError: If there is no key, or one is not of 32 bytes, cannot be read, or lies in a
            file that others may read.
    """

    auth_key: KeySource | Sequence[KeySource] | None = field(default=None, repr=False)
    seal_key: KeySource | Sequence[KeySource] | None = field(default=None, repr=False)
    auth_keys: tuple[bytes, ...] = field(init=False, repr=False)
    seal_keys: tuple[bytes, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("auth_key", "seal_key"):
            keys = tuple(_read_source(name, source) for source in _sources(getattr(self, name)))
            object.__setattr__(self, f"{name}s", keys)
        if not self.auth_keys and not self.seal_keys:
            raise ConfigError("auth_key, seal_key: expected at least one of them, got none")

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] = os.environ
    ) -> ProtectionConfig | None:
        """Keys from the files that KVKERNELS_AUTH_KEY_FILE and KVKERNELS_SEAL_KEY_FILE name.

        Each may name several, with colons between them. None where neither is set.
        """
        auth, seal = (
            split_paths(environment.get(name, ""))
            for name in ("KVKERNELS_AUTH_KEY_FILE", "KVKERNELS_SEAL_KEY_FILE")
        )
        return cls(auth, seal) if auth or seal else None


def read_key(path: str | Path) -> bytes:
    """The key in a file.

    Raises:
        ConfigError: If it cannot be read, others may read it, or it holds no key.
    """
    try:
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"key file {path}: {error.strerror}") from error
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"key file {path}: expected a file that only its owner may read, as with mode 600, got"
            f" mode {mode:03o}"
        )
    return _parse(path, content)


def write_key(path: str | Path) -> bytes:
    """Make a key and write it to a new file that only its owner may read.

    Raises:
        ConfigError: If the file is there already, or cannot be written.
    """
    key = secrets.token_bytes(KEY_BYTES)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(fd, "w", encoding="ascii") as file:
                file.write(key.hex() + "\n")
                file.flush()
                os.fsync(fd)  # what is sealed with it is lost without it
        except BaseException:
            Path(path).unlink()  # a part of a key is none, and would be in the way of the next one
            raise
    except OSError as error:
        raise ConfigError(f"key file {path}: {error.strerror}") from error
    return key


def split_paths(text: str) -> list[str]:
    """The files of a list with colons between them; empty for an empty one."""
    return [path for path in text.split(os.pathsep) if path]


def _parse(path: str | Path, content: bytes) -> bytes:
    if len(content) == KEY_BYTES:
        return content
    try:
        key = bytes.fromhex(content.decode("ascii"))
    except ValueError:  # its message, and the chain, would quote what the file holds
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"key file {path}: expected {_HEX_DIGITS} hexadecimal digits or {KEY_BYTES} bytes, got"
            f" something else of {len(content)} bytes or more"
        )
    return key


def _sources(given: KeySource | Sequence[KeySource] | None) -> Sequence[KeySource]:
    if given is None:
        return ()
    is_list = isinstance(given, Sequence) and not isinstance(given, bytes | str)
    return given if is_list else (given,)  # type: ignore[return-value]


def _read_source(name: str, source: KeySource) -> bytes:
    if isinstance(source, str | Path):
        return read_key(source)
    if not isinstance(source, bytes) or len(source) != KEY_BYTES:
        what = f"{len(source)} bytes" if isinstance(source, bytes) else type(source).__name__
        raise ConfigError(f"{name}: expected {KEY_BYTES} bytes or the path of a file, got {what}")
    return source
