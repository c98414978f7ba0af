"""The phases of the demo: cache off, cache on, and after a restart."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kvkernels import KVLayout
from prefixstore.demo.measure import Measured, measure_cached, measure_uncached
from prefixstore.demo.prompts import AgentLoop, Request
from prefixstore.errors import ConfigError, TierUnavailable

RESTARTS = 3  # each measures one request, so that the table can give a median
FLUSH_TIMEOUT_S = 120.0
MEMORY_TIER = "memory://1GiB"
WARM_UP_TOKENS = 24  # less than a block: warms the kernels and leaves nothing in a cache

OpenCache = Callable[..., Any]  # PrefixCache.open, or a test's stand-in
Advance = Callable[[str], None]  # called with what comes next, once for each request


@dataclass(frozen=True)
class Plan:
    """What to run, beside the prompts.

    Attributes:
        max_new_tokens: Tokens of an answer.
        num_cold: Requests run with the cache off, and again with an empty one.
        tiers: URLs of the tiers behind the memory tier; what earlier runs left there is reused.
        scratch: Directory for tiers that are to be empty.
    """

    max_new_tokens: int
    num_cold: int
    tiers: tuple[str, ...]
    scratch: Path

    def num_steps(self, loop: AgentLoop) -> int:
        """Requests that will be measured."""
        num_requests = len(loop.requests)
        return 2 * min(self.num_cold, num_requests) + num_requests + min(RESTARTS, num_requests)


@dataclass(frozen=True)
class Outcome:
    """Everything the demo measured.

    Attributes:
        measured: One entry a request, in the order they ran.
        open_s: Opening the cache: digesting the weights, opening the tiers.
        flush_s: Waiting for the background writer at the end of the loop.
        is_flushed: Whether it finished in time.
        tier_bytes: Bytes of KV and records by tier at the end of the loop.
        problems: What the cache's own recount found wrong; empty when all is well.
    """

    measured: tuple[Measured, ...]
    open_s: float
    flush_s: float
    is_flushed: bool
    tier_bytes: dict[str, int]
    problems: tuple[str, ...]


def check_context(model: Any, loop: AgentLoop, max_new_tokens: int) -> None:
    """Refuse a loop that does not fit the model's context.

    Raises:
        ConfigError: If the longest prompt and its answer exceed the model's positions.
    """
    context = model.config.get_text_config().max_position_embeddings
    needed = max(len(request.token_ids) for request in loop.requests) + max_new_tokens
    if needed > context:
        raise ConfigError(
            f"prefix-tokens: expected prompts and answers of at most {context} tokens (the"
            f" model's context), got {needed}"
        )


def run_phases(
    model: Any, loop: AgentLoop, plan: Plan, open_cache: OpenCache, advance: Advance
) -> Outcome:
    """Run the loop with the cache off, with an empty one, with it on, and after restarts.

    Args:
        model: A Hugging Face causal language model in evaluation mode.
        loop: The requests.
        plan: See `Plan`.
        open_cache: `PrefixCache.open`.
        advance: Told about each request before it runs.
    """
    model.set_attn_implementation("sdpa")  # what a cache gives back when it closes
    num_cold = min(plan.num_cold, len(loop.requests))
    measured = _run_cold(model, loop.requests[:num_cold], plan, open_cache, advance)
    started = time.perf_counter()
    tiers = [MEMORY_TIER, *plan.tiers]
    with open_cache(model, tiers=tiers) as cache:
        open_s = time.perf_counter() - started
        for request in loop.requests:
            advance("cache on")
            measured.append(_run_cached(model, cache, request, plan, "on"))
        started = time.perf_counter()
        is_flushed = cache.flush(FLUSH_TIMEOUT_S)
        flush_s = time.perf_counter() - started
        tier_bytes = _tier_bytes(model, cache)
        problems = tuple(cache.check())
    for request in loop.requests[:RESTARTS]:
        # A new object on the same tiers: what the old one held in memory is gone.
        with open_cache(model, tiers=tiers) as cache:
            advance("after a restart")
            measured.append(_run_cached(model, cache, request, plan, "restart"))
            cache.flush(FLUSH_TIMEOUT_S)
    return Outcome(tuple(measured), open_s, flush_s, is_flushed, tier_bytes, problems)


def disk_url(path: Path) -> str:
    """The URL of a disk tier in a directory."""
    return f"disk://{quote(str(path.absolute()))}?max_bytes=4GiB"


def forget(model: Any, tiers: tuple[str, ...], open_cache: OpenCache) -> None:
    """Forget what earlier runs left in these tiers.

    Raises:
        TierUnavailable: If one of them cannot.
    """
    with open_cache(model, tiers=list(tiers)) as cache:
        failed = cache.forget()
    if failed:
        raise TierUnavailable(f"fresh: expected tiers that can forget, got none from {failed}")


def _run_cold(
    model: Any,
    requests: tuple[Request, ...],
    plan: Plan,
    open_cache: OpenCache,
    advance: Advance,
) -> list[Measured]:
    """Each request with transformers' own cache and sdpa, then through a cache that holds nothing.

    The two alternate, so that whatever else the machine does falls on both.
    """
    measured = []
    for at, request in enumerate(requests):
        advance("cache off")
        if at == 0:
            measure_uncached(model, request.token_ids[:WARM_UP_TOKENS], "", 2)
        measured.append(
            measure_uncached(model, request.token_ids, request.question, plan.max_new_tokens)
        )
        advance("cache on, empty")
        # With a disk tier of its own: a first request also pays for the background writing.
        with (
            tempfile.TemporaryDirectory(dir=plan.scratch) as scratch,
            open_cache(model, tiers=[MEMORY_TIER, disk_url(Path(scratch))]) as cache,
        ):
            if at == 0:
                measure_cached(model, cache, request.token_ids[:WARM_UP_TOKENS], "", 2, "")
            measured.append(_run_cached(model, cache, request, plan, "empty"))
    return measured


def _run_cached(model: Any, cache: Any, request: Request, plan: Plan, phase: str) -> Measured:
    return measure_cached(
        model, cache, request.token_ids, request.question, plan.max_new_tokens, phase
    )


def _tier_bytes(model: Any, cache: Any) -> dict[str, int]:
    """What each tier holds, in bytes."""
    stats = cache.stats()
    layout = KVLayout.from_config(
        model.config.get_text_config(), block_size=cache.config.block_size, dtype=model.dtype
    )
    used_blocks = stats.pool_blocks - stats.pool_free_blocks
    held = {"device": used_blocks * layout.block_bytes}
    for name, tier in cache.tier_stats().items():
        held[name] = tier.used_bytes if tier is not None else 0
    return held
