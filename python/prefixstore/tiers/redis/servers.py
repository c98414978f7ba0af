"""Which server holds which key: always the same one, the primary of the moment, or by slot."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from prefixstore.errors import TierError, TierUnavailable
from prefixstore.tiers.redis.config import Address, RedisTierConfig, Topology
from prefixstore.tiers.redis.pool import Pool, PooledChannel, data_connect, sentinel_connect
from prefixstore.tiers.redis.wire import ErrorReply, Reply

_BYTES_PER_CONNECTION = 1 << 20  # less is not worth another connection

_REDIRECT = re.compile(r"(?P<code>MOVED|ASK) (?P<slot>\d+) (?P<host>.*):(?P<port>\d+)")


class Servers(ABC):
    """The servers of a tier and the connections to them.

    Attributes:
        has_one_address: Whether all keys have the same server at any time.
    """

    has_one_address = True

    def __init__(self, config: RedisTierConfig) -> None:
        self.config = config
        self.pool = Pool(config.name, data_connect(config))

    @property
    def can_batch(self) -> bool:
        """Whether the extension can move the bytes: those of TLS it cannot."""
        return self.config.tls is None

    @abstractmethod
    def address_of(self, key: bytes, deadline: float) -> Address:
        """The server that is to be asked about a key.

        Raises:
            TierError: If nobody can say which it is.
        """

    @abstractmethod
    def primaries(self, deadline: float) -> list[Address]:
        """Every server that holds keys."""

    @abstractmethod
    def refresh(self, deadline: float) -> bool:
        """Ask anew who holds what, after something went wrong; whether that may have changed."""

    def redirected(self, reply: ErrorReply) -> Address | None:
        """The server that another one sends us to; None where it does not."""
        return None

    def borrow(
        self, address: Address, num_commands: int, num_bytes: int, deadline: float
    ) -> list[PooledChannel]:
        """As many connections to a server as are worth it for so many commands that move so much;
        fewer if it has no more, but one at least. To be given back to the pool.

        Raises:
            TierError: If there is none to be had.
        """
        # Over a unix socket one keeps a server busy, which reads but one at a time.
        most = self.config.num_connections if address.port else 1
        num_wanted = min(most, num_commands, max(1, num_bytes // _BYTES_PER_CONNECTION))
        channels: list[PooledChannel] = []
        try:
            while len(channels) < num_wanted:
                channels.append(self.pool.borrow(address, deadline))
        except TierError:
            if not channels:
                raise
        return channels

    def close(self) -> None:
        self.pool.close()


class _OneServer(Servers):
    def address_of(self, key: bytes, deadline: float) -> Address:
        return self.config.addresses[0]

    def primaries(self, deadline: float) -> list[Address]:
        return [self.config.addresses[0]]

    def refresh(self, deadline: float) -> bool:
        return False


class _SentinelServers(Servers):
    """One primary, which the sentinels name."""

    def __init__(self, config: RedisTierConfig) -> None:
        super().__init__(config)
        self._sentinels = Pool(config.name, sentinel_connect(config))
        self._primary: Address | None = None

    def address_of(self, key: bytes, deadline: float) -> Address:
        if self._primary is None:
            self._primary = self._ask_sentinels(deadline)
        return self._primary

    def primaries(self, deadline: float) -> list[Address]:
        return [self.address_of(b"", deadline)]

    def refresh(self, deadline: float) -> bool:
        self._primary = None
        return True

    def close(self) -> None:
        super().close()
        self._sentinels.close()

    def _ask_sentinels(self, deadline: float) -> Address:
        master = self.config.sentinel_master
        problems = []
        for sentinel in self.config.addresses:
            args = (b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", master.encode())
            try:
                reply = self._sentinels.ask(sentinel, args, deadline)
            except TierError as error:
                problems.append(str(error))
                continue
            if isinstance(reply, list) and len(reply) == 2:
                return Address(reply[0].decode(), int(reply[1]))
            problems.append(f"{sentinel} knows no {master!r}")
        raise TierUnavailable(f"{self.config.name}: no sentinel helps: {'; '.join(problems)}")


class _ClusterServers(Servers):
    """Many primaries, each of some of 16,384 slots."""

    has_one_address = False

    def __init__(self, config: RedisTierConfig) -> None:
        super().__init__(config)
        self._slots: list[Address | None] = []
        self._nodes: list[Address] = list(config.addresses)

    def address_of(self, key: bytes, deadline: float) -> Address:
        slots = self._slots or self._load(deadline)
        slot = key_slot(key)
        address = slots[slot]
        if address is None:
            raise TierUnavailable(f"{self.config.name}: nobody serves slot {slot}")
        return address

    def primaries(self, deadline: float) -> list[Address]:
        return sorted({a for a in self._slots or self._load(deadline) if a is not None})

    def refresh(self, deadline: float) -> bool:
        self._slots = []
        return True

    def redirected(self, reply: ErrorReply) -> Address | None:
        match = _REDIRECT.fullmatch(str(reply))
        if match is None or not match["host"]:  # without a host: the next map will tell
            return None
        address = Address(match["host"], int(match["port"]))
        slots = self._slots
        if match["code"] == "MOVED" and slots:
            slots[int(match["slot"]) % REDIS_CLUSTER_HASH_SLOTS] = address
        return address

    def _load(self, deadline: float) -> list[Address | None]:
        """The map of slots, by whoever tells it first; the nodes known last are asked first."""
        problems = []
        for node in dict.fromkeys([*self._nodes, *self.config.addresses]):
            try:
                reply = self.pool.ask(node, (b"CLUSTER", b"SLOTS"), deadline)
            except TierError as error:
                problems.append(str(error))
                continue
            slots: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
            for first, last, primary in _read_ranges(reply, node):
                slots[first : last + 1] = [primary] * (last + 1 - first)
            if any(slots):
                self._nodes = [node, *sorted({a for a in slots if a is not None and a != node})]
                self._slots = slots
                return slots
            problems.append(f"{node} knows of no slots")
        raise TierUnavailable(f"{self.config.name}: no node helps: {'; '.join(problems)}")


def _read_ranges(reply: Reply, node: Address) -> Iterator[tuple[int, int, Address]]:
    """First slot, last slot and primary of each range of CLUSTER SLOTS."""
    for first, last, primary, *_replicas in reply if isinstance(reply, list) else ():
        host = (primary[0] or b"").decode()
        # a node that does not know its own name, or is not to tell it, is where it was asked
        yield first, last, Address(host if host not in ("", "?") else node.host, primary[1])


_KINDS: dict[Topology, type[Servers]] = {
    Topology.STANDALONE: _OneServer,
    Topology.SENTINEL: _SentinelServers,
    Topology.CLUSTER: _ClusterServers,
}


def open_servers(config: RedisTierConfig) -> Servers:
    """Asks nobody yet."""
    return _KINDS[config.topology](config)
