"""A whole load test: rounds in which the servers take turns, each cold, then warm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prefixstore.loadtest.client import Asked
from prefixstore.loadtest.plan import Plan
from prefixstore.loadtest.prompts import MakePrompt
from prefixstore.loadtest.replay import Request, replay
from prefixstore.loadtest.targets import Served, Target, running
from prefixstore.loadtest.workloads import Conversation


@dataclass(frozen=True)
class Replay:
    """The requests of one target, round and phase, in the order in which they were answered.

    `duration_s` is from the first request to the last answer.
    """

    target: str
    model: str
    round_number: int
    phase: str
    duration_s: float
    requests: tuple[Request, ...]


Advance = Callable[[str, str], None]  # called with target and phase after each answer
Keep = Callable[[Replay], None]  # called after each replay


@dataclass(frozen=True)
class Hooks:
    """Who is told while a test runs."""

    advance: Advance
    keep: Keep


async def run_rounds(
    plan: Plan, targets: list[Target], make_prompt: MakePrompt, logs: Path, hooks: Hooks
) -> None:
    """Replay everything.

    Args:
        plan: What to replay.
        targets: The servers; in the rounds they take turns, in every other one backwards.
        make_prompt: The form of prompts.
        logs: A directory for what servers print that are started.
        hooks: Get each replay when it is over: what was measured outlives a server that fails
            later.

    Raises:
        TargetUnavailable: If a server does not come up or does not answer.
    """
    # A server that was started runs for the first of these, and anew for the second.
    sittings = [
        [phase for phase in plan.phases if phase != "restart"],
        [phase for phase in plan.phases if phase == "restart"],
    ]
    for round_number in range(plan.num_rounds):
        conversations = plan.conversations(round_number)
        for target in targets if round_number % 2 == 0 else reversed(targets):
            for phases in filter(None, sittings):
                log = logs / f"{target.name}.log"
                async with running(target, make_prompt, log, plan.start_timeout_s) as served:
                    for phase in phases:
                        part = (target.name, round_number, phase)
                        hooks.keep(await _replay(plan, served, part, conversations, hooks.advance))


async def _replay(
    plan: Plan,
    served: Served,
    part: tuple[str, int, str],  # target, round and phase
    conversations: list[Conversation],
    advance: Advance,
) -> Replay:
    target, round_number, phase = part
    requests = await replay(
        served.client,
        Asked(served.model, plan.shape.max_tokens, plan.ignore_eos, plan.timeout_s),
        conversations,
        plan.num_live,
        plan.arrival,
        partial(advance, target, phase),
    )
    duration_s = max(one.sent_s + one.answer.end_s for one in requests)
    return Replay(target, served.model, round_number, phase, duration_s, tuple(requests))
