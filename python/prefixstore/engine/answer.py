"""The answer of one request: tokens become text, and some token or text ends it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from prefixstore.engine.detokenizer import Detokenizer, StopStrings
from prefixstore.engine.handle import RequestHandle
from prefixstore.engine.outputs import FinishReason, OutputDelta, RequestReport
from prefixstore.engine.sampler import SampledToken
from prefixstore.engine.sampling import SamplingParams


class Answer:
    """Puts the pieces of an answer into a handle.

    The piece that ends it waits for its report: `push` says that it has ended, `end` sends it.

    Args:
        handle: Gets the pieces.
        sampling: When the answer ends.
        max_tokens: New tokens at most, whatever `sampling` says.
        eos_ids: Tokens with which the model ends an answer.
        tokenizer: A `transformers.PreTrainedTokenizerBase`.
    """

    def __init__(
        self,
        handle: RequestHandle,
        sampling: SamplingParams,
        max_tokens: int,
        eos_ids: Collection[int],
        tokenizer: Any,
    ) -> None:
        self.handle = handle
        self.num_tokens = 0
        self._max_tokens = min(max_tokens, sampling.max_tokens)
        own_ids = () if sampling.ignore_eos else eos_ids
        self._stop_ids = frozenset((*own_ids, *sampling.stop_token_ids))
        self._detokenizer = Detokenizer(tokenizer)
        self._stop_strings = StopStrings(sampling.stop)
        self._last = OutputDelta("", ())  # not sent yet

    def push(self, token: SampledToken) -> FinishReason | None:
        """The next token; returns why the answer ends with it, if it does."""
        self.num_tokens += 1
        reason, text, is_stopped = None, "", False
        if token.token_id in self._stop_ids:
            reason = FinishReason.STOP
        else:
            text, is_stopped = self._stop_strings.push(self._detokenizer.push([token.token_id]))
            if is_stopped:
                reason = FinishReason.STOP
        if reason is None and self.num_tokens == self._max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None and not is_stopped:
            text += self._held_back()
        logprobs = None if token.logprob is None else (token.logprob,)
        delta = OutputDelta(text, (token.token_id,), logprobs=logprobs)
        if reason is None:
            self.handle.put(delta)
        else:
            self._last = delta
        return reason

    def end(self, reason: FinishReason, report: RequestReport, error: str | None = None) -> None:
        """Send the last piece."""
        last = self._last
        self.handle.put(
            OutputDelta(last.text, last.token_ids, reason, report, error, last.logprobs)
        )

    def _held_back(self) -> str:
        """Text that waited for more, of which no more comes."""
        text, is_stopped = self._stop_strings.push(self._detokenizer.finish())
        return text if is_stopped else text + self._stop_strings.finish()
