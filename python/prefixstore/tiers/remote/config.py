"""Where a remote tier's objects lie, and how much it may ask for at a time."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, unquote

from prefixstore.errors import ConfigError
from prefixstore.settings import (
    MAX_WAIT_S,
    check_count,
    check_known,
    check_seconds,
    check_user_info,
    parse_bytes,
    parse_seconds,
    parse_switch,
    parse_text,
    parse_whole,
    split_options,
    split_url,
)
from prefixstore.tiers.base import check_bytes
from prefixstore.tiers.remote.endpoints import is_server

# Characters that every store takes in a name without encoding them.
_PREFIX = re.compile(r"[A-Za-z0-9!_.*'()-]+(/[A-Za-z0-9!_.*'()-]+)*")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
_MIN_PART_BYTES = 5 << 20  # the least that S3 takes for a part
_WAITS = ("timeout_s", "connect_timeout_s", "request_timeout_s", "sweep_timeout_s")


@dataclass(frozen=True)
class RemoteTierConfig:
    """An object store, a place in it, and bounds on its use. Credentials come from the environment.

    Attributes:
        kind: "s3" and what speaks it, "gs", "az", or "file" for a directory.
        bucket: Bucket, container, or directory; only a directory is made if absent.
        prefix: What all names begin with: letters, digits and !_.*'()- between slashes.
        region: Of S3; None for what the environment says.
        endpoint: http:// or https:// URL of a server that speaks S3 or Azure's protocol; None for
            the public cloud or what the environment says.
        account: Of Azure; None for what the environment says.
        bulk_delete: Whether the server has S3's request that deletes a thousand objects; false for
            those that only imitate the rest of it.
        anonymous: Ask without credentials.
        ttl_s: Seconds after it was written when a record expires; None for never. Uses do not
            count: an object has one time. The store's clock is compared with this machine's, and
            S3 tells whole seconds.
        timeout_s: Bound on a call that comes without a deadline.
        connect_timeout_s: To connect once.
        request_timeout_s: For a request with its answer, and for all its retries.
        sweep_timeout_s: For what lists the store: `sweep`, `check` and `delete_identity`.
        max_retries: Of one request that was throttled, met an error of the server or lost its
            connection.
        max_requests: In flight, of all threads that call.
        max_in_flight_bytes: Of records on their way, of all threads; a longer one goes alone.
        part_bytes: Longer records are uploaded in parts of so many bytes. Those of an upload that
            is given up stay, unless a rule of the bucket deletes them: see docs/remote.md.
        name: In messages and statistics.
    """

    kind: str
    bucket: str
    prefix: str = ""
    region: str | None = None
    endpoint: str | None = None
    account: str | None = None
    bulk_delete: bool = True
    anonymous: bool = False
    ttl_s: float | None = None
    timeout_s: float = 30.0
    connect_timeout_s: float = 3.0
    request_timeout_s: float = 30.0
    sweep_timeout_s: float = 600.0
    max_retries: int = 4
    max_requests: int = 32
    max_in_flight_bytes: int = 256 << 20
    part_bytes: int = 32 << 20
    name: str = "remote"

    def __post_init__(self) -> None:
        check_known("kind", [self.kind], _OWN_OPTIONS)
        self._check_place()
        if self.ttl_s is not None:
            check_seconds("ttl_s", self.ttl_s)
        for name in _WAITS:
            check_seconds(name, getattr(self, name), MAX_WAIT_S)
        check_count("max_requests", self.max_requests, 1)
        check_count("max_retries", self.max_retries, 0)
        check_bytes("max_in_flight_bytes", self.max_in_flight_bytes, 1)
        check_bytes("part_bytes", self.part_bytes, _MIN_PART_BYTES)

    @classmethod
    def from_url(cls, url: str, **fields: Any) -> RemoteTierConfig:
        """Read `s3://bucket/prefix?region=...&endpoint=...&ttl=7d`, `gs://bucket/prefix`,
        `az://container/prefix?account=...` or `file:///directory`.

        Args:
            url: Its options are those of `OPTIONS` that its kind has.
            fields: Of the configuration, beside the URL's.

        Raises:
            ConfigError: If it is no such URL, has credentials in it, or an option that nobody
                reads; the message has the nearest name that there is.
        """
        parts = split_url("url", url)
        check_known("url: kind", [parts.scheme], _OWN_OPTIONS)
        if parts.scheme != "file":
            check_user_info("url", parts)
        known = _COMMON_OPTIONS | _OWN_OPTIONS[parts.scheme]
        options = split_options(parts.scheme, parts.query)
        check_known(f"{parts.scheme}: option", options, known)
        read: dict[str, Any] = {
            known[name].field: known[name].parse(name, text) for name, text in options.items()
        }
        return cls(parts.scheme, **_read_place(parts), **read, **fields)

    @property
    def root(self) -> str:
        """What the names of all objects of this version begin with."""
        return f"{self.prefix}/1" if self.prefix else "1"

    def _check_place(self) -> None:
        if self.kind == "file":
            if not self.bucket.startswith("/"):
                raise ConfigError(f"bucket: expected an absolute path, got {self.bucket!r}")
        elif not _BUCKET.fullmatch(self.bucket):
            raise ConfigError(f"bucket: expected the name of a bucket, got {self.bucket!r}")
        is_plain = _PREFIX.fullmatch(self.prefix) and not {".", ".."} & {*self.prefix.split("/")}
        if self.prefix and not is_plain:
            raise ConfigError(
                "prefix: expected letters, digits and !_.*'()- between slashes,"
                f" got {self.prefix!r}"
            )
        if self.endpoint is not None and not is_server(self.endpoint):
            # not shown: it may hold a password
            raise ConfigError("endpoint: expected http://host:port or https://host:port alone")
        for name in ("region", "endpoint", "account"):
            if getattr(self, name) is not None and name not in _OWN_OPTIONS[self.kind]:
                raise ConfigError(f"{name}: expected none for {self.kind}://, got one")


@dataclass(frozen=True)
class _Option:
    field: str
    parse: Callable[[str, str], Any]


def _own(*names: str) -> dict[str, _Option]:
    return {name: _Option(name, parse_text) for name in names}


_COMMON_OPTIONS = {
    name.removesuffix("_s"): _Option(name, parse_seconds) for name in ("ttl_s", *_WAITS)
} | {
    "max_retries": _Option("max_retries", parse_whole),
    "max_requests": _Option("max_requests", parse_whole),
    "max_in_flight_bytes": _Option("max_in_flight_bytes", parse_bytes),
    "part_bytes": _Option("part_bytes", parse_bytes),
    "name": _Option("name", parse_text),
}
_ANONYMOUS = {"anonymous": _Option("anonymous", parse_switch)}
_OWN_OPTIONS: dict[str, dict[str, _Option]] = {
    "s3": _own("region", "endpoint")
    | {"bulk_delete": _Option("bulk_delete", parse_switch)}
    | _ANONYMOUS,
    "gs": _ANONYMOUS,
    "az": _own("account", "endpoint") | _ANONYMOUS,
    "file": {},
}


def _read_place(parts: SplitResult) -> dict[str, Any]:
    """Bucket and prefix."""
    if "@" in parts.netloc:
        raise ConfigError("url: expected credentials in the environment, got some in the URL")
    path = unquote(parts.path)
    if parts.scheme != "file":
        if ":" in parts.netloc:  # not shown: an access key may have ended at a /
            raise ConfigError("url: expected the name of a bucket alone, got one with a colon")
        return {"bucket": parts.netloc, "prefix": path.strip("/")}
    if parts.netloc or not path.startswith("/"):
        raise ConfigError(f"url: expected file:///directory, got file://{parts.netloc}{path}")
    return {"bucket": path}
