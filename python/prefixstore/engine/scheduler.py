"""Who runs, and on which tokens: admission, chunks of prompts, preemption."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvkernels import PoolFullError
from prefixstore.block_cache import BlockCache
from prefixstore.engine.config import EngineConfig
from prefixstore.engine.fair_queue import FairQueue
from prefixstore.engine.load_call import LoadCall
from prefixstore.engine.loader import Loader
from prefixstore.engine.prefill_turns import Prefill, PrefillTurns
from prefixstore.engine.request import Request
from prefixstore.engine.restorer import Restorer
from prefixstore.engine.restoring import Restoring
from prefixstore.engine.sequence import SequenceBlocks
from prefixstore.engine.window_budget import WindowBudget

_RETRY_S = 0.02  # after which a full pool is tried again
# Passes in a row without a turn after which nobody waits for what a prompt is to compute.
_PATIENCE = 8


@dataclass(frozen=True)
class Step:
    """A request's part of the next forward pass: tokens `start` to `stop`.

    Attributes:
        load: Brings blocks before them, layer after layer; None if all are there.
        wait_until: When its layers are not waited for any more, of `time.monotonic`.
    """

    request: Request
    start: int
    stop: int
    load: LoadCall | None = None
    wait_until: float = math.inf

    @property
    def wants_logits(self) -> bool:
        """Whether the next token is sampled after this step."""
        return self.stop == self.request.num_tokens


class Scheduler:
    """Decides; the engine does. Called under the engine's lock.

    - A request is admitted when the pool has room for its whole prompt, and in sliding groups for
      its window, so that prompts never wait for each other's blocks. It waits too while another is
      computing what it begins with.
    - Running answers come first in every batch, one token each; prompts share what is left, see
      `PrefillTurns`.
    - When an answer's next block finds no room, whoever was admitted last gives its blocks away:
      they are published, so they stay as long as there is room, and in the tiers. It goes on from
      there.

    Args:
        blocks: The model's.
        restorer: Brings prompts in.
        loader: Of the restorer.
        config: Bounds.
        budget: Of the sliding groups.
        give_way: Gives blocks back that no request needs; False if there are none.
    """

    def __init__(
        self,
        blocks: BlockCache,
        restorer: Restorer,
        loader: Loader,
        config: EngineConfig,
        budget: WindowBudget,
        give_way: Callable[[], bool],
    ) -> None:
        # Every request passes through the queue, also those that the batch has room for.
        self.queue: FairQueue[Request] = FairQueue(config.max_queued + config.max_running)
        self.running: list[Request] = []  # in the order of their admission
        self.num_preemptions = 0
        self._blocks = blocks
        self._restorer = restorer
        self._loader = loader
        self._config = config
        self._budget = budget
        self._give_way = give_way
        self._turns = PrefillTurns()
        self._retry_at = 0.0

    @property
    def num_waiting(self) -> int:
        """Requests that are not in the batch yet, or any more."""
        return len(self.queue)

    # ---- admission ---------------------------------------------------------------------------

    def admit(self, now: float) -> None:
        """Let requests run as long as there is room."""
        if now < self._retry_at or not self.num_waiting:
            return
        self._retry_at = 0.0  # set again below where there is no room
        if len(self.running) >= self._config.max_running:
            return
        producing = self._producing()

        def is_ready(request: Request) -> bool:
            self._blocks.extend_keys(request.keys, request.tokens, request.salt)
            return not self._is_produced(request, producing)

        while len(self.running) < self._config.max_running:
            request = self.queue.pop_ready(is_ready)
            if request is None:
                return
            if not self._try_admit(request, producing, now):
                self.queue.push_front(request)
                return

    @property
    def retry_at(self) -> float | None:
        """When a pool that was too full is to be tried again."""
        return self._retry_at if self.num_waiting and self._retry_at else None

    def _try_admit(self, request: Request, producing: set[bytes], now: float) -> bool:
        if not self._budget.has_room(self.running, request):
            return False
        sequence = SequenceBlocks(
            *(self._blocks, request.tokens, request.salt, request.keys),
            request.max_tokens,
        )
        try:
            sequence.reserve(min(request.num_tokens + 1, request.max_tokens))
        except PoolFullError:
            sequence.release()
            if self._give_way():
                return self._try_admit(request, producing, now)
            # Do not wait here for blocks to be given back (by a request, the writer or a session):
            # submit, cancel and stats need the lock meanwhile.
            self._retry_at = now + _RETRY_S
            return False
        if not request.is_counted:
            request.is_counted = True
            sequence.count_look_up()
        request.sequence = sequence
        request.restoring = Restoring(
            request.num_tokens, self._blocks.block_size, sequence, now, request.tenant
        )
        request.num_computed = request.num_passed_over = 0
        clock = request.clock
        clock.admitted = clock.admitted or now
        if clock.preempted:
            clock.preempted_s += now - clock.preempted
            clock.preempted = 0.0
        self.running.append(request)
        producing.update(self._hashes_to_come(request))
        self._restorer.begin(request.restoring, request.keys, now)
        return True

    def _producing(self) -> set[bytes]:
        """Hashes of the blocks that running prompts are about to publish."""
        return {
            one
            for request in self.running
            if not request.is_decoding and _is_getting_on(request)
            for one in self._hashes_to_come(request)
        }

    def _hashes_to_come(self, request: Request) -> Iterator[bytes]:
        assert request.sequence is not None
        last = request.num_tokens // self._blocks.block_size
        for key in request.keys[0][request.sequence.num_published : last]:
            yield key.block_hash

    def _is_produced(self, request: Request, producing: set[bytes]) -> bool:
        """Whether the first block that a prompt lacks is on its way already."""
        if not producing:
            return False
        size = self._blocks.block_size
        whole = (request.num_tokens - 1) // size
        cached = self._blocks.device.num_cached(request.tokens[: whole * size], request.salt)
        return cached < whole and request.keys[0][cached].block_hash in producing

    # ---- the next batch ----------------------------------------------------------------------

    def next_steps(self, now: float) -> list[Step]:
        """What the next forward pass computes; empty if all that runs waits for loads."""
        self._loader.begin_calls(now)
        decoding = [one for one in self.running if one.is_decoding]
        with_room = [
            one for one in decoding if one in self.running and self._make_room(one, one.num_tokens)
        ]
        # Room for a later request may have preempted an earlier one: that one computes nothing.
        steps = [
            Step(one, one.num_computed, one.num_tokens) for one in with_room if one in self.running
        ]
        budget = self._config.max_batch_tokens - len(steps)
        prompts = [one for one in self.running if one.restoring is not None]
        for request in prompts:
            request.num_passed_over += not _is_loading(request)
        for turn in self._turns.of_pass([_prefill(one, now) for one in prompts], budget):
            request = prompts[turn.index]
            if request not in self.running:  # preempted for the sake of one before it
                continue
            request.num_passed_over = 0
            step = self._next_chunk(request, turn.max_tokens, now)
            if step is not None and self._make_room(request, step.stop, step.start):
                steps.append(step)
                turn.num_taken = step.stop - step.start
        return [step for step in steps if step.request in self.running]

    def wake_at(self) -> float | None:
        """When there may be something to do though nothing happened."""
        times = [self.retry_at, self._loader.next_turn_at(time.monotonic())]
        for request in self.running:
            restoring = request.restoring
            if restoring is not None:
                is_planned = restoring.is_planned
                times.append(
                    restoring.wake_at if is_planned else self._restorer.look_up_until(restoring)
                )
        known = [one for one in times if one is not None]
        return min(known) if known else None

    def _next_chunk(self, request: Request, budget: int, now: float) -> Step | None:
        restoring = request.restoring
        assert restoring is not None
        if not self._restorer.prepare(restoring, request.keys, now):
            return None
        chunk = restoring.next_chunk(now, budget)
        if chunk is not None:
            return Step(request, chunk.start, chunk.stop)
        is_alone = len(self.running) == 1
        chunk = restoring.next_overlapped_chunk(now, budget, is_alone=is_alone)
        if chunk is None:
            return None
        wait_until = restoring.overdue_at(now)
        return Step(request, chunk.start, chunk.stop, restoring.load_under_way, wait_until)

    def _make_room(self, request: Request, stop: int, start: int | None = None) -> bool:
        """Have blocks for tokens up to `stop`, preempting; False if it was itself preempted."""
        start = request.num_computed if start is None else start
        while True:
            assert request.sequence is not None
            try:
                request.sequence.grow(start, stop)
                return True
            except PoolFullError:
                if self._give_way():
                    continue
                victim = self.running[-1]
                self.preempt(victim)
                if victim is request:
                    # The blocks are held by the writer or a session, and neither says when it lets
                    # go of them.
                    self._retry_at = time.monotonic() + _RETRY_S
                    return False

    def preempt(self, request: Request) -> None:
        """Let a request give its blocks away, and go on later from what is left of them."""
        self.stop(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        request.num_computed = 0
        request.clock.preempted = time.monotonic()
        self.queue.push_front(request)

    def stop(self, request: Request) -> None:
        """Take a running request's blocks from it; what is published stays cached."""
        self.running.remove(request)
        assert request.sequence is not None
        if request.restoring is not None:
            request.restoring.finish(time.monotonic())
            request.restoring = None
        request.sequence.release()
        request.sequence = None


def _prefill(request: Request, now: float) -> Prefill:
    restoring = request.restoring
    assert restoring is not None
    return Prefill(request.tenant, restoring.num_left, restoring.load_ahead(now))


def _is_getting_on(request: Request) -> bool:
    """Whether a prompt is computed or loaded, and not just waiting for turns in passes.

    A load that waits for its turn counts: another's for the same blocks would wait behind it.
    """
    return _is_loading(request) or request.num_passed_over < _PATIENCE


def _is_loading(request: Request) -> bool:
    return request.restoring is not None and request.restoring.is_loading
