"""What one prompt asks of the tiers, before anything of it is computed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from kvkernels import PoolFullError
from prefixstore.block_cache import BlockCache
from prefixstore.group_load import GroupLoad
from prefixstore.missing_blocks import HeldBlocks, MissingBlocks
from prefixstore.patient_calls import CallLeftError, PatientCalls
from prefixstore.planner import Planner, RestorePlan
from prefixstore.reuse_report import MissReason
from prefixstore.store.holders import Holders

_LEAST_LOOKUP_S = 0.02  # a thread that wakes late is not a slow tier
_LOOKUP_SHARE = 0.05  # a look-up may take this share of the prompt's computing time
# So many calls of earlier prompts that nobody waits for any more may keep threads, and blocks of
# the pool; beyond them no tier is asked.
_MAX_LEFT = 4


class PrefixLoads:
    """A look-up, a plan, and the loads that it has.

    ::

        look-up     5 % of computing, 20 ms at least,     then: tiers that answered by then
                or as long as it is worth
        load        as long as computing what it brings   then: what arrived by then
        probe       nobody waits

    A tier that takes longer keeps a thread until the store's own deadline.

    Args:
        blocks: The model's, with a store.
        calls: Runs what may hang.
        planner: Plans.
        missing: Blocks of the prompt.
        num_tokens: Of the prompt.
    """

    def __init__(
        self,
        blocks: BlockCache,
        calls: PatientCalls,
        planner: Planner,
        missing: MissingBlocks,
        num_tokens: int,
    ) -> None:
        assert blocks.store is not None
        self._blocks = blocks
        self._store = blocks.store
        self._calls = calls
        self._planner = planner
        self._missing = missing
        self._num_tokens = num_tokens
        self._deadline = self._store.deadline()
        self._until: float | None = None  # a load is waited for; None for as long as it takes

    def run(self) -> None:
        """Fill holes in `missing`, as far as that is sooner done than computing them."""
        missing = self._missing
        num_present = missing.num_usable
        lookup_s = self._look_up()
        if missing.num_usable == num_present:
            if lookup_s is not None:
                self._planner.observe_look_up(lookup_s, 0.0)
            return
        held = missing.held()
        now = time.monotonic()
        left_s = self._deadline - now
        plan = self._planner.plan_prefix(
            *(self._num_tokens, held.first, held.tiers, held.record_bytes, now), deadline_s=left_s
        )
        if lookup_s is not None:
            self._planner.observe_look_up(lookup_s, plan.saved_share)
        missing.leave_out(held.first + plan.num_load_blocks)
        if plan.num_load_blocks:
            # The tiers keep the deadline by themselves, and what came by then is restored.
            is_patient = plan.load_deadline_s >= left_s
            self._until = None if is_patient else now + plan.load_deadline_s
            self._load_all()
        if plan.is_probe:
            self._probe(held, plan)

    def _look_up(self) -> float | None:
        """Note who holds what is missing, as far as tiers say so in time.

        Returns:
            Seconds until all had; None if they were not waited for, or not asked.
        """
        missing = self._missing
        wanted = missing.wanted()
        sizes = [len(own) for own in wanted]
        heard = [Holders([None] * sum(sizes), range(sum(sizes)))]
        if self._calls.num_left >= _MAX_LEFT:
            missing.note_holders(heard[-1].split(sizes))
            return None
        began = time.monotonic()
        until = began + self._look_up_patience_s()
        # Read here: whoever answers late finds all changed. One group's blocks stand for the rest.
        windows = self._blocks.device.windows
        group = windows.index(None) if None in windows else 0
        numbers = np.flatnonzero(missing.block_ids[:, group] < 0)

        def ask() -> Sequence[Holders]:
            answers = self._store.look_up(wanted, self._deadline, heard.append)
            if until < time.monotonic() <= self._deadline:
                self._observe_late(numbers, answers[group], began)
            return answers

        try:
            answers = self._calls.run(ask, until if until < self._deadline else None)
        except CallLeftError:
            self._planner.observe_look_up_left()
            missing.note_holders(heard[-1].split(sizes))
            return None
        seconds = time.monotonic() - began
        missing.note_holders(answers)
        return seconds

    def _observe_late(self, numbers: np.ndarray, holders: Holders, began: float) -> None:
        """Tell the planner what an answer would have saved that was not waited for."""
        tiers: list[str] = []
        for number, tier in zip(numbers.tolist(), holders.tiers, strict=True):
            if tier is None or number != numbers[0] + len(tiers):
                break
            tiers.append(tier)
        share = 0.0
        if tiers:
            first = int(numbers[0])
            record_bytes = np.sum(self._blocks.record_bytes(first, len(tiers)), axis=0)
            share = self._planner.saved_share(self._num_tokens, first, tiers, record_bytes)
        self._planner.observe_look_up(time.monotonic() - began, share)

    def _look_up_patience_s(self) -> float:
        context = self._missing.num_usable * self._blocks.block_size
        prefill_s = self._planner.slowest_prefill_s(self._num_tokens - context, context)
        worth_s = self._planner.look_up_patience_s(prefill_s)
        return max(_LEAST_LOOKUP_S, _LOOKUP_SHARE * prefill_s, worth_s)

    def _load_all(self) -> None:
        """Load what the longest prefix needs; if some of that does not come, settle for a shorter
        one.
        """
        missing = self._missing
        is_complete = is_late = False
        while not is_complete:
            num_blocks, is_complete = missing.num_usable, True
            for group in range(len(missing.keys)):
                numbers = missing.needed(group, num_blocks)
                if not numbers:
                    continue
                if is_late:
                    missing.fail(group, numbers, MissReason.LATE)
                    is_complete = False
                    continue
                try:
                    is_complete &= self._load(group, numbers)
                except CallLeftError:
                    is_complete, is_late = False, True

    def _load(self, group: int, numbers: Sequence[int]) -> bool:
        """Load these blocks of one group into the pool; whether all came.

        Raises:
            CallLeftError: If they did not in time.
        """
        missing = self._missing
        deadline = self._deadline if self._until is None else self._until
        try:
            taken = self._blocks.device.reserve(group, len(numbers), deadline)
        except PoolFullError:
            # Try again with the first half; what the pool cannot hold cannot be restored.
            missing.fail(group, numbers[len(numbers) // 2 :], MissReason.NO_ROOM)
            return False
        missing.place(group, numbers, taken)  # at once: whatever is raised below, they go back
        load = GroupLoad(self._blocks, group, [missing.keys[group][n] for n in numbers], taken)
        try:
            answers = self._calls.run(partial(load.run, self._deadline), self._until)
        except BaseException:
            arrived = {numbers[at] for at in load.leave()}
            late = [number for number in numbers if number not in arrived]
            missing.hand_over(group, late)
            missing.note_loaded({number: missing.holder(group, number) for number in arrived})
            missing.fail(group, late, MissReason.LATE)
            self._observe_given_up(group, late, time.monotonic() - load.last_arrival)
            raise
        found = dict(zip(numbers, answers, strict=True))
        lost = [number for number, tier in found.items() if tier is None]
        missing.drop(group, lost)
        missing.note_loaded({number: tier for number, tier in found.items() if tier is not None})
        missing.fail(group, lost, MissReason.LOST)
        return not lost

    def _observe_given_up(self, group: int, late: Sequence[int], waited_s: float) -> None:
        """The tiers are asked one after another, so it is the fastest that was waited for."""
        names = [self._missing.holder(group, number) for number in late]
        tier = min(names, key=self._store.tier_names.index, default=None)
        own = [number for number, name in zip(late, names, strict=True) if name == tier]
        if tier is not None and waited_s > 0:
            num_bytes = sum(self._missing.record_bytes(group, number) for number in own)
            self._planner.observe_given_up(tier, num_bytes, waited_s, time.monotonic())

    def _probe(self, held: HeldBlocks, plan: RestorePlan) -> None:
        """Load a few blocks that nobody wants, to measure their tier."""
        for group in range(len(self._missing.keys)):
            keys = [
                self._missing.keys[group][held.first + at]
                for at in plan.probe
                if held.needs[at, group]
            ]
            if not keys:
                continue
            try:
                taken = self._blocks.device.reserve_now(group, len(keys))
            except PoolFullError:
                return  # the next request will do
            load = GroupLoad(self._blocks, group, keys, taken)
            load.leave()
            self._calls.begin(partial(load.run, self._deadline))
