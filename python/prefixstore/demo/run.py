"""The phases of the demo: cache off, cache on, and after a restart."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvkernels import KVLayout
from prefixstore.demo.measure import Measured, measure_cached, measure_uncached
from prefixstore.demo.prompts import AgentLoop, Request
from prefixstore.errors import ConfigError

RESTARTS = 3  # each measures one request, so that the table can give a median
FLUSH_TIMEOUT_S = 120.0
STAT_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the filesystem's
WARM_UP_TOKENS = 24  # less than a block: warms the kernels and leaves nothing in a cache

OpenCache = Callable[..., Any]  # PrefixCache.open, or a test's stand-in
Advance = Callable[[str], None]  # called with what comes next, once for each request


@dataclass(frozen=True)
class Plan:
    """What to run, beside the prompts.

    Attributes:
        max_new_tokens: Tokens of an answer.
        num_cold: Requests run with the cache off, and again with an empty one.
        disk_path: Directory of the disk tier; what earlier runs left there is reused.
    """

    max_new_tokens: int
    num_cold: int
    disk_path: Path

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
    with open_cache(model, disk_path=plan.disk_path) as cache:
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
        # A new object on the same directory: what the old one held in memory is gone.
        with open_cache(model, disk_path=plan.disk_path) as cache:
            advance("after a restart")
            measured.append(_run_cached(model, cache, request, plan, "restart"))
            cache.flush(FLUSH_TIMEOUT_S)
    return Outcome(tuple(measured), open_s, flush_s, is_flushed, tier_bytes, problems)


def forget(disk_path: Path) -> None:
    """Delete what earlier runs left in the demo's disk tier."""
    if disk_path.exists():
        shutil.rmtree(disk_path)


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
            tempfile.TemporaryDirectory(dir=plan.disk_path.parent) as scratch,
            open_cache(model, disk_path=Path(scratch) / "blocks") as cache,
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
    """What each tier holds, in bytes; the disk's are those its files take up."""
    stats, config = cache.stats(), cache.config
    layout = KVLayout.from_config(
        model.config.get_text_config(), block_size=config.block_size, dtype=model.dtype
    )
    used_blocks = stats.pool_blocks - stats.pool_free_blocks
    put_in_memory = sum(use.written_bytes for use in stats.store.tiers if use.name == "memory")
    files = [path for path in config.disk_path.rglob("*") if path.is_file()]
    return {
        "device": used_blocks * layout.block_bytes,
        # It began empty with this cache and evicts only when it is full.
        "memory": min(put_in_memory, config.memory_bytes),
        "disk": sum(path.stat().st_blocks for path in files) * STAT_BLOCK_BYTES,
    }
