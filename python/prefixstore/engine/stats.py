"""What an engine counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from prefixstore.cache import CacheStats
from prefixstore.engine.outputs import FinishReason, RequestReport
from prefixstore.planner import PlannerStats


@dataclass(frozen=True)
class EngineStats:
    """Since the engine was opened, but for what is as of now.

    Attributes:
        num_submitted: Requests taken on.
        num_refused: Requests that found the queue full.
        num_finished: Of those taken on, by the value of their `FinishReason`.
        num_running: In the batch now.
        num_queued: Waiting now.
        num_preemptions: Times a request gave its blocks away.
        num_steps: Forward passes.
        step_s: Seconds of the engine's thread at work: scheduling, computing, sampling.
        model_s: Of them inside the model.
        prompt_tokens: Of the requests whose prompts are computed.
        computed_tokens: Run through the model: prompts, answers, and again after preemption.
        hit_tokens: Prompt tokens reused, by tier.
        miss_tokens: Prompt tokens in whole blocks that were not, by the value of `MissReason`.
        output_tokens: Of all answers.
        num_audits: Prompts whose reused blocks were computed once more to the end, or to the first
            that was wrong.
        audited_blocks: Compared for that.
        num_quarantined: Blocks found wrong or computed on such, not used any more.
        planner: What it chose and believes.
        cache: Of the cache beneath.
    """

    num_submitted: int
    num_refused: int
    num_finished: Mapping[str, int]
    num_running: int
    num_queued: int
    num_preemptions: int
    num_steps: int
    step_s: float
    model_s: float
    prompt_tokens: int
    computed_tokens: int
    hit_tokens: Mapping[str, int]
    miss_tokens: Mapping[str, int]
    output_tokens: int
    num_audits: int
    audited_blocks: int
    num_quarantined: int
    planner: PlannerStats
    cache: CacheStats


class EngineCounts:
    """The sums behind `EngineStats`; under the engine's lock."""

    def __init__(self) -> None:
        self.num_submitted = self.num_refused = self.num_steps = 0
        self.step_s = self.model_s = 0.0
        self.prompt_tokens = self.computed_tokens = self.output_tokens = 0
        self.finished: Counter[str] = Counter()
        self.hit_tokens: Counter[str] = Counter()
        self.miss_tokens: Counter[str] = Counter()

    def add_finished(self, reason: FinishReason, report: RequestReport) -> None:
        """Count a request that has ended."""
        self.finished[reason.value] += 1
        if report.times.ttft_s:
            self.prompt_tokens += report.reuse.num_prompt_tokens
            self.hit_tokens.update(report.reuse.tokens_by_tier)
            self.miss_tokens.update(report.reuse.misses)
        self.output_tokens += report.num_output_tokens
