"""Prompts of text, whose lengths and beginnings put a prefix cache to the test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# In blocks and tokens beyond them: whole blocks alone, one token more, one fewer, long and short.
_LENGTHS = ((7, 0), (4, 1), (12, -1), (2, 3), (20, 5), (9, 8))
_SHARED_EVERY = 3  # so many prompts have one among them that begins like the one before


def cut_prompts(
    tokenizer: Any, texts: Sequence[str], count: int, block_size: int
) -> list[list[int]]:
    """Prompts of different lengths around whole blocks; every third begins like the one before.

    Args:
        tokenizer: A `transformers.PreTrainedTokenizerBase`.
        texts: Cut into prompts in their order; the longest is about 23 blocks.
        count: How many prompts.
        block_size: Tokens in a block.

    Raises:
        ValueError: If there is too little text.
    """
    prompts: list[list[int]] = []
    rest: list[int] = []
    left = list(texts)
    for number in range(count):
        num_blocks, beyond = _LENGTHS[number % len(_LENGTHS)]
        length = num_blocks * block_size + beyond
        while len(rest) < length:
            if not left:
                raise ValueError(f"texts: expected enough for {count} prompts, got {number}")
            rest = tokenizer(left.pop(0)).input_ids
        begin: list[int] = []
        if number % _SHARED_EVERY == _SHARED_EVERY - 1:
            begin = prompts[-1][: 3 * block_size + block_size // 2]
        prompts.append(begin + rest[:length])
        rest = rest[length:]
    return prompts
