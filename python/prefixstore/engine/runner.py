"""Runs the model once over the new tokens of many sequences."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import numpy as np
import torch

from kvkernels import UnsupportedError
from kvkernels.nn import PagedGroup, batch_invariance, decoder_layers, fused_layers
from kvkernels.nn.module import PagedBatch
from kvkernels.nn.transformers_batch import BatchCache
from kvkernels.threads import own_threads
from prefixstore.engine.decode_graphs import BeforeLayer, DecodeGraphs
from prefixstore.engine.graph_recorder import find_recorder
from prefixstore.engine.pass_inputs import to_device
from prefixstore.engine.pass_layout import Chunk, DecodeShape, lay_out, make_batches

logger = logging.getLogger(__name__)


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
    is_due = model.device.type == "cpu" if wanted is None else wanted
    if not is_due:
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
        cuda_graphs: See `EngineConfig`.

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
        cuda_graphs: bool = True,
    ) -> None:
        self._model = model
        self._groups = tuple(groups)
        self._block_size = block_size
        self._device = groups[0].pool.device
        # Undone in reverse order, also where the rest fails.
        with ExitStack() as changes:
            self.is_batch_invariant = install_batch_invariance(model, batch_invariant)
            if self.is_batch_invariant:
                changes.callback(batch_invariance.uninstall, model)
            num_fused = 0
            if fuses_layers:
                num_fused = fused_layers.install(model)
                changes.callback(fused_layers.uninstall, model)
            # With fused layers a pass is almost only kernels of ours, and that is what
            # `own_threads` is for.
            is_ours = self.is_batch_invariant and num_fused > 0
            self.threads: Callable[[], AbstractContextManager[None]] = (
                own_threads if is_ours else nullcontext
            )
            if is_ours:
                decoder_layers.install(model)
                changes.callback(decoder_layers.uninstall, model)
            recorder = find_recorder(self._device) if cuda_graphs else None
            self._graphs = (
                DecodeGraphs(self._forward_decode, model, len(self._groups), self._device, recorder)
                if recorder is not None
                else None
            )
            if self._graphs is not None:
                changes.callback(self._graphs.close)
            self._changes = changes.pop_all()

    def close(self) -> None:
        """Give the model back what was changed. May be called again."""
        self.is_batch_invariant = False
        self._changes.close()

    @property
    def graph_shapes(self) -> list[DecodeShape]:
        """Of the passes that are replayed from CUDA graphs."""
        return [] if self._graphs is None else self._graphs.shapes

    @torch.inference_mode()
    def run(
        self, chunks: Sequence[Chunk], before_layer: BeforeLayer | None = None
    ) -> torch.Tensor | None:
        """Compute the chunks' tokens and store their KV.

        Args:
            chunks: At least one, none empty.
            before_layer: See `BatchCache`.

        Returns:
            ``[num_wanted, vocab_size]``: logits after the chunks that want them, in order, good
            until the next run; None if none does.
        """
        arrays = lay_out(chunks, len(self._groups), self._block_size)
        ends = np.cumsum([len(chunk.tokens) for chunk in chunks])
        wanted = [
            int(end) - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.wants_logits
        ]
        is_decode = len(chunks) == len(arrays[0])
        if self._graphs is not None and is_decode:
            logits = self._graphs.run(arrays, before_layer)
            if 0 < len(wanted) < len(chunks):
                logits = logits[wanted]
        else:
            logits = self._forward(arrays, wanted, is_decode, before_layer)
        if self._device.type == "cuda":
            # The planner needs the time a pass takes, not the time it takes to queue it.
            torch.cuda.current_stream(self._device).synchronize()
        return logits if wanted else None

    def _forward(
        self,
        arrays: Sequence[np.ndarray],
        wanted: Sequence[int],
        is_decode: bool,
        before_layer: BeforeLayer | None,
    ) -> torch.Tensor:
        # Models compute logits of at least one position, even if none is wanted.
        places = np.array(wanted or [0])
        tensors = to_device([*arrays, places], self._device)
        input_ids, position_ids, seq_lens, bounds, *own, places_there = tensors
        batches = make_batches(seq_lens, None if is_decode else bounds, own)
        return self._call_model(input_ids, position_ids, batches, places_there, before_layer)

    def _forward_decode(
        self, tensors: Sequence[torch.Tensor], before_layer: BeforeLayer | None
    ) -> torch.Tensor:
        """See `decode_graphs.Forward`."""
        input_ids, position_ids, seq_lens, *own = tensors
        batches = make_batches(seq_lens, None, own)
        return self._call_model(input_ids, position_ids, batches, 0, before_layer)

    def _call_model(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        batches: Sequence[PagedBatch],
        logits_to_keep: int | torch.Tensor,
        before_layer: BeforeLayer | None,
    ) -> torch.Tensor:
        """Logits of the places ``logits_to_keep``, or with 0 of all."""
        cache = BatchCache(self._groups, batches, before_layer)
        with self.threads():
            out = self._model(
                input_ids=input_ids[None],
                position_ids=position_ids[None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=logits_to_keep,
            )
        logits: torch.Tensor = out.logits[0]
        return logits
