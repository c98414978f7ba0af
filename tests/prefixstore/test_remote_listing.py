"""A directory is listed past what cannot be looked at, and nobody waits for one that hangs."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator, Sequence

import pytest

from prefixstore.tiers.remote.config import RemoteTierConfig
from prefixstore.tiers.remote.listing import list_directory
from prefixstore.tiers.remote.objects import DELETE_BATCH, Objects


class Entries(Iterator[Sequence[int]]):
    """A client's batches of one; it goes on after the entries that raise."""

    def __init__(self, entries: Sequence[int | Exception]) -> None:
        self._left = [*entries]

    def __next__(self) -> Sequence[int]:
        if not self._left:
            raise StopIteration
        entry = self._left.pop(0)
        if isinstance(entry, Exception):
            raise entry
        return [entry]


def is_unreadable(error: Exception) -> bool:
    return isinstance(error, ValueError)


def list_all(entries: Sequence[int | Exception]) -> list[list[int]]:
    async def run() -> list[list[int]]:
        return [batch async for batch in list_directory(Entries(entries), is_unreadable, 3)]

    return asyncio.run(run())


@pytest.mark.parametrize("num_entries", [0, 1, 3, 7])
def test_gives_all_that_can_be_looked_at_in_batches(num_entries):
    entries: list[int | Exception] = [*range(num_entries)]
    for place in (num_entries, num_entries // 2, 0):
        entries.insert(place, ValueError("a loop"))
    batches = list_all(entries)
    assert [*itertools.chain(*batches)] == [*range(num_entries)]
    assert all(len(batch) == 3 for batch in batches[:-1])


def test_raises_what_is_another_error():
    with pytest.raises(OSError, match="no such disk"):
        list_all([1, ValueError("a loop"), OSError("no such disk")])


def test_a_directory_that_hangs_keeps_neither_the_loop_nor_its_end():
    is_over = threading.Event()

    class Hanging(Entries):
        def __next__(self) -> Sequence[int]:
            assert is_over.wait(60)
            raise StopIteration

    async def run() -> None:
        batches = list_directory(Hanging([]), is_unreadable, 3)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(batches), 0.05)

    try:
        asyncio.run(run())  # waits for asyncio's own threads
        assert not is_over.is_set()
    finally:
        is_over.set()


def test_the_clients_listing_goes_on_after_a_link_to_itself(tmp_path):
    num_files = DELETE_BATCH + 20
    for number in range(num_files):
        (tmp_path / f"{number}.kvb").touch()
        if number % 200 == 0:
            (tmp_path / f"loop{number}").symlink_to(f"loop{number}")
    objects = Objects(RemoteTierConfig.from_url(f"file://{tmp_path}"))

    async def run() -> list[str]:
        return [info.path async for batch in objects.list("") for info in batch]

    assert sorted(asyncio.run(run())) == sorted(f"{number}.kvb" for number in range(num_files))
