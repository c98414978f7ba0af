"""Which server holds which key: always the same one, the primary of the moment, or by slot."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from prefixstore.errors import TierError, TierPartSilent, TierTimeout, TierUnavailable
from prefixstore.tiers.redis.address import Address, Topology, address_told
from prefixstore.tiers.redis.config import RedisTierConfig
from prefixstore.tiers.redis.pool import Pool, PooledChannel, data_login, sentinel_login
from prefixstore.tiers.redis.silent_servers import SilentServers
from prefixstore.tiers.redis.wire import ErrorReply, Reply

_BYTES_PER_CONNECTION = 1 << 20  # less is not worth another connection
# Least age of the map of servers before silence makes us ask for a new one. A failover takes
# seconds, and calls whose deadlines no server can meet must not each ask again.
_MIN_AGE_S = 0.5
# A call's time is shared by at most this many addresses: a distant server needs a quarter.
_MAX_SHARES = 4

_REDIRECT = re.compile(
    r"(?P<code>MOVED|ASK) (?P<slot>\d{1,5}) (?P<host>.*):(?P<port>\d{1,5})", re.ASCII
)
_PORT = re.compile(rb"\d{1,5}")


def in_turn(
    addresses: Sequence[Address], num_after: int, deadline: float
) -> Iterator[tuple[Address, float]]:
    """Servers one after the other, and until when each may take: for a share of the time that is
    left then, so that one that is silent does not take all.

    Args:
        addresses: Theirs.
        num_after: Shares for what comes after them.
        deadline: The end of that time.
    """
    for num_left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
        now = time.monotonic()
        yield address, now + (deadline - now) / min(num_left + num_after, _MAX_SHARES)


class Servers(ABC):
    """The servers of a tier and the connections to them.

    Attributes:
        has_one_address: Whether all keys have the same server at any time.
        silent: Those that are left alone for a while.
    """

    has_one_address = True

    def __init__(self, config: RedisTierConfig) -> None:
        self.config = config
        self.pool = Pool(config, data_login(config))
        self.silent = SilentServers()

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

    @abstractmethod
    def suspect(self, address: Address) -> None:
        """Before the next call ask anew who holds what: this server gave no answer in time. It
        may be down without a word, and another one have taken over.
        """

    def redirected(self, reply: ErrorReply) -> Address | None:
        """The server that another one sends us to; None where it does not."""
        return None

    def borrow(
        self,
        address: Address,
        num_commands: int,
        num_bytes: int,
        deadline: float,
        asked_at: float,
    ) -> list[PooledChannel]:
        """As many connections to a server as are worth it for so many commands that move so much;
        fewer if it has no more, but one at least. To be given back to the pool.

        Args:
            address: The server's.
            num_commands: That it gets.
            num_bytes: That they move.
            deadline: For connecting to it.
            asked_at: The time now, for `note_call`.

        Raises:
            TierError: If there is none to be had.
        """
        if not self.silent.may_ask(address, asked_at):
            self.suspect(address)  # another server may have taken over since
            raise TierPartSilent(f"{self.config.name}: {address}: left alone, for it was silent")
        # A single connection over a unix socket keeps a server busy, as it reads one at a time.
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

    def note_call(
        self, answered: Mapping[Address, float], unanswered: Mapping[Address, float]
    ) -> bool:
        """What came of a call.

        Args:
            answered: Servers that gave an answer, or a part of one, and when they were asked.
            unanswered: Those that did not give all, or let nobody connect, in the time they had.

        Returns:
            Whether others answered than those that were late, which gave no answer at all.
        """
        for address in unanswered:
            self.suspect(address)
        silent = {address: unanswered[address] for address in unanswered.keys() - answered.keys()}
        self.silent.note_call(answered, silent)
        return bool(answered and silent) and len(silent) == len(unanswered)

    def to_connect(
        self, addresses: Sequence[Address], num_servers: int, deadline: float
    ) -> Iterator[tuple[Address, float]]:
        """Servers in the order in which to `borrow` from them, and until when from each: those
        first to which there are connections, and some of the time is left to use them.

        Args:
            addresses: Of the servers.
            num_servers: That the call goes to, with those that it has connections to.
            deadline: The call's.
        """
        ordered = sorted(addresses, key=lambda address: not self.pool.has_idle(address))
        return in_turn(ordered, int(num_servers > 1), deadline)

    def close(self) -> None:
        self.pool.close()


class _Guides:
    """Servers that can be asked who holds what, in turn, those last that were silent.

    Args:
        pool: Connections to them.
        addresses: Theirs, as they are configured.
    """

    def __init__(self, pool: Pool, addresses: Sequence[Address]) -> None:
        self._pool = pool
        self._configured = addresses
        self._addresses = list(addresses)

    def ask(
        self, args: Sequence[bytes], deadline: float, problems: list[str]
    ) -> Iterator[tuple[Address, Reply]]:
        """One answer after the other, each with who gave it; fills in why others gave none.

        Some of the time is left for what the answer is good for.
        """
        for address, latest in in_turn(self._addresses, 1, deadline):
            try:
                reply = self._pool.ask(address, args, latest)
            except TierError as error:
                problems.append(str(error))
                if isinstance(error, TierTimeout):
                    self.put_last(address)
                continue
            yield address, reply

    def put_last(self, address: Address) -> None:
        """Ask all others before this one, which was silent."""
        self._addresses = [*(one for one in self._addresses if one != address), address]

    def learn(self, addresses: Sequence[Address]) -> None:
        """Ask these from now on, and then those that are configured."""
        self._addresses = list(dict.fromkeys([*addresses, *self._configured]))


class _OneServer(Servers):
    def address_of(self, key: bytes, deadline: float) -> Address:
        return self.config.addresses[0]

    def primaries(self, deadline: float) -> list[Address]:
        return [self.config.addresses[0]]

    def refresh(self, deadline: float) -> bool:
        return False

    def suspect(self, address: Address) -> None:
        """Nobody knows another one."""


class _SentinelServers(Servers):
    """One primary, which the sentinels name."""

    def __init__(self, config: RedisTierConfig) -> None:
        super().__init__(config)
        self._pool_of_sentinels = Pool(config, sentinel_login(config))
        self._sentinels = _Guides(self._pool_of_sentinels, config.addresses)
        self._primary: Address | None = None
        self._named_at = 0.0

    def address_of(self, key: bytes, deadline: float) -> Address:
        primary = self._primary
        if primary is None:
            primary = self._primary = self._ask_sentinels(deadline)
            self._named_at = time.monotonic()
        return primary

    def primaries(self, deadline: float) -> list[Address]:
        return [self.address_of(b"", deadline)]

    def refresh(self, deadline: float) -> bool:
        self._primary = None
        return True

    def suspect(self, address: Address) -> None:
        if address == self._primary and time.monotonic() - self._named_at > _MIN_AGE_S:
            self._primary = None

    def close(self) -> None:
        super().close()
        self._pool_of_sentinels.close()

    def _ask_sentinels(self, deadline: float) -> Address:
        master = self.config.sentinel_master
        args = (b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", master.encode())
        problems: list[str] = []
        for sentinel, reply in self._sentinels.ask(args, deadline, problems):
            primary = _read_primary(reply)
            if primary is not None:
                return primary
            problems.append(f"{sentinel} knows no {master!r}, and answers {reply!r:.100}")
        raise TierUnavailable(f"{self.config.name}: no sentinel helps: {'; '.join(problems)}")


class _ClusterServers(Servers):
    """Many primaries, each of some of 16,384 slots."""

    has_one_address = False

    def __init__(self, config: RedisTierConfig) -> None:
        super().__init__(config)
        self._slots: list[Address | None] = []
        self._loaded_at = 0.0
        self._nodes = _Guides(self.pool, config.addresses)

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

    def suspect(self, address: Address) -> None:
        if time.monotonic() - self._loaded_at > _MIN_AGE_S:
            self._slots = []
            self._nodes.put_last(address)

    def redirected(self, reply: ErrorReply) -> Address | None:
        match = _REDIRECT.fullmatch(str(reply))
        if match is None:
            return None
        # Without a host: the next map of servers will name it.
        address = address_told(match["host"].encode(), int(match["port"]))
        slots, slot = self._slots, int(match["slot"])
        if address is not None and match["code"] == "MOVED" and slot < len(slots):
            slots[slot] = address
        return address

    def _load(self, deadline: float) -> list[Address | None]:
        """The map of slots, by whoever tells it first; the nodes known last are asked first."""
        problems: list[str] = []
        for node, reply in self._nodes.ask((b"CLUSTER", b"SLOTS"), deadline, problems):
            slots = _read_slots(reply, node)
            if slots is None:
                problems.append(f"{node} answers {reply!r:.100}")
                continue
            primaries = sorted({address for address in slots if address is not None})
            if primaries:
                self._nodes.learn([node, *primaries])
                self._slots = slots
                self._loaded_at = time.monotonic()
                return slots
            problems.append(f"{node} knows of no slots")
        raise TierUnavailable(f"{self.config.name}: no node helps: {'; '.join(problems)}")


def _read_primary(reply: Reply) -> Address | None:
    """The address that a sentinel gives; None if that is none."""
    if not isinstance(reply, list) or len(reply) != 2:
        return None
    host, port = reply
    is_number = isinstance(port, bytes) and _PORT.fullmatch(port)
    return address_told(host, int(port)) if is_number else None


def _read_slots(reply: Reply, node: Address) -> list[Address | None] | None:
    """Each slot's primary, as `node` tells with CLUSTER SLOTS; None if that is no such map."""
    slots: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
    if not isinstance(reply, list):
        return None
    ranges = [one for one in reply if isinstance(one, list) and len(one) >= 3]
    if len(ranges) < len(reply) or not all(type(n) is int for one in ranges for n in one[:2]):
        return None
    next_slot = 0
    for first, last, primary, *_replicas in sorted(ranges, key=lambda one: one[:2]):
        # In order, of which none meets another.
        is_range = next_slot <= first <= last < REDIS_CLUSTER_HASH_SLOTS
        if not is_range or not isinstance(primary, list) or len(primary) < 2:
            return None
        next_slot = last + 1
        host, port, *_ = primary
        # The node does not know its name, or hides it; then it is where it was asked.
        is_nameless = host in (None, b"", b"?")
        address = address_told(node.host.encode() if is_nameless else host, port)
        # Port 0 is of one that takes no connections of this kind: nobody serves what it has.
        if address is None and port != 0:
            return None
        slots[first : last + 1] = [address] * (last + 1 - first)
    return slots


_KINDS: dict[Topology, type[Servers]] = {
    Topology.STANDALONE: _OneServer,
    Topology.SENTINEL: _SentinelServers,
    Topology.CLUSTER: _ClusterServers,
}


def open_servers(config: RedisTierConfig) -> Servers:
    """Asks nobody yet."""
    return _KINDS[config.topology](config)
