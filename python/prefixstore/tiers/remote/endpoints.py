"""Where a store's server is by the environment, and whether it may be asked over plain HTTP.

The client reads these variables for itself. They are checked here because it crashes on an endpoint
that is no URL, at the first request, and because what it is told of connections replaces all that
the environment says of them.
"""

from __future__ import annotations

import os
import re

from prefixstore.errors import ConfigError

# What the client goes by where no endpoint is given; of S3 the first alone, where it is set.
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_ALLOW_HTTP = {"s3": "AWS_ALLOW_HTTP", "gs": "GOOGLE_ALLOW_HTTP", "az": "AZURE_ALLOW_HTTP"}

_URL = re.compile(r"(?i:https?)://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(\d{0,5}))?(/[!-~]*)?")
_MAX_PORT = 65535
_YES = ("1", "true", "on", "yes", "y")


def is_server(url: str) -> bool:
    """Whether this is http://host:port or https://host:port, and nothing more."""
    return _is_url(url) and not _URL.sub(r"\2", url).strip("/")


def may_be_plain(kind: str, endpoint: str | None) -> bool:
    """Whether requests may go over plain HTTP: the endpoint says so, or the environment.

    Args:
        kind: Of the store: "s3", "gs" or "az".
        endpoint: Where the tier's configuration has one, it counts.

    Raises:
        ConfigError: If the environment's endpoint is none, which may have a path. It is not shown:
            it may hold a password.
    """
    if endpoint is not None:
        return _is_plain(endpoint)
    names = [name for name in _ENDPOINTS[kind] if name in os.environ]
    if names[:1] == ["AWS_ENDPOINT_URL_S3"]:
        names = names[:1]
    for name in names:
        if not _is_url(os.environ[name]):
            raise ConfigError(
                f"{name}: expected http://host:port or https://host:port, got something else"
            )
    is_allowed = os.environ.get(_ALLOW_HTTP[kind], "").lower() in _YES
    return is_allowed or any(_is_plain(os.environ[name]) for name in names)


def _is_plain(url: str) -> bool:
    return url.lower().startswith("http://")


def _is_url(url: str) -> bool:
    """Whether this is a server's URL, which may have a path."""
    match = _URL.fullmatch(url)
    return match is not None and int(match[1] or 0) <= _MAX_PORT
