"""What tests of fused decoder layers share: models ready for them, and which of them ran."""

from contextlib import contextmanager

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
