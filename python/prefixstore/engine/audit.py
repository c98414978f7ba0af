"""Recomputes a sampled share of what was reused, and quarantines what does not agree.

    a prompt reused blocks -> chosen? -> the engine is idle -> block after block:
        computed into a block of its own -> compared with the one that was reused
            agrees                       -> the next one
            differs by more than honest arithmetic does -> detached, deleted, named, logged

Checksums find bytes that changed since they were written. This finds what was wrong when it was
written: a bug, a bad machine, or someone who may write to a tier and lies.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from kvkernels import PoolFullError
from prefixstore.block_cache import BlockCache
from prefixstore.engine.pass_layout import Chunk
from prefixstore.engine.quarantine import Quarantine
from prefixstore.engine.request import Request
from prefixstore.engine.runner import ModelRunner
from prefixstore.residency import first_block_needed

logger = logging.getLogger(__name__)

_MAX_WAITING = 16  # audits that wait; further ones are skipped
_PATIENCE_S = 60.0  # how long an audit waits for the engine to be idle before it is dropped

# How far recomputed blocks may differ from right ones: the norm of the difference over the norm,
# for one layer's keys or values in a block. Each bound is at least three times what was measured
# (docs/security.md), but twice for codecs of 2 bits, where blocks differ too much for more.
# Lossless codecs: only the order of summation differs, with chunks and batches.
LOSSLESS_BOUNDS = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
# Lossy codecs: what the codec loses, and its effect on all that is computed from it.
LOSSY_BOUNDS = {"q8": 0.1, "k8v4": 0.4, "q4": 0.4, "k4v2": 1.2, "q2": 1.2}


def divergence_bound(dtype: torch.dtype, codecs: Iterable[str]) -> float:
    """The largest relative error of an honest block.

    Args:
        dtype: Of the pool.
        codecs: Of all layers that blocks may have been restored from: what one layer lost, the
            layers after it were computed from.
    """
    return max(LOSSLESS_BOUNDS[dtype], *(LOSSY_BOUNDS.get(codec, 0.0) for codec in codecs), 0.0)


def relative_errors(block: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """How far a block is from what it should be.

    Args:
        block: ``[num_layers, num_planes, num_kv_heads, block_size, head_dim]``.
        exact: Like `block`.

    Returns:
        ``[num_layers, num_planes]``, float32: of keys, and of values where they lie apart.
    """
    block, exact = block.flatten(2).float(), exact.flatten(2).float()
    least = torch.finfo(torch.float32).tiny
    return (block - exact).norm(dim=2) / exact.norm(dim=2).clamp_min(least)


@dataclass(frozen=True)
class _Job:
    """A prompt to be audited.

    Attributes:
        request: Which has reused blocks.
        reused: Their numbers, and where each came from.
        until: When it is dropped.
    """

    request: Request
    reused: Mapping[int, str]
    until: float


class _Audit:
    """One prompt on its way through the model once more.

    It holds a pin and references to the blocks under test, and blocks of its own.
    """

    def __init__(self, blocks: BlockCache, job: _Job) -> None:
        self.job = job
        self.number = 0  # of the next block
        self._device, self._size = blocks.device, blocks.block_size
        tokens = job.request.tokens[: (max(job.reused) + 1) * self._size]
        # In a sliding group only the last window was read, so only that is held.
        self._match, self.held = blocks.device.find_usable(tokens, job.request.salt)
        # Blocks may have been evicted since: audit those left, up to the last reused one.
        left = [number for number in job.reused if number < len(self.held)]
        self.num_blocks = max(left, default=-1) + 1
        self._own = np.full((len(blocks.device.groups), self.num_blocks), -1, dtype=np.int32)

    @property
    def is_done(self) -> bool:
        return self.number >= self.num_blocks

    def begin_block(self) -> Chunk:
        """The next block's tokens, with room for them; PoolFullError if there is none."""
        number, size = self.number, self._size
        for group, table in enumerate(self._own):
            table[number] = self._device.reserve_now(group, 1)[0]
        start, stop = number * size, (number + 1) * size
        tokens = self.job.request.tokens[start:stop].copy()
        return Chunk(tokens, start, self._own.copy(), wants_logits=False)

    def errors(self) -> list[torch.Tensor]:
        """Of the block that was computed now, `relative_errors` of each group that holds it."""
        found = []
        places = zip(
            *(self._device.groups, self.held[self.number].tolist()),
            self._own[:, self.number].tolist(),
            strict=True,
        )
        for group, held, own in places:
            data = group.pool.data
            is_held = held >= 0  # blocks that a window has passed are not held
            found.append(relative_errors(data[held], data[own]) if is_held else torch.zeros(1, 1))
        return found

    def end_block(self) -> None:
        """Go on, and give back what no later token can see."""
        self.number += 1
        for group, (window, table) in enumerate(zip(self._device.windows, self._own, strict=True)):
            self._device.drop(group, table[: first_block_needed(self.number, self._size, window)])

    def release(self) -> None:
        self._device.release(np.ascontiguousarray(self._own.T))
        self._device.release(self.held)
        self._device.unpin(self._match)


