"""An open engine, and what it must and may have of each prompt that it is asked."""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prefixstore.testing.adapter import Adapter, Answer, Setup, Tokens


@dataclass(frozen=True)
class Asked:
    """A prompt and what came of it.

    Attributes:
        prompt: Its tokens.
        answer: The engine's.
        at_least: Tokens of it that were asked before and must be reused.
        at_most: Tokens of it that can have been asked before.
        at_most_device: Of them those that may be on the device.
    """

    prompt: Tokens
    answer: Answer
    at_least: int
    at_most: int
    at_most_device: int


class Stage:
    """An engine for the states of one setup, and what it was asked so far.

    Args:
        adapter: Opens the engine.
        setup: How.
        prompts: All of them.
        num_few: So many, the first ones, for states that cost more.
        num_new: Tokens of each answer.
    """

    def __init__(
        self,
        adapter: Adapter,
        setup: Setup,
        prompts: Sequence[Tokens],
        num_few: int,
        num_new: int,
    ) -> None:
        self.prompts = list(prompts)
        self.few = self.prompts[:num_few]
        self.block_size = setup.block_size
        self._adapter, self._setup = adapter, setup
        self._num_new = num_new
        # What tiers outside this machine keep of other runs is never met.
        self._run = secrets.token_hex(8)
        # By salt: sequences of which something may be known, those that must be, and on the device.
        self._known: defaultdict[str, list[Tokens]] = defaultdict(list)
        self._kept: defaultdict[str, list[Tokens]] = defaultdict(list)
        self._on_device: defaultdict[str, list[Tokens]] = defaultdict(list)
        self._subject = adapter.open(setup)

    def ask(self, prompts: Sequence[Tokens], salt: str) -> list[Asked]:
        """Ask prompts at once."""
        answers = self._answer(prompts, self._num_new, salt)
        whole = _whole(prompts, answers)
        asked = []
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            # One of them may reuse what another has just computed.
            others = whole[:number] + whole[number + 1 :]
            asked.append(
                Asked(
                    prompt,
                    answer,
                    at_least=self._common(prompt, self._kept[salt]),
                    at_most=self._common(prompt, [*self._known[salt], *others]),
                    at_most_device=self._common(prompt, [*self._on_device[salt], *others]),
                )
            )
        self._note(prompts, whole, salt)
        return asked

    def seed(self, prompts: Sequence[Tokens], salt: str) -> None:
        """Have prompts cached."""
        answers = self._answer(prompts, 1, salt)
        self._note(prompts, _whole(prompts, answers), salt)

    def seed_missing(self, prompts: Sequence[Tokens], salt: str) -> None:
        """Have those of the prompts cached that are not."""
        missing = [prompt for prompt in prompts if prompt not in self._kept[salt]]
        if missing:
            self.seed(missing, salt)

    def evict(self) -> None:
        """What was asked comes from the tiers from now on."""
        self._subject.flush()
        self._subject.evict()
        self._on_device.clear()

    def flush(self) -> None:
        """The tiers hold what was asked."""
        self._subject.flush()

    def restart(self) -> None:
        """Close the engine and open it over the same tiers."""
        self.close()
        self._subject = self._adapter.open(self._setup)
        self._on_device.clear()

    def check(self) -> list[str]:
        return self._subject.check()

    def close(self) -> None:
        self._subject.close()

    def _answer(self, prompts: Sequence[Tokens], num_new: int, salt: str) -> list[Answer]:
        answers = self._subject.answer(prompts, num_new, f"{self._run} {salt}")
        wanted = [num_new] * len(prompts)
        got = [len(answer.tokens) for answer in answers]
        if got != wanted:
            raise ValueError(
                f"answer: expected {len(prompts)} answers of {num_new} tokens, got lengths {got}"
            )
        return answers

    def _note(self, prompts: Sequence[Tokens], whole: Sequence[Tokens], salt: str) -> None:
        self._known[salt] += whole
        self._on_device[salt] += whole
        # Of an answer nothing need be kept.
        self._kept[salt] += prompts

    def _common(self, prompt: Tokens, others: Iterable[Tokens]) -> int:
        """Tokens of the whole blocks that a prompt has in common with some other, its last one
        left out: it is always computed."""
        longest = max((_common_length(prompt[:-1], other) for other in others), default=0)
        return longest // self.block_size * self.block_size


def _whole(prompts: Sequence[Tokens], answers: Sequence[Answer]) -> list[Tokens]:
    return [(*prompt, *answer.tokens) for prompt, answer in zip(prompts, answers, strict=True)]


def _common_length(left: Tokens, right: Tokens) -> int:
    pairs = zip(left, right, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
