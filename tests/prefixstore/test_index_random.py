"""The prefix index under seeded random operations; every answer is compared with a plain model."""

import random

import numpy as np
import pytest

from prefixstore.index import Match, RadixIndex
from tests.prefixstore.index_model import Block, IndexModel

SALTS = (b"", b"a", b"a\0b")

# block_size, vocabulary, window_blocks of each group: few tokens make many prompts share and split.
CASES = {
    "one token a block": (1, 2, (None,)),
    "two groups": (2, 2, (None, None)),
    "long runs": (3, 1, (None,)),
    "mostly new": (4, 50, (None, None, None)),
    "a window": (2, 2, (None, 2)),
    "long runs with a window": (1, 1, (None, 3)),
    "mostly new with a window": (4, 50, (None, 2)),
    "two windows": (1, 2, (None, 4, 1)),
    "windows only": (2, 2, (3, 1)),
    "no block but its own": (1, 2, (0,)),
}


class Pair:
    def __init__(
        self, seed: int, block_size: int, vocabulary: int, windows: tuple[int | None, ...]
    ) -> None:
        self.rng = random.Random(seed)
        self.windowed = [group for group, one in enumerate(windows) if one is not None]
        self.index = RadixIndex(block_size, len(windows), windows)
        self.model = IndexModel(block_size, len(windows), windows if self.windowed else None)
        self.vocabulary = vocabulary
        self.last_id = 0
        self.matches: list[tuple[Match, list[Block]]] = []
        self.prompts: list[list[int]] = [[]]

    def prompt(self) -> list[int]:
        """The beginning of an earlier prompt, with a new ending."""
        old = self.rng.choice(self.prompts)
        front = old[: self.rng.randint(0, len(old))]
        length = self.rng.randint(0, 4 * self.model.block_size)
        tokens = front + [self.rng.randrange(self.vocabulary) for _ in range(length)]
        tokens = tokens[: 12 * self.model.block_size]
        self.prompts = [*self.prompts[-7:], tokens]
        return tokens

    def new_id(self) -> int:
        self.last_id += 1
        return -1 if self.rng.random() < 0.2 else self.last_id

    def match(self) -> None:
        tokens, salt = self.prompt(), self.rng.choice(SALTS)
        kind = self.rng.choice(("match", "match", "peek"))
        match = getattr(self.index, kind)(tokens, salt)
        run = getattr(self.model, kind)(tokens, salt)
        assert match.num_tokens == len(run) * self.model.block_size
        assert match.block_ids.shape == (len(run), self.model.num_groups)
        assert match.block_ids.tolist() == [block.ids for block in run]
        self.matches = [*self.matches[-30:], (match, run)]

    def insert(self) -> None:
        tokens, salt = self.prompt(), self.rng.choice(SALTS)
        most = len(tokens) // self.model.block_size
        num_blocks = self.rng.choice([most, self.rng.randint(0, most)])
        ids = [[self.new_id() for _ in range(self.model.num_groups)] for _ in range(num_blocks)]
        given = np.array(ids, np.int32).reshape(num_blocks, self.model.num_groups)
        rejected = self.index.insert(tokens, given, salt)
        assert rejected.shape == given.shape
        assert rejected.tolist() == self.model.insert(tokens, ids, salt)

    def pin(self) -> None:
        match, run = self.rng.choice(self.matches)
        if run and not self.model.is_cached(run[-1]):
            with pytest.raises(ValueError, match="evicted since"):
                self.index.pin(match)
            return
        self.index.pin(match)
        if run:
            run[-1].num_pins += 1

    def unpin(self) -> None:
        match, run = self.rng.choice(self.matches)
        if run and run[-1].num_pins == 0:
            with pytest.raises(ValueError, match=r"evicted since|not pinned"):
                self.index.unpin(match)
            return
        self.index.unpin(match)
        if run:
            self.model.unpin(run[-1])

    def strip(self) -> None:
        group, num_blocks = self.rng.choice(self.windowed), self.rng.choice([0, 1, 1, 2, 5, 40])
        stripped = self.index.strip(group, num_blocks)
        assert stripped.dtype == np.int32 and stripped.ndim == 1
        assert stripped.tolist() == self.model.strip(group, num_blocks)

    def evict(self) -> None:
        num_blocks = self.rng.choice([0, 1, 1, 2, 5, 40])
        assert self.index.evict(num_blocks).tolist() == self.model.evict(num_blocks)

    def detach(self) -> None:
        tokens, salt = self.prompt(), self.rng.choice(SALTS)
        num_kept = self.rng.randint(0, 3)
        ids = self.index.detach(tokens, num_kept, salt)
        assert ids.tolist() == self.model.detach(tokens, num_kept, salt)

    def step(self) -> None:
        operations = [self.match, self.insert, self.insert, self.pin, self.unpin, self.evict]
        operations = operations * 4 + [self.detach] + [self.strip] * (4 if self.windowed else 0)
        if not self.matches:
            operations = [self.match]
        self.rng.choice(operations)()
        assert self.index.check() == []
        assert self.index.num_evictable == self.model.num_evictable()

    def compare_blocks(self) -> None:
        size = self.model.block_size
        walked = [
            (run.salt, run.first_token + i * size, *run.tokens[i * size :][:size], *ids)
            for run in self.index.walk()
            for i, ids in enumerate(run.block_ids)
        ]
        expected = [
            (salt.partition(b"\0detached")[0], len(tokens) - size, *tokens[-size:], *block.ids)
            for (salt, tokens), block in self.model.blocks.items()
        ]
        assert sorted(walked) == sorted(expected)
        pinned = sum(block.num_pins for block in self.model.blocks.values())
        assert sum(run.num_pins for run in self.index.walk()) == pinned


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_model(case: str, seed: int) -> None:
    pair = Pair(seed, *CASES[case])
    for step in range(400):
        pair.step()
        if step % 20 == 0:
            pair.compare_blocks()
    stats = pair.index.stats()
    assert stats.num_blocks == len(pair.model.blocks) == pair.index.num_blocks
    assert stats.evicted_blocks > 0
    assert (stats.stripped_blocks > 0) == bool(pair.windowed)
    num_kept = pair.index.num_blocks - pair.index.num_evictable
    assert pair.index.evict(10**9).tolist() == pair.model.evict(10**9)  # all unpinned blocks
    assert (pair.index.num_blocks, pair.index.num_evictable) == (num_kept, 0)
    assert pair.index.check() == []
