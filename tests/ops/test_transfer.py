"""Blocks are moved while the model works; nothing is read before it has arrived."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

import kvkernels
from kvkernels import (
    CODECS,
    BlockAllocator,
    BlockFormat,
    EncodedBlocks,
    KVLayout,
    KVPool,
)
from kvkernels.transfer import BlockTransfer, PinnedMemory, routes
from kvkernels.transfer.ring import Ring

LAYOUT = KVLayout(4, 2, 64, 16)
LATENTS = KVLayout(4, 1, 40, 16, latent_dim=32)
MakeTransfer = Callable[..., BlockTransfer]


def make_pool(num_blocks: int, layout: KVLayout = LAYOUT) -> KVPool:
    pool = KVPool(layout, num_blocks)
    pool.data.copy_(torch.randn(pool.data.shape, generator=torch.Generator().manual_seed(5)))
    return pool


@pytest.fixture
def make_transfer() -> Iterator[MakeTransfer]:
    made: list[BlockTransfer] = []

    def make(pool: KVPool, **options: object) -> BlockTransfer:
        made.append(BlockTransfer(pool, **options))
        return made[-1]

    yield make
    for transfer in made:
        transfer.close()


class Gate:
    """Another stream's work that ends when the test says so."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def wait(self) -> None:
        assert self.opened.wait(30)

    wait_on_stream = wait


def copy_of(encoded: EncodedBlocks) -> EncodedBlocks:
    return EncodedBlocks(
        encoded.block_format,
        encoded.payloads.clone(),
        encoded.sums.clone(),
        encoded.is_raw.clone(),
    )


@pytest.mark.parametrize("layout", [LAYOUT, LATENTS], ids=["keys and values", "latents"])
@pytest.mark.parametrize("codec", CODECS)
def test_evicted_blocks_are_restored(
    codec: str, layout: KVLayout, make_transfer: MakeTransfer
) -> None:
    pool = make_pool(5, layout)
    pool.data[3, 0, 0, 0, 0, 0] = float("inf")  # written raw
    transfer = make_transfer(pool, num_slots=3, headroom=256)
    ids, block_format = torch.tensor([3, 0, 4]), BlockFormat(layout, codec)
    wanted = kvkernels.encode_blocks(pool, ids, block_format)
    transfer_slots = transfer.evict(ids, block_format)
    with transfer_slots as eviction:
        eviction.slots[:, :256] = 77
        encoded = eviction.wait()
        assert torch.equal(encoded.sums, wanted.sums)
        assert torch.equal(encoded.is_raw, wanted.is_raw)
        for index in range(3):
            payload = encoded.payload(index)
            assert torch.equal(payload, wanted.payload(index))
            assert payload.data_ptr() == eviction.slots[index, 256:].data_ptr()
        assert (eviction.slots[:, :256] == 77).all()
        target = make_pool(5, layout)
        target.data.zero_()
        is_good = make_transfer(target).restore(encoded, torch.tensor([1, 2, 3])).wait()
        assert is_good.shape == (3, 4) and is_good.all()
    again = KVPool(layout, 3)
    kvkernels.decode_blocks(wanted, again, torch.arange(3))
    assert torch.equal(target.data[1:4].view(torch.int16), again.data.view(torch.int16))
    assert (target.data[[0, 4]] == 0).all()


@pytest.mark.parametrize("codec", CODECS)
def test_out_into_memory_of_others(codec: str, make_transfer: MakeTransfer) -> None:
    pool = make_pool(5)
    transfer = make_transfer(pool, num_slots=1)  # none is needed
    ids, block_format = torch.tensor([3, 0, 4]), BlockFormat(LAYOUT, codec)
    wanted = kvkernels.encode_blocks(pool, ids, block_format)
    whole = torch.full((3, block_format.payload_bytes + 64), 170, dtype=torch.uint8)
    payloads = whole[:, : block_format.payload_bytes]
    if not transfer.can_evict_into:
        with pytest.raises(ValueError, match="pool: expected one in host memory, got one on cuda"):
            transfer.evict_into(ids, block_format, payloads)
        return
    with transfer.evict_into(ids, block_format, payloads) as eviction:
        encoded = eviction.wait()
    assert torch.equal(encoded.sums, wanted.sums) and not encoded.is_raw.any()
    for index in range(3):
        assert torch.equal(payloads[index], wanted.payload(index))
    assert (whole[:, block_format.payload_bytes :] == 170).all()
    with pytest.raises(ValueError, match=r"payloads: expected shape \[2, any\], got \[3, "):
        transfer.evict_into(ids[:2], block_format, payloads).wait()


