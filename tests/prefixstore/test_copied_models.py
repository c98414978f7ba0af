"""Copies of a model that a cache serves are models as any other."""

import contextlib
import copy
import pickle

import pytest
from cached_models import generate, random_tokens, run

from kvkernels.nn.fused_model import fused_model
from prefixstore.cache import PrefixCache


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, pickled])
@pytest.mark.parametrize("is_fused", [False, True])
def test_a_served_model_can_be_copied(model, open_cache, copy_of, is_fused):
    model, tokens = model.cpu(), random_tokens(40).cpu()  # where layers can be fused
    plain = generate(model, tokens)
    with fused_model(model) if is_fused else contextlib.nullcontext():
        cache = open_cache()
        run(cache, model, tokens)
        copied = copy_of(model)
        assert copied.prepare_inputs_for_generation.prepare.__self__ is copied
        assert generate(copied, tokens) == plain
        with PrefixCache.open(copied, block_size=16, pool_tokens=256) as other:
            assert run(other, copied, tokens)[0] == plain
            with (
                cache.session(tokens) as session,
                pytest.raises(ValueError, match="the model the cache was opened for"),
            ):
                generate(copied, tokens, session)
        assert "prepare_inputs_for_generation" not in vars(copied)
        cache.close()
