"""What a load test replays, how often, and when requests are sent."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from prefixstore.errors import ConfigError
from prefixstore.loadtest.workloads import MIN_LIVE, WORKLOADS, Conversation, Shape, mark

# What a phase replays is the same in all of them: prompts nobody saw before, the same again, and
# the same once more after the server was stopped and started.
PHASES = ("cold", "warm", "restart")


@dataclass(frozen=True)
class Arrival:
    """When requests are sent.

    Attributes:
        concurrency: Closed loop: so many workers, each sends a request when the one before is
            answered.
        rate: Open loop: so many requests a second at random times (Poisson), whether or not those
            before are answered; None for a closed loop.
        seed: Chooses the times.
    """

    concurrency: int = 1
    rate: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """What to replay, and how often.

    Attributes:
        workload: A key of WORKLOADS.
        shape: How conversations are cut.
        num_requests: Of a replay.
        arrival: When they are sent.
        phases: Of PHASES, in that order, "cold" always.
        num_rounds: Each begins cold, with the servers in the other order.
        seed: Chooses documents, order and arrival; with the round, what makes a prompt cold.
        ignore_eos: See `Asked`.
        timeout_s: Of a request.
        start_timeout_s: Of a server that is started.
    """

    workload: str
    shape: Shape
    num_requests: int
    arrival: Arrival
    phases: tuple[str, ...] = ("cold", "warm")
    num_rounds: int = 1
    seed: int = 0
    ignore_eos: bool = False
    timeout_s: float = 600.0
    start_timeout_s: float = 300.0

    @property
    def num_live(self) -> int:
        """Conversations under way at once, about."""
        return max(MIN_LIVE, self.arrival.concurrency)

    def conversations(self, round_number: int) -> list[Conversation]:
        """What all servers are sent in this round, and no server was sent in another.

        Raises:
            ConfigError: If there are fewer requests than asked for.
        """
        built = WORKLOADS[self.workload](self.shape, self.seed)
        available = sum(len(one.turns) for one in built)
        if self.num_requests > available:
            raise ConfigError(
                f"requests: expected at most {available} (all of {self.workload} that fits the"
                f" context), got {self.num_requests}"
            )
        first = take_first(built, self.num_live, self.num_requests)
        return mark(first, f"{self.seed}/{round_number}")


def take_first(
    conversations: list[Conversation], num_live: int, num_requests: int
) -> list[Conversation]:
    """The conversations cut to the first requests of them when `num_live` take turns.

    Chosen before anything is sent: which requests are would else depend on how fast a server
    answers, and a warm replay have some that the cold one had not.
    """
    fresh = deque(range(len(conversations)))
    live: deque[int] = deque()
    num_turns = [0] * len(conversations)
    for _ in range(num_requests):
        at = fresh.popleft() if fresh and len(live) < num_live else live.popleft()
        num_turns[at] += 1
        if num_turns[at] < len(conversations[at].turns):
            live.append(at)
    return [
        Conversation(one.name, one.turns[:taken])
        for one, taken in zip(conversations, num_turns, strict=True)
        if taken
    ]
