"""From a parsed request to its answer: both kinds of completions, whole or as a stream."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from prefixstore.engine import Engine, FinishReason
from prefixstore.errors import EngineClosed, EngineOverloaded, ModelChanged
from prefixstore.server.config import ServerConfig
from prefixstore.server.errors import (
    ApiError,
    context_exceeded,
    internal_error,
    overloaded,
    shutting_down,
)
from prefixstore.server.generation import (
    Choice,
    Generation,
    Job,
    Piece,
    unless_disconnected,
)
from prefixstore.server.lifecycle import Lifecycle
from prefixstore.server.logprobs import TokenTexts
from prefixstore.server.metrics import Latencies
from prefixstore.server.prompts import Prompt, PromptReader
from prefixstore.server.responses import DONE, AnswerForm, describe, event, usage
from prefixstore.server.schema import ChatRequest, CompletionRequest, shown_name
from prefixstore.server.worker import Worker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """What answering takes, the same for all requests.

    Attributes:
        max_choices: Answers of one request: those that `config` allows, and an idle engine takes.
    """

    engine: Engine
    config: ServerConfig
    model_name: str
    max_choices: int
    reading: Worker
    prompts: PromptReader
    texts: TokenTexts
    latencies: Latencies
    lifecycle: Lifecycle

    def check_model(self, name: str) -> None:
        """Raises ApiError, 404, unless it is the one that is served."""
        if name != self.model_name:
            shown = shown_name(name)
            message = f"model: expected {self.model_name!r}, got {shown!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def plan(self, body: ChatRequest | CompletionRequest, prompts: Sequence[Prompt]) -> list[Job]:
        """The answers that are asked for, each to a prompt of the request.

        Raises:
            ApiError: 400 if there are too many, or a prompt leaves no room for a token.
        """
        num_choices = len(prompts) * body.num_answers
        if num_choices > self.max_choices:
            param = "prompt" if len(prompts) > self.max_choices else "n"
            message = f"{param}: expected at most {self.max_choices} answers, got"
            raise ApiError(400, f"{message} {num_choices}", param=param, code="invalid_value")
        jobs: list[Job] = []
        for prompt in prompts:
            max_tokens = self._max_tokens(body, prompt)
            jobs += [
                Job(prompt, body.sampling(max_tokens, number), number == 0)
                for number in range(body.num_answers)
            ]
        return jobs

    async def answer(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        jobs: Sequence[Job],
        form: AnswerForm,
        answer_id: str,
        echoes: Sequence[str],
    ) -> Response:
        """Compute and send.

        Args:
            request: Whom it is for.
            body: What it says.
            jobs: From `plan`.
            form: How the answer is written.
            answer_id: Its id, the engine's too.
            echoes: Text to put before each answer.
        """
        caller, fields = request.state.caller, request.state.log_fields
        fields.update(answer_id=answer_id, stream=bool(body.stream))
        try:
            generation = Generation.submit(self.engine, jobs, caller, answer_id, self.texts)
        except (ValueError, EngineOverloaded, EngineClosed) as error:
            raise self._refusal(error, body) from error
        self.lifecycle.add(generation)
        answering = _Answering(self, generation, form, echoes, caller.salt or "", fields)
        if body.stream:
            wants_usage = body.stream_options is not None and body.stream_options.include_usage
            return _EventStream(answering, wants_usage)
        try:
            return JSONResponse(await unless_disconnected(request.receive, answering.whole()))
        finally:
            answering.end()

    def _refusal(self, error: Exception, body: ChatRequest | CompletionRequest) -> ApiError:
        """What the client is told when the engine takes nothing on."""
        if isinstance(error, EngineOverloaded):
            return overloaded(str(error), self.config.retry_after_s)
        if isinstance(error, EngineClosed):
            return internal_error() if self.engine.has_failed else shutting_down()
        if isinstance(error, ModelChanged):
            logger.error("a request was refused: %s", error)
            return internal_error()
        # The engine names its own argument, the client knows its field.
        message = f"{body.PROMPT}: {str(error).partition(': ')[2] or error}"
        return ApiError(400, message, param=body.PROMPT, code="invalid_value")

    def _max_tokens(self, body: ChatRequest | CompletionRequest, prompt: Prompt) -> int:
        room = self.engine.max_model_len - len(prompt.token_ids)
        if room < 1:
            num_tokens = len(prompt.token_ids)
            raise context_exceeded(body.PROMPT, self.engine.max_model_len, num_tokens)
        if not prompt.token_ids:
            message = f"{body.PROMPT}: expected at least one token, got none"
            raise ApiError(400, message, param=body.PROMPT, code="invalid_value")
        wanted, limit = body.wanted_tokens, self.config.max_tokens
        if wanted is not None and limit is not None and wanted > limit:
            param = "max_tokens" if body.max_tokens else "max_completion_tokens"
            message = f"{param}: expected at most {limit}, got {wanted}"
            raise ApiError(400, message, param=param, code="invalid_value")
        return min(wanted or body.DEFAULT_TOKENS or room, limit or room, room)


@dataclass(frozen=True)
class _Answering:
    """One request on its way to its answer."""

    service: Service
    generation: Generation
    form: AnswerForm
    echoes: Sequence[str]
    salt: str
    log_fields: dict[str, Any]

    async def whole(self) -> dict[str, Any]:
        async for piece in self.generation.pieces(self.service.latencies):
            self._settle(self.generation.choices[piece.index])
        choices = self.generation.choices
        texts = [echo + choice.text for echo, choice in zip(self.echoes, choices, strict=True)]
        return {**self.form.whole(texts, choices), "usage": usage(choices)}

    async def events(self, wants_usage: bool) -> AsyncIterator[bytes]:
        extra = {"usage": None} if wants_usage else {}
        for index, echo in enumerate(self.echoes):
            opening = self.form.opening(index)
            if opening is not None:
                yield event({**opening, **extra})
            if echo:
                yield event({**self.form.piece(Piece(index, echo)), **extra})
        try:
            async for piece in self.generation.pieces(self.service.latencies):
                self._settle(self.generation.choices[piece.index])
                if piece.text or piece.finish_reason is not None:
                    yield event({**self.form.piece(piece), **extra})
        except ApiError as error:
            yield event(error.body)
            return
        if wants_usage:
            yield event(self.form.end(usage(self.generation.choices)))
        yield DONE

    def end(self) -> None:
        """Cancel what is unfinished: nobody waits for it any more."""
        self.service.lifecycle.remove(self.generation)
        for choice in self.generation.choices:
            if choice.finish_reason is None:
                choice.finish_reason = FinishReason.CANCELLED
                self._log(choice)

    def _settle(self, choice: Choice) -> None:
        """Once a choice is finished: log it, remember it, raise what went wrong."""
        if choice.finish_reason is None:
            return
        self._log(choice)
        if choice.finish_reason is FinishReason.CANCELLED:
            raise shutting_down()  # the client is there, or nobody would read this
        if choice.finish_reason is FinishReason.ERROR:
            raise internal_error()
        prompts = self.service.prompts
        prompts.remember(choice.job.prompt, choice.text, choice.token_ids, self.salt)

    def _log(self, choice: Choice) -> None:
        reason = choice.finish_reason.value if choice.finish_reason else None
        line = {
            "finish_reason": reason,
            "prompt_tokens": len(choice.job.prompt.token_ids),
            "output_tokens": len(choice.token_ids),
            "error": choice.error,
            **(describe(choice.report) if choice.report else {}),
        }
        self.log_fields.setdefault("answers", []).append(line)


class _EventStream(StreamingResponse):
    """Server-sent events; however it ends, the engine stops working for it."""

    media_type = "text/event-stream"

    def __init__(self, answering: _Answering, wants_usage: bool) -> None:
        # Proxies that collect an answer before they pass it on are told not to.
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(answering.events(wants_usage), headers=headers)
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answering.end()
