"""Ports for servers that tests and benches start, and that take a number rather than a socket."""

from __future__ import annotations

import socket
from itertools import cycle
from pathlib import Path
from random import SystemRandom


def free_ports(num_ports: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody has, none of them given before by this process.

    A server binds its port some time after it was chosen, or binds it again after a restart. So
    these are ports that the kernel gives to nobody by itself (unless it keeps none back): any
    client's connection may have one of those meanwhile.
    """
    ports: list[int] = []
    while len(ports) < num_ports:
        port = next(_candidates)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
    return ports


def _list_candidates() -> list[int]:
    """Ports outside the kernel's own range, from a random one on: no two processes begin alike."""
    own = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    first, last = map(int, own.split())
    every = range(10_000, 1 << 16)
    ports = [port for port in every if not first <= port <= last] or list(every)
    begin = SystemRandom().randrange(len(ports))
    return ports[begin:] + ports[:begin]


_candidates = cycle(_list_candidates())
