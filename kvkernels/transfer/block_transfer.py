"""Takes blocks out of a pool as payloads in host memory, and brings payloads back.

    pool --encode--> slot of a ring in host memory --> whoever writes records
    pool <--decode-- payloads in host memory       <-- whoever read them

Both run on a lane beside the model (`lanes.py`), and these orders hold:

- a block is read only after what its caller had queued before (`mark`), and may be written again
  once `Eviction.wait` has returned;
- a slot is read only after `Eviction.wait`, and written again only after `Eviction.release`;
- a restored layer is read only after `Restoration.wait_layer`, which waits for that layer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType

import torch

from kvkernels.checks import check_dtype, check_shape
from kvkernels.codecs import BlockFormat
from kvkernels.ops.codecs import EncodedBlocks
from kvkernels.pool import KVPool
from kvkernels.transfer.lanes import Done, Lane, lane_of
from kvkernels.transfer.ring import Ring
from kvkernels.transfer.routes import HostRoute, route_of

_PAGE_BYTES = 4096


class Eviction:
    """Blocks on their way out. Made by `BlockTransfer.evict`; a context that ends in `release`.

    Attributes:
        slots: ``[num_blocks, slot_bytes]``, uint8: headroom and payload of each; of `evict_into`
            the payloads alone.
    """

    def __init__(self, slots: torch.Tensor, give_back: Callable[[], None] | None = None) -> None:
        self.slots = slots
        self._give_back = give_back
        self._done: Done | None = None
        self._finish: Callable[[], EncodedBlocks] | None = None

    def start(
        self, lane: Lane, encode: Callable[[], Callable[[], EncodedBlocks]], after: Done | None
    ) -> None:
        """For `BlockTransfer`."""

        def run() -> None:
            self._finish = encode()

        self._done = lane.run(run, after)

    def wait(self) -> EncodedBlocks:
        """The payloads, in this eviction's slots, once they are written.

        From then on the blocks may be written anew. The payloads stay until `release`.
        """
        assert self._done is not None
        self._done.wait()
        assert self._finish is not None
        return self._finish()

    def release(self) -> None:
        """Give the slots back; their payloads are not to be read any more. May be called again."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()

    def __enter__(self) -> Eviction:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class Restoration:
    """Blocks on their way in. Made by `BlockTransfer.restore` or `BlockTransfer.begin_restore`.

    Until `wait` has returned, the payloads must not change, and no one else may write the blocks.
    One thread adds layers; any may wait for those that were added.
    """

    def __init__(
        self,
        lane: Lane,
        decode: Callable[[range], None],
        is_good: torch.Tensor,
        after: Done | None,
    ) -> None:
        self._lane = lane
        self._decode = decode
        self._is_good = is_good
        self._after = after
        # Layers, and what to wait for until they are in the pool.
        self._steps: list[tuple[range, Done]] = []

    def add_layers(self, layers: range) -> None:
        """The payloads of these layers are there: bring them into the pool, after those before.

        A CPU decodes all layers before this returns, but a part of them in a thread beside.
        """
        is_whole = len(layers) == self._is_good.shape[1]
        submit = self._lane.run if is_whole else self._lane.submit
        self._steps.append((layers, submit(partial(self._decode, layers), self._after)))

    def wait_layer(self, layer: int) -> None:
        """Let what the caller does next find `layer` in the pool, where its checksum was right.

        On a GPU the caller's stream waits, not the caller.

        Raises:
            ValueError: If there is no such layer, or it was not added.
        """
        for layers, done in self._steps:
            if layer in layers:
                done.wait_on_stream()
                return
        num_layers = sum(len(layers) for layers, _ in self._steps)
        raise ValueError(f"layer: expected one of the {num_layers} that were added, got {layer}")

    def wait(self) -> torch.Tensor:
        """``[num_blocks, num_layers]``, bool: which layers were right, once those added are there.

        What was not right was not written.
        """
        with ExitStack() as waits:  # waits for every step, even where one raises
            for _, done in self._steps:
                waits.callback(done.wait)
        return self._is_good


