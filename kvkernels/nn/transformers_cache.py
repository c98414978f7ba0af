"""A `transformers.Cache` whose keys and values lie in block pools."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from kvkernels.allocator import PoolFullError
from kvkernels.errors import UnsupportedError
from kvkernels.nn.block_tables import BlockTables
from kvkernels.nn.groups import PagedGroup
from kvkernels.nn.long_pass import LongPass
from kvkernels.nn.module import PagedBatch
from kvkernels.nn.paged_kv import PagedKV, equal_bounds
from kvkernels.nn.pool_cache import PoolCache
from kvkernels.nn.transformers_compat import num_queries

if TYPE_CHECKING:
    from typing import Self


class PagedCache(PoolCache):
    """The cache of one `generate` call or one chat, over pools shared by many.

    All sequences of the batch are equally long. The first `num_cached_tokens` tokens may be there
    already: `generate` then runs the model on the rest of the prompt only, of which at least one
    token must remain.

    ::

        forward pass      layer 0 reserves blocks in every group -> each layer stores its new keys
                          and values, and attends -> the last layer's store counts the new tokens
                          and calls on_step

    Of a forward pass that would take more blocks of a sliding group than it may or there are, only
    the last window stays in the pool, and the one before each of `ends`; see `LongPass`.

    A forward pass that fails counts nothing; the next one starts over at the same place. Where the
    last layer has stored its tokens already, that takes a model for which
    `kvkernels.nn.transformers.install` was called: if a part of it was called by itself, or a hook
    on the model failed, take the tokens back with `crop`.

    `copy.deepcopy` gives a cache that goes on from the same tokens and holds the same blocks; who
    writes into a partly used one first takes a copy of it.

    Args:
        groups: All layers of the model, each in one group.
        batch_size: Sequences.
        num_cached_tokens: Tokens whose keys and values the blocks hold already.
        block_tables: For each group, for each sequence, the blocks of those tokens; -1 where the
            group's window never reaches again. Their references pass to the cache once the
            constructor returns. A partly used last block that has other owners is copied before
            it is written.
        reserve: Called with a group's number and how many blocks it needs; returns their ids, one
            reference each. Default the allocator's `allocate`.
        on_step: Called with the cache after each forward pass has stored its tokens.
        ends: Numbers of tokens after which other sequences may go on in another way.
        max_pass_blocks: By sliding group, how many blocks a forward pass may take; without an entry
            as many as there are.

    Raises:
        ValueError: If the groups do not make up a model's layers or the tables do not fit.
    """

    def __init__(
        self,
        groups: Sequence[PagedGroup],
        *,
        batch_size: int = 1,
        num_cached_tokens: int = 0,
        block_tables: Sequence[Sequence[Sequence[int]]] | None = None,
        reserve: Callable[[int, int], list[int]] | None = None,
        on_step: Callable[[Any], None] | None = None,
        ends: Sequence[int] = (),
        max_pass_blocks: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__(groups)
        self.groups = tuple(groups)
        if batch_size < 1:
            raise ValueError(f"batch_size: expected a positive integer, got {batch_size}")
        self._batch_size = batch_size
        self._reserve, self._on_step = reserve, on_step
        self._ends = tuple(ends)
        self._max_pass_blocks = dict(max_pass_blocks or {})
        self._num_tokens = num_cached_tokens
        self._is_released = False
        self._batches: list[PagedBatch] = []
        self._long_passes: dict[int, LongPass] = {}
        if block_tables is None:
            block_tables = [[[] for _ in range(batch_size)] for _ in self.groups]
        _check_tables(self.groups, block_tables, batch_size, num_cached_tokens)
        self._tables = [
            BlockTables(group, ids, _reserver(index, group, reserve))
            for index, (group, ids) in enumerate(zip(self.groups, block_tables, strict=True))
        ]
        for tables in self._tables:
            tables.check_reach(num_cached_tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens of each sequence whose keys and values are stored in all layers."""
        return self._num_tokens

    def block_ids(self, group: int, sequence: int) -> list[int]:
        """The blocks that hold the stored tokens, in order; the last may be partly filled.

        -1 where the window has passed, and the block is held no more.
        """
        tables = self._tables[group]
        return tables.ids[sequence][: -(-self._num_tokens // tables.block_size)]

    def release(self) -> None:
        """Give back all references to blocks; the cache is of no more use. Idempotent."""
        self._is_released = True
        for tables in self._tables:
            tables.release()
        self._num_tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        tables = [
            [self.block_ids(group, sequence) for sequence in range(self._batch_size)]
            for group in range(len(self.groups))
        ]
        for group, rows in zip(self.groups, tables, strict=True):
            group.allocator.share(block_id for ids in rows for block_id in ids if block_id >= 0)
        copied = PagedCache(
            self.groups,
            batch_size=self._batch_size,
            num_cached_tokens=self._num_tokens,
            block_tables=tables,
            reserve=self._reserve,
            on_step=self._on_step,
            ends=self._ends,
            max_pass_blocks=self._max_pass_blocks,
        )
        copied._is_released = self._is_released
        return copied

    # ---- what models and `generate` call --------------------------------------------------------

    # See `PoolCache`.
    @torch.compiler.disable
    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        call: Hashable = None,
        **kwargs: Any,
    ) -> tuple[PagedKV, PagedKV]:
        """Store a layer's new keys and values, `[batch, num_kv_heads, num_new, head_dim]` each.

        Models' own layers pass other arguments, too; `call` comes from replaced ones, see
        `LayerStore.store`.

        Returns:
            A handle, twice, that the "kvkernels" attention function takes for key and value.

        Raises:
            UnsupportedError: If the model does not visit its layers once each and in order.
            ValueError: If shapes or dtypes do not fit the pool, or a tensor requires grad.
            PoolFullError: If no blocks are left.
        """
        if layer_idx == 0:
            self._begin_step(key_states)
            self._layers.begin()
        handle = self._layers.store(
            self._batches, layer_idx, key_states, value_states, self._long_passes, call
        )
        if self._layers.is_done:
            self._long_passes = {}
            self._num_tokens += key_states.shape[2]
            if self._on_step is not None:
                self._on_step(self)
        return handle, handle

    def next_place(self, layer_idx: int, call: Hashable) -> PagedKV | None:
        """See `LayerStore.next_place`; None if the layer is to go through `update`, as the first
        does, which reserves blocks, and the last, which counts the tokens.
        """
        if layer_idx in (0, len(self) - 1) or self._long_passes:
            return None
        return self._layers.next_place(self._batches, layer_idx, call)

    def get_seq_length(self, layer_idx: int = 0, *args: Any) -> int:
        return self._num_tokens

    def get_mask_sizes(self, query: int | torch.Tensor, layer_idx: int) -> tuple[int, int]:
        """Keys that attention will see, and the position of the first."""
        return self._num_tokens + num_queries(query), 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: `-n` forgets n, a positive n keeps n, as in transformers 4.57.

        Raises:
            ValueError: If more tokens are to go or stay than there are, or a sliding group no
                longer holds what the remaining tokens will see.
        """
        keep = tokens_to_remove if tokens_to_remove > 0 else self._num_tokens + tokens_to_remove
        if not 0 <= keep <= self._num_tokens:
            raise ValueError(
                f"tokens_to_remove: expected at most {self._num_tokens} (stored), got"
                f" {tokens_to_remove}"
            )
        self._keep(keep)

    def undo_pass(self, num_tokens: int) -> None:
        """Forget what a failed forward pass has counted, if it came to that.

        Args:
            num_tokens: Of each sequence before the pass.
        """
        if num_tokens < self._num_tokens:
            self._keep(num_tokens)

    def reset(self) -> None:
        """Forget all tokens; the cache can be used again."""
        self.crop(-self._num_tokens)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise UnsupportedError("num_beams: expected 1 with a PagedCache, got beam search")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise UnsupportedError("PagedCache: expected a fixed batch, got a request to repeat it")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise UnsupportedError(
            "PagedCache: expected a fixed batch, got a request to select from it"
        )

    def __repr__(self) -> str:
        return f"PagedCache(num_tokens={self._num_tokens}, batch_size={self._batch_size})"

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def is_croppable(self) -> bool:
        return True

    def _keep(self, num_tokens: int) -> None:
        for tables in self._tables:
            tables.check_reach(num_tokens)
        for tables in self._tables:
            tables.shrink(num_tokens)
        self._num_tokens = num_tokens

    def _begin_step(self, key_states: torch.Tensor) -> None:
        """Reserve room for the new tokens and lay out the step's index tensors, once a group."""
        if self._is_released:
            raise ValueError("past_key_values: expected a PagedCache in use, got a released one")
        batch_size, _, num_new, _ = key_states.shape
        if batch_size != self._batch_size:
            raise ValueError(
                f"key_states: expected a batch of {self._batch_size} (the cache's), got"
                f" {batch_size}"
            )
        num_tokens = self._num_tokens + num_new
        for group, tables in enumerate(self._tables):
            tables.own_last_block(self._num_tokens)
            most = self._max_pass_blocks.get(group, tables.group.pool.num_blocks)
            _make_room(tables, self._num_tokens, num_tokens, self._ends, most)
        device = key_states.device
        seq_lens = torch.full((batch_size,), num_tokens, dtype=torch.int32, device=device)
        cu_seqlens_q = equal_bounds(batch_size, num_new, device)
        self._batches = [
            PagedBatch(
                tables.table,
                seq_lens,
                cu_seqlens_q,
                tables.slot_mapping(self._num_tokens, num_new),
            )
            for tables in self._tables
        ]
        self._long_passes = {
            group: LongPass(tables, batch, self._num_tokens, num_new)
            for group, (tables, batch) in enumerate(zip(self._tables, self._batches, strict=True))
            if tables.has_holes(self._num_tokens)
        }


def _make_room(
    tables: BlockTables, num_tokens: int, num_after: int, ends: Sequence[int], max_blocks: int
) -> None:
    """Have blocks for the tokens from `num_tokens` to `num_after`, or for the windows that matter.

    Raises:
        PoolFullError: If the pool has not even that many.
    """
    if tables.has_holes(num_tokens):  # left by a pass that failed
        tables.shrink(num_tokens)
    size, need = tables.block_size, -(-num_after // tables.block_size)
    # Keep the window before the end of the last whole block: going on from there needs it.
    kept = set(range(tables.first_seen(num_after // size * size), need))
    num_new_blocks = (need - tables.num_blocks) * len(tables.ids)
    if kept.issuperset(range(tables.num_blocks, need)):
        tables.grow(num_after)
        return
    if num_new_blocks <= max_blocks:
        try:
            tables.grow(num_after)
            return
        except PoolFullError:
            pass  # others hold the blocks: keep the windows alone
    for end in ends:
        if num_tokens < end <= num_after:
            kept.update(range(tables.first_seen(end // size * size), end // size))
    tables.grow(num_after, kept)


def _check_tables(
    groups: Sequence[PagedGroup],
    block_tables: Sequence[Sequence[Sequence[int]]],
    batch_size: int,
    num_cached_tokens: int,
) -> None:
    if num_cached_tokens < 0:
        raise ValueError(f"num_cached_tokens: expected 0 or more, got {num_cached_tokens}")
    if len(block_tables) != len(groups):
        raise ValueError(f"block_tables: expected {len(groups)} groups, got {len(block_tables)}")
    for group, tables in zip(groups, block_tables, strict=True):
        if len(tables) != batch_size:
            raise ValueError(f"block_tables: expected {batch_size} sequences, got {len(tables)}")
        num_blocks = -(-num_cached_tokens // group.pool.layout.block_size)
        for ids in tables:
            if len(ids) != num_blocks:
                raise ValueError(
                    f"block_tables: expected {num_blocks} blocks for {num_cached_tokens} tokens,"
                    f" got {len(ids)}"
                )


def _reserver(
    index: int, group: PagedGroup, reserve: Callable[[int, int], list[int]] | None
) -> Callable[[int], list[int]]:
    if reserve is None:
        return group.allocator.allocate
    return lambda num_blocks: reserve(index, num_blocks)
