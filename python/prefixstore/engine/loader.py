"""Loads blocks of prompts that were planned, in turns, beside the computing of others."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kvkernels import PoolFullError
from prefixstore.block_cache import BlockCache
from prefixstore.block_key import BlockKey
from prefixstore.engine.load_call import LoadCall
from prefixstore.engine.load_turns import LoadTurn, LoadTurns
from prefixstore.engine.restoring import Restoring
from prefixstore.engine.tier_calls import TierCalls
from prefixstore.planner import ContendedCall, Planner

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _PromptLoad:
    """What is loaded of one prompt, call by call."""

    restoring: Restoring
    keys: Sequence[Sequence[BlockKey]]
    call: LoadCall | None = None  # under way

    def overdue_at(self, now: float) -> float:
        """When the call under way will not be waited for any more; at once if nobody waits."""
        is_waited_for = self.restoring.load_left(now) is not None
        return self.restoring.overdue_at(now) if is_waited_for else now


class Loader:
    """Makes the calls of prompts' loads, one after another of each; see `LoadTurns`.

    Args:
        blocks: The model's.
        planner: Learns the tiers' speeds.
        num_threads: And so most calls at the same time.
        changed: The engine's condition, whose lock guards every `Restoring`, and is held wherever
            one of these methods is called; notified when there is something to do.
    """

    def __init__(
        self,
        blocks: BlockCache,
        planner: Planner,
        num_threads: int,
        changed: threading.Condition,
    ) -> None:
        self._blocks = blocks
        self._planner = planner
        self._changed = changed
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="kv-loader")
        self._loads: list[_PromptLoad] = []  # in the order in which they were planned
        self._turns = LoadTurns()
        self._calls = TierCalls(blocks.store.tier_names if blocks.store is not None else ())
        self._own = threading.local()  # `call`: the one that this thread has under way
        self._is_computing = self._lacks_threads = False
        self._stop_observing: Callable[[], None] | None = None
        if blocks.store is not None:
            self._stop_observing = blocks.store.observe_loads(self._observe)

    def add(self, restoring: Restoring, keys: Sequence[Sequence[BlockKey]], now: float) -> None:
        """Load what the plan of a prompt says."""
        self._loads.append(_PromptLoad(restoring, keys))
        self.begin_calls(now)

    def begin_calls(self, now: float) -> None:
        """Have threads make the calls whose turn has come; to be asked whenever all may differ."""
        if self._find_turn(now) is None:
            return
        try:
            # The thread begins the call, so that nobody waits for one that has not begun.
            self._threads.submit(self._run_calls)
        except RuntimeError as error:
            # The system starts no thread: those there are will see to it, or what a prompt waits
            # for too long is computed.
            if not self._lacks_threads:
                logger.warning("no thread to load blocks: %s", error)
            self._lacks_threads = True

    def next_turn_at(self, now: float) -> float | None:
        """When a call under way will not be waited for any more, and another's turn may come."""
        if all(load.call is not None for load in self._loads):
            return None
        times = [load.overdue_at(now) for load in self._loads if load.call is not None]
        return min((time for time in times if time > now), default=None)

    def busy_s(self, now: float) -> float:
        """Seconds until now in which some call was under way."""
        return self._calls.busy_s(now)

    def note_done(self, restoring: Restoring, now: float) -> None:
        """All of a prompt is there: a call that is still under way took too long."""
        if restoring.load_under_way is not None:
            self._observe_given_up(restoring, restoring.load_under_way, now)

    def note_computing(self, is_computing: bool) -> None:
        """Whether the model computes from now on."""
        self._is_computing = is_computing

    def close(self) -> None:
        """Wait for the calls under way; without the lock, as they need it to end."""
        if self._stop_observing is not None:
            self._stop_observing()
        self._threads.shutdown(wait=True)

    # ---- turns -------------------------------------------------------------------------------

    def _find_turn(self, now: float) -> tuple[_PromptLoad, LoadTurn] | None:
        """Whose turn it is to begin a call; None if it is nobody's, or no thread is free."""
        if sum(load.call is not None for load in self._loads) >= self._num_threads:
            return None
        found = [(load, load.restoring.next_load()) for load in self._loads if not load.call]
        self._drop([load for load, following in found if following is None])
        waiting = [(load, following) for load, following in found if following is not None]
        if not waiting:
            return None
        under_way = [load.restoring.load_left(now) for load in self._loads if load.call]
        turn = self._turns.next(
            [following for _, following in waiting],
            [one for one in under_way if one is not None],
            self._planner.tiers(),
        )
        return None if turn is None else (waiting[turn.index][0], turn)

    def _begin_next(self, now: float) -> _PromptLoad | None:
        """Begin the call whose turn it is; None if there is none."""
        while (found := self._find_turn(now)) is not None:
            load, turn = found
            if self._begin_call(load, now):
                self._turns.take(turn)
                return load
            self._drop([load])
        return None

    def _drop(self, loads: Sequence[_PromptLoad]) -> None:
        """Nothing more is loaded of these prompts."""
        for load in loads:
            self._loads.remove(load)
        if loads:
            # Chunks that waited for the next call may be computed now.
            self._changed.notify_all()

    def _begin_call(self, load: _PromptLoad, now: float) -> bool:
        """Take what a prompt loads next; False if that is nothing."""
        restoring = load.restoring
        numbers = restoring.next_call(now)
        if numbers is None:
            return False
        assert restoring.meeting is not None
        num_steps = restoring.meeting.num_layer_steps
        tier, _ = restoring.expected_of(numbers)
        tier_call = self._calls.begin(tier, self._planner.tiers()[tier].sharing, now)
        try:
            load.call = LoadCall(
                *(self._blocks, restoring.sequence, numbers),
                *(restoring.prefix_end(numbers), num_steps, tier_call),
            )
        except PoolFullError:
            restoring.stop_loading(now, has_no_room=not restoring.meeting.is_probing)
            self._calls.end(tier_call, now)
            return False
        restoring.begin_call(load.call)
        # The engine now waits until it is overdue, or computes beside it.
        self._changed.notify_all()
        return True

    # ---- in a thread of the pool -------------------------------------------------------------

    def _run_calls(self) -> None:
        """Make one call after another while it is somebody's turn."""
        load: _PromptLoad | None = None
        found: dict[int, str] | None = None
        try:
            while True:
                with self._changed:
                    now = time.monotonic()
                    if load is not None:
                        self._end_call(load, found, now)
                    load = self._begin_next(now)
                    if load is None:
                        return
                    self.begin_calls(now)  # in another thread, if it is another's turn too
                found = self._run_call(load)
        except Exception:
            logger.exception("loading blocks failed")  # nobody asks for the thread's result

    def _run_call(self, load: _PromptLoad) -> dict[int, str] | None:
        """The blocks that came, and from where; None if it failed."""
        store, call = self._blocks.store, load.call
        assert store is not None and call is not None
        self._own.call = call.tier_call
        try:
            return call.run(store, load.keys, load.restoring.deadline)
        except Exception:
            # Errors of tiers are handled in the store: this is a bug of ours. What has not come is
            # computed.
            logger.exception("loading blocks failed")
            return None
        finally:
            self._own.call = None

    def _end_call(self, load: _PromptLoad, found: dict[int, str] | None, now: float) -> None:
        call, restoring = load.call, load.restoring
        assert call is not None
        load.call = None
        self._calls.end(call.tier_call, now)
        kept = restoring.call_done(call.numbers, found or {}, now - call.began, now)
        call.keep(set(kept))
        self._blocks.note_loaded(load.keys[0][number] for number in kept)
        if not found and not call.is_given_up:
            self._observe_given_up(restoring, call, now)
        if found is None:
            restoring.stop_loading(now)
        self._changed.notify_all()

    def _observe(self, tier: str, num_records: int, num_bytes: int, seconds: float) -> None:
        if not num_records or not seconds > 0:
            return
        now = time.monotonic()
        own: ContendedCall | None = getattr(self._own, "call", None)  # None in a session's thread
        num_beside = 0.0
        if own is not None and own.tier == tier:
            with self._changed:
                num_beside = own.num_beside(now)
        self._planner.observe_load(
            *(tier, num_bytes, num_records, seconds, now),
            is_computing=self._is_computing,
            num_beside=num_beside,
        )

    def _observe_given_up(self, restoring: Restoring, call: LoadCall, now: float) -> None:
        """A call gave nothing until now; an answer at once says nothing of the tier, nor does a
        call for blocks that all windows have left behind.

        Once for each call: the planner takes one surprise for an accident, and two for a change.
        """
        call.is_given_up = True
        tier, num_bytes = restoring.expected_of(call.numbers)
        if now > call.began and num_bytes > 0:
            self._planner.observe_given_up(
                *(tier, num_bytes, now - call.began, now),
                num_beside=call.tier_call.num_beside(now),
            )