class BlockTransfer:
    """Moves blocks between a pool and host memory beside the model's work. Thread-safe.

    Args:
        pool: Holds the blocks.
        num_slots: Payloads that may be on their way out.
        headroom: Bytes left free before each payload in its slot, a multiple of 4: a record's
            header fits there, and the record is whole without a copy.
        payload_bytes: The longest payload; default that of a raw block.
        is_staged: On a GPU: encode into its own memory and copy that, rather than let the kernel
            write host memory.
        num_programs: On a GPU: as many programs at most encode; default all that help. Nobody waits
            for what leaves, but for what comes: decoding has no bound.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        pool: KVPool,
        *,
        num_slots: int = 4,
        headroom: int = 0,
        payload_bytes: int | None = None,
        is_staged: bool = False,
        num_programs: int | None = None,
    ) -> None:
        if not isinstance(num_slots, int) or num_slots < 1:
            raise ValueError(f"num_slots: expected a positive integer, got {num_slots!r}")
        if not isinstance(headroom, int) or headroom < 0 or headroom % 4:
            raise ValueError(f"headroom: expected a multiple of 4, got {headroom!r}")
        self.pool = pool
        self._headroom = headroom
        self._route = route_of(pool, is_staged, num_programs)
        self._lane = lane_of(pool.device)
        self._ring = Ring(num_slots)
        raw_bytes = BlockFormat(pool.layout, "raw").payload_bytes
        self._payload_bytes = max(raw_bytes, payload_bytes or 0)
        shape = (num_slots, -(-(headroom + self._payload_bytes) // _PAGE_BYTES) * _PAGE_BYTES)
        self._slots = self._route.new_slots(shape)

    @property
    def num_slots(self) -> int:
        return self._ring.num_slots

    def mark(self) -> Done:
        """What the caller has queued so far: blocks written by it may be evicted after this."""
        return self._lane.mark()

    def evict(
        self, block_ids: torch.Tensor, block_format: BlockFormat, after: Done | None = None
    ) -> Eviction:
        """Encode blocks into slots, waiting for those while others hold too many.

        Who holds evictions gives them back first: slots of one eviction are neighbours, so between
        one's own there may never be room for as many as are left.

        Args:
            block_ids: ``[num_blocks]``, int64, on the CPU; at most `num_slots`. The blocks must not
                be written until `Eviction.wait` has returned.
            block_format: How; of the pool's layout.
            after: From `mark`, if the blocks were written by work queued on another stream.

        On a CPU this encodes them; on a GPU it returns at once.

        Raises:
            ValueError: If there are more blocks than slots, a payload is longer than a slot, or an
                argument is not as `encode_blocks` wants it.
        """
        num_blocks = _num_ids(block_ids)
        if not 1 <= num_blocks <= self.num_slots:
            raise ValueError(f"block_ids: expected 1 to {self.num_slots}, got {num_blocks}")
        if block_format.payload_bytes > self._payload_bytes:
            raise ValueError(
                f"block_format: expected payloads of at most {self._payload_bytes} bytes, got"
                f" {block_format.payload_bytes}"
            )
        first = self._ring.take(num_blocks)
        assert first is not None
        slots = self._slots[first : first + num_blocks]
        payloads = slots[:, self._headroom : self._headroom + self._payload_bytes]
        eviction = Eviction(slots, partial(self._ring.give_back, first))
        return self._start(eviction, block_ids, block_format, payloads, after)

    @property
    def can_evict_into(self) -> bool:
        """Whether `evict_into` is there: of a pool in host memory."""
        return isinstance(self._route, HostRoute)

    def evict_into(
        self,
        block_ids: torch.Tensor,
        block_format: BlockFormat,
        payloads: torch.Tensor,
        after: Done | None = None,
    ) -> Eviction:
        """Encode blocks where the caller wants them, rather than into slots.

        Args:
            block_ids: As for `evict`, but as many as there are `payloads`.
            block_format: As for `evict`.
            payloads: In host memory, as for `encode_blocks`.
            after: As for `evict`.

        Raises:
            ValueError: If this is not there for the pool, or an argument is not as `encode_blocks`
                wants it.
        """
        if not self.can_evict_into:
            raise ValueError(f"pool: expected one in host memory, got one on {self.pool.device}")
        _num_ids(block_ids)
        return self._start(Eviction(payloads), block_ids, block_format, payloads, after)

    def _start(
        self,
        eviction: Eviction,
        block_ids: torch.Tensor,
        block_format: BlockFormat,
        payloads: torch.Tensor,
        after: Done | None,
    ) -> Eviction:
        encode = partial(self._route.encode, block_ids, block_format, payloads)
        try:
            eviction.start(self._lane, encode, after)
        except BaseException:
            eviction.release()
            raise
        return eviction

    def restore(
        self,
        encoded: EncodedBlocks,
        block_ids: torch.Tensor,
        *,
        layers_per_step: int | None = None,
        after: Done | None = None,
    ) -> Restoration:
        """Bring payloads back into blocks, layer after layer.

        Args:
            encoded: In host memory.
            block_ids: ``[num_blocks]``, int64, distinct, on the CPU: where they go.
            layers_per_step: Layers that arrive together; default all, and then a CPU decodes them
                before this returns. Fewer let the first ones be used earlier, and cost some of the
                rate.
            after: From `mark`, if the blocks were read by work queued on another stream.

        Raises:
            ValueError: If `layers_per_step` is not positive. What else is wrong with the arguments
                `Restoration.wait` raises.
        """
        num_layers = self.pool.layout.num_layers
        step = num_layers if layers_per_step is None else layers_per_step
        if not isinstance(step, int) or step < 1:
            raise ValueError(f"layers_per_step: expected a positive integer, got {step!r}")
        restoration = self.begin_restore([encoded], block_ids, after=after)
        for first in range(0, num_layers, step):
            restoration.add_layers(range(first, min(first + step, num_layers)))
        return restoration

    def begin_restore(
        self,
        encoded: Sequence[EncodedBlocks],
        block_ids: torch.Tensor,
        *,
        after: Done | None = None,
    ) -> Restoration:
        """Bring payloads back whose layers are still to come: see `Restoration.add_layers`.

        Args:
            encoded: One part or more of one format, in host memory; a part's payloads lie at equal
                distances, and to a GPU those that lie close together travel in one piece. Nothing
                is read of them before its layer is added.
            block_ids: As for `restore`, for the payloads of all parts in their order.
            after: As for `restore`.

        Raises:
            ValueError: If parts have several formats, or there is not an id for each payload.
        """
        check_shape("block_ids", block_ids, (sum(len(part.is_raw) for part in encoded),))
        formats = {part.block_format.codecs: part.block_format for part in encoded}
        if len(formats) != 1:
            raise ValueError(f"encoded: expected parts of one format, got {[*formats.values()]}")
        is_good = self._route.new_flags(len(block_ids))
        decode = self._route.decode(encoded, block_ids, is_good)
        return Restoration(self._lane, decode, is_good, after)

    def close(self) -> None:
        """Wait for what is on its way."""
        self._lane.close()


def _num_ids(block_ids: torch.Tensor) -> int:
    check_shape("block_ids", block_ids, (None,))
    check_dtype("block_ids", block_ids, torch.int64)
    return len(block_ids)
