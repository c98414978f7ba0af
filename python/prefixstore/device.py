"""The blocks on the device: who holds them, which prefixes they are, and how room is made.

Every block in use has one reference from the index if it is indexed there, one from each session
that reads it, and one from each write to a tier that has not finished::

    pool block     17   references  index 1 + sessions 2 + writers 0 = 3
    pool block     18   references  session 1 (the tail of a sequence, not a whole block yet)
    pool block     19   references  0: on the free list
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from kvkernels import PoolFullError
from kvkernels.nn import PagedGroup
from kvkernels.nn.block_tables import BlockTables
from prefixstore.index import Match, Outline, RadixIndex, Stats
from prefixstore.residency import first_block_needed, longest_prefix, num_window_blocks
from prefixstore.write_holds import WriteHolds

# One forward pass may take at most a quarter of a sliding group's pool, so that other sequences
# keep their windows.
_PASS_SHARE = 4

_WRITERS_WAIT_S = 10.0  # how long a full pool waits for writers to let blocks go


class DeviceBlocks:
    """The pools of all layer groups and the index of the prefixes in them.

    Args:
        groups: Pool, allocator and window of each layer group.
        block_size: Tokens in a block.

    Attributes:
        writes: What writers hold.
    """

    def __init__(self, groups: Sequence[PagedGroup], block_size: int) -> None:
        self.groups = list(groups)
        self.block_size = block_size
        reaches = [
            None if window is None else num_window_blocks(block_size, window)
            for window in self.windows
        ]
        self._index = RadixIndex(block_size, len(self.groups), reaches)
        self._lock = threading.Lock()
        self._evicted_blocks = 0
        self.writes = WriteHolds(self.groups, self.holds_windows)
        # (group, block id) of blocks that were found wrong: they are not offered to anybody until
        # the id is given to another block.
        self._detached: set[tuple[int, int]] = set()
        self._abandoned: deque[tuple[Sequence[BlockTables], Match]] = deque()

    @property
    def windows(self) -> list[int | None]:
        """The window of each layer group, in tokens; None for full attention."""
        return [group.window for group in self.groups]

    def find(self, tokens: np.ndarray, salt: str) -> tuple[Match, np.ndarray]:
        """The longest cached prefix, pinned, and its block ids with a reference to each.

        Returns:
            The match and `[num_blocks, num_groups]` int32, -1 where a group's block is gone.
        """
        self.release_abandoned()
        with self._lock:
            match = self._index.match(tokens, salt.encode())
            self._index.pin(match)
            # Take references under the same lock, so that nothing is evicted between finding and
            # using it.
            self.share(match.block_ids)
            return match, match.block_ids

    def find_usable(self, tokens: np.ndarray, salt: str) -> tuple[Match, np.ndarray]:
        """As `find`, of the longest prefix that can be gone on from, and of what that takes.

        It is not counted: who waits for room asks often, see `count_look_up`.

        Returns:
            The match and `[num_blocks, num_groups]` int32, -1 where no later token can see the
            block.
        """
        self.release_abandoned()
        with self._lock:
            match = self._index.peek(tokens, salt.encode())
            block_ids = match.block_ids
            num_usable = self._num_usable(block_ids)
            if num_usable < len(block_ids):
                # Pin the run only as far as it is used: a pin further on would keep a window that
                # nobody needs.
                match = self._index.peek(tokens[: num_usable * self.block_size], salt.encode())
                block_ids = block_ids[:num_usable]
            for group, window in enumerate(self.windows):
                block_ids[: first_block_needed(num_usable, self.block_size, window), group] = -1
            self._index.pin(match)
            self.share(block_ids)
            return match, block_ids

    def count_look_up(self, tokens: np.ndarray, salt: str) -> None:
        """Count a prompt, and where it leaves what is cached as an end of prompts."""
        with self._lock:
            self._index.match(tokens, salt.encode())

    def hold(self, tokens: np.ndarray, salt: str) -> Match:
        """Pin what is indexed of a prefix, whose blocks the caller has references to."""
        with self._lock:
            match = self._index.peek(tokens, salt.encode())
            self._index.pin(match)
            return match

    def pin(self, tokens: np.ndarray, salt: str, block_ids: np.ndarray) -> Match | None:
        """Pin the indexed run of `tokens` if it is made of these very blocks, else None.

        What a session holds frees nothing when it is evicted; the index would forget it in vain.
        """
        with self._lock:
            match = self._index.peek(tokens, salt.encode())
            # Compare only blocks that the caller holds (id >= 0): those behind a window may be
            # anybody's.
            is_held = block_ids >= 0
            if match.block_ids.shape != block_ids.shape or not np.array_equal(
                match.block_ids[is_held], block_ids[is_held]
            ):
                return None
            self._index.pin(match)
            return match

    def unpin(self, match: Match) -> None:
        """Let the run of a match be evicted again."""
        with self._lock:
            self._index.unpin(match)

    def num_cached(self, tokens: np.ndarray, salt: str) -> int:
        """Blocks of the longest prefix that is usable now; nothing is held, so it may shrink."""
        with self._lock:
            return self._num_usable(self._index.peek(tokens, salt.encode()).block_ids)

    def abandon(self, tables: Sequence[BlockTables], match: Match) -> None:
        """Leave a session's references and pin to be given back by the next call that needs room.

        For finalizers: they may run anywhere, also in a thread that holds the locks it takes.
        """
        self._abandoned.append((tables, match))

    def release_abandoned(self) -> None:
        """Give back what finalizers left."""
        while self._abandoned:
            try:
                tables, match = self._abandoned.popleft()
            except IndexError:  # another thread was faster
                return
            for table in tables:
                table.release()
            self.unpin(match)

    def insert(self, tokens: np.ndarray, salt: str, block_ids: np.ndarray) -> int:
        """Index the whole blocks of `tokens`; the index takes a reference of those new to it.

        Returns:
            How many blocks: a detached one, and what follows it, stays out.
        """
        with self._lock:
            block_ids = block_ids[: self._num_attached(block_ids)]
            refused = self._index.insert(tokens, block_ids, salt.encode())
            self.share(np.where(refused >= 0, -1, block_ids))
            return len(block_ids)

    def detach(self, tokens: np.ndarray, salt: str, num_kept: int) -> None:
        """Offer the block after the first `num_kept`, and all after it, to nobody any more.

        Who reads them goes on, and what is computed on top of them is not indexed either.
        """
        with self._lock:
            for ids in self._index.detach(tokens, num_kept, salt.encode()).tolist():
                self._detached.update((group, one) for group, one in enumerate(ids) if one >= 0)

    def _num_attached(self, block_ids: np.ndarray) -> int:
        """Blocks before the first that was detached."""
        if self._detached:
            for number, ids in enumerate(block_ids.tolist()):
                if not self._detached.isdisjoint(enumerate(ids)):
                    return number
        return len(block_ids)

    def reserve(self, group: int, num_blocks: int, deadline: float | None = None) -> list[int]:
        """Take blocks of one group; where that needs room, the least recently used go.

        Of a group with a window its own blocks go alone, see `RadixIndex.strip`. Of others whole
        prefixes are evicted.

        Args:
            group: Which one.
            num_blocks: How many.
            deadline: Of `time.monotonic()`: for blocks that writers read it is waited no longer;
                default ten seconds from now.

        Raises:
            PoolFullError: If sessions, or writers until the deadline, hold too many; nothing is
                taken then.
        """
        allocator = self.groups[group].allocator
        if deadline is None:
            deadline = time.monotonic() + _WRITERS_WAIT_S
        may_wait = True
        while True:
            self.release_abandoned()
            try:
                return self._allocate(group, num_blocks)
            except PoolFullError:
                # Some evicted blocks are not free yet, as a writer still reads them: wait for those
                # before evicting more. They are counted before the free blocks are, so that one let
                # go in between counts twice rather than never.
                num_leaving = self.writes.num_leaving(group) if may_wait else 0
                missing = num_blocks - allocator.num_free
                if missing <= 0:
                    continue  # another thread has just given some back
                missing -= num_leaving
                if missing > 0 and self._give_up(group, missing):
                    continue
                if not may_wait:
                    raise
            may_wait = self.writes.wait(group, deadline)

    def reserve_now(self, group: int, num_blocks: int) -> list[int]:
        """As `reserve`, for who has other things to do than to wait for a writer.

        Raises:
            PoolFullError: If too few are free and evictable; what was evicted for it may be free
                soon, once the writer has read it.
        """
        self.release_abandoned()
        allocator = self.groups[group].allocator
        while (missing := num_blocks - allocator.num_free) > 0:
            # Blocks that a writer is about to let go need no eviction of a prefix. Windows are
            # evicted all the same: there are few of them, and a request that gets none in time
            # loses its place.
            if not self.holds_windows(group):
                missing -= self.writes.num_leaving(group)
            if missing <= 0 or not self._give_up(group, missing):
                break
        return self._allocate(group, num_blocks)

    def evict_all(self) -> int:
        """Give up all blocks that no session holds; returns how many."""
        self.release_abandoned()
        before = self._evicted_blocks
        with self._lock:
            self._evict(self._index.num_blocks)
        return self._evicted_blocks - before

    def holds_windows(self, group: int) -> bool:
        """Whether the group's pool is smaller than that of whole contexts, if there is any."""
        sizes = [one.pool.num_blocks for one in self.groups if one.window is None]
        own = self.groups[group]
        return own.window is not None and own.pool.num_blocks not in sizes

    def max_pass_blocks(self) -> dict[int, int]:
        """By group whose pool holds windows: how much of it one long prompt may sweep through."""
        return {
            number: group.pool.num_blocks // _PASS_SHARE
            for number, group in enumerate(self.groups)
            if self.holds_windows(number)
        }

    def share(self, block_ids: np.ndarray) -> None:
        """Add a reference to each block of `[num_blocks, num_groups]`; -1 is skipped."""
        for group, ids in zip(self.groups, block_ids.T, strict=True):
            group.allocator.share(ids[ids >= 0].tolist())

    def release(self, block_ids: np.ndarray) -> None:
        """Drop a reference of each block of `[num_blocks, num_groups]`; -1 is skipped."""
        for group, ids in zip(self.groups, block_ids.T, strict=True):
            group.allocator.release(ids[ids >= 0].tolist())

    def drop(self, group: int, block_ids: np.ndarray) -> None:
        """Drop a reference of each of some blocks of a group, in whose place -1 is put."""
        self.groups[group].allocator.release(block_ids[block_ids >= 0].tolist())
        block_ids[:] = -1

    @property
    def evicted_blocks(self) -> int:
        """Blocks that gave way to others so far, in all groups."""
        return self._evicted_blocks

    def index_stats(self) -> Stats:
        """See `RadixIndex.stats`."""
        self.release_abandoned()
        with self._lock:
            return self._index.stats()

    def outline(self) -> Outline:
        """See `RadixIndex.outline`."""
        self.release_abandoned()
        with self._lock:
            return self._index.outline()

    def tokens_of(self, handle: int) -> np.ndarray | None:
        """See `RadixIndex.tokens_of`."""
        with self._lock:
            return self._index.tokens_of(handle)

    def check(self) -> list[str]:
        """Recount index, pools and references; one line for each thing that is wrong."""
        self.release_abandoned()
        with self._lock:
            problems = [f"index: {line}" for line in self._index.check()]
            for number, group in enumerate(self.groups):
                problems += [f"pool {number}: {line}" for line in group.allocator.check()]
        return problems

    def _num_usable(self, block_ids: np.ndarray) -> int:
        """Blocks of the longest prefix of `[num_blocks, num_groups]` that can be gone on from."""
        return longest_prefix([ids >= 0 for ids in block_ids.T], self.block_size, self.windows)

    def _allocate(self, group: int, num_blocks: int) -> list[int]:
        """Take free blocks. Who still read those that their ids stood for has let go of them."""
        ids = self.groups[group].allocator.allocate(num_blocks)
        if self._detached:
            with self._lock:
                self._detached.difference_update((group, one) for one in ids)
        return ids

    def _give_up(self, group: int, num_blocks: int) -> bool:
        """Let the index give up blocks for the sake of a group.

        Of a group without a window all of them or, if it has too few that no session holds, none:
        for what cannot be had, nobody's prefix is to go. False if nothing was given up.

        What a strip leaves of a group is pinned, so no eviction would free it. A run that lost its
        window keeps its other blocks: it is evicted before the runs that are of use, which were
        used later, and until then a tier or the next prompt may bring the window back.
        """
        if self.groups[group].window is None:
            with self._lock:
                if self._index.num_evictable < num_blocks:
                    return False
                return self._evict(num_blocks)
        with self._lock:
            ids = self._index.strip(group, num_blocks).tolist()
            self.groups[group].allocator.release(ids)
        return len(ids) > 0

    def _evict(self, num_blocks: int) -> bool:
        """Under the lock."""
        victims = self._index.evict(num_blocks)
        self._evicted_blocks += len(victims)
        self.release(victims)
        return len(victims) > 0
