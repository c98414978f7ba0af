"""From a request's text or messages to token ids, off the event loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from prefixstore.server.errors import ApiError
from prefixstore.server.schema import Message
from prefixstore.server.transcripts import Transcripts
from prefixstore.server.worker import Worker

# What a template raises that is given what it does not expect: its own complaint, or a slip.
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
        worker: Does it.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, worker: Worker) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._transcripts = Transcripts(tokenizer)
        self._worker = worker

    async def read_text(self, text: str) -> Prompt:
        """A text as the tokenizer cuts it, with the special tokens it begins texts with."""
        return await self._worker.run(self._read_text, text)

    def read_ids(self, token_ids: Sequence[int]) -> Prompt:
        """A prompt that came as token ids.

        Raises:
            ApiError: 400 if the model does not know one: it could not be decoded for an echo.
        """
        wrong = [one for one in (min(token_ids), max(token_ids)) if not 0 <= one < self._vocab_size]
        if wrong:
            message = f"prompt: expected token ids 0 to {self._vocab_size - 1}, got {wrong[0]}"
            raise ApiError(400, message, param="prompt", code="invalid_value")
        return Prompt(token_ids, None)

    async def read_chat(self, messages: Sequence[Message], salt: str) -> Prompt:
        """A chat by the model's template, up to where the next answer begins.

        Raises:
            ApiError: 400 if the model has no template, or it refuses the messages.
        """
        return await self._worker.run(self._read_chat, messages, salt)

    async def remember(
        self, prompt: Prompt, text: str, token_ids: Sequence[int], salt: str
    ) -> None:
        """Let the next turn of a chat begin with the tokens of this one."""
        if prompt.text is not None:
            await self._worker.run(
                self._transcripts.remember, prompt.text, text, prompt.token_ids, token_ids, salt
            )

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a prompt that came as token ids."""
        return await self._worker.run(self._tokenizer.decode, list(token_ids))

    def _read_text(self, text: str) -> Prompt:
        return Prompt(self._tokenizer(text).input_ids, None)

    def _read_chat(self, messages: Sequence[Message], salt: str) -> Prompt:
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
        return Prompt(self._transcripts.encode(text, salt), text)
