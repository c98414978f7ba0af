"""Fused layers: which layers are replaced, that results stay the same, what is left alone."""

import copy
import inspect

import pytest
import tiny_models
import torch
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook

from kvkernels.nn import fused_layers

# Modules replaced per layer (norms, gate, rotation); one more is the norm at the end.
NUM_REPLACED = {"llama": 2 + 1 + 1, "gemma2": 4 + 1 + 1, "gemma3": 6 + 1 + 1, "qwen2": 2 + 1 + 1}


def logits_of(model):
    tokens = torch.randint(0, 100, (2, 37), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return model(tokens).logits.double()


def replaced(model):
    return [module for module in model.modules() if "forward" in vars(module)]


def replaced_kinds(model):
    fused_layers.install(model)
    return {type(module).__name__ for module in replaced(model)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NUM_REPLACED)
def test_a_model_stays_as_accurate_and_is_given_back(name, dtype):
    model = tiny_models.MODELS[name]().to(dtype)
    exact, before = logits_of(copy.deepcopy(model).double()), logits_of(model)
    expected = NUM_REPLACED[name] * model.config.num_hidden_layers + 1
    assert fused_layers.install(model) == len(replaced(model)) == expected
    fused = logits_of(model)
    fused_layers.uninstall(model)
    assert not replaced(model)
    assert torch.equal(logits_of(model), before)
    assert (fused - exact).norm() <= 1.25 * (before - exact).norm()


def test_is_installed_until_the_last_user_is_done():
    model = tiny_models.llama()
    num_replaced = fused_layers.install(model)
    assert fused_layers.install(model) == num_replaced
    fused_layers.uninstall(model)
    assert len(replaced(model)) == num_replaced
    fused_layers.uninstall(model)
    assert not replaced(model)
    fused_layers.uninstall(model)  # no effect the second time


def test_another_model_of_the_class_is_not_touched():
    model, other = tiny_models.llama(), tiny_models.llama()
    before = logits_of(other)
    fused_layers.install(model)
    assert not replaced(other)
    assert torch.equal(logits_of(other), before)


def test_weights_may_change_in_place():
    model = tiny_models.llama()
    fused_layers.install(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(1.5) if "norm" in name else weight.add_(0.01)
    fused = logits_of(model)
    fused_layers.uninstall(model)
    torch.testing.assert_close(fused, logits_of(model), rtol=1e-4, atol=1e-4)


def test_an_epsilon_may_change():
    model = tiny_models.llama()
    fused_layers.install(model)
    before = logits_of(model)
    model.model.norm.variance_epsilon = 1.0
    fused = logits_of(model)
    fused_layers.uninstall(model)
    torch.testing.assert_close(fused, logits_of(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(fused, before, rtol=1e-2)


def test_gradients_and_other_dtypes_go_through_the_layers_own_forward():
    model = tiny_models.llama()
    expected = logits_of(copy.deepcopy(model).double())
    fused_layers.install(model)
    tokens = torch.randint(0, 100, (2, 37), generator=torch.Generator().manual_seed(5))
    model(tokens).logits.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    # Hidden states of another dtype than a norm's weight.
    norm = model.model.norm
    rows = torch.randn(3, 64, dtype=torch.float64)
    with torch.inference_mode():
        assert torch.equal(norm(rows), type(norm).forward(norm, rows))
        torch.testing.assert_close(logits_of(model.double()), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_tangents_and_batches_go_through_the_layers_own_forward(name):
    model = tiny_models.MODELS[name]().requires_grad_(False)
    model.set_attn_implementation("eager")
    shape = (3, 1, 8, model.config.hidden_size)
    rows, tangent = (torch.randn(shape) for _ in range(2))

    def run(inputs):
        return model(inputs_embeds=inputs, use_cache=False).logits

    def transformed():
        with torch.no_grad(), forward_ad.dual_level():
            dual = run(forward_ad.make_dual(rows[0], tangent[0]))
            found = forward_ad.unpack_dual(dual).tangent.clone()
        with torch.no_grad():
            return found, torch.func.vmap(run)(rows)

    expected = transformed()
    fused_layers.install(model)
    torch.testing.assert_close(transformed(), expected)


def test_leaves_rotations_of_another_kind():
    """gpt-oss has cosines for half a head, and experts in place of gates."""
    assert replaced_kinds(tiny_models.gpt_oss()) == {"GptOssRMSNorm"}


@pytest.mark.parametrize("make", [tiny_models.phi3, tiny_models.nemotron])
def test_leaves_rotations_of_a_part_of_each_head(make):
    """A kernel that rotates whole heads would read past their narrower angles."""
    model = make()
    cos, _ = model.model.rotary_emb(torch.zeros(1, 1, 64), torch.arange(3)[None])
    assert cos.shape[-1] < 16
    expected = logits_of(model)
    assert fused_layers.install(model) > 0
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)


def test_an_mlp_with_another_activation_is_left_as_it_is():
    kinds = replaced_kinds(tiny_models.llama(hidden_act="relu"))
    assert kinds == {"LlamaRMSNorm", "LlamaAttention"}


def test_an_activation_may_be_replaced():
    model = tiny_models.llama()
    fused_layers.install(model)
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()
    fused = logits_of(model)
    fused_layers.uninstall(model)
    torch.testing.assert_close(fused, logits_of(model), rtol=1e-4, atol=1e-4)


def test_an_activation_may_be_given_another_forward():
    model = tiny_models.llama()
    fused_layers.install(model)
    for layer in model.model.layers:
        layer.mlp.act_fn.forward = torch.relu
    fused = logits_of(model)
    fused_layers.uninstall(model)
    torch.testing.assert_close(fused, logits_of(model), rtol=1e-4, atol=1e-4)
    assert replaced_kinds(model) >= {"LlamaRMSNorm"}
    assert "forward" not in vars(model.model.layers[0].mlp)


def test_leaves_layers_with_a_forward_of_their_own():
    model = tiny_models.llama()
    mlp = model.model.layers[0].mlp
    own = vars(mlp)["forward"] = mlp.forward
    fused_layers.install(model)
    fused_layers.uninstall(model)
    assert vars(mlp)["forward"] is own


def halve_activations(module, args, output):
    return output / 2 if "SiLU" in type(module).__name__ else None


def hook_activation(model):
    return model.model.layers[1].mlp.act_fn.register_forward_hook(halve_activations)


def hook_all_models(_):
    return register_module_forward_hook(halve_activations)


@pytest.mark.parametrize("register", [hook_activation, hook_all_models])
def test_hooks_of_an_activation_may_come_and_go(register):
    model = tiny_models.llama()
    plain, handle = logits_of(model), register(model)
    hooked = logits_of(model)
    assert not torch.allclose(hooked, plain, rtol=1e-3)
    fused_layers.install(model)
    torch.testing.assert_close(logits_of(model), hooked, rtol=1e-4, atol=1e-4)
    handle.remove()
    fused_layers.uninstall(model)
    fused_layers.install(model)
    torch.testing.assert_close(logits_of(model), plain, rtol=1e-4, atol=1e-4)
    handle = register(model)
    torch.testing.assert_close(logits_of(model), hooked, rtol=1e-4, atol=1e-4)
    handle.remove()


class CenteredRMSNorm(torch.nn.Module):
    """Subtracts the mean first, despite its name."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(32))
        self.eps = 1e-6

    def forward(self, rows):
        rows = rows - rows.mean(-1, keepdim=True)
        return rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class GatedRMSNorm(CenteredRMSNorm):
    """Requires another argument."""

    def forward(self, rows, gate):
        return super().forward(rows) * gate


class SwappedMLP(torch.nn.Module):
    """Applies the activation to the other half."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = torch.nn.Linear(32, 48), torch.nn.Linear(32, 48)
        self.down_proj, self.act_fn = torch.nn.Linear(48, 32), torch.nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class OptionallyGatedRMSNorm(torch.nn.Module):
    """Takes an optional second argument, as Mamba's norms do."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(32))
        self.variance_epsilon = 1e-6

    def forward(self, rows, gate=None):
        scale = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        normed = rows * scale * self.weight
        return normed if gate is None else normed * gate


class OptionallyScaledMLP(SwappedMLP):
    def forward(self, x, scale=1.0):
        return scale * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("make", [OptionallyGatedRMSNorm, OptionallyScaledMLP])
@torch.inference_mode()
def test_calls_with_more_arguments_go_through_the_layers_own_forward(make):
    module, rows, other = make(), torch.randn(3, 32), torch.tensor(2.0)
    name = list(inspect.signature(module.forward).parameters)[1]
    expected = module(rows), module(rows, other)
    assert fused_layers.install(module) == 1
    torch.testing.assert_close(module(rows), expected[0])
    assert torch.equal(module(rows, other), expected[1])
    assert torch.equal(module(rows, **{name: other}), expected[1])


class LargeMLP(OptionallyScaledMLP):
    """Beyond the range of float16 for rows 1,000 times as large as those drawn."""

    def __init__(self):
        super().__init__()
        torch.nn.init.normal_(self.gate_proj.weight, std=3)


class ClampedRMSNorm(OptionallyGatedRMSNorm):
    def forward(self, rows):
        return super().forward(rows.clamp(-1e4, 1e4))


class ClampedMLP(OptionallyScaledMLP):
    """As of Step 3.7 and DeepSeek-V4."""

    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=10), self.up_proj(x).clamp(-10, 10)
        return self.down_proj(self.act_fn(gate) * up)


class MaskedMLP(OptionallyScaledMLP):
    """Clamps without a name for it."""

    def forward(self, x):
        gate = self.gate_proj(x)
        return self.down_proj(self.act_fn((gate < 10) * gate) * self.up_proj(x))


class DroppingMLP(OptionallyScaledMLP):
    """As of T5Gemma."""

    def __init__(self):
        super().__init__()
        self.dropout = torch.nn.Dropout()

    def forward(self, x):
        return self.down_proj(self.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


LOOK_ALIKE = [
    *(CenteredRMSNorm, GatedRMSNorm, SwappedMLP),
    *(ClampedRMSNorm, ClampedMLP, MaskedMLP, DroppingMLP),
]


@pytest.mark.parametrize("make", LOOK_ALIKE)
def test_leaves_what_only_looks_alike(make):
    assert fused_layers.install(make().eval()) == 0


@pytest.mark.parametrize(("make", "num_replaced"), [(LargeMLP, 1), (tiny_models.llama, 13)])
def test_half_numbers_are_tried_within_their_range(make, num_replaced):
    assert fused_layers.install(make().half()) == num_replaced


def test_replaces_norms_of_pytorch():
    assert fused_layers.install(torch.nn.RMSNorm(32, eps=1e-6)) == 1


def test_leaves_other_devices_and_dtypes():
    assert fused_layers.install(tiny_models.llama().double()) == 0
    assert fused_layers.install(tiny_models.llama().to("meta")) == 0
