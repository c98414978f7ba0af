"""The blocks of a prompt that is brought in from both ends, each in one state."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

ABSENT, COMPUTING, LOADING, PRESENT = range(4)


class PromptBlocks:
    """Which blocks are there, and how far the front has come. Blocks and tokens are counted from
    the prompt's start.

    Args:
        num_tokens: Of the prompt.
        block_size: Tokens in a block.
        num_present: Blocks at the front that are there.

    Attributes:
        next_token: First one that the front has not computed.
        chunk: Tokens being computed.
    """

    def __init__(self, num_tokens: int, block_size: int, num_present: int) -> None:
        self.next_token = num_present * block_size
        self.chunk: range | None = None
        self._num_tokens, self._size = num_tokens, block_size
        self._states = np.full(-(-num_tokens // block_size), ABSENT, dtype=np.uint8)
        self._states[:num_present] = PRESENT

    # ---- the front ---------------------------------------------------------------------------

    @property
    def front(self) -> int:
        """Block of the next token."""
        return self.next_token // self._size

    @property
    def claimed_until(self) -> int:
        """First block that the front has not begun."""
        token = self.next_token if self.chunk is None else self.chunk.stop
        return -(-token // self._size)

    def begin_chunk(self, tokens: range) -> None:
        """These are being computed."""
        assert self.chunk is None, "one chunk at a time"
        self.chunk = tokens
        self._states[tokens.start // self._size : -(-tokens.stop // self._size)] = COMPUTING

    def end_chunk(self) -> int:
        """They are computed; returns how many blocks that made whole."""
        assert self.chunk is not None, "no chunk was begun"
        stop = self.chunk.stop
        first, end = self.chunk.start // self._size, -(-stop // self._size)
        whole = end if stop == self._num_tokens else stop // self._size
        self._states[first:whole] = PRESENT
        self._states[whole:end] = ABSENT  # begun: `claimed_until` keeps the loader off
        self.next_token, self.chunk = stop, None
        return whole - first

    def void_chunk(self) -> None:
        """What was computed of the chunk does not count."""
        assert self.chunk is not None, "no chunk was begun"
        self._states[self._states == COMPUTING] = ABSENT
        self.chunk = None

    def skip_present(self) -> None:
        """Let the front go on after blocks that are there."""
        end = self.present_until(self.front)
        if end > self.front:
            self.next_token = end * self._size

    # ---- states ------------------------------------------------------------------------------

    def state(self, block: int) -> int:
        """Of one block."""
        return int(self._states[block])

    def set(self, blocks: Collection[int], state: int) -> None:
        """Put blocks into a state."""
        self._states[list(blocks)] = state

    def are(self, blocks: range, state: int) -> bool:
        """Whether all of them are in a state."""
        return bool((self._states[blocks.start : blocks.stop] == state).all())

    def within(self, blocks: range, state: int) -> list[int]:
        """Those of them that are in a state."""
        own = self._states[blocks.start : blocks.stop]
        return (blocks.start + np.flatnonzero(own == state)).tolist()

    def run_until(self, block: int) -> int:
        """Behind the last block from there on that is in the same state without a gap."""
        ahead = self._states[block:]
        return block + _num_leading(ahead == ahead[0])

    def present_until(self, block: int) -> int:
        """Behind the last block from there on that is there without a gap; `block` if it is not."""
        return block + _num_leading(self._states[block:] == PRESENT)

    # ---- all of it ---------------------------------------------------------------------------

    @property
    def num_left(self) -> int:
        """Tokens that are not there yet; between two chunks."""
        if self.is_done:
            return 0
        is_left = self._states != PRESENT
        past_end = len(is_left) * self._size - self._num_tokens if is_left[-1] else 0
        return int(is_left.sum()) * self._size - past_end - self.next_token % self._size

    @property
    def is_done(self) -> bool:
        """Every token is there."""
        return self.next_token >= self._num_tokens


def _num_leading(flags: np.ndarray) -> int:
    """How many of them are set before the first that is not."""
    if flags.all():
        return len(flags)
    return int(flags.argmin())
