"""Decode passes of fixed shapes, recorded and replayed, answer as the model alone does.

CUDA graphs need a GPU. In their place a recorder whose replay runs the recorded function once more
on the same inputs: all but the recording itself is what runs on a GPU.
"""

import logging

import numpy as np
import pytest
import torch
from cached_models import DEVICE, tiny_gemma3, tiny_llama
from engines import answer, open_engine, prompt

from kvkernels import UnsupportedError
from prefixstore.engine import SamplingParams
from prefixstore.engine.decode_graphs import NUM_FORWARD_PASSES, DecodeGraphs
from prefixstore.engine.graph_recorder import WithoutWaiting
from prefixstore.engine.pass_layout import Chunk, DecodeShape, idle_decode, lay_out, pad_decode

MODELS = {"llama": tiny_llama, "gemma 3": tiny_gemma3}
SAMPLING = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, logprobs=2)


class SameAgain:
    """Records by running, replays by running again.

    Attributes:
        num_recorded: Functions.
        num_replays: Of all of them.
    """

    def __init__(self):
        self.num_recorded = self.num_replays = 0

    def record(self, function):
        function()
        self.num_recorded += 1

        def replay():
            self.num_replays += 1
            function()

        return replay


class NeverWaiting(SameAgain):
    """Refuses what waits, as one for a GPU does."""

    def record(self, function):
        with WithoutWaiting(torch.empty(0, device=DEVICE).device):  # by its number
            function()
        return super().record(function)


class Raising:
    def record(self, function):
        function()
        raise RuntimeError("operation not permitted when stream is capturing")


class Stale:
    """As a graph that holds its inputs: a replay leaves what the recording wrote."""

    def record(self, function):
        function()
        return lambda: None


# There answers depend on their batch in the last bits, and the batch on how long passes take.
in_any_batch = pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs a device where results are batch invariant"
)


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request):
    torch.manual_seed(1)
    return request.param()


@pytest.fixture
def use(monkeypatch):
    """Have engines that are opened from now on record with a recorder."""

    def use(recorder):
        monkeypatch.setattr("prefixstore.engine.runner.find_recorder", lambda device: recorder)
        return recorder

    return use


def requests(num_requests):
    """Prompts and answers of many lengths: the batch grows to all of them, and shrinks."""
    for i in range(num_requests):
        yield prompt(5 + 23 * i, i), SamplingParams(30 + 9 * i, 0, ignore_eos=True, logprobs=2)


def answers(engine, num_requests=6):
    handles = [engine.submit(*one) for one in requests(num_requests)]
    outputs = [handle.result(60) for handle in handles]
    assert all(output.error is None for output in outputs)
    return [(output.token_ids, output.logprobs) for output in outputs]


@in_any_batch
def test_replays_answer_with_the_bits_of_the_model(model, use):
    with open_engine(model, cuda_graphs=False) as engine:
        plain = answers(engine)
        assert engine.graph_shapes == []
    recorder = use(SameAgain())
    with open_engine(model) as engine:
        assert answers(engine) == plain
        shapes = engine.graph_shapes
    assert recorder.num_recorded == len(shapes) >= 3
    assert {shape.num_seqs for shape in shapes} <= {1, 2, 4, 8}
    assert recorder.num_replays > 20


@in_any_batch
def test_replays_go_on_beside_preempted_requests(use):
    torch.manual_seed(1)
    model = tiny_llama()
    outputs = []
    for recorder in (None, SameAgain()):
        use(recorder)
        with open_engine(model, pool_tokens=320, max_running=6) as engine:
            outputs.append(answers(engine, 5))
            assert engine.stats().num_preemptions > 0
    assert outputs[0] == outputs[1]
    assert recorder.num_replays > 20


def test_restored_and_pooled_prompts_are_answered_alike(model, use):
    use(SameAgain())
    tokens = prompt(100)
    with open_engine(model, tiers=["memory://16MiB"], restore_policy="load") as engine:
        computed, pooled = (answer(engine, tokens, SAMPLING) for _ in range(2))
        assert engine.cache.flush()
        while engine.cache.stats().pool_free_blocks < engine.cache.stats().pool_blocks:
            engine.cache.evict_pool()
        restored = answer(engine, tokens, SAMPLING)
        assert restored.report.reuse.tokens_by_tier["memory"] > 0
        assert engine.graph_shapes == [(1, 32)]
        # The computed one went through other passes: on a GPU its last bits differ.
        alike = [pooled, restored, *([computed] if engine.is_batch_invariant else [])]
    for output in alike:
        assert (output.token_ids, output.logprobs) == (pooled.token_ids, pooled.logprobs)


