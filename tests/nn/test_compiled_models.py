"""Models compiled by torch.compile, before or after layers are replaced in them."""

import pytest
import tiny_models
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from kvkernels import UnsupportedError
from kvkernels.nn import batch_invariance, decoder_layers, fused_layers
from kvkernels.nn.batch_invariance import batch_invariant
from kvkernels.nn.transformers import paged_attention


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check_logits(model, expected, num_tokens=20):
    with torch.inference_mode():
        got = model(torch.arange(num_tokens)[None]).logits
    torch.testing.assert_close(got, expected[:, :num_tokens], rtol=1e-4, atol=1e-4)


@pytest.fixture
def model():
    return tiny_models.llama(num_hidden_layers=2)


@pytest.fixture
def expected(model):
    with torch.inference_mode():
        return model(torch.arange(24)[None]).logits


def test_fused_layers_in_a_model_that_is_compiled(model, expected):
    model.compile(backend="eager")
    check_logits(model, expected)
    num_replaced = fused_layers.install(model)
    assert num_replaced == 9
    check_logits(model, expected)
    check_logits(model, expected, num_tokens=24)
    fused_layers.uninstall(model)
    check_logits(model, expected)


def test_a_model_with_fused_layers_may_be_compiled_in_one_graph(model, expected):
    fused_layers.install(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    check_logits(compiled, expected)
    check_logits(compiled, expected, num_tokens=24)
    fused_layers.uninstall(model)
    check_logits(compiled, expected)


def test_a_model_on_our_kernels_may_be_compiled(model, expected):
    with paged_attention(model), batch_invariant(model):
        fused_layers.install(model)
        assert decoder_layers.install(model) == 2
        model.compile(backend="eager")
        check_logits(model, expected)
        check_logits(model, expected, num_tokens=24)
        decoder_layers.uninstall(model)
        fused_layers.uninstall(model)


@pytest.mark.parametrize("name", ["", "model.layers.1.mlp"])
def test_no_bits_are_promised_of_what_is_compiled(model, name):
    model.get_submodule(name).compile(backend="eager")
    with pytest.raises(UnsupportedError, match=f"not compiled .*, got {name or 'a model'} that is"):
        batch_invariance.install(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_no_bits_are_promised_of_a_compiled_wrapper(model):
    with pytest.raises(UnsupportedError, match="not compiled"):
        batch_invariance.install(torch.compile(model, backend="eager"))


@pytest.mark.parametrize("name", ["", "model.layers.1.mlp"])
def test_no_bits_are_promised_of_a_compiled_forward(model, name):
    part = model.get_submodule(name)
    part.forward = torch.compile(part.forward, backend="eager")
    what = rf"forward of their class, got {name or 'a model'} with a function of torch\._dynamo"
    with pytest.raises(UnsupportedError, match=what):
        batch_invariance.install(model)


@torch.compile(backend="eager")
def double(rows):
    return rows * 2


class Decorated(torch.nn.Identity):
    @torch.no_grad()
    @torch.compile(backend="eager")
    def forward(self, rows):
        return rows * 2


class Calling(torch.nn.Identity):
    def forward(self, rows):
        return double(rows)


class Holding(torch.nn.Identity):
    def __init__(self):
        super().__init__()
        self.function = double

    def forward(self, rows):
        return self.function(rows)


class Disabled(torch.nn.Identity):
    @torch.compiler.disable
    def forward(self, rows):
        return rows * 2


@pytest.mark.parametrize("kind", [Decorated, Calling, Holding])
def test_no_bits_are_promised_of_functions_that_are_compiled(kind):
    with pytest.raises(UnsupportedError, match=r"not compiled .*, got 0 that is"):
        batch_invariance.install(torch.nn.Sequential(kind()))


def test_bits_are_promised_of_what_the_compiler_leaves_alone():
    with batch_invariant(torch.nn.Sequential(Disabled())) as model:
        assert batch_invariance.is_batch_invariant(model[0])


@pytest.mark.parametrize("name", ["input_layernorm", "mlp"])
@pytest.mark.parametrize("layers", [batch_invariance, fused_layers])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_is_traced_computes_with_its_own_input(model, layers, name):
    part = model.model.layers[0].get_submodule(name)
    layers.install(part)
    first, second = torch.randn(2, 4, model.config.hidden_size)
    with torch.no_grad():
        traced = torch.jit.trace(part, (first,), check_trace=False)
        assert torch.equal(traced(second), part(second))
    layers.uninstall(part)


@pytest.mark.parametrize("name", ["input_layernorm", "mlp"])
@pytest.mark.parametrize("layers", [batch_invariance, fused_layers])
def test_what_make_fx_writes_down_computes_with_its_own_input(model, layers, name):
    part = model.model.layers[0].get_submodule(name)
    layers.install(part)
    first, second = torch.randn(2, 4, model.config.hidden_size)
    with torch.no_grad():
        written = make_fx(lambda rows: part(rows), tracing_mode="real")(first)
        assert torch.equal(written(second), part(second))
    layers.uninstall(part)
