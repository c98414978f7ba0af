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
from prefixstore.loadtest.targets import Target, running
from prefixstore.loadtest.workloads import Conversation


@dataclass(frozen=True)
class Replay:
    """The requests of one target, round and phase, in the order in which they were answered."""

    target: str
    model: str
    round_number: int
    phase: str
    duration_s: float
    requests: tuple[Request, ...]


Advance = Callable[[str, str], None]  # called with target and phase after each answer


async def run_rounds(
    plan: Plan, targets: list[Target], make_prompt: MakePrompt, logs: Path, advance: Advance
) -> list[Replay]:
    """Replay everything.

    Args:
        plan: What to replay.
        targets: The servers; in the rounds they take turns, in every other one backwards.
        make_prompt: The form of prompts.
        logs: A directory for what servers print that are started.
        advance: Called after each answer.

    Raises:
        TargetUnavailable: If a server does not come up or does not answer.
    """
    replays = []
    for round_number in range(plan.num_rounds):
        conversations = plan.conversations(round_number)
        for target in targets if round_number % 2 == 0 else reversed(targets):
            replays += await _run_target(
                plan, target, round_number, conversations, make_prompt, logs, advance
            )
    return replays


async def _run_target(
    plan: Plan,
    target: Target,
    round_number: int,
    conversations: list[Conversation],
    make_prompt: MakePrompt,
    logs: Path,
    advance: Advance,
) -> list[Replay]:
    """All phases of one server in one round. One that is started runs only meanwhile."""
    before = [phase for phase in plan.phases if phase != "restart"]
    after = [phase for phase in plan.phases if phase == "restart"]
    log = logs / f"{target.name}.log"
    replays = []
    for phases in (before, after):
        if not phases:
            continue
        async with running(target, make_prompt, log, plan.start_timeout_s) as (client, model):
            asked = Asked(model, plan.shape.max_tokens, plan.ignore_eos, plan.timeout_s)
            for phase in phases:
                requests = await replay(
                    client,
                    asked,
                    conversations,
                    plan.num_live,
                    plan.arrival,
                    partial(advance, target.name, phase),
                )
                replays.append(
                    Replay(
                        target.name,
                        model,
                        round_number,
                        phase,
                        _duration_s(requests),
                        tuple(requests),
                    )
                )
    return replays


def _duration_s(requests: list[Request]) -> float:
    """From the first request to the last answer."""
    return max(one.sent_s + one.answer.end_s for one in requests)
