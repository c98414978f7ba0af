"""The answers as OpenAI's clients read them: whole, and in pieces."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from prefixstore.engine import FinishReason, RequestReport
from prefixstore.server.generation import Choice, Piece
from prefixstore.server.logprobs import ShownToken, TokenText

DONE = b"data: [DONE]\n\n"


class AnswerForm(Protocol):
    """How one endpoint writes its answers."""

    def whole(self, texts: Sequence[str], choices: Sequence[Choice]) -> dict[str, Any]:
        """All answers; `texts` are those of `choices`, with what is put before them."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first piece of a stream's choice, before any text."""

    def piece(self, piece: Piece) -> dict[str, Any]:
        """A piece of a stream."""

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

    def end(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._body([]), "usage": usage}


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
                    "logprobs": _chat_logprobs(choice.shown) if choice.reader else None,
                    "finish_reason": _reason(choice.finish_reason),
                }
                for index, (text, choice) in enumerate(zip(texts, choices, strict=True))
            ]
        )

    def opening(self, index: int) -> dict[str, Any]:
        return self._chunk(Piece(index), {"role": "assistant", "content": ""})

    def piece(self, piece: Piece) -> dict[str, Any]:
        return self._chunk(piece, {"content": piece.text} if piece.text else {})

    def _chunk(self, piece: Piece, delta: dict[str, str]) -> dict[str, Any]:
        choice = {
            "index": piece.index,
            "delta": delta,
            "logprobs": _chat_logprobs(piece.shown) if piece.shown else None,
            "finish_reason": _reason(piece.finish_reason),
        }
        return self._body([choice])


class CompletionForm(_Form):
    """`text_completion`; a stream's pieces have the same form."""

    def __init__(self, answer_id: str, model: str) -> None:
        super().__init__(answer_id, model, "text_completion")

    def whole(self, texts: Sequence[str], choices: Sequence[Choice]) -> dict[str, Any]:
        return self._body(
            [
                _text_choice(
                    Piece(index, text, choice.shown, choice.finish_reason),
                    has_logprobs=choice.reader is not None,
                )
                for index, (text, choice) in enumerate(zip(texts, choices, strict=True))
            ]
        )

    def opening(self, index: int) -> None:
        return None

    def piece(self, piece: Piece) -> dict[str, Any]:
        return self._body([_text_choice(piece, has_logprobs=bool(piece.shown))])


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


def _text_choice(piece: Piece, *, has_logprobs: bool) -> dict[str, Any]:
    return {
        "index": piece.index,
        "text": piece.text,
        "logprobs": _text_logprobs(piece.shown) if has_logprobs else None,
        "finish_reason": _reason(piece.finish_reason),
    }


def _chat_logprobs(shown: Sequence[ShownToken]) -> dict[str, Any]:
    content = [
        {
            **_chat_token(one.token, one.logprob),
            "top_logprobs": [_chat_token(token, logprob) for token, logprob in one.top],
        }
        for one in shown
    ]
    return {"content": content, "refusal": None}


def _chat_token(token: TokenText, logprob: float) -> dict[str, Any]:
    return {"token": token.text, "logprob": logprob, "bytes": list(token.data)}


def _text_logprobs(shown: Sequence[ShownToken]) -> dict[str, Any]:
    return {
        "tokens": [one.token.text for one in shown],
        "token_logprobs": [one.logprob for one in shown],
        "top_logprobs": [_text_table(one) for one in shown],
        "text_offset": [one.offset for one in shown],
    }


def _text_table(one: ShownToken) -> dict[str, float]:
    """The most likely tokens and the answer's own; of several that read the same the likeliest."""
    table: dict[str, float] = {}
    for token, logprob in (*one.top, (one.token, one.logprob)):
        table.setdefault(token.text, logprob)
    return table


def _reason(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value
