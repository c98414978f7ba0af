"""Blocks are handed out once, counted, and come back."""

import random
import threading

import pytest
import torch

from kvkernels import BlockAllocator, PoolFullError


def test_hands_out_each_block_once():
    allocator = BlockAllocator(5)
    taken = allocator.allocate(3) + allocator.allocate(2)
    assert sorted(taken) == [0, 1, 2, 3, 4]
    assert allocator.num_free == 0
    assert allocator.check() == []


def test_a_full_pool_raises_and_takes_nothing():
    allocator = BlockAllocator(3)
    allocator.allocate(2)
    with pytest.raises(PoolFullError, match=r"expected at most 1 \(free now\), got 2"):
        allocator.allocate(2)
    assert allocator.num_free == 1
    assert allocator.check() == []


def test_a_shared_block_is_free_only_after_the_last_release():
    allocator = BlockAllocator(2)
    block = allocator.allocate(1)
    allocator.share(block)
    allocator.release(block)
    assert allocator.ref_count(block[0]) == 1
    assert allocator.num_free == 1
    allocator.release(block)
    assert allocator.num_free == 2
    assert allocator.check() == []


def test_wrong_releases_change_nothing():
    allocator = BlockAllocator(4)
    first, second = allocator.allocate(2)
    with pytest.raises(ValueError, match="2 references or more"):
        allocator.release([second, first, first])
    with pytest.raises(ValueError, match="block_id: expected 0 to 3, got 9"):
        allocator.release([first, 9])
    with pytest.raises(ValueError, match="1 references or more"):
        allocator.share([first, next(b for b in range(4) if b not in (first, second))])
    assert [allocator.ref_count(block) for block in (first, second)] == [1, 1]
    assert allocator.check() == []


def test_refuses_negative_counts():
    with pytest.raises(ValueError, match=r"num_blocks: expected an integer of 0 or more, got 1\.5"):
        BlockAllocator(4).allocate(1.5)
    with pytest.raises(ValueError, match="num_blocks: expected an integer of 0 or more, got -1"):
        BlockAllocator(1).allocate(-1)
    with pytest.raises(ValueError, match="num_blocks: expected a positive integer, got 0"):
        BlockAllocator(0)


def test_random_operations_agree_with_a_dict():
    rng = random.Random(7)
    allocator, model = BlockAllocator(16), {}
    for _ in range(3000):
        action = rng.choice(("allocate", "share", "release"))
        if action == "allocate":
            wanted = rng.randrange(6)
            if wanted > 16 - len(model):
                with pytest.raises(PoolFullError):
                    allocator.allocate(wanted)
            else:
                for block in allocator.allocate(wanted):
                    assert block not in model
                    model[block] = 1
        elif model and action == "share":
            block = rng.choice(list(model))
            allocator.share([block])
            model[block] += 1
        elif model:
            block = rng.choice(list(model))
            allocator.release([block])
            model[block] -= 1
            if model[block] == 0:
                del model[block]
        assert allocator.num_free == 16 - len(model)
        assert all(allocator.ref_count(block) == count for block, count in model.items())
    assert allocator.check() == []


def test_threads_never_share_a_block_by_accident():
    allocator, seen, problems = BlockAllocator(64), set(), []

    def work() -> None:
        for _ in range(500):
            blocks = allocator.allocate(4)
            if seen & set(blocks):
                problems.append(blocks)
            seen.update(blocks)
            seen.difference_update(blocks)
            allocator.release(blocks)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert allocator.num_free == 64
    assert allocator.check() == []


def test_takes_the_numbers_out_of_a_tensor():
    """Not its elements, which are views, and change with it."""
    allocator = BlockAllocator(4)
    row = torch.tensor(allocator.allocate(3))
    allocator.share(row)
    with pytest.raises(ValueError, match="with 3 references or more"):
        allocator.release(torch.cat([row, row, row]))
    allocator.release(torch.cat([row, row]))
    row.fill_(7)
    assert allocator.check() == []
    assert sorted(allocator.allocate(4)) == [0, 1, 2, 3]
