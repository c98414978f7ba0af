"""The answers as OpenAI's clients read them: whole, and in pieces."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from prefixstore.engine import FinishReason, RequestReport
from prefixstore.server.generation import Choice

DONE = b"data: [DONE]\n\n"


class AnswerForm(Protocol):
    """How one endpoint writes its answers."""

    def whole(self, texts: Sequence[str], choices: Sequence[Choice]) -> dict[str, Any]:
        """All answers; `texts` are those of `choices`, with what is put before them."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first piece of a stream's choice, before any text."""

    def piece(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        """A piece of a stream; `reason` in the last one of the choice."""

    def end(self, usage: dict[str, Any]) -> dict[str, Any]:
        """What a stream ends with if it was asked for its usage."""


class _Form:
    def __init__(self, answer_id: str, model: str, kind: str) -> None:
        self._head = {
            "id": answer_id,
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def _body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "choices": choices}


class ChatForm(_Form):
    """`chat.completion`, and `chat.completion.chunk` of a stream."""

    def __init__(self, answer_id: str, model: str, is_stream: bool) -> None:
        kind = "chat.completion.chunk" if is_stream else "chat.completion"
        super().__init__(answer_id, model, kind)

    def whole(self, texts: Sequence[str], choices: Sequence[Choice]) -> dict[str, Any]:
        return self._body(
            [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": text, "refusal": None},
                    "logprobs": None,
                    "finish_reason": _reason(choice.finish_reason),
                }
                for index, (text, choice) in enumerate(zip(texts, choices, strict=True))
            ]
        )

    def opening(self, index: int) -> dict[str, Any]:
        return self._chunk(index, {"role": "assistant", "content": ""}, None)

    def piece(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        return self._chunk(index, {"content": text} if text else {}, reason)

    def end(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._body([]), "usage": usage}

    def _chunk(
        self, index: int, delta: dict[str, str], reason: FinishReason | None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None}
        return self._body([{**choice, "finish_reason": _reason(reason)}])


class CompletionForm(_Form):
    """`text_completion`; a stream's pieces have the same form."""

    def __init__(self, answer_id: str, model: str) -> None:
        super().__init__(answer_id, model, "text_completion")

    def whole(self, texts: Sequence[str], choices: Sequence[Choice]) -> dict[str, Any]:
        return self._body(
            [
                _text_choice(index, text, choice.finish_reason)
                for index, (text, choice) in enumerate(zip(texts, choices, strict=True))
            ]
        )

    def opening(self, index: int) -> None:
        return None

    def piece(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        return self._body([_text_choice(index, text, reason)])

    def end(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._body([]), "usage": usage}


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens of finished answers; `kvkernels` says of each what was reused, and how long it took.

    Several answers to one prompt count it once, as reused as the first of them found it.
    """
    first = [choice for choice in choices if choice.job.is_first]
    prompt_tokens = sum(len(choice.job.prompt.token_ids) for choice in first)
    completion_tokens = sum(len(choice.token_ids) for choice in choices)
    cached_tokens = sum(choice.report.reuse.num_reused for choice in first if choice.report)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "kvkernels": [describe(choice.report) for choice in choices if choice.report],
    }


def describe(report: RequestReport) -> dict[str, Any]:
    """What became of one request, for clients and the log."""
    return {
        "request_id": report.request_id,
        "cached_tokens_by_tier": report.reuse.tokens_by_tier,
        "computed_tokens": report.reuse.num_recomputed,
        "missed_tokens_by_reason": report.reuse.misses,
        "plan": report.plan,
        "num_preemptions": report.num_preemptions,
        "saved_s": round(report.saved_s, 6),
        **{name: round(value, 6) for name, value in asdict(report.times).items()},
    }


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def _text_choice(index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": _reason(reason)}


def _reason(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value
