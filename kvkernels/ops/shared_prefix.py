"""Attention of sequences that share leading blocks: the shared ones are read once for all.

::

    sequence 0   [ shared prefix ][ own  ]      prefix pass: the queries of sequences 0, 1 and 2
    sequence 1   [ as above      ][ own ]       together against the shared blocks
    sequence 2   [ as above      ][ own    ]    suffix pass: each against its own blocks
    sequence 3   [ own        ]                 then both are merged

Known as cascade attention (FlashInfer) or Hydragen (Juravsky et al., 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from kvkernels.checks import check_device, check_shape
from kvkernels.ops.attention import merge_attention, paged_attention
from kvkernels.ops.attention_checks import check_attention_inputs, check_kinds
from kvkernels.ops.library import LIBRARY
from kvkernels.ops.prefix_groups import find_groups
from kvkernels.quantized_cache import QuantizedCache

if TYPE_CHECKING:
    from typing import Unpack

    from kvkernels.ops.attention_options import SharedOptions

# The cost of a second pass and a merge, as the bytes of prefix that flat attention re-reads in the
# same time. On a GPU they are three more launches, and flat attention reads a prefix that fits in
# the L2 from memory only once (an H100 with 16 sequences breaks even near this figure); on a CPU
# they are one more wake-up of the threads.
_FIXED_COST_BYTES = {"cuda": 128 << 20, "cpu": 256 << 10}


class SharedPrefixes:
    """Which neighbouring sequences of a batch share how many leading tokens.

    Args:
        group_sizes: Sequences of each group, in the order of the batch; 1 for a sequence that
            shares with none.
        prefix_lens: Tokens that each group shares, a multiple of the block size; 0 for none. No
            query of the group stands before their end.
        device: Of the batch.

    Raises:
        ValueError: If the two differ in length or hold something else than such numbers.
    """

    def __init__(
        self,
        group_sizes: Sequence[int],
        prefix_lens: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        self.group_sizes, self.prefix_lens = tuple(group_sizes), tuple(prefix_lens)
        if len(self.group_sizes) != len(self.prefix_lens):
            raise ValueError(
                f"prefix_lens: expected one for each of {len(self.group_sizes)} groups, got"
                f" {len(self.prefix_lens)}"
            )
        for name, values, least in (
            ("group_sizes", self.group_sizes, 1),
            ("prefix_lens", self.prefix_lens, 0),
        ):
            if any(not isinstance(value, int) or value < least for value in values):
                raise ValueError(f"{name}: expected integers of {least} or more, got {values}")
        self.num_seqs = sum(self.group_sizes)
        sizes = torch.tensor(self.group_sizes, dtype=torch.int64, device="cpu")
        lens = torch.tensor(self.prefix_lens, dtype=torch.int32, device="cpu")
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), sizes.cumsum(0)])
        # Moved to the device once, here: the passes copy nothing and can be captured in a graph.
        self._first_seqs = bounds[:-1].to(device)
        self._bounds = bounds.to(device)
        self._lens = lens.to(device)
        self._lens_of_seqs = lens.repeat_interleave(sizes).to(device)

    @classmethod
    def find(
        cls,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        block_size: int,
        num_queries: Sequence[int] | None = None,
    ) -> SharedPrefixes:
        """The groups of neighbouring sequences that leave the fewest blocks to be read again.

        Reads the tensors' values, so on a GPU it waits for them: a scheduler that knows what its
        sequences share says so itself.

        Args:
            block_table: As for `paged_attention`.
            seq_lens: As for `paged_attention`.
            block_size: Tokens in a block.
            num_queries: Of each sequence; default 1.

        Raises:
            ValueError: If shapes disagree, a sequence is longer than its row of the table, or
                `num_queries` holds something else than numbers of queries.
        """
        check_shape("block_table", block_table, (None, None))
        num_seqs, width = block_table.shape
        check_shape("seq_lens", seq_lens, (num_seqs,))
        counts = list(num_queries) if num_queries is not None else [1] * num_seqs
        if len(counts) != num_seqs:
            raise ValueError(f"num_queries: expected {num_seqs} numbers, got {len(counts)}")
        if any(not isinstance(count, int) or count < 0 for count in counts):
            raise ValueError(f"num_queries: expected integers of 0 or more, got {counts}")
        rows, lens = block_table.tolist(), seq_lens.tolist()
        max_tokens = width * block_size
        for length in lens:
            if not 0 <= length <= max_tokens:
                raise ValueError(
                    f"seq_lens: expected 0 to {max_tokens} (the table's width), got {length}"
                )
        # Only whole blocks before a sequence's first query can be shared.
        usable = [
            max(0, length - count) // block_size for length, count in zip(lens, counts, strict=True)
        ]
        common = [
            _num_equal(before, row, min(pair))
            for (before, row), pair in zip(pairwise(rows), pairwise(usable), strict=True)
        ]
        groups = find_groups(num_seqs, common)
        sizes = [size for size, _ in groups]
        return cls(sizes, [blocks * block_size for _, blocks in groups], block_table.device)

    def pays(
        self, num_tokens: int, num_heads: int, key_cache: torch.Tensor, value_cache: torch.Tensor
    ) -> bool:
        """Whether two passes and a merge move less memory than one flat pass.

        Saved: each group's prefix, once for every member but one. Spent: both partial outputs
        written and read again, and a fixed cost.
        """
        _, num_kv_heads, _, head_dim = key_cache.shape
        value_dim = value_cache.shape[3]
        token_bytes = num_kv_heads * (head_dim + value_dim) * key_cache.element_size()
        saved = sum(
            (size - 1) * length * token_bytes
            for size, length in zip(self.group_sizes, self.prefix_lens, strict=True)
        )
        partial_bytes = num_tokens * num_heads * (value_dim * key_cache.element_size() + 4)
        fixed = _FIXED_COST_BYTES.get(key_cache.device.type, _FIXED_COST_BYTES["cuda"])
        return saved > 4 * partial_bytes + fixed


def _num_equal(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """How many of the first `limit` are the same in both."""
    num_equal = 0
    while num_equal < limit and a[num_equal] == b[num_equal]:
        num_equal += 1
    return num_equal


@overload
def shared_prefix_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    *,
    prefixes: SharedPrefixes,
    only_if_it_pays: bool = True,
    return_lse: Literal[False] = False,
    **options: Unpack[SharedOptions],
) -> torch.Tensor: ...


@overload
def shared_prefix_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    *,
    prefixes: SharedPrefixes,
    only_if_it_pays: bool = True,
    return_lse: Literal[True],
    **options: Unpack[SharedOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def shared_prefix_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    *,
    prefixes: SharedPrefixes,
    only_if_it_pays: bool = True,
    return_lse: bool,
    **options: Unpack[SharedOptions],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def shared_prefix_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    *,
    prefixes: SharedPrefixes,
    sm_scale: float | None = None,
    causal: bool = True,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    int8_cache: QuantizedCache | None = None,
    int4_cache: QuantizedCache | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    only_if_it_pays: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`paged_attention` of a batch, reading blocks that sequences share once for all of them.

    The result is that of `paged_attention` up to rounding. Where the two passes would move more
    memory than one (`SharedPrefixes.pays`) it is one. So it is with ``batch_invariant``: a merge
    rounds, and what a sequence shares depends on the batch. A window or ALiBi goes by each query's
    own position, so neither has a shared prefix: `paged_attention` serves those.

    Args:
        query: And all others up to ``cu_seqlens_q``: as for `paged_attention`.
        prefixes: What the sequences share; for as many sequences as ``seq_lens`` has.
        sm_scale: And all others up to ``batch_invariant``: as for `paged_attention`.
        only_if_it_pays: Whether to leave it at one pass where two would not pay.

    Raises:
        ValueError: As for `paged_attention`, and if ``prefixes`` is on another device or for
            another number of sequences, or its lengths are no multiples of the block size, or (on
            the CPU) reach past a sequence's first query.
    """
    rules: dict[str, Any] = {"sm_scale": sm_scale, "soft_cap": soft_cap}
    rules |= {"int8_cache": int8_cache, "int4_cache": int4_cache}
    # Only for the tokens behind the prefix. A sink, for one, is a key: it may be counted only once.
    own: dict[str, Any] = {"causal": causal, "sinks": sinks, "tree_mask": tree_mask}
    check_kinds(int8_cache, int4_cache)
    check_attention_inputs(
        *(query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q),
        *(int8_cache, int4_cache),
    )
    _check_prefixes(prefixes, key_cache, block_table, seq_lens)
    # Also before one pass, which needs no lengths of its own: what it is told must be right.
    max_tokens = block_table.shape[1] * key_cache.shape[2]
    own_lens = torch.ops.kvkernels.lens_behind_prefixes.default(
        seq_lens, cu_seqlens_q, prefixes._lens_of_seqs, max_tokens
    )
    num_tokens, num_heads, _ = query.shape
    if batch_invariant or (
        only_if_it_pays and not prefixes.pays(num_tokens, num_heads, key_cache, value_cache)
    ):
        return paged_attention(
            query,
            key_cache,
            value_cache,
            block_table,
            seq_lens,
            cu_seqlens_q,
            **rules,
            **own,
            return_lse=return_lse,
            batch_invariant=batch_invariant,
        )
    out, lse = _attend_in_two_passes(
        *(query, key_cache, value_cache, block_table, own_lens, cu_seqlens_q),
        *(prefixes, rules, own),
    )
    return (out, lse) if return_lse else out


