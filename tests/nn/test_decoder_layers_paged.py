"""Fused decoder layers with a `PagedCache`: the same bits, and the same tokens stored."""

import itertools

import pytest
import tiny_models
import torch
from fused_decoder_layers import NAMES, count_runs, with_kernels

from kvkernels.nn import decoder_layers
from kvkernels.nn.transformers import PagedCache


@pytest.mark.parametrize("keeps_windows", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_paged_cache_gets_the_bits_of_the_layers_own(
    name, batch_size, keeps_windows, monkeypatch
):
    model = tiny_models.MODELS[name]().to(torch.bfloat16)
    tokens = torch.randint(1, 128, (batch_size, 90))

    def run():
        """Logits of a prompt longer than a window, some tokens, and single ones, some twice."""
        groups = tiny_models.make_groups(model)
        options = {"batch_size": batch_size}
        if keeps_windows:  # the pool does not get the whole prompt
            options["max_pass_blocks"] = {index: 3 for index, g in enumerate(groups) if g.window}
        with torch.inference_mode(), PagedCache(groups, **options) as cache:
            cuts = (0, 60, 64, 65, 66, 88, 90)
            logits = [
                model(tokens[:, begin:end], past_key_values=cache).logits
                for begin, end in itertools.pairwise(cuts)
            ]
            cache.crop(-2)
            logits += [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in (88, 89)]
            assert cache.num_tokens == 90
            stored = [
                group.pool.data[cache.block_ids(index, row)].view(torch.int16)  # NaN if unused
                for index, group in enumerate(groups)
                for row in range(batch_size)
            ]
        return [*logits, *stored]

    with with_kernels(model):
        expected = run()
        decoder_layers.install(model)
        runs = count_runs(monkeypatch)
        got = run()
        decoder_layers.uninstall(model)
    assert len(runs) == 8 * model.config.num_hidden_layers
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("shape", [(0, 5), (1, 0), (0, 0)])
def test_a_pass_without_tokens_is_left_to_the_layers_own(shape):
    model = tiny_models.llama()
    tokens = torch.empty(shape, dtype=torch.long)
    with (
        with_kernels(model),
        torch.inference_mode(),
        PagedCache(tiny_models.make_groups(model)) as cache,
    ):
        with pytest.raises(Exception) as expected:
            model(tokens, past_key_values=cache)
        decoder_layers.install(model)
        with pytest.raises(type(expected.value)) as got:
            model(tokens, past_key_values=cache)
        decoder_layers.uninstall(model)
    assert str(got.value) == str(expected.value)


def test_generate_with_a_paged_cache_runs_replaced_layers(monkeypatch):
    model = tiny_models.llama()
    ids = torch.randint(1, 128, (2, 40))
    groups = tiny_models.make_groups(model)
    with with_kernels(model), PagedCache(groups, batch_size=2) as cache:
        expected = tiny_models.generate(model, ids, past_key_values=cache)
        cache.reset()
        decoder_layers.install(model)
        runs = count_runs(monkeypatch)
        got = tiny_models.generate(model, ids, past_key_values=cache)
        decoder_layers.uninstall(model)
    assert torch.equal(got, expected)
    assert len(runs) == 24 * model.config.num_hidden_layers


def test_a_pass_that_fails_midway_starts_over_with_replaced_layers():
    model = tiny_models.gemma3()
    tokens = torch.randint(1, 128, (1, 41))
    with with_kernels(model), torch.inference_mode():
        decoder_layers.install(model)
        with PagedCache(tiny_models.make_groups(model)) as cache:
            model(tokens[:, :40], past_key_values=cache)
            expected = model(tokens[:, 40:], past_key_values=cache).logits
            cache.crop(-1)
            weights = model.model.layers[2].mlp.up_proj.weight
            del model.model.layers[2].mlp.up_proj.weight
            with pytest.raises(KeyError):
                model(tokens[:, 40:], past_key_values=cache)
            model.model.layers[2].mlp.up_proj.weight = weights
            assert cache.num_tokens == 40
            assert torch.equal(model(tokens[:, 40:], past_key_values=cache).logits, expected)
        decoder_layers.uninstall(model)
