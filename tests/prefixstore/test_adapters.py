"""Adapters of one model never reuse each other's KV."""

import pytest
import torch
from cached_models import generate, random_tokens, run, tiny_llama

from kvkernels.errors import UnsupportedError
from prefixstore.cache import PrefixCache
from prefixstore.errors import ConfigError
from prefixstore.module_watch import ModuleWatch

TARGETS = ["q_proj", "k_proj", "v_proj"]


class LoraLinear(torch.nn.Module):
    """A layer with the attributes of PEFT's, for machines without PEFT."""

    def __init__(self, base_layer, alphas):
        super().__init__()
        self.base_layer = base_layer
        self.lora_alpha = alphas
        self.scaling = {name: alpha / 4 for name, alpha in alphas.items()}
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter = next(iter(alphas))
        shape = base_layer.weight.shape
        self.lora = torch.nn.ParameterDict({name: torch.randn(shape) * 0.02 for name in alphas})

    @property
    def active_adapters(self):
        return [self._active_adapter]

    @property
    def disable_adapters(self):
        return self._disable_adapters

    def forward(self, hidden):
        out = self.base_layer(hidden)
        if not self._disable_adapters:
            for name in self.active_adapters:
                out = out + self.scaling[name] * (hidden @ self.lora[name].T)
        return out


class StandIn:
    """A model with two adapters, without PEFT."""

    def __init__(self, model, alpha=64):
        self.model = model
        self.layers = []
        for layer in model.model.layers:
            for name in TARGETS:
                wrapped = LoraLinear(getattr(layer.self_attn, name), {"A": alpha, "B": alpha})
                setattr(layer.self_attn, name, wrapped)
                self.layers.append(wrapped)
        model.eval()

    def activate(self, name):
        for layer in self.layers:
            layer._active_adapter = name

    def disable(self):
        for layer in self.layers:
            layer._disable_adapters = True


class Peft:
    """The same with PEFT."""

    def __init__(self, model, alpha=64):
        peft = pytest.importorskip("peft", reason="needs PEFT")
        config = peft.LoraConfig(
            r=4, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights=False
        )
        self.model = model
        self._adapted = peft.get_peft_model(model, config, adapter_name="A")
        self._adapted.add_adapter("B", config)
        self._adapted.eval()

    def activate(self, name):
        self._adapted.set_adapter(name)

    def disable(self):
        self._adapted.base_model.disable_adapter_layers()


@pytest.fixture
def model():
    torch.manual_seed(1)
    return tiny_llama()


@pytest.fixture(params=[StandIn, Peft])
def adapt(request):
    """Puts the same adapters on a model each time."""

    def make(model, **options):
        torch.manual_seed(2)
        return request.param(model, **options)

    return make


def test_each_adapter_has_blocks_of_its_own(model, adapt, open_cache, tmp_path):
    adapted = adapt(model)
    tokens = random_tokens(100)
    steps = [lambda: adapted.activate("A"), lambda: adapted.activate("B"), adapted.disable]
    for choose in steps:
        choose()
        plain = generate(model, tokens)
        cache = open_cache(disk_path=tmp_path)
        cold, report = run(cache, model, tokens)
        assert (cold, report.num_reused) == (plain, 0)
        assert cache.flush()
        warm, report = run(open_cache(disk_path=tmp_path), model, tokens)
        assert (warm, report.tokens_by_tier) == (plain, {"disk": 96})


def test_an_adapter_of_another_strength_has_blocks_of_its_own(adapt):
    identities = set()
    for alpha in (8, 64):
        torch.manual_seed(1)
        model = adapt(tiny_llama(), alpha=alpha).model
        with PrefixCache.open(model, pool_tokens=64, memory_bytes=0) as cache:
            identities.add(cache.blocks.identity(""))
    assert len(identities) == 2


@pytest.mark.parametrize("change", ["switch", "disable"])
def test_an_adapter_switched_in_an_open_cache_is_refused(model, adapt, open_cache, change):
    adapted = adapt(model)
    cache = open_cache()
    tokens = random_tokens(40)
    run(cache, model, tokens)
    with cache.session(random_tokens(40, seed=1)) as session:
        adapted.activate("B") if change == "switch" else adapted.disable()
        with pytest.raises(ValueError, match="model: expected the adapters as they were when"):
            generate(model, random_tokens(40, seed=1), session)
    with pytest.raises(ValueError, match="model: expected the adapters as they were when"):
        cache.session(tokens)
    assert run(open_cache(), model, tokens)[1].num_reused == 0


def test_an_adapter_switched_for_one_answer_is_refused(model, adapt, open_cache):
    adapted = adapt(model)
    tokens = random_tokens(40)
    plain = generate(model, tokens, num_new=2)
    cache = open_cache()
    run(cache, model, tokens)
    with cache.session(tokens) as session:
        adapted.activate("B")
        with pytest.raises(ValueError, match="model: expected the adapters as they were when"):
            generate(model, tokens, session, num_new=2)
        adapted.activate("A")
        assert generate(model, tokens, session, num_new=2) == plain


@pytest.mark.parametrize("depth", ["outer", "tuner"])
def test_a_model_that_holds_the_model_is_refused(model, depth):
    adapted = Peft(model)._adapted
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedError, match=r"get_base_model\(\), got (Peft|Lora)Model"):
        PrefixCache.open(adapted if depth == "outer" else adapted.base_model, pool_tokens=64)
    assert model.config._attn_implementation == before


def layers_of(model):
    return [module for module in model.modules() if hasattr(module, "merged_adapters")]


def rescale(layer):
    layer.scaling["A"] *= 2


def merge(layer):
    layer.merged_adapters.append("A")


@pytest.mark.parametrize("change", [rescale, merge])
def test_an_adapter_of_which_more_counts_is_refused(model, adapt, open_cache, change):
    adapt(model)
    cache = open_cache()
    change(layers_of(model)[-1])
    with pytest.raises(ValueError, match="model: expected the adapters as they were when"):
        cache.session(random_tokens(40))


def test_a_scaling_that_is_a_tensor_is_watched_without_its_values(model, adapt, monkeypatch):
    adapt(model)
    scaling = layers_of(model)[0].scaling
    scaling["A"] = torch.tensor(2.0)
    watch = ModuleWatch(model.eval())
    with monkeypatch.context() as patch:  # on a GPU that would wait for queued work
        for name in ("tolist", "item", "__bool__"):
            patch.setattr(torch.Tensor, name, None)
        assert watch.change() is None
    scaling["A"].mul_(2)
    assert "expected the adapters" in watch.change()
    watch = ModuleWatch(model)
    scaling["A"] = scaling["A"].clone()
    assert "expected the adapters" in watch.change()


def test_adapters_named_in_a_call_are_refused(model, open_cache):
    tokens = random_tokens(40)
    message = "adapter_names: expected input_ids alone"
    with open_cache().session(tokens) as session, pytest.raises(UnsupportedError, match=message):
        model(tokens, past_key_values=session, adapter_names=["B"])


def test_an_adapter_put_on_for_training_is_refused(model, adapt, open_cache):
    adapted = adapt(model)
    adapted.model.model.layers[1].self_attn.q_proj.train()
    with pytest.raises(ConfigError, match=r"training mode in model.layers.1.self_attn.q_proj;"):
        open_cache()