class Auditor:
    """Chooses requests, and audits them one block at a time; all in the engine's thread.

    Args:
        blocks: The model's.
        runner: Computes.
        quarantine: Takes what is wrong.
        check_weights: Raises `ValueError` if the model is not the one any more that filled them.
        share: Of the requests that reused blocks.
        seed: Of the choice.
    """

    def __init__(
        self,
        blocks: BlockCache,
        runner: ModelRunner,
        quarantine: Quarantine,
        check_weights: Callable[[], None],
        share: float,
        seed: int | None,
    ) -> None:
        self.num_audits = self.audited_blocks = 0
        self._blocks = blocks
        self._runner = runner
        self._quarantine = quarantine
        self._check_weights = check_weights
        self._share = share
        self._random = random.Random(seed)
        self._jobs: deque[_Job] = deque()
        self._audit: _Audit | None = None
        dtype = blocks.device.groups[0].pool.layout.dtype
        self._bound = divergence_bound(dtype, blocks.record_codecs())

    def offer(self, request: Request, reused: Mapping[int, str], now: float) -> None:
        """A prompt is computed, some blocks of which were not: perhaps it is to be audited."""
        if reused and self._random.random() < self._share and len(self._jobs) < _MAX_WAITING:
            self._jobs.append(_Job(request, reused, now + _PATIENCE_S))

    def has_work(self, now: float) -> bool:
        """Whether `step` is to be called when there is nothing else to do."""
        if self._audit is not None and now > self._audit.job.until:
            self.give_way()
        while self._jobs and now > self._jobs[0].until:
            self._jobs.popleft()
        # Read in this order, since `step` sets `_audit` before it removes the job: another thread
        # always sees one of the two.
        return bool(self._jobs) or self._audit is not None

    def step(self) -> None:
        """Compute and compare one block."""
        try:
            if self._audit is None:
                try:
                    self._audit = _Audit(self._blocks, self._jobs[0])
                finally:
                    # Last, so that `has_work` never sees neither job nor audit.
                    self._jobs.popleft()
            if self._audit.is_done or not self._step(self._audit):
                self.give_way()
        except Exception:
            # A fault of the model or of ours, as in a forward pass: requests go on.
            logger.exception("an audit failed")
            self.give_way()

    def give_way(self) -> bool:
        """Drop the audit under way, for the sake of its blocks; False if there is none."""
        if self._audit is None:
            return False
        self._audit.release()
        self._audit = None
        return True

    def close(self) -> None:
        """Drop what is under way."""
        self._jobs.clear()
        self.give_way()

    def _step(self, audit: _Audit) -> bool:
        """Audit the next block; False once the audit is over."""
        try:
            chunk = audit.begin_block()
        except PoolFullError:
            return False  # requests of other threads hold the pool
        self._runner.run([chunk])
        if audit.number in audit.job.reused:
            errors = audit.errors()
            self.audited_blocks += 1
            # "not all below" instead of "any above", since a comparison with NaN is false
            if not all(bool((one <= self._bound).all()) for one in errors):
                self.num_audits += 1
                self._remove(audit, errors)
                return False
        audit.end_block()
        if audit.is_done:
            # Before it is counted, so that whoever sees the count finds the blocks free.
            self.give_way()
            self.num_audits += 1
        return not audit.is_done

    def _remove(self, audit: _Audit, errors: list[torch.Tensor]) -> None:
        """A block is wrong: neither it nor what was computed on it is used again."""
        try:
            self._check_weights()
        except ValueError:
            return  # another model, so other blocks: the engine ends what runs on them
        request, number = audit.job.request, audit.number
        num_blocks = self._quarantine.add(request, number)
        known = [one.nan_to_num(nan=float("inf")) for one in errors]
        group = max(range(len(known)), key=lambda i: float(known[i].max()))
        layer, plane = divmod(int(known[group].argmax()), known[group].shape[1])
        logger.error(
            "audit: request %s: block %d (%s), from %s: relative error %.3g in %s of layer %d,"
            " expected at most %.3g: %d blocks quarantined",
            *(request.request_id, number, request.keys[group][number].block_hash.hex()),
            *(audit.job.reused[number], known[group].max(), ("keys", "values")[plane]),
            *(self._blocks.device.groups[group].layers[layer], self._bound, num_blocks),
        )
