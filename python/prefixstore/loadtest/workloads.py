"""What is replayed: an agent loop, an airline's agent episodes, and short chats."""

from __future__ import annotations

import hashlib
import json
import lzma
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from prefixstore.demo.prompts import build_briefing, load_questions, order_questions
from prefixstore.errors import ConfigError

Message = dict[str, str]  # {"role": ..., "content": ...}
CountTokens = Callable[[str], int]

# Characters of a token, for servers whose tokenizer is not at hand. Of the documents SmolLM2's
# tokenizer makes tokens of 3.67; of episodes, which are JSON, dates and ids, at least of 2.3.
DOCUMENT_CHARS = 3.67
EPISODE_CHARS = 2.2
# What a chat template adds to each message, about.
TEMPLATE_TOKENS = 6
# Of the longest question, and of what `mark` adds.
QUESTION_TOKENS = 100
ASSISTANT = "You are a helpful assistant."
# Episodes and chats take turns with so many others, or with as many as there are workers.
MIN_LIVE = 8


@dataclass(frozen=True)
class Turn:
    """One request of a conversation.

    Attributes:
        messages: What is added to the conversation before the request.
        answer: What is added after it, whatever the server says; None for what the server says.
    """

    messages: tuple[Message, ...]
    answer: str | None


@dataclass(frozen=True)
class Conversation:
    """Requests that follow one another: each has all messages before it as its history."""

    name: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Shape:
    """How conversations are cut to fit.

    Attributes:
        prefix_tokens: What the requests of the agent loop share, about.
        context_tokens: What the server takes, prompt and answer together.
        max_tokens: Of an answer.
        count_tokens: The model's tokenizer; None to reckon by characters.
    """

    prefix_tokens: int = 7000
    context_tokens: int = 8192
    max_tokens: int = 32
    count_tokens: CountTokens | None = None


def build_agent_loop(shape: Shape, seed: int) -> list[Conversation]:
    """100 questions about the same documents: conversations of one turn that share all but that.

    Raises:
        ConfigError: If there is less text than asked for, or it does not fit the context.
    """
    count = shape.count_tokens or _by_characters(DOCUMENT_CHARS)
    most = shape.context_tokens - shape.max_tokens - QUESTION_TOKENS
    if shape.prefix_tokens > most:
        raise ConfigError(
            f"prefix-tokens: expected at most {most} (the context less question and answer), got"
            f" {shape.prefix_tokens}"
        )
    briefing = build_briefing(
        lambda text: count(text) + TEMPLATE_TOKENS, prefix_tokens=shape.prefix_tokens, seed=seed
    )
    system = {"role": "system", "content": briefing.text}
    return [
        Conversation(
            f"question {number}",
            (Turn((system, {"role": "user", "content": question.text}), None),),
        )
        for number, question in enumerate(order_questions(load_questions(), briefing))
    ]


def build_episodes(shape: Shape, seed: int) -> list[Conversation]:
    """Episodes of an airline's agent, in an order of their own for each seed.

    The agent's recorded messages are its history, so every server is sent the same requests. An
    episode ends before the turn that does not fit the context.

    Raises:
        ConfigError: If not even a first turn fits.
    """
    count = shape.count_tokens or _by_characters(EPISODE_CHARS)
    conversations = []
    for row in load_episodes():
        turns = tuple(_fitting(_turns_of(row["traj"]), count, shape))
        if turns:
            conversations.append(Conversation(f"episode {row['task_id']}", turns))
    if not conversations:
        raise ConfigError(
            "context-tokens: expected room for an episode's first turn and an answer of"
            f" {shape.max_tokens}, got {shape.context_tokens}"
        )
    random.Random(seed).shuffle(conversations)
    return conversations


def build_chats(shape: Shape, seed: int) -> list[Conversation]:
    """80 chats of two questions; the second follows on the server's own answer to the first."""
    conversations = [
        Conversation(
            f"chat {row['question_id']}",
            tuple(Turn(({"role": "user", "content": text},), None) for text in row["turns"]),
        )
        for row in load_chats()
    ]
    random.Random(seed).shuffle(conversations)
    return conversations


WORKLOADS: dict[str, Callable[[Shape, int], list[Conversation]]] = {
    "agent": build_agent_loop,
    "tau": build_episodes,
    "chats": build_chats,
}


def mark(conversations: list[Conversation], key: str) -> list[Conversation]:
    """The same conversations, each beginning with words that only this key has.

    No cache knows them from a replay under another key, so the first one is cold.
    """
    word = hashlib.sha256(key.encode()).hexdigest()[:12]
    line = f"Conversations {word}. "
    return [
        Conversation(one.name, (_with_system(line, one.turns[0]), *one.turns[1:]))
        for one in conversations
    ]


def load_episodes() -> list[dict[str, Any]]:
    """The episodes that come with the package (data/NOTICE says whose they are)."""
    packed = files("prefixstore.loadtest").joinpath("data/tau_airline_dev_trial0.jsonl.xz")
    return [json.loads(row) for row in lzma.decompress(packed.read_bytes()).decode().splitlines()]


def load_chats() -> list[dict[str, Any]]:
    """The chats that come with the package (data/NOTICE says whose they are)."""
    text = files("prefixstore.loadtest").joinpath("data/mt_bench_question.jsonl")
    return [json.loads(row) for row in text.read_text("utf-8").splitlines()]


def as_text(message: dict[str, Any]) -> Message:
    """An episode's message as one that every chat template takes: calls and results are text."""
    content = message["content"] or ""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    for call in message.get("tool_calls", ()):
        function = call["function"]
        name, arguments = json.dumps(function["name"]), function["arguments"]
        content += f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'
    return {"role": message["role"], "content": content}


def _turns_of(messages: list[dict[str, Any]]) -> Iterator[Turn]:
    """A turn for each message of the assistant; what follows the last one is nobody's."""
    before: list[Message] = []
    for message in map(as_text, messages):
        if message["role"] == "assistant":
            yield Turn(tuple(before), message["content"])
            before = []
        else:
            before.append(message)


def _fitting(turns: Iterator[Turn], count: CountTokens, shape: Shape) -> Iterator[Turn]:
    """The turns whose prompt and answer fit the context."""
    num_tokens = 2 * TEMPLATE_TOKENS  # a mark, and the beginning of the answer
    for turn in turns:
        num_tokens += sum(count(one["content"]) + TEMPLATE_TOKENS for one in turn.messages)
        if num_tokens + shape.max_tokens > shape.context_tokens:
            return
        yield turn
        num_tokens += count(turn.answer or "") + TEMPLATE_TOKENS


def _by_characters(chars_per_token: float) -> CountTokens:
    return lambda text: round(len(text) / chars_per_token)


def _with_system(line: str, turn: Turn) -> Turn:
    """The turn with `line` at the beginning of its system message, which it may not have yet."""
    first, *rest = turn.messages
    if first["role"] != "system":
        first, rest = {"role": "system", "content": ASSISTANT}, [first, *rest]
    return Turn(({"role": "system", "content": line + first["content"]}, *rest), turn.answer)