def test_blocks_are_read_after_what_wrote_them(make_transfer: MakeTransfer) -> None:
    pool, gate = make_pool(1), Gate()
    block_format = BlockFormat(LAYOUT, "raw")

    def write_late() -> None:
        time.sleep(0.05)
        pool.data.fill_(3.0)
        gate.opened.set()

    threading.Thread(target=write_late).start()  # stands for another stream
    with make_transfer(pool).evict(torch.tensor([0]), block_format, gate) as eviction:
        encoded = eviction.wait()
        assert (encoded.payload(0).view(torch.bfloat16) == 3).all()


def test_blocks_may_be_written_once_they_are_out(make_transfer: MakeTransfer) -> None:
    pool = make_pool(2)
    block_format = BlockFormat(LAYOUT, "q8")
    wanted = kvkernels.encode_blocks(pool, torch.arange(2), block_format)
    with make_transfer(pool).evict(torch.arange(2), block_format) as eviction:
        encoded = eviction.wait()
        pool.data.fill_(float("nan"))
        for index in range(2):
            assert torch.equal(encoded.payload(index), wanted.payload(index))


def test_slots_are_not_written_before_they_are_given_back(make_transfer: MakeTransfer) -> None:
    pool = make_pool(6)
    transfer = make_transfer(pool, num_slots=2)
    block_format = BlockFormat(LAYOUT, "raw")
    first = [transfer.evict(torch.tensor([number]), block_format) for number in range(2)]
    held = [copy_of(eviction.wait()) for eviction in first]
    later: list[EncodedBlocks] = []

    def evict_more() -> None:
        with transfer.evict(torch.tensor([4, 5]), block_format) as eviction:
            later.append(copy_of(eviction.wait()))

    thread = threading.Thread(target=evict_more)
    thread.start()
    first[1].release()
    thread.join(0.2)
    assert thread.is_alive() and not later  # two slots are wanted, one is free
    for eviction, copy in zip(first[:1], held[:1], strict=True):
        assert torch.equal(eviction.wait().payload(0), copy.payload(0))
    first[0].release()
    first[0].release()  # no effect the second time
    thread.join(30)
    blocks = pool.data.flatten(1).view(torch.uint8)
    assert torch.equal(later[0].payload(0), blocks[4]) and torch.equal(
        later[0].payload(1), blocks[5]
    )


