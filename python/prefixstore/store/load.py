"""What one call of a loader knows while it is under way."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from prefixstore.block_key import BlockKey
from prefixstore.store.block_targets import BlockTarget
from prefixstore.store.write_queue import Chooser, WriteJob

LoadProgress = Callable[[Sequence[int]], bool]


@dataclass
class Work:
    """What one tier gave to a load, and how long the load was at it."""

    num_records: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


class Load:
    """One call on its way.

    Args:
        keys: What is loaded.
        deadline: What is not there by then is a miss.
        target: Gets whole blocks, by their index among `keys`; None if layers are loaded.
        progress: See `Store.load_many`.
    """

    def __init__(
        self,
        keys: Sequence[BlockKey],
        deadline: float,
        target: BlockTarget | None = None,
        progress: LoadProgress | None = None,
    ) -> None:
        self.keys = keys
        self.target = target
        self.deadline = deadline
        self.progress = progress
        self.is_stopped = False
        self.coalesces = True
        self.found: list[str | None] = [None] * len(keys)
        self.promotions: list[WriteJob] = []
        self.held_bytes = self.num_held = 0  # room reserved in the queue for `promotions`
        # Records deleted meanwhile, which must go to no faster tier.
        self.passed_over: list[Chooser] = []
        self.claimed: set[int] = set()  # blocks that other threads leave to this load, and wait for
        # Blocks that other threads are fetching, and this one waits for.
        self.elsewhere: set[int] = set()
        # By number of the tier that was asked.
        self.work: defaultdict[int, Work] = defaultdict(Work)

    def goes_on_after(self, batch: Sequence[int]) -> bool:
        """Say what of a batch was found; False if the caller has had enough."""
        loaded = [i for i in batch if self.found[i] is not None]
        if self.progress is not None and loaded:
            self.is_stopped = not self.progress(loaded)
        return not self.is_stopped

    def passes_over(self, job: WriteJob) -> bool:
        """Whether a record is not to go to a faster tier after all."""
        return any(is_meant(job.key.name) for is_meant in self.passed_over)

    @contextmanager
    def timed(self, number: int) -> Iterator[None]:
        """What runs inside is this tier's work."""
        started = time.perf_counter()
        yield
        self.work[number].seconds += time.perf_counter() - started
