"""The KV of one sequence: what a model generates with, and what became of its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvkernels.nn.transformers import PagedCache
from prefixstore.device import DeviceBlocks
from prefixstore.restore import RestoredPrefix
from prefixstore.tokens import as_tokens


@dataclass(frozen=True)
class ReuseReport:
    """What became of one prompt.

    Attributes:
        num_prompt_tokens: Tokens of the prompt.
        tokens_by_tier: Reused tokens by where their blocks lay: "device", "memory", "disk".
        num_recomputed: Tokens the model has to compute.
        restore_s: Seconds spent looking up, loading and verifying.
    """

    num_prompt_tokens: int
    tokens_by_tier: dict[str, int]
    num_recomputed: int
    restore_s: float

    @property
    def num_reused(self) -> int:
        return self.num_prompt_tokens - self.num_recomputed


class Session(PagedCache):
    """The KV of one sequence: a `transformers.Cache` that begins with the reused prefix.

    Made by `PrefixCache.session`. Pass it to `model.generate(ids, past_key_values=session)`. The
    prompt's blocks are offered to other sessions as soon as the model has computed them. Use it
    as a context manager, or call `release`: until then its blocks cannot be evicted.

    Attributes:
        report: What was reused, from where, and what has to be computed.
    """

    def __init__(
        self,
        device: DeviceBlocks,
        tokens: np.ndarray,
        restored: RestoredPrefix,
        report: ReuseReport,
        publish: Callable[[np.ndarray, np.ndarray, int], None],
    ) -> None:
        self.report = report
        self._device = device
        self._tokens = tokens
        self._restored: RestoredPrefix | None = restored
        self._num_committed = restored.num_blocks
        self._publish = publish
        super().__init__(
            device.groups,
            num_cached_tokens=restored.num_blocks * device.block_size,
            block_tables=[[ids.tolist()] for ids in restored.block_ids.T],
            reserve=device.reserve,
            on_step=Session._commit_stored,
        )

    def commit(self, token_ids: torch.Tensor | Sequence[int]) -> int:
        """Offer the whole blocks of `token_ids` stored so far to later sessions.

        Args:
            token_ids: `[num_tokens]` or `[1, num_tokens]`: the prompt and what followed, as
                `model.generate` returns it. Tokens the model has not stored are left out.

        Returns:
            How many tokens of it are cached now.

        Raises:
            ValueError: If `token_ids` does not begin with the session's tokens, or the session
                was released.
        """
        tokens = as_tokens("token_ids", token_ids)
        known = min(len(tokens), len(self._tokens))
        differs = np.flatnonzero(tokens[:known] != self._tokens[:known])
        if len(differs):
            at = differs[0]
            raise ValueError(
                f"token_ids: expected to continue this session's tokens, with"
                f" {self._tokens[at]} at {at}, got {tokens[at]}"
            )
        if len(tokens) > len(self._tokens):
            self._tokens = tokens
        self._commit_stored()
        return self._num_committed * self._device.block_size

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, as `PagedCache.crop`; what follows may be other tokens."""
        super().crop(tokens_to_remove)
        self._tokens = self._tokens[: self.num_tokens]
        self._num_committed = min(self._num_committed, self.num_tokens // self._device.block_size)

    def release(self) -> None:
        """Give the blocks back; what was committed stays cached. May be called again."""
        super().release()
        restored, self._restored = self._restored, None
        if restored is not None:
            self._device.unpin(restored.match)

    def __del__(self) -> None:
        # Reached without release() when the session was passed straight to generate().
        if getattr(self, "_restored", None) is not None:
            self.release()

    def _commit_stored(self) -> None:
        if self._restored is None:
            raise ValueError("session: expected an open session, got a released one")
        block_size = self._device.block_size
        num_blocks = min(self.num_tokens, len(self._tokens)) // block_size
        if num_blocks <= self._num_committed:
            return
        tables = [self.block_ids(group, 0) for group in range(len(self._device.groups))]
        block_ids = np.array([table[:num_blocks] for table in tables], dtype=np.int32).T
        self._publish(self._tokens[: num_blocks * block_size], block_ids, self._num_committed)
        self._num_committed = num_blocks
