"""The prompts of one agent loop: the same documents first, a different question last."""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from prefixstore.errors import ConfigError

SYSTEM_PROMPT = (
    "You are a helpful assistant. You advise a small agency in India that has to choose a web"
    " framework. Answer from the documents below, briefly."
)
# What an agent's file-reading tool returns of one document, in characters.
EXCERPT_CHARS = 6000


@dataclass(frozen=True)
class Document:
    """A document of one library: where it comes from and its text."""

    library: str
    source: str
    text: str


@dataclass(frozen=True)
class Question:
    """A question of the loop; `heading` is the part of a document it asks about, or empty."""

    text: str
    heading: str


@dataclass(frozen=True)
class Briefing:
    """What all prompts of a loop begin with: the system prompt, and the documents it holds."""

    text: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """One request of the loop: the question, and the whole prompt as token ids."""

    question: str
    token_ids: list[int]


@dataclass(frozen=True)
class AgentLoop:
    """Requests whose prompts begin with the same `num_shared_tokens` tokens.

    Attributes:
        requests: In the order an agent would send them.
        num_shared_tokens: Length of the longest prefix that all prompts have in common.
        sources: The documents in the shared part, in order.
    """

    requests: tuple[Request, ...]
    num_shared_tokens: int
    sources: tuple[str, ...]


def load_documents() -> list[Document]:
    """The documents that come with the package (data/NOTICE says whose they are)."""
    packed = files("prefixstore.demo").joinpath("data/agent_docs.jsonl.xz").read_bytes()
    rows = map(json.loads, lzma.decompress(packed).decode().splitlines())
    return [Document(row["lib"], row["src"], row["text"]) for row in rows]


def load_questions() -> list[Question]:
    """The questions that come with the package, in the order of the loop."""
    text = files("prefixstore.demo").joinpath("data/agent_followups.jsonl").read_text("utf-8")
    rows = map(json.loads, text.splitlines())
    return [Question(row["q"], row.get("heading", "")) for row in rows]


def build_agent_loop(
    tokenizer: Any, *, num_requests: int, prefix_tokens: int, seed: int = 0
) -> AgentLoop:
    """The prompts of a loop of `num_requests` requests; the same arguments give the same prompts.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        num_requests: At most as many as there are questions (100).
        prefix_tokens: About how many tokens all prompts share.
        seed: Chooses the documents.

    Raises:
        ConfigError: If there are fewer questions or less text than asked for.
    """
    questions = load_questions()
    if not 1 <= num_requests <= len(questions):
        raise ConfigError(f"requests: expected 1 to {len(questions)}, got {num_requests}")

    def shared_ids(text: str) -> list[int]:
        return _token_ids(tokenizer, _render(tokenizer, text, "\0").partition("\0")[0])

    briefing = build_briefing(
        lambda text: len(shared_ids(text)), prefix_tokens=prefix_tokens, seed=seed
    )
    requests = tuple(
        Request(question.text, _prompt_ids(tokenizer, briefing.text, question.text))
        for question in order_questions(questions, briefing)[:num_requests]
    )
    shared = shared_ids(briefing.text)
    for request in requests:
        shared = shared[: _common_length(shared, request.token_ids)]
    return AgentLoop(requests, len(shared), briefing.sources)


def build_briefing(
    count_tokens: Callable[[str], int], *, prefix_tokens: int, seed: int = 0
) -> Briefing:
    """The system prompt and as much of the documents as fits.

    Args:
        count_tokens: Tokens of a prompt up to the question, given the briefing's text.
        prefix_tokens: About how many those are to be; fewer by less than a word's.
        seed: Chooses the documents.

    Raises:
        ConfigError: If there is less text than asked for, or the system prompt alone is longer.
    """
    excerpts = _choose_excerpts(load_documents(), seed)
    text = _cut_to_tokens(count_tokens, SYSTEM_PROMPT + "".join(excerpts.values()), prefix_tokens)
    return Briefing(text, tuple(source for source in excerpts if source in text))


def order_questions(questions: list[Question], briefing: Briefing) -> list[Question]:
    """Questions about what is in the briefing first; otherwise in the order of the loop."""
    return sorted(questions, key=lambda question: question.heading not in briefing.text)


def _choose_excerpts(documents: list[Document], seed: int) -> dict[str, str]:
    """Beginnings of documents by source, in the order of the prompt: Next.js, the other, ..."""
    shuffle = random.Random(seed).shuffle
    ours = [document for document in documents if document.library == "Next.js"]
    others = [document for document in documents if document.library != "Next.js"]
    shuffle(ours)
    shuffle(others)
    pairs = zip(ours, others, strict=False)
    return {
        document.source: f"\n\n# {document.library}: {document.source}\n\n"
        + document.text[:EXCERPT_CHARS].rstrip()
        for pair in pairs
        for document in pair
    }


def _cut_to_tokens(count_tokens: Callable[[str], int], briefing: str, prefix_tokens: int) -> str:
    """The beginning of `briefing` whose chat prompt is `prefix_tokens` long up to the question."""

    def num_tokens(num_chars: int) -> int:
        return count_tokens(briefing[:num_chars])

    low, high = len(SYSTEM_PROMPT), min(len(briefing), 8 * prefix_tokens)
    if num_tokens(low) > prefix_tokens:
        raise ConfigError(
            f"prefix-tokens: expected at least {num_tokens(low)} (the system prompt),"
            f" got {prefix_tokens}"
        )
    if num_tokens(high) < prefix_tokens:
        raise ConfigError(
            f"prefix-tokens: expected at most {num_tokens(high)} (all documents),"
            f" got {prefix_tokens}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        if num_tokens(middle) <= prefix_tokens:
            low = middle
        else:
            high = middle
    # Between words, so that the text does not end in half a word.
    at_word = len(briefing[:low].rsplit(None, 1)[0])
    return briefing[: max(at_word, len(SYSTEM_PROMPT))]


def _prompt_ids(tokenizer: Any, briefing: str, question: str) -> list[int]:
    return _token_ids(tokenizer, _render(tokenizer, briefing, question))


def _render(tokenizer: Any, briefing: str, question: str) -> str:
    """The chat prompt as text."""
    messages = [
        {"role": "system", "content": briefing},
        {"role": "user", "content": question},
    ]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _common_length(left: list[int], right: list[int]) -> int:
    pairs = zip(left, right, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
