"""Takes blocks that were found wrong out of use, on the device and in the tiers."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor

from prefixstore.block_cache import BlockCache
from prefixstore.block_key import BlockKey
from prefixstore.engine.request import Request

logger = logging.getLogger(__name__)

_DELETE_S = 30.0  # how long what is being written is waited for before it is deleted


class Quarantine:
    """What an engine found wrong; all in its thread.

    Attributes:
        num_blocks: That were taken out of use.

    Args:
        blocks: The model's.
    """

    def __init__(self, blocks: BlockCache) -> None:
        self.num_blocks = 0
        self._blocks = blocks
        # Deleting from a slow tier takes time that the engine's thread has not.
        self._deleting = ThreadPoolExecutor(1, thread_name_prefix="kv-quarantine")

    def add(self, request: Request, num_kept: int) -> int:
        """Use no block of a request any more after the first `num_kept`; returns how many."""
        wrong = self._blocks.quarantine(request.tokens, request.salt, request.keys, num_kept)
        num_blocks = len(request.keys[0]) - num_kept
        self.num_blocks += num_blocks
        if self._blocks.store is not None:
            self._deleting.submit(self._delete, wrong)
        return num_blocks

    def close(self) -> None:
        """Wait until all is deleted."""
        self._deleting.shutdown(wait=True)

    def _delete(self, keys: list[BlockKey]) -> None:
        """Delete what tiers hold, and what is still on its way there."""
        store = self._blocks.store
        assert store is not None
        try:
            failed = store.delete_many(keys, time.monotonic() + _DELETE_S)
        except Exception:
            logger.exception("quarantine: %d records not deleted", len(keys))
            return
        if failed:
            logger.error("quarantine: %d records not deleted from %s", len(keys), ", ".join(failed))
