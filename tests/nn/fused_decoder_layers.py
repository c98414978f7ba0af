"""What tests of fused decoder layers share: models ready for them, and which of them ran."""

import random
from contextlib import contextmanager

import tiny_models
import torch
from packed_forward import PackedModel

from kvkernels.nn import batch_invariance, fused_layers
from kvkernels.nn.decoder_layers import FusedDecoderLayer
from kvkernels.nn.transformers import paged_attention

NAMES = ("llama", "gemma2", "gemma3", "qwen2")


@contextmanager
def with_kernels(model):
    """Install what a model must have before its decoder layers are replaced."""
    with paged_attention(model), batch_invariance.batch_invariant(model):
        fused_layers.install(model)
        yield model
        fused_layers.uninstall(model)


def count_runs(monkeypatch):
    runs = []
    own_run = FusedDecoderLayer.run

    def run(self, *args):
        runs.append(self)
        return own_run(self, *args)

    monkeypatch.setattr(FusedDecoderLayer, "run", run)
    return runs


def replaced(model):
    forwards = [vars(module).get("forward") for module in model.modules()]
    return [forward for forward in forwards if isinstance(forward, FusedDecoderLayer)]


def make_packed(model, lengths):
    sequences = [torch.randint(0, 128, (length,)) for length in lengths]
    num_blocks = sum(-(-length // tiny_models.BLOCK_SIZE) for length in lengths) + 1
    groups = tiny_models.make_groups(model, num_blocks)
    return PackedModel(model, groups, sequences)


def run_steps(packed):
    """Logits of prompts, pieces of prompts and single tokens, in batches of any size."""
    steps = packed.random_steps(random.Random(0), (1, 1, 2, 3, 16, 33))
    return [logits for step in steps for logits in packed.run(step)]
