"""Opens sockets to servers before a deadline: names are looked up, addresses tried, TLS agreed on.

A client library's timeouts hold for each step, or each piece of a reply, so that a server which is
slow at all of them, or trickles, takes many times as long.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import ssl
import threading
import time
from typing import Any, TypeAlias

from prefixstore.tiers.redis.address import Address, TlsConfig

_Place: TypeAlias = "tuple[int, Any]"  # address family and socket address

_UNIX_SEND_BYTES = 4 << 20  # the kernel may grant less
# Seconds until probes begin, seconds between them, and how many may be lost. Probes keep
# connections alive in routers that forget silent ones, and find out dead hosts between calls.
_KEEP_ALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))


def open_socket(
    address: Address, tls: TlsConfig | None, deadline: float
) -> socket.socket | ssl.SSLSocket:
    """A connection to a server, encrypted where `tls` is given.

    Raises:
        TimeoutError: If there is none before the deadline.
        OSError: If there is none to be had.
        UnicodeError: If no host can have that name.
    """
    if address.port == 0:
        sock = _connect(socket.AF_UNIX, address.host, deadline)
        # TCP buffers grow by themselves, those of unix sockets do not.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_SEND_BYTES)
        return sock
    sock = _connect_to_any(_look_up(address, deadline), deadline)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE:
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return sock if tls is None else _encrypt(sock, address.host, tls, deadline)
    except BaseException:
        sock.close()
        raise


def _look_up(address: Address, deadline: float) -> list[_Place]:
    """Where a host is, in the order of preference."""
    with contextlib.suppress(socket.gaierror):  # not an IP address but a name
        return _ask_system(address, socket.AI_NUMERICHOST)
    # The system's look-up has no deadline: it runs in a thread, which may outlive the call.
    found: concurrent.futures.Future[list[_Place]] = concurrent.futures.Future()

    def look_up() -> None:
        try:
            found.set_result(_ask_system(address, 0))
        except (OSError, UnicodeError) as error:
            found.set_exception(error)

    threading.Thread(target=look_up, name="redis-look-up", daemon=True).start()
    try:
        return found.result(max(0.0, deadline - time.monotonic()))
    except concurrent.futures.TimeoutError:
        raise TimeoutError(f"the look-up of {address.host!r} takes too long") from None


def _ask_system(address: Address, flags: int) -> list[_Place]:
    found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=flags)
    return [(family, place) for family, _, _, _, place in found]


def _connect_to_any(places: list[_Place], deadline: float) -> socket.socket:
    """Each has an equal share of the time that is left: the first may lead nowhere."""
    for num_left, (family, place) in zip(range(len(places), 0, -1), places, strict=True):
        now = time.monotonic()
        try:
            return _connect(family, place, now + (deadline - now) / num_left)
        except OSError:
            if num_left == 1:
                raise
    raise OSError("the look-up found no address")


def _connect(family: int, place: Any, deadline: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(_remaining(deadline))
        sock.connect(place)
    except BaseException:
        sock.close()
        raise
    return sock


def _encrypt(sock: socket.socket, host: str, tls: TlsConfig, deadline: float) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=tls.ca_file)
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if tls.cert_file is not None:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    sock.settimeout(_remaining(deadline))  # of the handshake as a whole
    return context.wrap_socket(sock, server_hostname=host)


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError("the time is over")
    return remaining
