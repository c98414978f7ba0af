"""GPU restores are staged in as few pieces as possible, which hold just what is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import pytest
import torch

import kvkernels
from kvkernels import BlockFormat, EncodedBlocks, KVLayout, KVPool
from kvkernels.transfer import routes, staging
from kvkernels.transfer.routes import DeviceRoute

LAYOUT = KVLayout(4, 2, 64, 16)
NUM_BLOCKS = 7


class InOrder:
    """A stream without a GPU: queued work is already done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def record_event(self) -> InOrder:
        return self

    def wait_event(self, event: InOrder) -> None: ...
    def wait_stream(self, stream: InOrder) -> None: ...
    def synchronize(self) -> None: ...


@pytest.fixture
def num_copies(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Run a GPU's route on the CPU; returns how often it copied rows."""
    monkeypatch.setattr(torch.cuda, "Stream", InOrder)
    monkeypatch.setattr(torch.cuda, "current_stream", InOrder)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(
        routes, "_pinned", lambda shape, dtype: torch.empty(shape, dtype=dtype).fill_(1)
    )
    copies: list[torch.Size] = []
    copy = torch.Tensor.copy_

    def counted(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> object:
        if self.dtype == torch.uint8:
            copies.append(self.shape)
        return copy(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    return lambda: len(copies)


def encode(codec: str, has_infinity: bool, distance: int) -> tuple[EncodedBlocks, KVPool]:
    """Encode a pool's blocks into rows with gaps of so many bytes."""
    pool = KVPool(LAYOUT, NUM_BLOCKS)
    pool.data.normal_(generator=torch.Generator().manual_seed(1))
    if has_infinity:
        pool.data[3, 1, 0, 0, 0, 0] = torch.inf
    block_format = BlockFormat(LAYOUT, codec)
    encoded = kvkernels.encode_blocks(pool, torch.arange(NUM_BLOCKS), block_format)
    row_bytes = max(one.payload_bytes for one in (block_format, block_format.raw))
    if not has_infinity:
        row_bytes = block_format.payload_bytes
    rows = torch.full((NUM_BLOCKS, row_bytes + distance), 0xEE, dtype=torch.uint8)[:, :row_bytes]
    rows[:] = encoded.payloads[:, :row_bytes]
    return EncodedBlocks(block_format, rows, encoded.sums, encoded.is_raw), pool


def cut(encoded: EncodedBlocks, lengths: Sequence[int]) -> list[EncodedBlocks]:
    parts = (one.split(list(lengths)) for one in (encoded.payloads, encoded.sums, encoded.is_raw))
    return [EncodedBlocks(encoded.block_format, *part) for part in zip(*parts, strict=True)]


@pytest.mark.parametrize("layers_per_step", [1, 3, 4])
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 100])
@pytest.mark.parametrize("lengths", [(7,), (1, 4, 2)], ids=["one part", "three parts"])
@pytest.mark.parametrize("has_infinity", [False, True], ids=["", "raw ones"])
@pytest.mark.parametrize("codec", ["raw", "l12", "q4"])
def test_staged_layers_are_those_of_the_rows(
    codec: str,
    has_infinity: bool,
    lengths: tuple[int, ...],
    rows_per_chunk: int,
    layers_per_step: int,
    num_copies: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded, _ = encode(codec, has_infinity, 192)
    monkeypatch.setattr(routes, "STAGE_BYTES", rows_per_chunk * encoded.payloads.stride(0))
    expected, target = (KVPool(LAYOUT, NUM_BLOCKS) for _ in range(2))
    for one in (expected, target):
        one.data.fill_(7.0)
    ids = torch.arange(NUM_BLOCKS).flip(0)
    encoded.payloads[5, encoded.block_format.cut(range(2, 3))][8] ^= 1
    flags = kvkernels.decode_blocks(encoded, expected, ids)
    route = DeviceRoute(target, False, None)
    is_good = route.new_flags(NUM_BLOCKS)
    decode_layers = route.decode(cut(encoded, lengths), ids, is_good)
    for first in range(0, 4, layers_per_step):
        decode_layers(range(first, min(first + layers_per_step, 4)))
    assert (
        torch.equal(is_good, flags) and not is_good[5, 2] and is_good.sum() == is_good.numel() - 1
    )
    assert torch.equal(target.data, expected.data)


@pytest.mark.parametrize("is_told_raw", [False, True])
def test_parts_without_raw_blocks_may_have_narrow_rows(
    is_told_raw: bool, num_copies: Callable[[], int]
) -> None:
    encoded, _ = encode("q4", True, 0)
    expected, target = (KVPool(LAYOUT, NUM_BLOCKS) for _ in range(2))
    ids = torch.arange(NUM_BLOCKS)
    kvkernels.decode_blocks(encoded, expected, ids)
    wide, narrow = cut(encoded, (5, 2))
    rows = narrow.payloads[:, : encoded.block_format.payload_bytes].clone()
    narrow = EncodedBlocks(narrow.block_format, rows, narrow.sums, narrow.is_raw.clone())
    narrow.is_raw[1] = is_told_raw
    target.data.fill_(7.0)
    route = DeviceRoute(target, False, None)
    is_good = route.new_flags(NUM_BLOCKS)
    route.decode([wide, narrow], ids, is_good)(range(4))
    num_good = NUM_BLOCKS - is_told_raw
    assert is_good.all(1).tolist() == [True] * num_good + [False] * is_told_raw
    assert torch.equal(target.data[:num_good], expected.data[:num_good])


@pytest.mark.parametrize("distance, gap_copies", [(0, 1), (4096, 1), (128 << 10, NUM_BLOCKS)])
def test_rows_close_together_are_one_copy(
    distance: int, gap_copies: int, num_copies: Callable[[], int]
) -> None:
    encoded, pool = encode("q4", False, distance)
    before = num_copies()
    route = DeviceRoute(pool, False, None)
    is_good = route.new_flags(NUM_BLOCKS)
    route.decode([encoded], torch.arange(NUM_BLOCKS), is_good)(range(4))
    assert is_good.all() and num_copies() - before == gap_copies


def test_a_failure_waits_for_what_is_under_way(
    num_copies: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, pool = encode("raw", False, 0)
    monkeypatch.setattr(routes, "STAGE_BYTES", encoded.payloads.stride(0))
    waited: list[InOrder] = []
    monkeypatch.setattr(InOrder, "synchronize", lambda stream: waited.append(stream))
    stage = staging.Staging(pool.device, 1)
    with (
        pytest.raises(RuntimeError, match="launch"),
        contextlib.closing(stage.chunks([encoded], range(4))) as chunks,
    ):
        for _ in chunks:
            raise RuntimeError("launch failed")
    assert len(waited) == 2