@in_any_batch
@pytest.mark.parametrize(
    ("recorder", "message"), [(Raising(), "not permitted"), (Stale(), "other logits")]
)
def test_what_cannot_be_trusted_is_dropped_with_one_warning(model, use, caplog, recorder, message):
    with open_engine(model, cuda_graphs=False) as engine:
        plain = answers(engine)
    use(recorder)
    with caplog.at_level(logging.WARNING), open_engine(model) as engine:
        assert answers(engine) == plain
        assert engine.graph_shapes == []
    assert [message in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_give_the_bits_of_passes_of_the_same_shapes(model, use, caplog):
    """One request at a time, so that passes are the same however long they take."""

    def ask_thrice():
        with open_engine(model) as engine:
            outputs = [answer(engine, prompt(495, i), SAMPLING) for i in (0, 1, 0)]
            return [(one.token_ids, one.logprobs) for one in outputs], engine.graph_shapes

    replayed, shapes = ask_thrice()
    assert shapes == [(1, 32), (1, 128)]
    assert caplog.records == []
    use(Raising())
    assert ask_thrice() == (replayed, [])


@in_any_batch
def test_a_model_that_waits_for_the_device_is_never_recorded(use, caplog):
    torch.manual_seed(1)
    model, recorder = tiny_llama(), use(NeverWaiting())
    with open_engine(model) as engine:
        plain = answers(engine, 3)
    num_recorded = recorder.num_recorded
    assert num_recorded >= 2
    model.lm_head.register_forward_pre_hook(lambda module, args: args[0].max().item() and None)
    with caplog.at_level(logging.WARNING), open_engine(model) as engine:
        assert answers(engine, 3) == plain
    assert recorder.num_recorded == num_recorded
    (record,) = caplog.records
    assert "does not wait" in record.getMessage()


def test_a_shape_is_recorded_when_it_comes_often(use):
    torch.manual_seed(1)
    recorder = use(SameAgain())
    with open_engine(tiny_llama()) as engine:

        def decode(num_passes):
            """The first token comes of the pass over the prompt."""
            sampling = SamplingParams(num_passes + 1, temperature=0, ignore_eos=True)
            answer(engine, prompt(20), sampling)

        decode(1)  # and then the whole prompt but for four tokens is in the pool
        decode(NUM_FORWARD_PASSES - 1)
        assert recorder.num_recorded == 0
        decode(3)
    assert (recorder.num_recorded, recorder.num_replays) == (1, 3)  # one of them to try it


@in_any_batch
def test_a_sequence_that_grows_goes_on_in_a_wider_shape(model, use):
    tokens = prompt(495)  # of the 512 that the narrowest table holds
    with open_engine(model, cuda_graphs=False) as engine:
        plain = answer(engine, tokens, SAMPLING)
    use(SameAgain())
    with open_engine(model) as engine:
        replayed = answer(engine, tokens, SAMPLING)
        assert engine.graph_shapes == [(1, 32), (1, 128)]
    assert (replayed.token_ids, replayed.logprobs) == (plain.token_ids, plain.logprobs)


def test_the_option_turns_them_off(use):
    torch.manual_seed(1)
    recorder = use(SameAgain())
    with open_engine(tiny_llama(), cuda_graphs=False) as engine:
        answers(engine, 2)
        assert engine.graph_shapes == []
    assert recorder.num_recorded == 0


# ---- parts -----------------------------------------------------------------------------------


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
    """A model that gives the same logits for every row, and notes what it was called with."""

    def forward(tensors, before_layer):
        noted.append((len(tensors[0]), before_layer))
        return torch.full((len(tensors[0]), 5), value)

    return forward


@pytest.mark.parametrize("value", [1.5, float("nan")])
@torch.inference_mode()
def test_larger_shapes_leave_what_smaller_ones_write_to(value):
    recorder, noted = SameAgain(), []
    graphs = DecodeGraphs(constant(value, noted), 2, torch.device("cpu"), recorder)
    for num_seqs in (2, 4, 2):
        arrays = lay_out([one_token(20, i) for i in range(num_seqs)], 2, 16)
        for _ in range(NUM_FORWARD_PASSES + 2):
            logits = graphs.run(arrays)
            torch.testing.assert_close(
                logits, torch.full((num_seqs, 5), value), rtol=0, atol=0, equal_nan=True
            )
    assert graphs.shapes == [(2, 32), (4, 32)]
    num_replays, before_layer = recorder.num_replays, lambda layer: None
    graphs.run(arrays, before_layer)  # who waits for layers is called, so the model runs
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
