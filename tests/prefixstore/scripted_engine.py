"""An engine that computes nothing, to do what a real one cannot be made to do on demand.

It streams a given answer, one token per step, at the speed that a test wants, fails on demand, and
records its requests and their cancellations.
"""

import asyncio
import itertools
import queue
import threading
import time
from dataclasses import fields
from types import SimpleNamespace

from prefixstore.cache import CacheStats
from prefixstore.engine import (
    FinishReason,
    OutputDelta,
    RequestReport,
    RequestTimes,
    SamplingParams,
)
from prefixstore.errors import EngineClosed, EngineOverloaded
from prefixstore.index import Stats
from prefixstore.session import ReuseReport

COUNTERS = ("num_submitted", "num_refused", "num_running", "num_queued", "num_preemptions")
COUNTERS += ("num_steps", "step_s", "model_s", "prompt_tokens", "computed_tokens")
COUNTERS += ("output_tokens", "num_audits", "audited_blocks", "num_quarantined")
TABLES = ("num_finished", "hit_tokens", "miss_tokens")
PLANNER = ("num_probes", "num_given_up", "computed_blocks", "loaded_blocks", "dropped_blocks")


class ScriptedHandle:
    """The handle of one request."""

    def __init__(self, engine, prompt, sampling, tenant, salt, request_id):
        self.prompt, self.sampling = list(prompt), sampling
        self.tenant, self.salt, self.request_id = tenant, salt, request_id
        self.is_cancelled = False
        self._engine = engine
        self._deltas = queue.SimpleQueue()
        self._listener = None
        self._lock = threading.Lock()
        self._token_ids = engine.answer_ids(sampling)
        self.num_sent = 0

    def cancel(self):
        self.is_cancelled = True

    async def __aiter__(self):
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            self._listener = (loop, arrived)
        while True:
            while not self._deltas.empty():
                delta = self._deltas.get()
                yield delta
                if delta.finish_reason is not None:
                    return
            await arrived.wait()
            arrived.clear()

    def step(self):
        """Send the next piece; returns whether it was the last."""
        if self.is_cancelled:
            return self._put("", (), FinishReason.CANCELLED)
        if self._engine.error is not None and self.num_sent >= self._engine.error_after:
            return self._put("", (), FinishReason.ERROR, self._engine.error)
        token_id, self.num_sent = self._token_ids[self.num_sent], self.num_sent + 1
        is_end = token_id == self._engine.tokenizer.eos_token_id
        reason = None
        if is_end:
            reason = FinishReason.STOP
        elif self.num_sent == self.sampling.max_tokens:
            reason = FinishReason.LENGTH
        text = "" if is_end else self._engine.tokenizer.decode([token_id])
        return self._put(text, (token_id,), reason)

    def _put(self, text, token_ids, reason=None, error=None):
        report = self._report() if reason is not None else None
        self._deltas.put(OutputDelta(text, token_ids, reason, report, error))
        with self._lock:
            if self._listener is not None:
                loop, arrived = self._listener
                if not loop.is_closed():
                    loop.call_soon_threadsafe(arrived.set)
        return reason is not None

    def _report(self):
        num_prompt = len(self.prompt)
        num_reused = (num_prompt - 1) // 16 * 16
        reuse = ReuseReport(num_prompt, {"device": num_reused}, num_prompt - num_reused, 0.001)
        times = RequestTimes(arrived_at=time.time(), queue_s=0.001, ttft_s=0.002, decode_s=0.01)
        return RequestReport(self.request_id, self.tenant, reuse, times, self.num_sent)


class ScriptedEngine:
    """See the module; with `error`, requests end with it after `error_after` tokens."""

    def __init__(
        self,
        tokenizer,
        answer="The pool keeps blocks.",
        *,
        step_s=0.0,
        max_running=64,
        max_queued=1024,
        max_model_len=512,
        error=None,
        error_after=0,
        is_endless=False,
    ):
        self.tokenizer, self.max_model_len, self.step_s = tokenizer, max_model_len, step_s
        self.vocab_size = len(tokenizer)
        self.max_running, self.max_queued = max_running, max_queued
        self.config = SimpleNamespace(max_queued=max_queued, max_running=max_running)
        self.error, self.error_after, self.is_endless = error, error_after, is_endless
        self.answer = answer
        self.asked = []  # all handles, in order
        self.running, self.queued = [], []
        self.is_draining = self.is_closed = self.was_flushed = self.has_failed = False
        self.has_changed_model = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def answer_ids(self, sampling):
        ids = self.tokenizer(self.answer, add_special_tokens=False).input_ids
        if self.is_endless:
            return list(itertools.islice(itertools.cycle(ids), sampling.max_tokens))
        return [*ids, self.tokenizer.eos_token_id]

    def submit(self, prompt, sampling=None, *, tenant="", salt=None, request_id=None):
        with self._changed:
            if self.is_draining:
                raise EngineClosed("the engine is draining")
            if len(self.queued) + len(self.running) >= self.max_queued + self.max_running:
                raise EngineOverloaded(f"expected fewer than {self.max_queued} waiting requests")
            if not all(0 <= token_id < len(self.tokenizer) for token_id in prompt):
                raise ValueError("prompt: expected token ids of the vocabulary, got others")
            sampling = sampling or SamplingParams()
            handle = ScriptedHandle(self, prompt, sampling, tenant, salt, request_id)
            self.asked.append(handle)
            self.queued.append(handle)
            self._changed.notify()
        return handle

    def stats(self):
        """All zeros except one: only a real engine counts."""
        index = Stats(*[0] * len(fields(Stats)))
        counters = dict.fromkeys(COUNTERS, 0) | {name: {} for name in TABLES}
        counters["num_running"] = len(self.running)
        cache = CacheStats(0, 0, {}, 0, 0, 0, (), index, None)
        planner = SimpleNamespace(modes={}, **dict.fromkeys(PLANNER, 0))
        return SimpleNamespace(**counters, planner=planner, cache=cache)

    @property
    def cache(self):
        return SimpleNamespace(tier_stats=dict, flush=self._flush)

    def _flush(self, timeout_s):
        self.was_flushed = True
        return True

    def drain(self, timeout_s):
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self.is_draining = True
            while self.running or self.queued:
                if time.monotonic() >= deadline:
                    return False
                self._changed.wait(0.01)
        return True

    def close(self):
        with self._changed:
            self.is_draining = self.is_closed = True
            self._changed.notify()
        self._thread.join(10)

    def _run(self):
        while True:
            with self._changed:
                while not self.running and not self.queued:
                    if self.is_closed:
                        return
                    self._changed.wait()
                self.queued, gone = _split(self.queued, lambda one: not one.is_cancelled)
                room = self.max_running - len(self.running)
                self.running += self.queued[:room]
                self.queued = self.queued[room:]
                batch = list(self.running)
            done = {id(handle) for handle in batch + gone if handle.step()}
            with self._changed:
                self.running = [one for one in self.running if id(one) not in done]
                self._changed.notify_all()
            time.sleep(self.step_s)


def _split(handles, keep):
    return [one for one in handles if keep(one)], [one for one in handles if not keep(one)]
