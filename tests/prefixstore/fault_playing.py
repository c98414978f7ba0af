"""Plays a scenario: traffic before, during and after a fault, and the results."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path

from fault_scenarios import BREAKER, LOAD_TIMEOUT_S, Scenario
from fault_traffic import Seen, Traffic

from prefixstore.errors import TierError
from prefixstore.store import Store, StoreConfig

GRACE_S = 0.25  # allowed past the deadline, as a thread may wait for a processor


@dataclass(frozen=True)
class Result:
    """What requests saw of a fault.

    Attributes:
        num_requests: In all.
        num_failed: Requests that raised.
        num_wrong: Blocks that were not the right ones.
        hit_share: Hits over blocks asked for, before the fault.
        fault_hit_share: The same during the fault.
        after_hit_share: The same after it.
        longest_s: The longest wait of a request.
        reasons: Misses and lost writes of the tier, by reason.
        problems: Violated expectations.
    """

    num_requests: int
    num_failed: int
    num_wrong: int
    hit_share: float
    fault_hit_share: float
    after_hit_share: float
    longest_s: float
    reasons: dict[str, int]
    problems: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        return not self.problems


def play(
    scenario: Scenario,
    directory: Path,
    seconds: float,
    grace_s: float = GRACE_S,
    num_requests: int = 250,
) -> Result:
    """Break a tier for some seconds while requests go on.

    Args:
        scenario: What breaks, and how.
        directory: For its files; made.
        seconds: How long it stays broken.
        grace_s: How much longer than its deadline a request may wait.
        num_requests: Requests before the tier breaks, and again after it is mended.

    Raises:
        Unavailable: If this machine cannot play it.
    """
    directory.mkdir()
    config = StoreConfig(load_timeout_s=LOAD_TIMEOUT_S, write_timeout_s=2, breaker=BREAKER)
    with scenario(directory) as scene:
        store = Store([scene.memory, scene.tier], config)
        with Traffic(store) as traffic:
            traffic.wait_requests(num_requests)
            before = copy.copy(traffic.seen)
            scene.run(seconds)
            during = copy.copy(traffic.seen)
            if scene.comes_back:
                _wait_up(store)
            mended = copy.copy(traffic.seen)
            traffic.wait_requests(num_requests)
        after = traffic.seen
        use = store.stats().tiers[1]
        problems = _find_problems(after, grace_s)
        if scene.comes_back:
            problems += _recount(store, after, during)
        store.close()
    return Result(
        num_requests=after.num_requests,
        num_failed=after.num_failed,
        num_wrong=after.num_wrong,
        hit_share=_share(before, Seen()),
        fault_hit_share=_share(during, before),
        after_hit_share=_share(after, mended),
        longest_s=after.longest_s,
        reasons={
            "absent": use.num_misses - use.num_corrupted,
            "corrupted": use.num_corrupted,
            "errors": use.num_errors - use.num_timeouts,
            "timeouts": use.num_timeouts,
            "skipped": use.num_skipped,
            "full": use.num_full,
            "not written": use.num_dropped,
        },
        problems=tuple(problems),
    )


def _wait_up(store: Store) -> None:
    """Wait until the breaker lets the tier back and queued records are written."""
    ends_at = time.monotonic() + 20
    while store.stats().tiers[1].is_down:
        assert time.monotonic() < ends_at, "expected a mended tier to be tried again within 20 s"
        time.sleep(0.01)
    time.sleep(0.5)


def _find_problems(seen: Seen, grace_s: float) -> list[str]:
    problems = sorted(seen.errors)
    if seen.num_wrong:
        problems.append(f"{seen.num_wrong} blocks were wrong")
    if seen.longest_s > LOAD_TIMEOUT_S + grace_s:
        problems.append(f"a request waited {seen.longest_s:.2f} s")
    return problems


def _recount(store: Store, after: Seen, during: Seen) -> list[str]:
    """Problems that a recount of the mended tier still finds."""
    problems = []
    if after.num_hits == during.num_hits:
        problems.append("no hit after the fault")
    store.flush(30)
    try:
        problems += store.check(fix=True) and store.check()
    except TierError as error:
        problems.append(str(error))
    return problems


def _share(seen: Seen, earlier: Seen) -> float:
    hits = seen.num_hits - earlier.num_hits
    misses = seen.num_misses - earlier.num_misses
    return hits / max(1, hits + misses)
