"""Where a prompt's blocks came from, though it had to give them away and begin again."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from prefixstore.engine.restoring import Restoring
from prefixstore.reuse_report import DEVICE, MissReason, ReuseReport


class BlockOrigins:
    """The ways of one prompt into the pool.

    ::

        first way     device | computed | from disk      preempted: published, so they stay
        second way    device   device     device         this is what it finds of its own

    Only what the first way finds on the device was there without it.
    """

    def __init__(self) -> None:
        self._ways: list[Restoring] = []

    def note(self, restoring: Restoring) -> None:
        """On this way something of the prompt is about to be published."""
        if not self._ways or self._ways[-1] is not restoring:
            self._ways.append(restoring)

    def correct(self, reuse: ReuseReport) -> ReuseReport:
        """What was reused, from a report of the last way that counts the prompt's own for it."""
        present = self._ways[-1].reused()
        if len(self._ways) < 2 or not present:
            return reuse
        origins = self._ways[0].reused()
        for way in self._ways[1:]:
            origins |= {number: tier for number, tier in way.reused().items() if tier != DEVICE}
        size = reuse.num_reused // len(present)
        by_tier, misses = Counter[str](), Counter(reuse.misses)
        for number in present:
            if number in origins:
                by_tier[origins[number]] += size
            else:  # it was computed before; why is no longer known, but mostly it was new
                misses[MissReason.NEW.value] += size
        return replace(
            reuse,
            tokens_by_tier=dict(by_tier),
            num_recomputed=reuse.num_prompt_tokens - by_tier.total(),
            misses=dict(misses),
        )
