"""Which of a tier's records say that they are what was asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prefixstore.block_key import BlockKey
from prefixstore.errors import BlockCorrupted, TierError
from prefixstore.record import RecordHeader, check_headers

Found = tuple[RecordHeader, np.ndarray]  # a record and what its header says


def find_right(
    keys: Sequence[BlockKey], records: Sequence[np.ndarray | TierError | None]
) -> tuple[list[Found | None], dict[int, BlockCorrupted]]:
    """Those whose headers agree with the keys, None for each other; and what is wrong with which,
    by index.
    """
    there = [i for i, record in enumerate(records) if isinstance(record, np.ndarray)]
    whole = [record for record in records if isinstance(record, np.ndarray)]
    found: list[Found | None] = [None] * len(keys)
    wrong = {i: one for i, one in enumerate(records) if isinstance(one, BlockCorrupted)}
    for i, record, header in zip(
        there, whole, check_headers(whole, [keys[i] for i in there]), strict=True
    ):
        if isinstance(header, BlockCorrupted):
            wrong[i] = header
        else:
            found[i] = header, record
    return found, wrong
