"""The parts of fixed-shape decode passes: the shapes, and passes that no graph can hold."""

import numpy as np
import pytest
import torch
from graph_recorders import SameAgain

from kvkernels import UnsupportedError
from prefixstore.engine.decode_graphs import NUM_FORWARD_PASSES, DecodeGraphs
from prefixstore.engine.graph_recorder import WithoutWaiting
from prefixstore.engine.pass_layout import Chunk, DecodeShape, idle_decode, lay_out, pad_decode


def one_token(start, block):
    table = np.arange(block, block + start // 16 + 1, dtype=np.int32)
    return Chunk(np.array([start + 7], np.uint32), start, np.stack([table, table + 100]), True)


def test_rows_that_nobody_has_read_and_write_nothing():
    chunks = [one_token(40, 3), one_token(15, 8), one_token(0, 9)]
    arrays = lay_out(chunks, num_groups=2, block_size=16)
    shape = DecodeShape.holding(arrays)
    assert shape == (4, 32)
    tokens, positions, seq_lens, *own = pad_decode(arrays, shape)
    assert tokens.tolist() == [47, 22, 7, 0]
    assert positions.tolist() == [40, 15, 0, 0]
    assert seq_lens.tolist() == [41, 16, 1, 0]
    for first, (table, slots) in enumerate([own[:2], own[2:]]):
        of_group = 100 * first
        assert table.shape == shape
        assert table[0, :4].tolist() == [of_group + 3, of_group + 4, of_group + 5, -1]
        assert (table[3] == -1).all() and (table[:, 3:] == -1).all()
        assert slots.tolist() == [16 * (of_group + 5) + 8, 16 * (of_group + 8) + 15,
                                  16 * (of_group + 9), -1]  # fmt: skip
    idle = idle_decode(2, shape)
    padded = pad_decode(arrays, shape)
    assert [(a.shape, a.dtype) for a in idle] == [(a.shape, a.dtype) for a in padded]
    assert all((a == (-1 if i > 2 else 0)).all() for i, a in enumerate(idle))


@pytest.mark.parametrize(
    ("num_seqs", "num_blocks", "shape"),
    [
        *[(1, 1, (1, 32)), (2, 32, (2, 32)), (3, 33, (4, 128)), (5, 128, (8, 128))],
        *[(8, 129, (8, 512)), (9, 1, (16, 32)), (17, 2, (24, 32)), (24, 2048, (24, 2048))],
    ],
)
def test_shapes_are_few_and_hold_the_batch(num_seqs, num_blocks, shape):
    chunk = one_token(16 * num_blocks - 1, 0)
    assert DecodeShape.holding(lay_out([chunk] * num_seqs, 1, 16)) == shape


def constant(value, noted):
    """A model that gives every row the same logits, and records its calls."""

    def forward(tensors, before_layer):
        noted.append((len(tensors[0]), before_layer))
        return torch.full((len(tensors[0]), 5), value)

    return forward


@pytest.mark.parametrize("value", [1.5, float("nan")])
@torch.inference_mode()
def test_larger_shapes_leave_what_smaller_ones_write_to(value):
    recorder, noted = SameAgain(), []
    graphs = DecodeGraphs(
        constant(value, noted), torch.nn.Module(), 2, torch.device("cpu"), recorder
    )
    for num_seqs in (2, 4, 2):
        arrays = lay_out([one_token(20, i) for i in range(num_seqs)], 2, 16)
        for _ in range(NUM_FORWARD_PASSES + 2):
            logits = graphs.run(arrays)
            torch.testing.assert_close(
                logits, torch.full((num_seqs, 5), value), rtol=0, atol=0, equal_nan=True
            )
    assert graphs.shapes == [(2, 32), (4, 32)]
    num_replays, before_layer = recorder.num_replays, lambda layer: None
    graphs.run(arrays, before_layer)  # waiting for layers takes a call per layer, so the model runs
    assert recorder.num_replays == num_replays
    assert noted[-1] == (2, before_layer)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), torch.zeros(())),
        lambda x: torch.equal(x, x),
        lambda x: torch.where(x > 0),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.to("meta"),
    ],
)
@torch.inference_mode()
def test_notices_what_a_graph_cannot_hold(waits):
    x = torch.arange(4.0)
    waits(x)
    with pytest.raises(UnsupportedError), WithoutWaiting(x.device):
        waits(x)


@torch.inference_mode()
def test_lets_through_what_a_graph_can_hold():
    x, places = torch.arange(4.0), torch.tensor([2, 0])
    with WithoutWaiting(x.device):
        y = x[places] + torch.where(x > 1, x, 0.0)[places]
        y = y.index_put_((places[1:],), torch.zeros(1)).to(torch.float64)
    assert y.tolist() == [0.0, 0.0]
