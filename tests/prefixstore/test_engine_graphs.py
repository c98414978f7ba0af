"""Decode passes of fixed shapes, recorded and replayed, answer as the model alone does.

CUDA graphs need a GPU. `SameAgain` stands in for them: its replay runs the recorded function once
more on the same inputs. All but the recording itself is the code that runs on a GPU.
"""

import logging

import pytest
import torch
from cached_models import calling_first, tiny_gemma3, tiny_llama
from engines import answer, open_engine, prompt
from graph_recorders import NeverWaiting, Raising, SameAgain, Stale
from torch.utils.module_tracker import ModuleTracker

from prefixstore.engine import SamplingParams
from prefixstore.engine.decode_graphs import NUM_FORWARD_PASSES

MODELS = {"llama": tiny_llama, "gemma 3": tiny_gemma3}
SAMPLING = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, logprobs=2)


# On a GPU the last bits of answers depend on the batch, and the batch on timing.
in_any_batch = pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs a device where results are batch invariant"
)


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request):
    torch.manual_seed(1)
    return request.param()


@pytest.fixture
def use(monkeypatch):
    """Make engines opened from now on use a recorder."""

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
        # The computed answer came from other passes: on a GPU its last bits differ.
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
    (message,) = (one.getMessage() for one in caplog.records if "replayed" in one.getMessage())
    assert "does not wait" in message


def test_a_shape_is_recorded_when_it_comes_often(use):
    torch.manual_seed(1)
    recorder = use(SameAgain())
    with open_engine(tiny_llama()) as engine:

        def decode(num_passes):
            """Decode `num_passes` times; the first token comes from the pass over the prompt."""
            sampling = SamplingParams(num_passes + 1, temperature=0, ignore_eos=True)
            answer(engine, prompt(20), sampling)

        decode(1)  # afterwards all but four tokens of the prompt are in the pool
        decode(NUM_FORWARD_PASSES - 1)
        assert recorder.num_recorded == 0
        decode(3)
    assert (recorder.num_recorded, recorder.num_replays) == (1, 3)  # one of them to try it


def test_hooks_that_come_later_are_called(use):
    """These are PyTorch's own hooks, as an open cache refuses others."""
    torch.manual_seed(1)
    model, recorder = tiny_llama(), use(SameAgain())
    num_parents = []
    with open_engine(model) as engine:
        answer(engine, prompt(20), SAMPLING)
        assert recorder.num_recorded == 1
        # A replay of this recorder calls the model once more; a graph would not.
        num_replays = recorder.num_replays
        with (
            ModuleTracker() as tracker,
            calling_first(model.lm_head, lambda: num_parents.append(len(tracker.parents))),
        ):
            answer(engine, prompt(20), SAMPLING)
        assert recorder.num_replays == num_replays
        assert num_parents == [2] * 40  # the model, and the module that calls it
        answer(engine, prompt(20), SAMPLING)
        assert recorder.num_replays > num_replays


def test_shapes_are_not_recorded_with_hooks_that_came_later(use):
    torch.manual_seed(1)
    model, recorder = tiny_llama(), use(SameAgain())
    with open_engine(model) as engine, ModuleTracker():
        answer(engine, prompt(20), SAMPLING)
        assert engine.graph_shapes == []
    assert recorder.num_recorded == 0


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
