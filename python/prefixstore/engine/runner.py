"""Runs the model once over the new tokens of many sequences."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvkernels import UnsupportedError, native
from kvkernels.nn import PagedGroup, batch_invariance, decoder_layers, fused_layers
from kvkernels.nn.module import PagedBatch
from kvkernels.nn.transformers_batch import BatchCache
from kvkernels.threads import own_threads
from prefixstore.engine.pass_inputs import to_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence.

    Attributes:
        tokens: ``[num_new]``, uint32.
        start: Position of the first.
        tables: ``[num_groups, num_blocks]``, int32: the sequence's blocks.
        wants_logits: Whether the token after them is to be chosen.
    """

    tokens: np.ndarray
    start: int
    tables: np.ndarray
    wants_logits: bool

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)


def install_batch_invariance(model: Any, wanted: bool | None) -> bool:
    """Make a model's results independent of batching, if that is wanted.

    Args:
        model: A Hugging Face causal language model.
        wanted: See `EngineConfig.batch_invariant`.

    Returns:
        Whether they are now; then `kvkernels.nn.batch_invariance.uninstall` undoes it.

    Raises:
        UnsupportedError: If `wanted` is True and this cannot be promised for the model.
    """
    costs_nothing = model.device.type == "cpu" and "amx" not in native.available_isas()
    if not (costs_nothing if wanted is None else wanted):
        return False
    try:
        batch_invariance.install(model)
    except UnsupportedError as error:
        if wanted:
            raise
        logger.info("answers may depend on their batch in the last bits: %s", error)
        return False
    return True


class ModelRunner:
    """A Hugging Face causal language model whose attention reads the pools.

    Args:
        model: In evaluation mode, with the attention of kvkernels.
        groups: All its layers.
        block_size: Tokens in a block.
        batch_invariant: See `EngineConfig`.
        fuses_layers: See `EngineConfig`.

    Attributes:
        is_batch_invariant: Whether results depend on nothing but a sequence's own tokens.
        threads: Makes the context that a pass runs in, and which says on whose threads.

    Raises:
        UnsupportedError: If `batch_invariant` is True and cannot be promised for the model.
    """

    def __init__(
        self,
        model: Any,
        groups: Sequence[PagedGroup],
        block_size: int,
        batch_invariant: bool | None = None,
        fuses_layers: bool = True,
    ) -> None:
        self._model = model
        self._groups = tuple(groups)
        self._block_size = block_size
        self._device = groups[0].pool.device
        self.is_batch_invariant = install_batch_invariance(model, batch_invariant)
        self._has_fused_layers = fuses_layers and fused_layers.install(model) > 0
        # A pass is then all but nothing else than our kernels.
        is_ours = self.is_batch_invariant and self._has_fused_layers
        self.threads: Callable[[], AbstractContextManager[None]] = (
            own_threads if is_ours else nullcontext
        )
        self._has_decoder_layers = is_ours and decoder_layers.install(model) > 0

    def close(self) -> None:
        """Give the model back what was changed. May be called again."""
        if self._has_decoder_layers:
            self._has_decoder_layers = False
            decoder_layers.uninstall(self._model)
        if self.is_batch_invariant:
            self.is_batch_invariant = False
            batch_invariance.uninstall(self._model)
        if self._has_fused_layers:
            self._has_fused_layers = False
            fused_layers.uninstall(self._model)

    @torch.inference_mode()
    def run(
        self, chunks: Sequence[Chunk], before_layer: Callable[[int], None] | None = None
    ) -> torch.Tensor | None:
        """Compute the chunks' tokens and store their KV.

        Args:
            chunks: At least one, none empty.
            before_layer: See `BatchCache`.

        Returns:
            ``[num_wanted, vocab_size]``: logits after the chunks that want them, in order; None if
            none does.
        """
        tokens = np.concatenate([chunk.tokens for chunk in chunks]).astype(np.int64)
        positions = np.concatenate([np.arange(chunk.start, chunk.stop) for chunk in chunks])
        ends = np.cumsum([len(chunk.tokens) for chunk in chunks])
        wanted = [
            int(end) - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.wants_logits
        ]
        # A model computes logits of one place at least.
        arrays = [tokens, positions, np.array(wanted or [0]), *self._layout(chunks, positions)]
        input_ids, position_ids, places, *layout = to_device(arrays, self._device)
        cache = BatchCache(self._groups, self._batches(layout, len(tokens)), before_layer)
        with self.threads():
            out = self._model(
                input_ids=input_ids[None],
                position_ids=position_ids[None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=places,
            )
        if self._device.type == "cuda":
            # The planner learns from how long passes take, not from how long queueing them does.
            torch.cuda.current_stream(self._device).synchronize()
        return out.logits[0] if wanted else None

    def _layout(self, chunks: Sequence[Chunk], positions: np.ndarray) -> list[np.ndarray]:
        """Lengths and their running sum, and each group's block table and slots: `PagedBatch`."""
        lengths = [len(chunk.tokens) for chunk in chunks]
        seq_lens = np.array([chunk.stop for chunk in chunks], dtype=np.int32)
        bounds = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        arrays: list[np.ndarray] = [seq_lens, bounds]
        widths = -(-seq_lens // self._block_size)
        rows = np.repeat(np.arange(len(chunks)), lengths)
        blocks, offsets = np.divmod(positions, self._block_size)
        for group in range(len(self._groups)):
            table = np.full((len(chunks), int(widths.max())), -1, dtype=np.int32)
            for row, (chunk, width) in enumerate(zip(chunks, widths.tolist(), strict=True)):
                table[row, :width] = chunk.tables[group, :width]
            arrays += [table, table[rows, blocks].astype(np.int64) * self._block_size + offsets]
        return arrays

    def _batches(self, layout: Sequence[torch.Tensor], num_tokens: int) -> list[PagedBatch]:
        """Of each group, from what `_layout` made, on the device."""
        seq_lens, bounds, *own = layout
        cu_seqlens_q = None if len(seq_lens) == num_tokens else bounds  # one new token each
        return [
            PagedBatch(own[2 * group], seq_lens, cu_seqlens_q, own[2 * group + 1])
            for group in range(len(self._groups))
        ]
