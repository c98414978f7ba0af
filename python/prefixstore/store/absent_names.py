"""What a tier was lately found not to hold, so that it is not asked for it again and again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from prefixstore.block_key import RecordName
from prefixstore.store.recent_names import RecentNames


class AbsentNames:
    """Names of records that are not there, each for a while. Thread-safe.

    A record may be written while the answer that it is absent is on its way:

        look-up    asks the tier -> "absent" ...                 -> not remembered
        write                                     written, noted

    Args:
        ttl_s: Seconds that a name is remembered.
    """

    def __init__(self, ttl_s: float) -> None:
        self._names = RecentNames(ttl_s=ttl_s)
        self._written: list[set[RecordName]] = []  # during each look-up that is under way
        self._lock = threading.Lock()

    def look_up(
        self,
        names: Sequence[RecordName],
        ask: Callable[[Sequence[RecordName]], Sequence[bool | None]],
    ) -> list[bool | None]:
        """False for each that is known to be absent, else what `ask` says: None for no answer."""
        is_absent = self._names.contains_many(names)
        asked = [name for name, known in zip(names, is_absent, strict=True) if not known]
        if not asked:
            return [False] * len(names)
        written: set[RecordName] = set()
        with self._lock:
            self._written.append(written)
        absent: set[RecordName] = set()
        try:
            answers = dict(zip(asked, ask(asked), strict=True))
            absent = {name for name, is_there in answers.items() if is_there is False}
        finally:
            with self._lock:
                # by identity: sets of two look-ups may be equal
                self._written = [one for one in self._written if one is not written]
                self._names.add(absent - written)
        return [answers.get(name, False) for name in names]

    def note_written(self, names: Iterable[RecordName]) -> None:
        """These may be there from now on."""
        with self._lock:
            noted = set(names)
            for written in self._written:
                written |= noted
            self._names.discard(noted)
