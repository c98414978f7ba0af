"""How many sequences may run at the same time, where pools hold windows and not whole contexts."""

from __future__ import annotations

from collections.abc import Sequence

from prefixstore.block_cache import BlockCache
from prefixstore.engine.request import Request
from prefixstore.errors import ConfigError
from prefixstore.pool_sizes import least_window_blocks
from prefixstore.residency import num_window_blocks


class WindowBudget:
    """Whether the sliding groups' pools have room for one more sequence.

    ::

        pool of a sliding group, in blocks
        | window + 2 | window + 2 | 2 windows + 2 | ...   | a batch's new tokens | being written |
          answers, to their end     a prompt, while its last window is loaded

    What a window has passed goes back as soon as it is published, so a sequence never holds more,
    and none is preempted for want of such blocks. What is cached besides makes room.

    Args:
        blocks: The model's.
        max_batch_tokens: Of one forward pass.
        max_model_len: Tokens of one sequence.

    Raises:
        ConfigError: If a pool has too few blocks for one sequence.
    """

    def __init__(self, blocks: BlockCache, max_batch_tokens: int, max_model_len: int) -> None:
        size = self._block_size = blocks.block_size
        self._has_store = blocks.store is not None
        # Per group, in blocks: one sequence's window, and room for all.
        self._rooms: list[tuple[int, int]] = []
        for number, group in enumerate(blocks.device.groups):
            if group.window is None or not blocks.device.holds_windows(number):
                continue
            num_blocks = group.pool.num_blocks
            usable = num_blocks - blocks.device.writes.max_blocks(number) * self._has_store
            least = least_window_blocks(size, group.window, max_batch_tokens)
            if usable < min(least, -(-max_model_len // size)):
                needed = -(-least * num_blocks // usable) * size
                raise ConfigError(
                    f"window_pool_tokens: expected at least {needed}"
                    f" (two windows of {group.window}, max_batch_tokens of {max_batch_tokens}, and"
                    f" what waits to be written), got {num_blocks * size}"
                )
            window = num_window_blocks(size, group.window)
            self._rooms.append((window, usable - -(-max_batch_tokens // size)))

    def has_room(self, running: Sequence[Request], new: Request) -> bool:
        """Whether one more may run; one alone always may."""
        return not running or all(
            sum(self._most_held(one, window) for one in (*running, new)) <= room
            for window, room in self._rooms
        )

    def _most_held(self, request: Request, window: int) -> int:
        """Blocks between two batches."""
        is_loading = self._has_store and not request.is_decoding
        most = 2 * (window + 1) if is_loading else window + 2
        return min(most, -(-request.max_tokens // self._block_size))
