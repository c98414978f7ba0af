"""One call of the store for some blocks of one prompt, in all layer groups that need them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from kvkernels import PoolFullError
from prefixstore.block_cache import BlockCache
from prefixstore.block_key import BlockKey
from prefixstore.engine.layer_gate import LayerGate
from prefixstore.engine.sequence import SequenceBlocks
from prefixstore.planner import ContendedCall
from prefixstore.pool_blocks import PoolTarget
from prefixstore.residency import first_block_needed
from prefixstore.store import Store


class LoadCall:
    """Blocks taken from a sequence, to be filled, and then placed there or given back.

    It is made, and `keep` and `show_in` are called, under the engine's lock. `run` is called by the
    thread that loads. Where layers come one after another, the engine's thread may use them
    meanwhile, each after `wait_layer`.

    Args:
        blocks: The model's.
        sequence: Gives the blocks, and gets those that are kept.
        numbers: Which of its blocks.
        prefix_end: Block behind the last one of the prefix that is being restored. It says which
            of the blocks a sliding window needs.
        num_layer_steps: See `Meeting.num_layer_steps`.
        tier_call: Counts it among those of its tier.

    Raises:
        PoolFullError: If the pool has too few; nothing is taken then.
    """

    def __init__(
        self,
        blocks: BlockCache,
        sequence: SequenceBlocks,
        numbers: range,
        prefix_end: int,
        num_layer_steps: int,
        tier_call: ContendedCall,
    ) -> None:
        self.numbers = numbers
        self.tier_call = tier_call
        self.is_given_up = False  # whether the planner was told that it took too long
        self._blocks = blocks
        self._sequence = sequence
        self._num_steps = num_layer_steps
        self._gate = LayerGate()
        self._target: PoolTarget | None = None  # of layers
        self._taken: list[dict[int, int]] = []  # per group, a block for each number it needs
        try:
            for group, window in enumerate(blocks.device.windows):
                least = first_block_needed(prefix_end, blocks.block_size, window)
                needed = [number for number in numbers if number >= least]
                ids = sequence.take(group, len(needed))
                self._taken.append(dict(zip(needed, ids, strict=True)))
        except PoolFullError:
            self.keep(())
            raise

    @property
    def began(self) -> float:
        """When, by `time.monotonic`."""
        return self.tier_call.began

    # ---- in the thread that loads ------------------------------------------------------------

    def run(
        self, store: Store, keys: Sequence[Sequence[BlockKey]], deadline: float
    ) -> dict[int, str]:
        """Load the blocks.

        Args:
            store: Loads them; where layers come one after another, from the tier of `tier_call`.
            keys: Per group, those of all blocks of the prompt.
            deadline: By `time.monotonic`; the tiers are not waited for any longer.

        Returns:
            The slowest tier that each block came from; only for blocks of which no part is missing.
        """
        if self._num_steps > 1:
            return self._run_layers(store, keys, deadline)
        ranks = {name: rank for rank, name in enumerate(store.tier_names)}
        found = dict.fromkeys(self.numbers, store.tier_names[0])
        for group, (own, ids) in enumerate(zip(keys, self._taken, strict=True)):
            if not ids:
                continue
            target = self._blocks.pool_blocks[group].target(list(ids.values()))
            wanted = [own[number] for number in ids]
            answers = store.load_many(wanted, target, deadline)
            for number, answer in zip(ids, answers, strict=True):
                if answer is None:
                    found.pop(number, None)
                elif number in found and ranks[answer] > ranks[found[number]]:
                    found[number] = answer
        return found

    def _run_layers(
        self, store: Store, keys: Sequence[Sequence[BlockKey]], deadline: float
    ) -> dict[int, str]:
        (own,), (ids,), (pool_blocks,) = keys, self._taken, self._blocks.pool_blocks
        num_layers = pool_blocks.transfer.pool.layout.num_layers
        length = -(-num_layers // self._num_steps)
        steps = [
            range(first, min(first + length, num_layers)) for first in range(0, num_layers, length)
        ]
        self._target = pool_blocks.target(list(ids.values()))
        try:
            answers = store.load_layers(
                *(self.tier_call.tier, [own[number] for number in ids], self._target),
                *(steps, self._gate, deadline),
            )
        finally:
            self._gate.fail()  # nobody is to wait for a layer that has not come by now
        return {
            number: answer
            for number, answer in zip(ids, answers, strict=True)
            if answer is not None
        }

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
            self._sequence.place(group, placed)
            allocator = self._blocks.device.groups[group].allocator
            allocator.release([one for number, one in ids.items() if number not in kept])
