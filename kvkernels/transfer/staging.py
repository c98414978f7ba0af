"""Rows of host memory on their way to a GPU: copied through two buffers, ahead of their decoding.

    link     | chunk 0 | chunk 1 | chunk 2 |      a stream of its own
    decoding           | chunk 0 | chunk 1 | ...  the lane's stream

Copies are queued by a processor that takes some microseconds for each, in which the link moves some
hundred kilobytes: so rows that lie close together travel in one piece, with what lies between them.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from kvkernels.ops.codecs import EncodedBlocks

STAGE_BYTES = 64 << 20  # of rows in a buffer: 1 ms of the link, twice a launch's cost
MAX_GAP_BYTES = 64 << 10
_ALIGNMENT = 64  # of layers in a row; kernels load up to 16 bytes at once


@dataclass(frozen=True)
class Cut:
    """The bytes of each row that hold some layers.

    Attributes:
        own: For rows in the block format, and for raw ones.
        start: Where the first of them begins.
        stride: How far apart they are staged.
        row_bytes: Of a row as it is decoded.
    """

    own: tuple[slice, slice]
    start: int
    stride: int
    row_bytes: int


def cut_layers(encoded: Sequence[EncodedBlocks], layers: range) -> Cut:
    """Where layers lie in the rows of parts that are written alike."""
    block_format = encoded[0].block_format
    has_raw = any(bool(part.is_raw.any()) for part in encoded)
    # Only rows wide enough for raw payloads can hold one; parts without may have others.
    row_bytes = max(part.payloads.shape[1] for part in encoded)
    if not has_raw:
        row_bytes = block_format.payload_bytes
    own = block_format.cut(layers), block_format.raw.cut(layers)
    used = own if row_bytes >= block_format.raw.payload_bytes else own[:1]
    start = min(cut.start for cut in used)
    num_bytes = max(cut.stop for cut in used) - start
    stride = _round_up(num_bytes)
    if len(layers) == len(block_format.layers) and not has_raw:
        close = [part.payloads.stride(0) for part in encoded if _is_close(part, num_bytes)]
        stride = max(close, default=stride)
    return Cut(own, start, stride, row_bytes)


def _is_close(part: EncodedBlocks, num_bytes: int) -> bool:
    distance = part.payloads.stride(0)
    is_apart = num_bytes <= distance <= num_bytes + MAX_GAP_BYTES
    return len(part.is_raw) > 1 and is_apart and distance % _ALIGNMENT == 0


def copy_rows(
    target: torch.Tensor, encoded: Sequence[EncodedBlocks], rows: range, cut: Cut
) -> None:
    """Queue copies of some of all parts' rows, counted over the parts, to where they are staged.

    Args:
        target: ``[rows, row_bytes]``, uint8; of a row only the cut is written, and where rows
            travel in one piece what lies up to the next.
    """
    first = 0  # of the part
    for part in encoded:
        chosen = range(max(rows.start, first), min(rows.stop, first + len(part.is_raw)))
        if len(chosen) > 0:
            own = slice(chosen.start - first, chosen.stop - first)
            place = slice(chosen.start - rows.start, chosen.stop - rows.start)
            _copy_part(target[place], part, own, cut)
        first += len(part.is_raw)


def _copy_part(target: torch.Tensor, part: EncodedBlocks, rows: slice, cut: Cut) -> None:
    source, is_raw = part.payloads[rows], part.is_raw[rows].tolist()
    if any(is_raw):
        # Rows too narrow for the raw payload they are said to hold give what they have: its sums
        # will not be right.
        pieces = [
            (target_row[cut.own[is_one_raw]], source_row[cut.own[is_one_raw]])
            for target_row, source_row, is_one_raw in zip(target, source, is_raw, strict=True)
        ]
        pairs = [(to[: from_.numel()], from_) for to, from_ in pieces]
    else:
        target, source = target[:, cut.own[0]], source[:, cut.own[0]]
        if source.stride(0) == cut.stride:  # one copy of all rows, gaps included
            shape = ((len(is_raw) - 1) * cut.stride + source.shape[1],)
            pairs = [(target.as_strided(shape, (1,)), source.as_strided(shape, (1,)))]
        else:
            pairs = list(zip(target, source, strict=True))
    for target_piece, source_piece in pairs:
        target_piece.copy_(source_piece, non_blocking=True)


class Staging:
    """Two buffers of a GPU, and the stream that fills them. Its owner lets one thread in at a time.

    Args:
        device: The GPU.
        num_bytes: Of a buffer's rows, if one row is not longer.
    """

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self._device = device
        self._num_bytes = num_bytes
        self._copying = torch.cuda.Stream(device)
        self._buffers: list[torch.Tensor] = []
        self._emptied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def chunks(
        self, encoded: Sequence[EncodedBlocks], layers: range
    ) -> Generator[tuple[range, torch.Tensor], None, None]:
        """Rows, counted over the parts, and where their layers lie for the current stream.

        Close it when it is not gone through to its end: nothing is read of the rows from then on.

        Yields:
            The rows, and ``[rows, row_bytes]``, uint8, of which only `layers` are there. What the
            caller queues until it asks for the next may read it.
        """
        cut = cut_layers(encoded, layers)
        num_rows = sum(len(part.is_raw) for part in encoded)
        length = max(1, self._num_bytes // cut.stride)
        pieces = [
            range(first, min(first + length, num_rows)) for first in range(0, num_rows, length)
        ]
        lane = torch.cuda.current_stream(self._device)
        self._make_room(max(self._num_bytes, cut.stride), cut.row_bytes, lane)
        try:
            ahead = [self._fill(encoded, rows, cut) for rows in pieces[:1]]
            for number, rows in enumerate(pieces):
                turn, staged, filled = ahead.pop()
                if number + 1 < len(pieces):
                    ahead.append(self._fill(encoded, pieces[number + 1], cut))
                lane.wait_event(filled)
                yield rows, staged
                self._emptied[turn] = lane.record_event()
        except BaseException:
            self._copying.synchronize()
            lane.synchronize()
            raise

    def _fill(
        self, encoded: Sequence[EncodedBlocks], rows: range, cut: Cut
    ) -> tuple[int, torch.Tensor, torch.cuda.Event]:
        """Queue the copies of a chunk into the next buffer, once what was there has been read."""
        turn, self._turn = self._turn, 1 - self._turn
        emptied = self._emptied[turn]
        if emptied is not None:
            self._copying.wait_event(emptied)
        # A row is addressed from the payload's start, but only the bytes of the cut are in the
        # buffer, so the view starts that far before it.
        first = _round_up(cut.row_bytes) - cut.start
        shape, strides = (len(rows), cut.row_bytes), (cut.stride, 1)
        staged = self._buffers[turn].as_strided(shape, strides, first)
        with torch.cuda.stream(self._copying):
            copy_rows(staged, encoded, rows, cut)
        return turn, staged, self._copying.record_event()

    def _make_room(self, num_bytes: int, row_bytes: int, lane: torch.cuda.Stream) -> None:
        """Have buffers with room for so many bytes of layers, and a row before and behind them."""
        wanted = num_bytes + 2 * _round_up(row_bytes)
        if self._buffers and self._buffers[0].numel() >= wanted:
            return
        # PyTorch's allocator does not know that the copying stream uses these buffers. So before
        # the old ones are freed their copies must have ended, and the new ones are not written
        # before the lane is done with the memory they may have been made of.
        lane.wait_stream(self._copying)
        self._buffers = []
        with torch.inference_mode(False):  # later calls may run outside inference mode
            self._buffers = [
                torch.empty(wanted, dtype=torch.uint8, device=self._device) for _ in self._emptied
            ]
        self._copying.wait_stream(lane)


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
