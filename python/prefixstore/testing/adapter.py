"""What an engine has to offer to be tested: how it is opened, asked, emptied and closed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np

DEVICE = "device"  # where blocks lie that attention reads as they are

Tokens = tuple[int, ...]


class Ability(str, Enum):
    """What not every engine can do; states that need it are left out for the others."""

    BATCHES = "batches"  # several prompts run in one forward pass
    PREEMPTS = "preempts"  # with a pool too small for all, some give their blocks away and go on
    CHUNKS = "chunks"  # prompts are computed in passes of `Setup.max_batch_tokens`
    BITWISE = "bitwise"  # an answer has the same bits whatever is cached or in the batch


@dataclass(frozen=True)
class Setup:
    """How an engine is to be opened.

    Attributes:
        codec: One of `kvkernels.CODECS`, for all that tiers hold.
        tiers: URLs, see `prefixstore.tier_urls`; what they hold outlives the engine, but for
            `memory://`.
        block_size: Tokens in a block.
        pool_tokens: Tokens that the device holds, a whole number of blocks.
        max_batch_tokens: Tokens of one forward pass.
        max_running: Prompts in one batch.
    """

    codec: str
    tiers: Sequence[str]
    block_size: int
    pool_tokens: int
    max_batch_tokens: int
    max_running: int


@dataclass(frozen=True)
class Answer:
    """What came of one prompt.

    Attributes:
        tokens: Greedy ones, as many as were asked for, an end of sequence like any other.
        logprobs: Natural logarithm of each one's probability; empty if not known.
        first_logits: `[vocab_size]`, float32: the logits that the first token was chosen by; None
            if not known.
        reused: Prompt tokens that were not computed, by where they lay: DEVICE or a tier's name;
            None if not known.
        num_declined: Prompt tokens that a tier held and that were computed all the same: it was
            slow, or the pool full.
        num_preemptions: Times it had to give its blocks away.
    """

    tokens: Tokens
    logprobs: tuple[float, ...] = ()
    first_logits: np.ndarray | None = field(default=None, repr=False)
    reused: Mapping[str, int] | None = None
    num_declined: int = 0
    num_preemptions: int = 0


class Subject(Protocol):
    """An engine that is open."""

    def answer(self, prompts: Sequence[Tokens], num_new: int, salt: str) -> list[Answer]:
        """Greedy answers of `num_new` tokens, all prompts asked at once.

        Blocks of different salts must never meet. What was asked before may be reused.
        """
        ...

    def flush(self) -> None:
        """Wait until the tiers hold all that was computed."""
        ...

    def evict(self) -> None:
        """Give up what the device holds."""
        ...

    def check(self) -> list[str]:
        """Recount whatever it counts; a line for each thing that is wrong."""
        ...

    def close(self) -> None:
        """Write out what waits to be written, and end."""
        ...


class Adapter(Protocol):
    """A kind of engine, with a model."""

    @property
    def name(self) -> str:
        """In the report."""
        ...

    @property
    def abilities(self) -> frozenset[Ability]: ...

    def open(self, setup: Setup) -> Subject:
        """An engine with nothing on its device, over tiers that may hold what another wrote."""
        ...
