"""API keys: who asks, and under which salt.

A file that only its owner may read::

    [[keys]]
    tenant = "research"
    sha256 = "9f86d081884c7d65..."     # of the key; or key = "the key itself"

    [[keys]]
    tenant = "operations"
    key = "kvk-Zr9..."
    is_operator = true                 # may see every tenant's requests on the dashboard

A tenant may have several keys. Its salt is its name unless `salt` says otherwise, and no two
tenants have the same: their blocks never meet.
"""

from __future__ import annotations

import hashlib
import hmac
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixstore.config import read_toml
from prefixstore.errors import ConfigError
from prefixstore.settings import check_known

_FIELDS = ("tenant", "key", "sha256", "salt", "is_operator")
_MIN_KEY_CHARACTERS = 16


@dataclass(frozen=True)
class Caller:
    """Who a request is from.

    Attributes:
        tenant: Served in turn with others; stands in logs.
        salt: The namespace of its blocks; None for the cache's own.
        is_operator: Whether it may see what others ask.
    """

    tenant: str
    salt: str | None
    is_operator: bool = False


ANONYMOUS = Caller(tenant="", salt=None, is_operator=True)


class ApiKeys:
    """Keys by their digests; the keys themselves are not kept."""

    def __init__(self, callers: Iterable[tuple[bytes, Caller]]) -> None:
        """Keep `callers`: the SHA-256 of each key, and who has it."""
        self._callers = tuple(callers)

    @classmethod
    def from_file(cls, path: str | Path) -> ApiKeys:
        """Read a file.

        Raises:
            ConfigError: If it cannot be read, others may read it, or an entry is wrong; no message
                shows a key.
        """
        values = read_toml(path)
        mode = stat.S_IMODE(Path(path).stat().st_mode)
        if mode & 0o077:
            raise ConfigError(
                f"api_keys_file {path}: expected a file that only its owner may read, as with mode"
                f" 600, got mode {mode:03o}"
            )
        check_known(f"api_keys_file {path}", values, ("keys",))
        entries = values.get("keys")
        if not isinstance(entries, list) or not entries:
            raise ConfigError(f"api_keys_file {path}: expected one [[keys]] or more, got none")
        callers = [_read_entry(f"keys[{n}]", entry) for n, entry in enumerate(entries)]
        _check_apart(callers)
        return cls(callers)

    def find(self, key: str) -> Caller | None:
        """Whose key it is; None if nobody's. Takes as long whichever it is."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        found = None
        for known, caller in self._callers:
            if hmac.compare_digest(known, digest):
                found = caller
        return found


def _read_entry(name: str, entry: Any) -> tuple[bytes, Caller]:
    if not isinstance(entry, dict):  # which may be a key: not shown
        raise ConfigError(f"{name}: expected a table")
    check_known(name, entry, _FIELDS)
    tenant = entry.get("tenant")
    if not isinstance(tenant, str) or not 1 <= len(tenant) <= 64 or not tenant.isprintable():
        raise ConfigError(f"{name}.tenant: expected 1 to 64 printable characters, got {tenant!r}")
    salt = entry.get("salt", tenant)
    if not isinstance(salt, str) or not salt:
        raise ConfigError(f"{name}.salt: expected a string that is not empty, got {salt!r}")
    is_operator = entry.get("is_operator", False)
    if not isinstance(is_operator, bool):
        raise ConfigError(f"{name}.is_operator: expected true or false, got {is_operator!r}")
    return _read_digest(name, entry), Caller(tenant, salt, is_operator)


def _read_digest(name: str, entry: Mapping[str, Any]) -> bytes:
    if ("key" in entry) == ("sha256" in entry):
        raise ConfigError(f"{name}: expected either key or sha256")
    if "key" in entry:
        key = entry["key"]
        if not isinstance(key, str) or len(key) < _MIN_KEY_CHARACTERS:
            raise ConfigError(f"{name}.key: expected {_MIN_KEY_CHARACTERS} characters or more")
        return hashlib.sha256(key.encode()).digest()
    try:
        digest = bytes.fromhex(entry["sha256"])
    except (TypeError, ValueError):
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise ConfigError(f"{name}.sha256: expected 64 hexadecimal digits")
    return digest


def _check_apart(callers: list[tuple[bytes, Caller]]) -> None:
    """Raises ConfigError if two tenants share a salt or a key."""
    tenants: dict[str, str] = {}
    digests: set[bytes] = set()
    for number, (digest, caller) in enumerate(callers):
        assert caller.salt is not None
        owner = tenants.setdefault(caller.salt, caller.tenant)
        if owner != caller.tenant:
            raise ConfigError(
                f"keys[{number}].salt: expected one of its own for tenant {caller.tenant!r}, got"
                f" that of {owner!r}"
            )
        if digest in digests:
            raise ConfigError(f"keys[{number}]: expected a key of its own, got one given before")
        digests.add(digest)
