"""One call of the store for some blocks of one prompt, in all layer groups that need them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvkernels import PoolFullError
from prefixstore.block_cache import BlockCache
from prefixstore.block_key import BlockKey
from prefixstore.engine.restoring import Restoring
from prefixstore.residency import first_block_needed
from prefixstore.store import Store


class LoadCall:
    """Blocks taken from a sequence, to be filled, and then placed there or given back.

    It is made, and `keep` is called, under the engine's lock; `run` is not.

    Args:
        blocks: The model's.
        restoring: Whose blocks they are.
        numbers: Which of its blocks.

    Raises:
        PoolFullError: If the pool has too few; nothing is taken then.
    """

    def __init__(self, blocks: BlockCache, restoring: Restoring, numbers: range) -> None:
        self._blocks = blocks
        self._restoring = restoring
        self._numbers = numbers
        self._taken: list[dict[int, int]] = []  # per group, a block for each number it needs
        end, size = restoring.load_end, blocks.block_size
        try:
            for group, window in enumerate(blocks.device.windows):
                least = first_block_needed(end, size, window)
                needed = [number for number in numbers if number >= least]
                ids = restoring.sequence.take(group, len(needed))
                self._taken.append(dict(zip(needed, ids, strict=True)))
        except PoolFullError:
            self.keep(())
            raise

    def run(self, store: Store, keys: Sequence[Sequence[BlockKey]]) -> dict[int, str]:
        """Load the blocks; the slowest tier of each of which no part is missing."""
        ranks = {name: rank for rank, name in enumerate(store.tier_names)}
        found = dict.fromkeys(self._numbers, store.tier_names[0])
        for group, (own, ids) in enumerate(zip(keys, self._taken, strict=True)):
            if not ids:
                continue
            target = self._blocks.pool_blocks[group].target(list(ids.values()))
            wanted = [own[number] for number in ids]
            answers = store.load_many(wanted, target, self._restoring.deadline)
            for number, tier in zip(ids, answers, strict=True):
                if tier is None:
                    found.pop(number, None)
                elif number in found and ranks[tier] > ranks[found[number]]:
                    found[number] = tier
        return found

    def keep(self, kept: Collection[int]) -> None:
        """Blocks that were filled go to the sequence, others back to the pool."""
        for group, ids in enumerate(self._taken):
            placed = {number: one for number, one in ids.items() if number in kept}
            self._restoring.sequence.place(group, placed)
            allocator = self._blocks.device.groups[group].allocator
            allocator.release([one for number, one in ids.items() if number not in kept])
