"""From a request's text or messages to token ids, off the event loop."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from prefixstore.server.errors import ApiError, context_exceeded
from prefixstore.server.keys import Caller
from prefixstore.server.schema import Message
from prefixstore.server.transcripts import Transcripts
from prefixstore.server.worker import Worker

logger = logging.getLogger(__name__)

# Of a text longer than this many characters per token of the context, the beginning is tokenized
# first: it mostly shows that the whole is too long, in a fraction of the time.
_CHARACTERS_PER_TOKEN = 8
# At the cut, a beginning may have more tokens than the whole text has there; never this many.
_TOKENS_AT_A_CUT = 256
_MAX_REMEMBERING = 256  # finished chats waiting to be remembered; further ones are not

# What templates raise for messages they do not expect: their own complaint, or an accident.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        token_ids: What the engine is given.
        text: Of a chat, as the template rendered it; None of a completion. That may begin with
            special tokens which its text does not name, so no chat is to begin with its tokens.
    """

    token_ids: Sequence[int]
    text: str | None


class PromptReader:
    """Renders and tokenizes.

    Args:
        tokenizer: The model's.
        vocab_size: How many token ids the model knows; a tokenizer may know fewer.
        max_model_len: Tokens of the model's context.
        worker: Does it.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, max_model_len: int, worker: Worker) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._transcripts = Transcripts(tokenizer)
        self._max_model_len = max_model_len
        self._worker = worker
        # A thread of its own: an answer is remembered before its last word is sent, and must not
        # wait for prompts.
        self._memory = ThreadPoolExecutor(1, "kvkernels-transcripts")
        self._remembering: deque[Future[None]] = deque()

    async def read_text(self, text: str, tenant: str) -> Prompt:
        """A text as the tokenizer cuts it, with the special tokens it begins texts with.

        Raises:
            ApiError: 400 if it is much too long; 429 as the worker.
        """
        return await self._worker.run(tenant, len(text), self._read_text, text)

    def read_ids(self, token_ids: Sequence[int]) -> Prompt:
        """A prompt that came as token ids.

        Raises:
            ApiError: 400 if the model does not know one: it could not be decoded for an echo.
        """
        if len(token_ids) >= self._max_model_len:
            return Prompt(token_ids, None)  # too long, whatever they are
        wrong = [one for one in (min(token_ids), max(token_ids)) if not 0 <= one < self._vocab_size]
        if wrong:
            message = f"prompt: expected token ids 0 to {self._vocab_size - 1}, got {wrong[0]}"
            raise ApiError(400, message, param="prompt", code="invalid_value")
        return Prompt(token_ids, None)

    async def read_chat(
        self, messages: Sequence[Message], num_bytes: int, caller: Caller
    ) -> Prompt:
        """A chat by the model's template, up to where the next answer begins.

        Args:
            messages: Of the chat.
            num_bytes: Of the request they came in.
            caller: Only chats of the same salt are gone on from.

        Raises:
            ApiError: 400 if the model has no template, or it refuses the messages, or they are
                much too long; 429 as the worker.
        """
        arguments = messages, caller.salt or "", tuple(self._remembering)
        return await self._worker.run(caller.tenant, num_bytes, self._read_chat, *arguments)

    def remember(self, prompt: Prompt, text: str, token_ids: Sequence[int], salt: str) -> None:
        """Let a next turn of a chat, read from now on, begin with the tokens of this one."""
        while self._remembering and self._remembering[0].done():
            self._remembering.popleft()
        if prompt.text is None or len(self._remembering) >= _MAX_REMEMBERING:
            return
        remembering = self._memory.submit(
            self._transcripts.remember, prompt.text, text, prompt.token_ids, token_ids, salt
        )
        remembering.add_done_callback(_log_failure)
        self._remembering.append(remembering)

    async def decode(self, token_ids: Sequence[int], tenant: str) -> str:
        """The text of a prompt that came as token ids."""
        ids = list(token_ids)
        return await self._worker.run(tenant, len(ids), self._tokenizer.decode, ids)

    def _read_text(self, text: str) -> Prompt:
        self._check_length(text, "prompt")
        return Prompt(self._tokenizer(text).input_ids, None)

    def _read_chat(
        self, messages: Sequence[Message], salt: str, remembering: Sequence[Future[None]]
    ) -> Prompt:
        if not self._tokenizer.chat_template:
            raise ApiError(
                400,
                "messages: expected a model with a chat template, got one without; use"
                " /v1/completions",
                param="messages",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [message.for_template() for message in messages],
                tokenize=False,
                add_generation_prompt=True,
            )
        except (*_TEMPLATE_ERRORS, RecursionError) as error:
            message = f"messages: expected what the model's chat template takes: {error}"
            raise ApiError(400, message, param="messages", code="invalid_value") from error
        self._check_length(text, "messages")
        wait(remembering)
        return Prompt(self._transcripts.encode(text, salt), text)

    def _check_length(self, text: str, param: str) -> None:
        """Raises ApiError if the beginning of a long text shows that it does not fit."""
        num_characters = _CHARACTERS_PER_TOKEN * self._max_model_len
        while num_characters < len(text):
            start = self._tokenizer(text[:num_characters], add_special_tokens=False).input_ids
            num_certain = len(start) - _TOKENS_AT_A_CUT
            if num_certain >= self._max_model_len:
                raise context_exceeded(param, self._max_model_len, f"at least {num_certain}")
            num_characters *= 4


def _log_failure(remembering: Future[None]) -> None:
    if not remembering.cancelled() and remembering.exception() is not None:
        logger.error("a chat was not remembered", exc_info=remembering.exception())
