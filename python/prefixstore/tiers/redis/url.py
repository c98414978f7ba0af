"""URLs of a Redis tier.

    redis://[user:password@]host[:port][/db][?option=value&...]     rediss:// for TLS
    unix://[user:password@]/path/of/socket[?db=0&...]
    redis+sentinel://[user:password@]host[:port],.../master-name[/db]     rediss+sentinel://
    redis+cluster://[user:password@]host[:port],...                       rediss+cluster://

User and password are percent-encoded; they go to the servers of the data, not to sentinels. Where
one of them is not, or the @ is forgotten, part of it stands where a host, a port or a database is
expected: messages about those do not show what came.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote

from prefixstore.errors import ConfigError
from prefixstore.settings import (
    check_known,
    check_user_info,
    parse_bytes,
    parse_seconds,
    parse_switch,
    parse_text,
    parse_whole,
    split_options,
    split_url,
)
from prefixstore.tiers.redis.address import Address, TlsConfig, Topology

SCHEMES = {
    "redis": (Topology.STANDALONE, False),
    "rediss": (Topology.STANDALONE, True),
    "unix": (Topology.STANDALONE, False),
    "redis+sentinel": (Topology.SENTINEL, False),
    "rediss+sentinel": (Topology.SENTINEL, True),
    "redis+cluster": (Topology.CLUSTER, False),
    "rediss+cluster": (Topology.CLUSTER, True),
}
_DEFAULT_PORTS = {Topology.SENTINEL: 26379}


def read_url(url: str) -> dict[str, Any]:
    """The fields of `RedisTierConfig` that a URL sets.

    Raises:
        ConfigError: If it is no such URL or has an unknown option; without showing the password.
    """
    parts = split_url("url", url)
    check_known("url: scheme", [parts.scheme], SCHEMES)
    check_user_info("url", parts)
    topology, uses_tls = SCHEMES[parts.scheme]
    user_info, _, hosts = parts.netloc.rpartition("@")
    username, _, password = user_info.partition(":")
    fields: dict[str, Any] = {
        "topology": topology,
        "username": unquote(username) or None,
        "password": unquote(password) or None,
        **_read_place(parts, topology, hosts),
    }
    options = _read_options(parts.query)
    tls = {name: options.pop(name) for name in list(options) if name in _TLS_OPTIONS}
    if tls and not uses_tls:
        raise ConfigError(f"{next(iter(tls))}: expected a rediss:// URL, got {parts.scheme}://")
    if uses_tls:
        fields["tls"] = TlsConfig(**{name.removeprefix("tls_"): tls[name] for name in tls})
    return {**fields, **{_FIELDS.get(name, name): value for name, value in options.items()}}


def _read_place(parts: SplitResult, topology: Topology, hosts: str) -> dict[str, Any]:
    """Addresses, and what stands in the path."""
    if parts.scheme == "unix":
        path = unquote(hosts + parts.path)
        if not path.startswith("/"):
            raise ConfigError("url: expected unix:///path/of/socket, got a path without /")
        return {"addresses": (Address(path, 0),)}
    default_port = _DEFAULT_PORTS.get(topology, 6379)
    addresses = tuple(_read_address(text, default_port) for text in hosts.split(","))
    words = [unquote(word) for word in parts.path.split("/") if word]
    place: dict[str, Any] = {"addresses": addresses}
    if topology is Topology.SENTINEL:
        if not words:
            raise ConfigError("url: expected the master's name after the sentinels, got none")
        place["sentinel_master"] = words.pop(0)
    if words:
        if not words[0].isdecimal():
            raise ConfigError("db: expected a whole number in the URL's path, got something else")
        place["db"] = int(words.pop(0))
    if words:
        raise ConfigError("url: expected nothing after the database, got more")
    return place


def _read_address(text: str, default_port: int) -> Address:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]/]*))(?::(\d+))?", text)
    if match is None:
        raise ConfigError("url: expected host:port, got something else")
    port = int(match[3] or default_port)
    if not 0 < port < 65536:
        raise ConfigError("url: expected a port of 1 to 65535, got one out of range")
    return Address(match[1] or match[2] or "127.0.0.1", port)


def _read_options(query: str) -> dict[str, Any]:
    options = split_options("url", query)
    check_known("url: option", options, _OPTIONS)
    return {name: _OPTIONS[name](name, text) for name, text in options.items()}


def _whole_seconds(name: str, text: str) -> int:
    return round(parse_seconds(name, text))


def _file(name: str, text: str) -> Path:
    return Path(text)


_TLS_OPTIONS = ("tls_ca_file", "tls_cert_file", "tls_key_file", "tls_verify")
_FIELDS = {
    "ttl": "ttl_s",
    "connections": "num_connections",
    "connect_timeout": "connect_timeout_s",
    "timeout": "timeout_s",
}
_OPTIONS: dict[str, Callable[[str, str], Any]] = {
    "ttl": _whole_seconds,
    "refresh_ttl": parse_switch,
    "part_bytes": parse_bytes,
    "connections": parse_whole,
    "connect_timeout": parse_seconds,
    "timeout": parse_seconds,
    "prefix": parse_text,
    "name": parse_text,
    "db": parse_whole,
    "tls_ca_file": _file,
    "tls_cert_file": _file,
    "tls_key_file": _file,
    "tls_verify": parse_switch,
}
