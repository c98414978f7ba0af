"""Settings as people write them: sizes, times, switches, URLs, and names that are almost right."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from urllib.parse import SplitResult, parse_qsl, urlsplit

from prefixstore.errors import ConfigError

MAX_SECONDS = 100 * 365 * 86400  # of a time to live: in nanoseconds it fits 63 bits with a date
MAX_WAIT_S = 24 * 86400  # of what is waited for: the system counts milliseconds in 31 bits
MAX_BYTES = 1 << 62
MAX_COUNT = (1 << 31) - 1

_BYTES = {"": 1, "b": 1}
_BYTES |= {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}
_BYTES |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}
_SECONDS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")
_MAX_DIGITS = 4000  # Python turns fewer than 4301 into a number; whoever asks bounds it
_SWITCHES = {"true": True, "1": True, "yes": True, "on": True}
_SWITCHES |= {"false": False, "0": False, "no": False, "off": False}


def parse_bytes(name: str, value: int | str) -> int:
    """A size: 4096, "64KiB", "1.5GiB", "10GB"; without a unit it must be whole.

    Raises:
        ConfigError: If it is none; the message names `name`.
    """
    wanted = 'a size such as 4096 or "4GiB"'
    if isinstance(value, float):  # which `_parse` would take, and bytes have no fractions
        raise ConfigError(f"{name}: expected {wanted}, got {value!r}")
    num_bytes = _parse(name, value, _BYTES, wanted)
    # With a unit a part of a byte is cut; without one it was forgotten, or is meant to be there.
    match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if match is not None and _BYTES[match[2].lower()] == 1 and num_bytes != int(num_bytes):
        raise ConfigError(f'{name}: expected whole bytes, or a unit as in "4GiB", got {value!r}')
    return int(num_bytes)


def parse_seconds(name: str, value: float | str) -> float:
    """A time: 2.5, "500ms", "30s", "15m", "24h", "7d".

    Raises:
        ConfigError: If it is none.
    """
    return _parse(name, value, _SECONDS, 'a time such as 2.5 or "24h"')


def parse_whole(name: str, value: int | str) -> int:
    """A whole number.

    Raises:
        ConfigError: If it is none.
    """
    if isinstance(value, str) and value.isdecimal() and len(value) <= _MAX_DIGITS:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ConfigError(f"{name}: expected a whole number, got {value!r}")


def parse_switch(name: str, value: bool | str) -> bool:
    """True or false, in one of the usual spellings.

    Raises:
        ConfigError: If it is neither.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _SWITCHES:
        return _SWITCHES[value.lower()]
    raise ConfigError(f"{name}: expected true or false, got {value!r}")


def parse_text(name: str, value: str) -> str:
    """What needs no reading, where every option has a function that reads it."""
    return value


def check_seconds(name: str, value: float, most: float = MAX_SECONDS) -> None:
    """Refuse a time that is not above 0 or is longer than any has a use for.

    Raises:
        ConfigError: The message names `name`.
    """
    if not _is_number(value) or not value > 0:
        raise ConfigError(f"{name}: expected more than 0, got {value!r}")
    if value > most:
        raise ConfigError(f"{name}: expected at most {most}, got {value!r}")


def check_seconds_or_0(name: str, value: float, most: float = MAX_SECONDS) -> None:
    """`check_seconds` where 0 has a meaning.

    Raises:
        ConfigError: The message names `name`.
    """
    if not _is_number(value) or not value >= 0:
        raise ConfigError(f"{name}: expected 0 or more, got {value!r}")
    if value > 0:
        check_seconds(name, value, most)


def check_count(name: str, value: int, least: int) -> None:
    """Refuse what is no whole number, or one out of range.

    Raises:
        ConfigError: The message names `name`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if value > MAX_COUNT:
        raise ConfigError(f"{name}: expected at most {MAX_COUNT}, got {value}")


def check_known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that nobody reads.

    Raises:
        ConfigError: With the nearest name that there is.
    """
    names = sorted(known)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{what}: expected one of {', '.join(names)}, got {name!r}{hint}")


def split_url(name: str, url: str) -> SplitResult:
    """A URL taken apart; none of ours has a fragment.

    Raises:
        ConfigError: If its host is broken, a # begins a fragment that nobody would read, or it has
            a zero character, which no path or host can; without showing it, for it may hold a
            password.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ConfigError(f"{name}: expected a URL, got one with a broken host") from None
    if "#" in url:
        raise ConfigError(f"{name}: expected no #, got one (in a name or a password it is %23)")
    if "%00" in url or "\0" in url:
        raise ConfigError(f"{name}: expected no zero character (%00), got one")
    return parts


def split_options(what: str, query: str) -> dict[str, str]:
    """The options in a URL's query, by name.

    Raises:
        ConfigError: If one is given twice; without showing its values, which may be secret.
    """
    options: dict[str, str] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name in options:
            raise ConfigError(f"{what}: expected each option once, got {name} twice")
        options[name] = text
    return options


def check_user_info(name: str, parts: SplitResult) -> None:
    """Refuse a URL with an @ after its host: most likely a / or ? in a password has ended the host
    before, and what follows would be taken for something else, and be shown.

    Raises:
        ConfigError: Without showing the URL.
    """
    if "@" in parts.path or "@" in parts.query:
        raise ConfigError(
            f"{name}: expected no @ after the host, got one (percent-encode user and password: / is"
            " %2F, ? is %3F; any other @ is %40)"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parse(name: str, value: float | str, units: Mapping[str, float], wanted: str) -> float:
    if isinstance(value, bool):
        raise ConfigError(f"{name}: expected {wanted}, got {value!r}")
    if isinstance(value, (int, float)):
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name}: expected {wanted}, got {value!r}")
        return value
    match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    number = math.nan
    if match is not None:
        number = float(match[1]) * units.get(match[2].lower(), math.nan)
    if not math.isfinite(number):  # too many digits make it infinite
        raise ConfigError(f"{name}: expected {wanted}, got {value!r}")
    return number