def _attend_in_two_passes(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    own_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    prefixes: SharedPrefixes,
    rules: dict[str, Any],
    own: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the prefixes, a group at a time, merged with that to each sequence's rest.

    `own_lens` are the sequences' tokens behind their prefixes. `rules` count for both passes, `own`
    only for the second.
    """
    bounds = prefixes._bounds
    shared = paged_attention(
        query,
        key_cache,
        value_cache,
        block_table[prefixes._first_seqs],
        prefixes._lens,
        bounds.to(torch.int32) if cu_seqlens_q is None else cu_seqlens_q[bounds],
        **rules,
        causal=False,
        return_lse=True,
    )
    rest = paged_attention(
        query,
        key_cache,
        value_cache,
        _suffix_table(block_table, prefixes, key_cache.shape[2]),
        own_lens,
        cu_seqlens_q,
        **rules,
        **own,
        return_lse=True,
    )
    return merge_attention(*shared, *rest)


def _check_prefixes(
    prefixes: SharedPrefixes,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    if prefixes.num_seqs != seq_lens.shape[0]:
        raise ValueError(
            f"prefixes: expected groups of {seq_lens.shape[0]} sequences together, got"
            f" {prefixes.num_seqs}"
        )
    check_device("prefixes", prefixes._bounds, seq_lens.device)
    block_size = key_cache.shape[2]
    longest = block_table.shape[1] * block_size
    for length in prefixes.prefix_lens:
        if length % block_size or length > longest:
            raise ValueError(
                f"prefixes: expected multiples of the block size {block_size} up to {longest}, got"
                f" {length}"
            )


def _suffix_table(
    block_table: torch.Tensor, prefixes: SharedPrefixes, block_size: int
) -> torch.Tensor:
    """Each sequence's row of the table without its prefix."""
    first = prefixes.prefix_lens[0] // block_size if prefixes.prefix_lens else 0
    if len(set(prefixes.prefix_lens)) <= 1:
        return block_table[:, first:]
    columns = torch.arange(block_table.shape[1], device=block_table.device)
    skipped = prefixes._lens_of_seqs[:, None] // block_size
    # Clamped: entries past a row's end may be anything, as they are never read.
    return block_table.gather(1, (columns + skipped).clamp(max=block_table.shape[1] - 1))


# An op, as a graph cannot hold a check of values. It returns what the second pass needs, so that no
# compiler takes it for useless; before one pass alone it may, where nothing could go wrong.
LIBRARY.define(
    "lens_behind_prefixes(Tensor seq_lens, Tensor? cu_seqlens_q, Tensor prefix_lens,"
    " SymInt max_tokens) -> Tensor"
)


@torch.library.impl(LIBRARY, "lens_behind_prefixes", "CPU")
def _lens_behind_prefixes_cpu(
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    prefix_lens: torch.Tensor,
    max_tokens: int,
) -> torch.Tensor:
    """Each sequence's tokens behind its prefix.

    Raises:
        ValueError: If a sequence is longer than its row of the table, or a prefix reaches past its
            sequence's first query.
    """
    # The second pass cannot tell: behind its prefix, a sequence may fit into its row again.
    if seq_lens.numel() and int(seq_lens.max()) > max_tokens:
        seq = int(seq_lens.argmax())
        raise ValueError(
            f"seq_lens: expected 0 to {max_tokens} (the table's width), got {int(seq_lens[seq])}"
            f" for sequence {seq}"
        )
    lens = seq_lens - prefix_lens
    left = lens - (cu_seqlens_q.diff() if cu_seqlens_q is not None else 1)
    # Sequences without a prefix are exempt: they may be empty, or have more queries than tokens.
    left = left.where(prefix_lens > 0, 0)
    if left.numel() and int(left.min()) < 0:
        seq = int(left.argmin())
        raise ValueError(
            f"prefixes: expected no more tokens than stand before the queries, got"
            f" {int(prefix_lens[seq])} for sequence {seq}"
        )
    return lens


@torch.library.impl(LIBRARY, "lens_behind_prefixes", "CUDA")
def _lens_behind_prefixes_cuda(
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    prefix_lens: torch.Tensor,
    max_tokens: int,
) -> torch.Tensor:
    return seq_lens - prefix_lens


@torch.library.register_fake("kvkernels::lens_behind_prefixes", lib=LIBRARY)
def _lens_behind_prefixes_fake(
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    prefix_lens: torch.Tensor,
    max_tokens: int,
) -> torch.Tensor:
    return torch.empty_like(seq_lens)