def test_a_layer_is_attended_to_while_later_ones_travel(
    make_transfer: MakeTransfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, gate = make_pool(2), Gate()
    encoded = kvkernels.encode_blocks(pool, torch.arange(2), BlockFormat(LAYOUT, "l12"))
    decode_blocks = routes.decode_blocks

    def decode_late(*args: object, layers: range) -> torch.Tensor:
        if layers.start > 0:
            gate.wait()
        return decode_blocks(*args, layers=layers)

    monkeypatch.setattr(routes, "decode_blocks", decode_late)
    target = KVPool(LAYOUT, 2)
    target.data.fill_(float("nan"))
    restoration = make_transfer(target).restore(encoded, torch.tensor([1, 0]), layers_per_step=1)
    restoration.wait_layer(0)
    query = torch.randn(1, 4, 64).bfloat16()
    lens = torch.tensor([32], dtype=torch.int32)
    outputs = [
        kvkernels.paged_attention(
            query, one.key_cache(0), one.value_cache(0), torch.tensor([table]).int(), lens
        )
        for one, table in ((pool, [0, 1]), (target, [1, 0]))
    ]
    assert torch.equal(*outputs)
    assert target.data[:, 1:].isnan().all()
    gate.opened.set()
    restoration.wait_layer(3)
    assert torch.equal(target.data[[1, 0]], pool.data)
    assert restoration.wait().all()
    with pytest.raises(ValueError, match="layer: expected one of the 4 that were added, got 4"):
        restoration.wait_layer(4)
    with pytest.raises(ValueError, match="got -1"):
        restoration.wait_layer(-1)


@pytest.mark.parametrize("layers_per_step", [1, 3, None])
def test_a_wrong_layer_is_told_and_not_written(
    layers_per_step: int | None, make_transfer: MakeTransfer
) -> None:
    pool = make_pool(2)
    encoded = kvkernels.encode_blocks(pool, torch.arange(2), BlockFormat(LAYOUT, "q8"))
    encoded.payloads[1, encoded.block_format.layers[2].offset + 40] ^= 4
    target = KVPool(LAYOUT, 2)
    target.data.fill_(7.0)
    restoration = make_transfer(target).restore(
        encoded, torch.arange(2), layers_per_step=layers_per_step
    )
    assert restoration.wait().tolist() == [[True] * 4, [True, True, False, True]]
    assert (target.data[1, 2] == 7).all() and not (target.data[1, 3] == 7).any()


def test_nothing_is_mixed_up_when_much_is_under_way(make_transfer: MakeTransfer) -> None:
    """Threads write, evict, overwrite and restore blocks at once."""
    pool, allocator = KVPool(LAYOUT, 24), BlockAllocator(24)
    transfer = make_transfer(pool, num_slots=5)
    block_format = BlockFormat(LAYOUT, "l12")
    problems: list[object] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            for _ in range(40):
                count = int(torch.randint(1, 4, (), generator=generator))
                ids = allocator.allocate(count)
                numbers = torch.randn((count, *LAYOUT.block_shape), generator=generator).bfloat16()
                pool.data[ids] = numbers
                with transfer.evict(torch.tensor(ids), block_format) as eviction:
                    encoded = eviction.wait()
                    pool.data[ids] = float("nan")
                    allocator.release(ids)
                    ids = allocator.allocate(count)
                    is_good = transfer.restore(
                        encoded, torch.tensor(ids), layers_per_step=1 + seed % 3
                    ).wait()
                if not is_good.all() or not torch.equal(pool.data[ids], numbers):
                    problems.append(seed)
                allocator.release(ids)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert allocator.check() == [] and allocator.num_free == 24


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_has_a_thread_of_its_own(make_transfer: MakeTransfer) -> None:
    pool = make_pool(2)
    transfer = make_transfer(pool)
    block_format = BlockFormat(LAYOUT, "q8")
    with transfer.evict(torch.arange(2), block_format) as eviction:
        encoded = copy_of(eviction.wait())
    pid = os.fork()
    if pid == 0:
        threading.Timer(20, os._exit, [9]).start()
        is_good = transfer.restore(encoded, torch.arange(2)).wait()
        os._exit(0 if is_good.all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_no_two_runs_of_a_ring_share_a_slot() -> None:
    generator = torch.Generator().manual_seed(0)
    for num_slots in (1, 3, 8):
        ring, held = Ring(num_slots), {}
        for _ in range(500):
            wanted = int(torch.randint(1, num_slots + 1, (), generator=generator))
            first = ring.take(wanted, timeout_s=0)
            if first is not None:
                run = set(range(first, first + wanted))
                assert max(run) < num_slots
                assert not any(run & other for other in held.values())
                held[first] = run
            elif held:
                chosen = int(torch.randint(len(held), (), generator=generator))
                ring.give_back(sorted(held)[chosen])
                del held[sorted(held)[chosen]]
        for first in list(held):
            ring.give_back(first)
        assert ring.take(num_slots, timeout_s=0) == 0


def test_bad_arguments_are_named(make_transfer: MakeTransfer) -> None:
    pool = make_pool(3)
    block_format = BlockFormat(LAYOUT, "q8")
    for options, message in (
        ({"num_slots": 0}, "num_slots: expected a positive integer, got 0"),
        ({"headroom": 6}, "headroom: expected a multiple of 4, got 6"),
    ):
        with pytest.raises(ValueError, match=message):
            make_transfer(pool, **options)
    transfer = make_transfer(pool, num_slots=2)
    for ids, message in (
        (torch.arange(3), "block_ids: expected 1 to 2, got 3"),
        (torch.arange(0), "block_ids: expected 1 to 2, got 0"),
        (torch.arange(2).int(), "block_ids: expected dtype torch.int64, got torch.int32"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            transfer.evict(ids, block_format)
    # The codec's error reaches the waiting caller, and the slots are given back.
    for _ in range(3):
        with (
            transfer.evict(torch.tensor([1, 3]), block_format) as eviction,
            pytest.raises(ValueError, match="block_ids: expected 0 to 2, got 1 to 3"),
        ):
            eviction.wait()
    encoded = kvkernels.encode_blocks(pool, torch.arange(2), block_format)
    with pytest.raises(ValueError, match="layers_per_step: expected a positive integer, got 0"):
        transfer.restore(encoded, torch.arange(2), layers_per_step=0)
    with pytest.raises(ValueError, match="block_ids: expected distinct ids, got one twice"):
        transfer.restore(encoded, torch.tensor([1, 1])).wait()
    long = BlockFormat(KVLayout(1, 1, 2, 16), "q8")
    with pytest.raises(
        ValueError, match="block_format: expected payloads of at most 128 bytes, got 192"
    ):
        make_transfer(KVPool(long.layout, 1)).evict(torch.tensor([0]), long)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_others_is_pinned_until_it_is_closed():
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    pinned = PinnedMemory(memory, torch.device("cuda"))
    assert pinned.is_pinned and memory.is_pinned()
    for _ in range(2):
        pinned.close()
        assert not pinned.is_pinned and not memory.is_pinned()
