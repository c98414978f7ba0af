"""One forward pass over many sequences gives each the same result as a pass of its own."""

import pytest
import torch
from tiny_models import BLOCK_SIZE, gemma2, gemma3, gpt_oss, llama, make_groups, qwen2

from kvkernels import UnsupportedError
from kvkernels.nn.module import PagedBatch
from kvkernels.nn.transformers import PagedCache, paged_attention
from kvkernels.nn.transformers_batch import BatchCache

LENGTHS = (70, 1, 33, 64)


@pytest.fixture(params=[llama, gemma3, qwen2, gemma2, gpt_oss])
def model(request):
    model = request.param()
    with paged_attention(model):
        yield model


class Sequences:
    """Sequences in a pool, computed a few tokens at a time."""

    def __init__(self, model, lengths, num_blocks=64):
        self.model = model
        self.groups = make_groups(model, num_blocks)
        self.tokens = [torch.randint(1, 128, (length,)) for length in lengths]
        self.stored = [0] * len(lengths)
        self.tables = [
            [group.allocator.allocate(-(-length // BLOCK_SIZE)) for length in lengths]
            for group in self.groups
        ]

    @torch.no_grad()
    def step(self, num_new, before_layer=None):
        """Compute new tokens of each sequence; returns a row of logits for each token."""
        chosen = [i for i, count in enumerate(num_new) if count]
        ends = {i: self.stored[i] + num_new[i] for i in chosen}
        batches = [
            PagedBatch.build(
                [tables[i] for i in chosen],
                [ends[i] for i in chosen],
                [num_new[i] for i in chosen],
                BLOCK_SIZE,
            )
            for tables in self.tables
        ]
        cache = BatchCache(self.groups, batches, before_layer)
        spans = [torch.arange(self.stored[i], ends[i]) for i in chosen]
        tokens = [self.tokens[i][span] for i, span in zip(chosen, spans, strict=True)]
        logits = self.model(
            torch.cat(tokens)[None], position_ids=torch.cat(spans)[None], past_key_values=cache
        ).logits[0]
        assert cache.is_done
        for i in chosen:
            self.stored[i] = ends[i]
        return dict(zip(chosen, logits.split([num_new[i] for i in chosen]), strict=True))


@torch.no_grad()
def alone(model, tokens):
    groups = make_groups(model, 16)
    return model(tokens[None], past_key_values=PagedCache(groups)).logits[0]


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([LENGTHS], id="whole prompts"),
        pytest.param([(32, 0, 5, 64), (38, 1, 28, 0)], id="chunks beside others"),
        pytest.param([(69, 0, 32, 63), (1, 1, 1, 1)], id="a decode step"),
        pytest.param([(50, 0, 0, 0), (1, 0, 0, 64), (1, 1, 33, 0), (18, 0, 0, 0)], id="mixed"),
    ],
)
def test_each_sequence_gets_what_it_gets_alone(model, steps):
    sequences = Sequences(model, LENGTHS)
    parts = [[] for _ in LENGTHS]
    for num_new in steps:
        for i, logits in sequences.step(num_new).items():
            parts[i].append(logits)
    for tokens, got in zip(sequences.tokens, parts, strict=True):
        torch.testing.assert_close(torch.cat(got), alone(model, tokens), rtol=2e-4, atol=2e-4)


def test_every_layer_is_announced_before_it_is_read():
    model = llama()
    with paged_attention(model):
        seen = []
        Sequences(model, (20,)).step((20,), seen.append)
        assert seen == [0, 1, 2]


def test_refuses_layers_out_of_turn_and_other_numbers_of_batches():
    model = llama()
    groups = make_groups(model, 4)
    batch = PagedBatch.build([groups[0].allocator.allocate(1)], [3], [3], BLOCK_SIZE)
    with pytest.raises(ValueError, match=r"batches: expected 1 \(one a group\), got 2"):
        BatchCache(groups, [batch, batch])
    states = torch.zeros(1, 2, 3, 16)
    with pytest.raises(UnsupportedError, match="layer_idx: expected 0"):
        BatchCache(groups, [batch]).update(states, states, 1)
