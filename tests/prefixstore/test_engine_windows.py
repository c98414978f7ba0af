"""An engine whose model has windows alone, of which blocks are left behind that no one needs."""

import time

import pytest
import torch
from cached_models import BLOCK_SIZE, tiny_mistral
from engines import Numbers, expected, prompt

from prefixstore.engine import Engine, SamplingParams

GREEDY = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
NUM_TOKENS = 4 * BLOCK_SIZE + 9  # the window needs the last 3 whole blocks


@pytest.fixture
def model():
    torch.manual_seed(5)
    return tiny_mistral()


def open_engine(model, directory):
    return Engine.open(
        model,
        Numbers(),
        block_size=BLOCK_SIZE,
        pool_tokens=1024,
        max_batch_tokens=64,
        max_running=4,
        tiers=["memory://16MiB", f"disk://{directory}"],
    )


@pytest.mark.parametrize("is_evicted", [False, True], ids=["all_held", "first_evicted"])
def test_probes_the_tiers_after_a_restart(model, is_evicted, tmp_path):
    prompts = [prompt(NUM_TOKENS, seed=seed) for seed in range(6)]
    answers = [expected(model, tokens, GREEDY.max_tokens) for tokens in prompts]
    with open_engine(model, tmp_path) as engine:
        for tokens in prompts:
            engine.submit(tokens, GREEDY).result(60)
        assert engine.cache.flush()
        blocks = engine.cache.blocks
        for tokens in prompts if is_evicted else ():
            whole = engine.cache.checked_prompt(tokens, None)[0][: 4 * BLOCK_SIZE]
            first = blocks.keys(whole, "")[0][0]
            blocks.store.delete_many([first], time.monotonic() + 10)
    # The memory tier is empty now.
    with open_engine(model, tmp_path) as engine:
        outputs = [engine.submit(tokens, GREEDY).result(60) for tokens in prompts]
        assert [list(output.token_ids) for output in outputs] == answers
        assert not engine.has_failed
        assert engine.check() == []
