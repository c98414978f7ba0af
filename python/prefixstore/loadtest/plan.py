"""What a load test replays, how often, and when requests are sent."""

from __future__ import annotations

from dataclasses import dataclass

from prefixstore.errors import ConfigError
from prefixstore.loadtest.workloads import WORKLOADS, Conversation, Shape, mark

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

    def conversations(self, round_number: int) -> list[Conversation]:
        """What all servers are sent in this round, and no server was sent in another."""
        built = WORKLOADS[self.workload](self.shape, self.seed)
        return mark(built, f"{self.seed}/{round_number}")


def check_requests(plan: Plan) -> None:
    """Refuse a plan of more requests than there are.

    Raises:
        ConfigError: If so, or if nothing fits the shape.
    """
    available = sum(len(one.turns) for one in plan.conversations(0))
    if plan.num_requests > available:
        raise ConfigError(
            f"requests: expected at most {available} (all of {plan.workload} that fits the"
            f" context), got {plan.num_requests}"
        )
