"""One call of the store for some blocks of one prompt, in all layer groups that need them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvkernels import PoolFullError
from prefixstore.block_cache import BlockCache
from prefixstore.block_key import BlockKey
from prefixstore.engine.layer_gate import LayerGate
from prefixstore.pool_blocks import PoolTarget
from prefixstore.residency import first_block_needed
from prefixstore.store import Store

if TYPE_CHECKING:  # which holds its call
    from prefixstore.engine.restoring import Restoring


class LoadCall:
    """Blocks taken from a sequence, to be filled, and then placed there or given back.

    It is made, and `keep` and `show_in` are called, under the engine's lock. `run` is called by the
    thread that loads. Where layers come one after another, the engine's thread may use them
    meanwhile, each after `wait_layer`.

    Args:
        blocks: The model's.
        restoring: Whose blocks they are.
        numbers: Which of its blocks.
        num_layer_steps: See `Meeting.num_layer_steps`.
        began: Of `time.monotonic`.

    Raises:
        PoolFullError: If the pool has too few; nothing is taken then.
    """

    def __init__(
        self,
        blocks: BlockCache,
        restoring: Restoring,
        numbers: range,
        num_layer_steps: int,
        began: float,
    ) -> None:
        self.numbers = numbers
        self.began = began
        self._blocks = blocks
        self._restoring = restoring
        self._num_steps = num_layer_steps
        self._gate = LayerGate()
        self._target: PoolTarget | None = None  # of layers
        self._taken: list[dict[int, int]] = []  # per group, a block for each number it needs
        end, size = restoring.prefix_end(numbers), blocks.block_size
        try:
            for group, window in enumerate(blocks.device.windows):
                least = first_block_needed(end, size, window)
                needed = [number for number in numbers if number >= least]
                ids = restoring.sequence.take(group, len(needed))
                self._taken.append(dict(zip(needed, ids, strict=True)))
        except PoolFullError:
            self.keep(())
            raise

    # ---- in the thread that loads ------------------------------------------------------------

    def run(self, store: Store, keys: Sequence[Sequence[BlockKey]]) -> dict[int, str]:
        """Load the blocks; the slowest tier of each of which no part is missing."""
        if self._num_steps > 1:
            return self._run_layers(store, keys)
        ranks = {name: rank for rank, name in enumerate(store.tier_names)}
        found = dict.fromkeys(self.numbers, store.tier_names[0])
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

    def _run_layers(self, store: Store, keys: Sequence[Sequence[BlockKey]]) -> dict[int, str]:
        (own,), (ids,), (pool_blocks,) = keys, self._taken, self._blocks.pool_blocks
        num_layers = pool_blocks.transfer.pool.layout.num_layers
        length = -(-num_layers // self._num_steps)
        steps = [
            range(first, min(first + length, num_layers)) for first in range(0, num_layers, length)
        ]
        tier, _ = self._restoring.expected_of(self.numbers)
        self._target = pool_blocks.target(list(ids.values()))
        try:
            answers = store.load_layers(
                *(tier, [own[number] for number in ids], self._target),
                *(steps, self._gate, self._restoring.deadline),
            )
        finally:
            self._gate.fail()  # whoever still waits waits for nothing
        return {number: tier for number, one in zip(ids, answers, strict=True) if one is not None}

    # ---- in the engine's thread --------------------------------------------------------------

    def wait_layer(self, layer: int, until: float) -> bool:
        """Let what is computed next find a layer in all blocks; False if it will not be there.

        Args:
            layer: Of the model.
            until: Of `time.monotonic`: it is not waited for any longer.
        """
        if not self._gate.wait(layer, until):
            return False
        assert self._target is not None, "a layer came before its blocks"
        self._target.wait_layer(layer)
        return True

    def show_in(self, tables: np.ndarray) -> None:
        """Put the blocks where the sequence will have them, in `[num_groups, num_blocks]`."""
        for table, ids in zip(tables, self._taken, strict=True):
            table[list(ids)] = list(ids.values())

    def keep(self, kept: Collection[int]) -> None:
        """Blocks that were filled go to the sequence, others back to the pool."""
        for group, ids in enumerate(self._taken):
            placed = {number: one for number, one in ids.items() if number in kept}
            self._restoring.sequence.place(group, placed)
            allocator = self._blocks.device.groups[group].allocator
            allocator.release([one for number, one in ids.items() if number not in kept])
