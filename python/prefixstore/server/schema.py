"""What requests may say. Unknown fields are refused, and so are those that nothing here serves."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from prefixstore.engine import SamplingParams
from prefixstore.engine.sampling import MAX_LOGPROBS
from prefixstore.server.unserved import (
    UNSERVED_OF_CHAT,
    UNSERVED_OF_COMPLETIONS,
    check_unserved,
)
from prefixstore.tokens import text_problem

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_MESSAGES = 10_000  # each takes some 25 µs to be checked, and as long to be rendered
MAX_SHOWN_CHARACTERS = 64  # of a name that the client made up

Text = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, value: Any) -> Any:
        # pydantic would collect an error for each name there is: 700,000 of them in 4 MiB.
        if isinstance(value, dict):
            for name in value:
                if name not in cls.model_fields:
                    raise _error_at(name, "extra_forbidden", cls.__name__)
        return value


class StreamOptions(_Strict):
    """What a stream has beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers who count bytes: never sent

    @field_validator("include_obfuscation")
    @classmethod
    def _check_obfuscation(cls, value: bool, info: ValidationInfo) -> bool:
        return check_unserved(value, info, {"include_obfuscation": (False,)})


class _Generation(_Strict):
    """What both kinds of request have."""

    DEFAULT_TOKENS: ClassVar[int | None] = None  # default `max_tokens`; None for as many as fit

    model: Text
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1 << 31, description="Extension.")
    ignore_eos: bool = Field(default=False, description="Extension.")
    n: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, description="Taken, and not used.")
    metadata: dict[str, str] | None = Field(default=None, description="Taken, and not used.")
    prompt_cache_key: str | None = Field(default=None, description="Taken, and not used.")
    safety_identifier: str | None = Field(default=None, description="Taken, and not used.")

    @field_validator("stop", mode="before")
    @classmethod
    def _read_stop(cls, value: Any) -> list[str]:
        stops = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(one, str) for one in stops):
            raise ValueError("expected a string or a list of strings")
        if len(stops) > MAX_STOPS:
            raise ValueError(f"expected at most {MAX_STOPS} strings, got {len(stops)}")
        if not all(1 <= len(one) <= MAX_STOP_CHARACTERS for one in stops):
            raise ValueError(f"expected strings of 1 to {MAX_STOP_CHARACTERS} characters")
        _check_text(stops)
        return stops

    @field_validator("metadata", mode="before")
    @classmethod
    def _check_metadata(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name, one in value.items():
                if not isinstance(one, str):
                    raise _error_at(name, "string_type", cls.__name__)
        return value

    @field_validator("stream_options")
    @classmethod
    def _check_streams(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and not info.data.get("stream"):
            raise ValueError("expected only with stream = true")
        return value

    @property
    def num_answers(self) -> int:
        """Of each prompt."""
        return 1 if self.n is None else self.n

    @property
    def wanted_tokens(self) -> int | None:
        """Of each answer; None where the request does not say."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Most likely tokens to be told beside each of an answer; None for no log-probabilities."""
        raise NotImplementedError

    def sampling(self, max_tokens: int, choice: int) -> SamplingParams:
        """How the answer `choice` of a prompt is sampled.

        Answers to one prompt differ under one seed too: each counts on from it.
        """
        stop = self.stop if isinstance(self.stop, list) else []
        seed = self.seed
        if seed is not None and choice:
            seed = (seed + choice + (1 << 63)) % (1 << 64) - (1 << 63)
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=seed,
            stop=stop,
            ignore_eos=self.ignore_eos,
            logprobs=self.num_logprobs,
        )


class Message(_Strict):
    """One message of a chat, as the model's template gets it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = Field(default=None, fail_fast=True)
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: Any) -> Any:
        # Clients send answers back as messages, with every absent field as null or [].
        if not isinstance(value, dict):
            return value
        return {name: one for name, one in value.items() if one is not None and one != []}

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        for number, part in enumerate(value):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f'expected text parts {{"type": "text", "text": ...}} at {number}')
        return "\n".join(part["text"] for part in value)

    @field_validator("content", "name", "tool_calls", "tool_call_id")
    @classmethod
    def _check_text(cls, value: Any) -> Any:
        _check_text(value)
        return value

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("expected content")
        return self

    def for_template(self) -> dict[str, Any]:
        role = "system" if self.role == "developer" else self.role
        fields = self.model_dump(exclude_none=True)
        return {"content": "", **fields, "role": role}


class ChatRequest(_Generation):
    """The body of `/v1/chat/completions`."""

    PROMPT: ClassVar = "messages"  # the field that becomes a prompt

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    audio: Any = None
    frequency_penalty: Any = None
    function_call: Any = None
    functions: Any = None
    logit_bias: Any = None
    modalities: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    presence_penalty: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    service_tier: Any = None
    store: Any = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    @field_validator("messages", mode="before")
    @classmethod
    def _check_number(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) > MAX_MESSAGES:
            raise ValueError(f"expected at most {MAX_MESSAGES} messages, got {len(value)}")
        return value

    @field_validator(*UNSERVED_OF_CHAT)
    @classmethod
    def _check_unserved(cls, value: Any, info: ValidationInfo) -> Any:
        return check_unserved(value, info, UNSERVED_OF_CHAT)

    @field_validator("max_completion_tokens")
    @classmethod
    def _check_max_tokens(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("max_tokens") not in (None, value):
            raise ValueError("expected the same as max_tokens, or only one of them")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _check_top_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("expected only with logprobs = true")
        return value

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Generation):
    """The body of `/v1/completions`."""

    PROMPT: ClassVar = "prompt"
    DEFAULT_TOKENS: ClassVar = 16  # as OpenAI's

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    best_of: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None
    presence_penalty: Any = None
    suffix: Any = None

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _read_prompt(cls, value: Any, _: Any) -> Any:
        # By hand: pydantic would try one type after the other, and report for each token what it is
        # not.
        if _is_token_ids(value):
            return value
        if isinstance(value, str):
            _check_text(value)
            return value
        if isinstance(value, list) and value:
            if all(isinstance(one, str) for one in value):
                _check_text(value)
                return value
            if all(_is_token_ids(one) for one in value):
                return value
        raise ValueError("expected a string, token ids, or a list of several of either")

    @field_validator(*UNSERVED_OF_COMPLETIONS)
    @classmethod
    def _check_unserved(cls, value: Any, info: ValidationInfo) -> Any:
        return check_unserved(value, info, UNSERVED_OF_COMPLETIONS)

    @field_validator("logprobs")
    @classmethod
    def _check_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("echo"):
            # Log-probabilities of a prompt are unknown where it is reused instead of computed.
            raise ValueError("expected only without echo: a prompt's tokens have none")
        return value

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or several, all text or all token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _check_text(value: Any) -> None:
    """Raises ValueError if there is text in it, however deep, that no tokenizer takes."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left += [*one, *one.values()]
        elif isinstance(one, list):
            left += one
        elif isinstance(one, str) and (problem := text_problem(one)) is not None:
            raise ValueError(problem)


def shown_name(name: str) -> str:
    """The beginning of a name that the client made up, as an answer may repeat it."""
    return name[:MAX_SHOWN_CHARACTERS].encode("utf-8", "replace").decode()


def _error_at(
    name: str, kind: Literal["extra_forbidden", "string_type"], title: str
) -> ValidationError:
    """What pydantic says of the entry `name`, alone."""
    return ValidationError.from_exception_data(
        title, [{"type": kind, "loc": (shown_name(name),), "input": None}]
    )
