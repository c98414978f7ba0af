"""What an engine says of a request: pieces of its answer, and at the end what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from prefixstore.reuse_report import ReuseReport


class FinishReason(str, Enum):
    """Why an answer ended."""

    STOP = "stop"  # a stop string, a stop token or the model's end of sequence
    LENGTH = "length"  # max_tokens, or the end of the model's context
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class RequestTimes:
    """Where a request's time went, in seconds.

    `queue_s + lookup_s + load_s + compute_s` add up to about `ttft_s` where loading and computing
    did not overlap.

    Attributes:
        arrived_at: When it was submitted, on the clock of `time.time`.
        queue_s: Until it was admitted.
        lookup_s: Index and tiers asked, and the plan made.
        load_s: Blocks on their way from the tiers, beside computing or alone.
        compute_s: Prompt tokens in forward passes, those of other requests in the same batch
            included.
        ttft_s: From arrival to the first token; 0 if there was none.
        decode_s: From the first token to the last.
        preempted_s: Evicted and waiting to go on.
    """

    arrived_at: float
    queue_s: float = 0.0
    lookup_s: float = 0.0
    load_s: float = 0.0
    compute_s: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    preempted_s: float = 0.0


@dataclass(frozen=True)
class RequestReport:
    """What became of one request.

    Attributes:
        request_id: As it was submitted.
        tenant: Who is served in turn with others.
        reuse: Prompt tokens by where they came from, and why others did not.
        times: Where the time went.
        num_output_tokens: Of the answer.
        num_preemptions: How often it had to give its blocks away.
        plan: What the planner chose: "none" (nothing to load), "recompute", "load" or "both".
        saved_s: Seconds of computing that reuse saved, as the planner reckons, less `load_s`.
    """

    request_id: str
    tenant: str
    reuse: ReuseReport
    times: RequestTimes
    num_output_tokens: int = 0
    num_preemptions: int = 0
    plan: str = "none"
    saved_s: float = 0.0


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token of an answer was, before temperature, top-k and top-p.

    Attributes:
        token_id: The token.
        logprob: Natural logarithm of its probability.
        top: Token and log-probability of the most likely tokens in its place, the most likely
            first, equals by id; as many as asked for, fewer where fewer are possible.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class OutputDelta:
    """The next piece of an answer.

    Attributes:
        text: New text, whole characters only; held back while it may begin a stop string.
        token_ids: New tokens since the last piece, stop tokens included.
        finish_reason: Set in the last piece.
        report: In the last piece.
        error: What went wrong, where `finish_reason` is ERROR.
        logprobs: One for each of `token_ids`; None unless `SamplingParams.logprobs` asks.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    report: RequestReport | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...] = field(repr=False)
    finish_reason: FinishReason
    report: RequestReport
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
