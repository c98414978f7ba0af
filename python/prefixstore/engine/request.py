"""One request on its way through the engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from prefixstore.block_key import BlockKey
from prefixstore.engine.answer import Answer
from prefixstore.engine.block_origins import BlockOrigins
from prefixstore.engine.outputs import FinishReason, RequestReport, RequestTimes
from prefixstore.engine.restoring import Restored, Restoring
from prefixstore.engine.sampler import SampledToken
from prefixstore.engine.sampling import SamplingParams
from prefixstore.engine.sequence import SequenceBlocks
from prefixstore.reuse_report import ReuseReport


@dataclass
class Clock:
    """When things happened to a request, on `time.monotonic`, 0 for never; sums in seconds."""

    arrived: float
    admitted: float = 0.0  # first admission
    first_token: float = 0.0
    last_token: float = 0.0
    preempted: float = 0.0  # when it was last preempted, while it waits to go on
    preempted_s: float = 0.0
    compute_s: float = 0.0


class Request:
    """A prompt, its answer so far, and what the engine holds for it.

    ::

        tokens        prompt ......................... answer .... t
        num_computed  ------------------->               what follows is still to be computed

    It is in prefill until one token is left to compute; a preempted one is so again.

    Args:
        prompt: ``[num_tokens]``, uint32.
        max_tokens: Of prompt and answer together.
        sampling: Its wishes.
        seed: Of its random numbers.
        tenant: Whose turn it takes.
        salt: The namespace of its blocks.
        answer: Takes the new tokens.
        num_groups: Layer groups of the model.
    """

    def __init__(
        self,
        prompt: np.ndarray,
        max_tokens: int,
        sampling: SamplingParams,
        seed: int,
        tenant: str,
        salt: str,
        answer: Answer,
        num_groups: int,
    ) -> None:
        self.sampling = sampling
        self.seed = seed
        self.tenant = tenant
        self.salt = salt
        self.answer = answer
        self.max_tokens = max_tokens
        self.num_prompt = self.num_tokens = len(prompt)
        self._tokens = np.empty(max_tokens, dtype=np.uint32)
        self._tokens[: len(prompt)] = prompt
        self.num_computed = 0
        # Per group, the keys of its whole blocks so far.
        self.keys: Sequence[list[BlockKey]] = [[] for _ in range(num_groups)]
        self.sequence: SequenceBlocks | None = None  # while it runs
        self.restoring: Restoring | None = None  # while it is in prefill
        self.origins = BlockOrigins()  # where the prompt's blocks came from, until it is computed
        # Whether the index counted its look-up; a resumed request is not counted again.
        self.is_counted = False
        self.num_preemptions = 0
        self.num_passed_over = 0  # passes in a row that had no turn for it, while in prefill
        self.clock = Clock(time.monotonic())
        self._arrived_at = time.time()
        self._restored: Restored | None = None  # what became of its prompt, the first time

    @property
    def request_id(self) -> str:
        """As the caller knows it."""
        return self.answer.handle.request_id

    @property
    def tokens(self) -> np.ndarray:
        """The prompt and the answer so far, ``[num_tokens]``, uint32; a view."""
        return self._tokens[: self.num_tokens]

    @property
    def num_output(self) -> int:
        """Tokens of the answer so far."""
        return self.num_tokens - self.num_prompt

    @property
    def is_decoding(self) -> bool:
        """One token is left to compute, the last."""
        return self.restoring is None

    def end_prefill(self, now: float) -> Restored:
        """All tokens are computed; what became of them, the answer's among them if it resumed."""
        assert self.restoring is not None
        self.restoring.finish(now)
        restored, self.restoring = self.restoring.result(), None
        if self._restored is None:
            restored = replace(restored, reuse=self.origins.correct(restored.reuse))
            self._restored = restored
        return restored

    def push(self, token: SampledToken, now: float) -> FinishReason | None:
        """The next token of the answer; returns why the answer ends with it, if it does."""
        # No KV is computed for the last token, so it needs no place.
        if self.num_tokens < self.max_tokens:
            self._tokens[self.num_tokens] = token.token_id
        self.num_tokens += 1
        self.clock.first_token = self.clock.first_token or now
        self.clock.last_token = now
        return self.answer.push(token)

    def report(self, now: float) -> RequestReport:
        """What became of it; once it has ended."""
        clock = self.clock
        if clock.preempted:
            clock.preempted_s += now - clock.preempted
            clock.preempted = 0.0
        # None if it ended before its prompt was computed.
        restored = self._restored or Restored(ReuseReport(self.num_prompt, {}, 0, 0.0))
        return RequestReport(
            request_id=self.request_id,
            tenant=self.tenant,
            reuse=restored.reuse,
            times=RequestTimes(
                arrived_at=self._arrived_at,
                queue_s=(clock.admitted or now) - clock.arrived,
                lookup_s=restored.lookup_s,
                load_s=restored.load_s,
                compute_s=clock.compute_s,
                ttft_s=clock.first_token - clock.arrived if clock.first_token else 0.0,
                decode_s=clock.last_token - clock.first_token,
                preempted_s=clock.preempted_s,
            ),
            num_output_tokens=self.answer.num_tokens,
            num_preemptions=self.num_preemptions,
            plan=restored.mode,
            saved_s=restored.saved_s,
        )
