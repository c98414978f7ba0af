"""What is left in a directory of writes whose process died.

    {hash}.kvb#1     what the client writes; it becomes {hash}.kvb when it is whole

The client neither lists nor deletes such names, so the directory itself is searched for them. An
object store shows nothing of an upload that was cut off.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from prefixstore.errors import TierUnavailable
from prefixstore.tiers.base import is_past, too_late
from prefixstore.tiers.remote.config import RemoteTierConfig
from prefixstore.tiers.remote.records import NAME

_STAGED = re.compile(NAME.pattern + r"#\d+")
# A write that has added nothing for so long is over, though clocks of machines differ.
GRACE_S = 3600.0
ANY_AGE_S = -math.inf  # even if the clock of who wrote it is ahead


class StagedFile(NamedTuple):
    """What is left of a write."""

    path: Path
    num_bytes: int


class StagedFiles:
    """Those of a tier; none where its store is no directory."""

    def __init__(self, config: RemoteTierConfig) -> None:
        self._tier_name = config.name
        self._directory = Path(config.bucket) if config.kind == "file" else None
        self._root = config.root

    def find(self, folder: str, min_age_s: float, deadline: float) -> list[StagedFile]:
        """Those below a folder to which nothing was added for so long.

        Raises:
            TierUnavailable: If the directory cannot be read.
            TierTimeout: If it is not read by the deadline.
        """
        if self._directory is None:
            return []
        try:
            return list(self._find(self._directory, folder, min_age_s, deadline))
        except OSError as error:
            raise self._translated(error) from error

    def remove(self, folder: str, min_age_s: float, deadline: float) -> list[StagedFile]:
        """`find` them and delete them."""
        found = self.find(folder, min_age_s, deadline)
        try:
            for file in found:
                file.path.unlink(missing_ok=True)
        except OSError as error:
            raise self._translated(error) from error
        return found

    def _find(
        self, directory: Path, folder: str, min_age_s: float, deadline: float
    ) -> Iterator[StagedFile]:
        root, newest = directory / self._root, time.time() - min_age_s
        for path in (directory / folder).rglob("*.kvb#*"):
            if is_past(deadline):
                raise too_late(self._tier_name)
            if not _STAGED.fullmatch(path.relative_to(root).as_posix()):
                continue
            try:
                status = path.stat()
            except FileNotFoundError:  # its write has ended meanwhile
                continue
            if status.st_mtime <= newest:
                yield StagedFile(path, status.st_size)

    def _translated(self, error: OSError) -> TierUnavailable:
        return TierUnavailable(f"{self._tier_name}: {error.strerror}")
