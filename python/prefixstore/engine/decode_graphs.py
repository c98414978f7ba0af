"""Decode passes in a few fixed shapes, which are recorded once and replayed from then on.

With few tokens a pass of a model takes longer to be queued than to be computed: Python, checks and
launches of a thousand kernels. A replay queues all of them in one call.

::

    arrays of a pass -- pad --> static inputs of its shape --+-- forward ----------------> logits
                                                             +-- replay --> static logits

Passes of one shape give the same bits both ways: when a pass is recorded is not seen in an answer.
What is recorded is tried beside the forward pass before it is trusted. While the model has other
hooks than when it was opened, it runs: a replay calls nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from itertools import chain

import numpy as np
import torch
from torch.nn.modules import module as torch_module

from prefixstore.engine.graph_recorder import Recorder
from prefixstore.engine.pass_inputs import pack, unpack
from prefixstore.engine.pass_layout import DecodeShape, idle_decode, pad_decode

logger = logging.getLogger(__name__)

# Passes of one shape before it is recorded. Recording takes about as long as this many passes, so
# it at most doubles what a shape has cost so far, and rare shapes are never recorded.
NUM_FORWARD_PASSES = 8

BeforeLayer = Callable[[int], None]
# Takes the device's copies of the arrays of `pad_decode`; gives logits, ``[num_seqs, vocab_size]``.
Forward = Callable[[Sequence[torch.Tensor], BeforeLayer | None], torch.Tensor]


class _Decode:
    """A shape: its inputs on the device, at addresses that stay, and what replays it, if anything.

    Args:
        shape: Rows and blocks.
        num_groups: Of layers.
        device: Where.

    Attributes:
        tensors: The inputs, views of one buffer.
        num_passes: How many were run.
        replay: None until it is recorded.
        logits: ``[shape.num_seqs, vocab_size]``: what `replay` writes.
    """

    def __init__(self, shape: DecodeShape, num_groups: int, device: torch.device) -> None:
        self.shape = shape
        self._device = device
        self._idle = idle_decode(num_groups, shape)
        self._packed = pack(self._idle, pin_memory=False).to(device)
        self.tensors = unpack(self._packed, self._idle)
        self.num_passes = 0
        self.replay: Callable[[], None] | None = None
        self.logits: torch.Tensor | None = None

    def load(self, arrays: Sequence[np.ndarray]) -> None:
        """Give it inputs, for what is queued next on the current stream."""
        packed = pack(arrays, pin_memory=self._device.type == "cuda")
        self._packed.copy_(packed, non_blocking=True)

    def load_idle(self) -> None:
        """Give it rows that nobody has."""
        self.load(self._idle)


class _Hooks:
    """Those of all modules of a model, and of all models."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._tables = [torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks]
        for module in model.modules():
            self._tables += [module._forward_pre_hooks, module._forward_hooks]

    def ids(self) -> Hashable:
        """Of each hook there is, a number that no other has.

        For every pass, so one expression: 3 us for the 400 modules of an 8B model.
        """
        return tuple(chain.from_iterable(filter(None, self._tables)))


class DecodeGraphs:
    """Runs passes with one new token a sequence; all in one thread and in inference mode.

    Args:
        forward: Runs the model; stores the tokens' KV.
        model: What it runs; its modules stay the same.
        num_groups: Of layers.
        device: Where.
        recorder: Records there.
    """

    def __init__(
        self,
        forward: Forward,
        model: torch.nn.Module,
        num_groups: int,
        device: torch.device,
        recorder: Recorder,
    ) -> None:
        self._forward = forward
        self._hooks = _Hooks(model)
        self._ids_at_first = self._hooks.ids()
        self._num_groups = num_groups
        self._device = device
        self._recorder: Recorder | None = recorder
        self._decodes: dict[DecodeShape, _Decode] = {}
        self._logits: torch.Tensor | None = None  # of the largest shape so far

    @property
    def shapes(self) -> list[DecodeShape]:
        """Those that are replayed. Any thread may ask."""
        decodes = list(self._decodes.items())
        return [shape for shape, one in decodes if one.replay is not None]

    def run(
        self, arrays: Sequence[np.ndarray], before_layer: BeforeLayer | None = None
    ) -> torch.Tensor:
        """Compute the tokens and store their KV.

        Args:
            arrays: What `lay_out` made of chunks of one token each.
            before_layer: See `BatchCache`. A replay calls nobody, so the model runs then.

        Returns:
            ``[num_seqs, vocab_size]``, good until the next pass.
        """
        num_seqs, shape = len(arrays[0]), DecodeShape.holding(arrays)
        if shape not in self._decodes:
            self._decodes[shape] = _Decode(shape, self._num_groups, self._device)
        decode, padded = self._decodes[shape], pad_decode(arrays, shape)
        decode.load(padded)
        has_other_hooks = self._hooks.ids() != self._ids_at_first
        if before_layer is not None or has_other_hooks or self._recorder is None:
            return self._forward(decode.tensors, before_layer)[:num_seqs]
        if decode.replay is not None:
            assert decode.logits is not None  # set before `replay`
            decode.replay()
            return decode.logits[:num_seqs]
        if decode.num_passes < NUM_FORWARD_PASSES:
            decode.num_passes += 1
            return self._forward(decode.tensors, None)[:num_seqs]
        return self._record(self._recorder, decode, padded)[:num_seqs]

    def close(self) -> None:
        """Forget all that was recorded: from now on the model runs."""
        self._recorder = None
        self._decodes.clear()
        self._logits = None

    def _record(
        self, recorder: Recorder, decode: _Decode, padded: Sequence[np.ndarray]
    ) -> torch.Tensor:
        """Record a shape and try it on a pass; the logits of that, from the model."""
        problem, replayed = "", None
        try:
            replay = self._record_idle(recorder, decode)
            decode.load(padded)
            replay()
            assert decode.logits is not None
            replayed = decode.logits.clone()
        except Exception as error:
            # Any error only means that this shape is not replayed. If the model itself fails, so
            # does its own pass below, and raises.
            problem = f"{type(error).__name__}: {error}"
        decode.load(padded)
        logits = self._forward(decode.tensors, None)
        if replayed is not None:
            if _has_same_bits(replayed, logits):
                decode.replay = replay
                return logits
            largest = float((replayed.float() - logits.float()).abs().max())
            problem = f"a replay gave other logits, by up to {largest:.3g}"
        logger.warning(
            "decode passes are not replayed from CUDA graphs but run by the model, shape %s: %s",
            *(tuple(decode.shape), problem),
        )
        self.close()
        return logits

    def _record_idle(self, recorder: Recorder, decode: _Decode) -> Callable[[], None]:
        """Record a shape while nobody has its rows.

        So the passes that this takes store nothing, and what a graph should not hold, as a value
        that was an input, gives other logits when it is tried on rows that somebody has.
        """
        decode.load_idle()
        out = decode.logits = self._room(self._forward(decode.tensors, None))

        def run() -> None:
            out.copy_(self._forward(decode.tensors, None))

        return recorder.record(run)

    def _room(self, logits: torch.Tensor) -> torch.Tensor:
        """Where such logits are written: shapes share it, for they are replayed one after another.

        A smaller one before stays with the shapes that were recorded with it.
        """
        num_seqs, vocab_size = logits.shape
        if self._logits is None or len(self._logits) < num_seqs:
            self._logits = logits.new_empty(1 << (num_seqs - 1).bit_length(), vocab_size)
        return self._logits[:num_seqs]


def _has_same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """NaN too, which equals nothing."""
    return a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
