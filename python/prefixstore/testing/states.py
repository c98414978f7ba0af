"""The states in which a prompt can meet a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from prefixstore.testing.adapter import DEVICE, Ability, Tokens
from prefixstore.testing.stage import Asked, Stage

MAIN = "main"  # the salt of the states that follow one another
_MOST_TRIES = 10  # at a state that depends on how fast things go


class Opening(str, Enum):
    """How much room the engine of a state has."""

    ROOMY = "roomy"  # all prompts fit the pool
    SMALL = "small"  # about half of them do
    TIGHT = "tight"  # all fit, their answers do not
    CHUNKED = "chunked"  # roomy, with passes of little more than two blocks


@dataclass(frozen=True)
class State:
    """A way to a prompt's answer.

    Attributes:
        name: In the report.
        run: Brings the engine there and asks.
        opening: What it needs of the pool.
        needs: What it needs of the engine.
        is_restored: Whether blocks come back from a tier, so that a lossy codec changes answers.
        is_tierless: Whether tiers have no part in it: it is run over the first one alone.
        needs_durable: Whether it needs a tier that outlives the engine.
        missed: Of all that was asked, why it was not in this state after all; empty if it was.
    """

    name: str
    run: Callable[[Stage], list[Asked]]
    opening: Opening = Opening.ROOMY
    needs: frozenset[Ability] = frozenset()
    is_restored: bool = True
    is_tierless: bool = False
    needs_durable: bool = False
    missed: Callable[[Sequence[Asked]], str] = lambda asked: ""


# ---- all prompts, one state after the other --------------------------------------------------


def _cold(stage: Stage) -> list[Asked]:
    return stage.ask(stage.prompts, MAIN)


def _warm(stage: Stage) -> list[Asked]:
    stage.seed_missing(stage.prompts, MAIN)
    return stage.ask(stage.prompts, MAIN)


def _evicted(stage: Stage) -> list[Asked]:
    stage.seed_missing(stage.prompts, MAIN)
    stage.evict()
    return stage.ask(stage.prompts, MAIN)


def _restarted(stage: Stage) -> list[Asked]:
    stage.seed_missing(stage.prompts, MAIN)
    stage.restart()
    return stage.ask(stage.prompts, MAIN)


# ---- few prompts, each state with a salt of its own ------------------------------------------


def _other_salt(stage: Stage) -> list[Asked]:
    stage.seed_missing(stage.few, MAIN)
    return stage.ask(stage.few, "other")


def _alone(stage: Stage) -> list[Asked]:
    """Twice each: cold, then from the device."""
    asked = [one for prompt in stage.few for one in stage.ask([prompt], "alone")]
    return asked + [one for prompt in stage.few for one in stage.ask([prompt], "alone")]


def _with_strangers(stage: Stage) -> list[Asked]:
    """Half of the batch is cached, half is new."""
    stage.seed(stage.few[::2], "strangers")
    return stage.ask(stage.few, "strangers")


def _after(name: str, cut: Callable[[Stage, Tokens], Tokens]) -> Callable[[Stage], list[Asked]]:
    """A state in which the tiers hold what `cut` makes of each prompt."""

    def run(stage: Stage) -> list[Asked]:
        seeds = [cut(stage, prompt) for prompt in stage.few]
        stage.seed([seed for seed in seeds if seed], name)
        stage.evict()
        return stage.ask(stage.few, name)

    return run


def _first_block(stage: Stage, prompt: Tokens) -> Tokens:
    return prompt[: stage.block_size]


def _half(stage: Stage, prompt: Tokens) -> Tokens:
    return prompt[: _half_of(stage, prompt)]


def _all_but_last_block(stage: Stage, prompt: Tokens) -> Tokens:
    whole = (len(prompt) - 1) // stage.block_size
    return prompt[: max(0, whole - 1) * stage.block_size]


def _branched(stage: Stage, prompt: Tokens) -> Tokens:
    """Another prompt that leaves this one within a block, a little after the half."""
    shared = prompt[: _half_of(stage, prompt) + stage.block_size // 3]
    rest = prompt[len(shared) :]
    return shared + rest[::-1]


def _half_on_device(stage: Stage) -> list[Asked]:
    """The first half is on the device, the second in a tier."""
    stage.seed(stage.few, "device half")
    stage.evict()
    halves = [_half(stage, prompt) for prompt in stage.few]
    stage.seed([half for half in halves if half], "device half")
    return stage.ask(stage.few, "device half")


def _next_turn(stage: Stage) -> list[Asked]:
    """A prompt that goes on after the answer to another."""
    first = stage.ask(stage.few, "turns")
    turns = [(*one.prompt, *one.answer.tokens, *one.prompt[-7:]) for one in first]
    return stage.ask(turns, "turns")


def _half_of(stage: Stage, prompt: Tokens) -> int:
    return len(prompt) // 2 // stage.block_size * stage.block_size


# ---- all prompts, engines with less room -----------------------------------------------------


def _pressed(stage: Stage) -> list[Asked]:
    """One after another, then again: the pool has given the first ones up by itself."""
    for prompt in stage.prompts:
        stage.seed([prompt], "pressed")
    stage.flush()
    return [one for prompt in stage.prompts for one in stage.ask([prompt], "pressed")]


def _none_from_tiers(asked: Sequence[Asked]) -> str:
    known = [one.answer.reused for one in asked if one.answer.reused is not None]
    places = {place for reused in known for place in reused}
    return "nothing came from a tier" if known and not places - {DEVICE} else ""


def _preempted(stage: Stage) -> list[Asked]:
    """More than the pool holds, until some meet there: fast engines may answer one by one."""
    for number in range(_MOST_TRIES):
        asked = stage.ask(stage.prompts, f"preempted {number}")
        if not _none_preempted(asked):
            break
    return asked


def _none_preempted(asked: Sequence[Asked]) -> str:
    return "" if any(one.answer.num_preemptions for one in asked) else "nothing was preempted"


def _chunked(stage: Stage) -> list[Asked]:
    return stage.ask(stage.few, "chunked")


def _restored(name: str, run: Callable[[Stage], list[Asked]], **fields: Any) -> State:
    """A state that only counts if something came from a tier."""
    return State(name, run, missed=_none_from_tiers, **fields)


BATCHES = frozenset({Ability.BATCHES})

STATES = (
    State("cold", _cold, is_restored=False),
    State("warm", _warm, is_restored=False),
    _restored("evicted", _evicted),
    _restored("restarted", _restarted, needs_durable=True),
    State("other salt", _other_salt, is_restored=False),
    State("alone", _alone, needs=BATCHES, is_restored=False, is_tierless=True),
    State("strangers", _with_strangers, needs=BATCHES, is_restored=False, is_tierless=True),
    _restored("first block", _after("first block", _first_block)),
    _restored("half", _after("half", _half)),
    _restored("all but last", _after("all but last", _all_but_last_block)),
    _restored("branched", _after("branched", _branched)),
    _restored("half on device", _half_on_device),
    State("next turn", _next_turn, is_restored=False, is_tierless=True),
    _restored("pressed", _pressed, opening=Opening.SMALL),
    State(
        *("preempted", _preempted, Opening.TIGHT),
        needs=frozenset({Ability.PREEMPTS}),
        missed=_none_preempted,
    ),
    State(
        *("chunked", _chunked, Opening.CHUNKED),
        needs=frozenset({Ability.CHUNKS}),
        is_restored=False,
        is_tierless=True,
    ),
)
