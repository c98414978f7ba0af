"""What is checked: codecs, tiers, states, and the setups that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode

from kvkernels import CODECS
from prefixstore.errors import ConfigError
from prefixstore.settings import check_known
from prefixstore.testing.adapter import Adapter, Setup, Tokens
from prefixstore.testing.cells import Limits, LossLimits
from prefixstore.testing.states import STATES, Opening, State
from prefixstore.tier_urls import check_tiers, parse_tier_url

MEMORY, DISK = "memory", "disk"
_MEMORY_URL = "memory://1GiB"
_DISK_OPTIONS = "max_bytes=8GiB"
# Of a tier given by its URL: everything is written at once, and what a check leaves there goes.
_URL_OPTIONS = {"write": "through", "ttl": "1h"}
_ROOMY_BATCH_TOKENS = 512

FLOAT32_LIMITS = Limits(tie=1e-4, drift=1e-3)
# Logits of 16 to 32 lie 1/8 apart in bfloat16 and 1/64 in float16; rounding moves them by a step or
# two, and what is summed from such numbers by a little more.
BFLOAT16_LIMITS = Limits(tie=0.25, drift=0.5)
FLOAT16_LIMITS = Limits(tie=0.03, drift=0.06)

# Three times what honest blocks did and more; docs/testing.md has what was measured.
LOSS_LIMITS = {
    "q8": LossLimits(drift=0.03, kl=0.002),
    "k8v4": LossLimits(drift=0.2, kl=0.06),
    "q4": LossLimits(drift=0.3, kl=0.25),
    "k4v2": LossLimits(drift=1.0, kl=1.5),
    "q2": LossLimits(drift=2.0, kl=6.0),
}


@dataclass(frozen=True)
class Plan:
    """What is checked.

    Attributes:
        codecs: Of `kvkernels.CODECS`.
        tiers: "memory", "disk" (a temporary directory) or URLs; each is checked by itself.
        states: Names of states, "cold" among them: others are compared with it.
        num_new: Tokens of an answer.
        num_few: Prompts in those states that ask them in many ways; all if there are fewer.
        block_size: Tokens in a block; small ones give more of them to go wrong.
        limits: What rounding may do, by the model's dtype.
    """

    codecs: Sequence[str] = ("raw",)
    tiers: Sequence[str] = (MEMORY, DISK)
    states: Sequence[str] = tuple(state.name for state in STATES)
    num_new: int = 32
    num_few: int = 4
    block_size: int = 16
    limits: Limits = FLOAT32_LIMITS

    def __post_init__(self) -> None:
        check_known("codecs", self.codecs, CODECS)
        check_known("states", self.states, [state.name for state in STATES])
        for name in ("codecs", "tiers"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: expected at least one, got none")
        if "cold" not in self.states:
            raise ConfigError(f"states: expected 'cold' among them, got {self.states}")
        for name in ("num_new", "num_few"):
            if getattr(self, name) < 2:
                raise ConfigError(f"{name}: expected 2 or more, got {getattr(self, name)}")
        for tier in self.tiers:
            if tier not in (MEMORY, DISK):
                check_tiers([tier])


@dataclass(frozen=True)
class Run:
    """States that are run one after the other on one engine.

    Attributes:
        adapter: Opens it.
        codec: Of its tier.
        tier: As in `Plan.tiers`.
        opening: How much room it has.
        states: To run.
        skipped: States that it cannot be brought into, and why.
    """

    adapter: Adapter
    codec: str
    tier: str
    opening: Opening
    states: tuple[State, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def tier_name(self) -> str:
        return self.tier if self.tier in (MEMORY, DISK) else parse_tier_url(self.tier).name


def plan_runs(adapters: Sequence[Adapter], plan: Plan, prompts: Sequence[Tokens]) -> list[Run]:
    """All that is to be run, "cold" first."""
    runs = []
    for adapter in adapters:
        for codec in plan.codecs:
            for tier in plan.tiers:
                is_first = codec == plan.codecs[0] and tier == plan.tiers[0]
                wanted = [
                    state
                    for state in STATES
                    if state.name in plan.states and (is_first or not state.is_tierless)
                ]
                runs += _runs_of(adapter, codec, tier, wanted, _too_few(plan, prompts))
    return runs


def _too_few(plan: Plan, prompts: Sequence[Tokens]) -> dict[Opening, str]:
    """Why prompts do not fill the pools that they are to fill, where that is so."""
    why = {}
    if _num_whole_blocks(prompts, plan.block_size) <= _pool_blocks(Opening.SMALL, plan, prompts):
        why[Opening.SMALL] = "needs more prompts: a pool for the longest holds them all"
    if plan.num_new <= plan.block_size:  # every prompt's last block may have room for its answer
        why[Opening.TIGHT] = (
            f"needs answers of more than a block, {plan.block_size} tokens; got {plan.num_new}"
        )
    return why


def _runs_of(
    adapter: Adapter,
    codec: str,
    tier: str,
    wanted: Sequence[State],
    too_few: Mapping[Opening, str],
) -> list[Run]:
    runs = []
    for opening in Opening:
        here = [state for state in wanted if state.opening == opening]
        why = too_few.get(opening, "")
        skipped = {state.name: _obstacle(state, adapter, tier) or why for state in here}
        skipped = {name: why for name, why in skipped.items() if why}
        states = tuple(state for state in here if state.name not in skipped)
        if here:
            runs.append(Run(adapter, codec, tier, opening, states, skipped))
    return runs


def _obstacle(state: State, adapter: Adapter, tier: str) -> str:
    """Why an engine cannot be brought into a state; empty if it can."""
    missing = state.needs - adapter.abilities
    if missing:
        return f"{adapter.name} lacks {', '.join(sorted(one.value for one in missing))}"
    if state.needs_durable and is_volatile(tier):
        return "this tier does not outlive the engine"
    return ""


def is_volatile(tier: str) -> bool:
    return tier == MEMORY or tier.startswith("memory://")


def make_setup(run: Run, plan: Plan, prompts: Sequence[Tokens], folder: Path) -> Setup:
    """How the engine of a run is opened; a tier on disk lies in `folder`."""
    size = plan.block_size
    max_running = max(16, len(prompts))
    batch_tokens = max(_ROOMY_BATCH_TOKENS, max_running)
    if run.opening == Opening.CHUNKED:
        max_running = min(max_running, 2 * size)
        batch_tokens = 2 * size + 5
    return Setup(
        codec=run.codec,
        tiers=(_tier_url(run.tier, folder),),
        block_size=size,
        pool_tokens=size * _pool_blocks(run.opening, plan, prompts),
        max_batch_tokens=batch_tokens,
        max_running=max_running,
    )


def _pool_blocks(opening: Opening, plan: Plan, prompts: Sequence[Tokens]) -> int:
    size, num_prompts = plan.block_size, len(prompts)
    # The longest prompt with an answer, a second turn and its answer, and blocks begun.
    least = -(-(max(map(len, prompts)) + 2 * plan.num_new) // size) + 3
    whole = _num_whole_blocks(prompts, size)
    if opening == Opening.SMALL:
        return max(least, whole // 2)
    if opening == Opening.TIGHT:
        return max(least, whole + num_prompts)
    answers = num_prompts * (-(-plan.num_new // size) + 2)
    return 2 * least + whole + answers


def _num_whole_blocks(prompts: Sequence[Tokens], size: int) -> int:
    """Of all prompts, those that they share counted once."""
    return len(
        {
            prompt[: number * size]
            for prompt in prompts
            for number in range(1, len(prompt) // size + 1)
        }
    )


def _tier_url(tier: str, folder: Path) -> str:
    if tier == MEMORY:
        return _MEMORY_URL
    if tier == DISK:
        return f"disk://{quote(str(folder))}?{_DISK_OPTIONS}"
    base, _, query = tier.partition("?")
    options = {**_URL_OPTIONS, **dict(parse_qsl(query, keep_blank_values=True))}
    return f"{base}?{urlencode(options)}"
