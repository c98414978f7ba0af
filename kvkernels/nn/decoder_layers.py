"""A Hugging Face model's decoder layers in one function each, on a CPU.

In a small model, or with few tokens, a pass spends as long between its kernels as in them: modules
that call modules, keyword arguments handed down, the checks and the ways of PyTorch to an operator,
all thirty times over. A function that knows its layer calls the same kernels in the same order.

::

    x = input_layernorm(hidden)
    q, k, v = q_proj(x), k_proj(x), v_proj(x)           and their norms, if there are any
    hidden += o_proj(attention(rotate(q), rotate(k), v))     * post_attention_layernorm
    x = pre_feedforward_layernorm(hidden)                    * post_attention_layernorm
    hidden += down_proj(act(gate_proj(x)) * up_proj(x))      * post_feedforward_layernorm
    * of Gemma: norms of what is added; the others have a norm of that name before their gate

`install` tries each layer within its model, next to what it would put there, and replaces only what
gave the same bits. So it goes on top of `batch_invariance` and `fused_layers`, whose kernels these
are, and serves passes of a `PagedCache`, and of an engine's `BatchCache`. All others, a pass under
`torch.autocast` or whose tensors or arguments are others than in the trial, and a layer whose
settings or parts have changed since or whose attention drops out, go through the layer's own
forward.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from kvkernels import native
from kvkernels.checks import is_traced, is_transformed
from kvkernels.nn.batch_invariance import is_batch_invariant
from kvkernels.nn.forward_patch import ForwardPatch, Forwards, has_own_forward, hook_tables
from kvkernels.nn.fused_layers import FusedMLP, FusedNorm
from kvkernels.nn.layer_kernels import LayerKernels, LayerParts
from kvkernels.nn.paged_kv import PagedKV
from kvkernels.nn.transformers import attend, observe_attention
from kvkernels.nn.transformers_batch import BatchCache
from kvkernels.nn.transformers_cache import PagedCache
from kvkernels.nn.transformers_compat import is_idle_capture
from kvkernels.nn.transformers_mask import find_window

logger = logging.getLogger(__name__)

_NUM_TRIAL_TOKENS = 16
# Of caches that say where a layer may store its keys and values itself. A class made of them that
# stores in another way has an `update` of its own.
_UPDATES = (BatchCache.update, PagedCache.update)
# What a model raises that has other parts than expected, or passes other arguments to them.
_TRIAL_ERRORS = (AttributeError, TypeError, LookupError, ValueError, RuntimeError)
# Options that an attention layer may pass to its attention function; replaced layers do the same.
_ATTENTION_OPTIONS = ("scaling", "sliding_window", "softcap")

# Every name that the forwards of the layers above use. A forward that uses any other may do what a
# trial of a few tokens does not show, such as scaling queries from some position on.
_LAYER_NAMES = {
    *("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
_ATTENTION_NAMES = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "apply_rotary_pos_emb"),
    *("head_dim", "shape", "view", "transpose", "reshape", "contiguous", "update", "layer_idx"),
    *("ALL_ATTENTION_FUNCTIONS", "get_interface", "eager_attention_forward", "config"),
    *("_attn_implementation", "attention_dropout", "training", "scaling", "sliding_window"),
    *("attn_logit_softcapping", "getattr"),
}

# Those of them that are numbers of the attention layer's own, which may be changed at any time.
_SETTINGS = ("head_dim", "layer_idx", "scaling", "sliding_window", "attn_logit_softcapping")

_LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
_NORMS_OF_GEMMA = (
    *("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)


def install(model: torch.nn.Module) -> int:
    """Replace the layers that can be replaced, until `uninstall`; returns how many that is.

    The model's attention, and what `batch_invariance` and `fused_layers` replace, is to be in place
    before and to stay until after. Installed twice, a model stays so until it is uninstalled twice.

    Args:
        model: A Hugging Face causal language model, in evaluation mode.
    """
    return _patch.install(model)


def uninstall(model: torch.nn.Module) -> None:
    """Give a model back the layers it had before `install`; without one, nothing changes."""
    _patch.uninstall(model)


@dataclass
class _Call:
    """What a model called a layer with, and what came of it."""

    hidden_states: torch.Tensor
    options: dict[str, Any]
    attention: dict[str, Any]
    result: Any


class FusedDecoderLayer:
    """In place of the forward of a decoder layer.

    Args:
        module: Whose parts have the names and the replaced forwards that this looks for.
        call: Of the module in the trial.

    Raises:
        AttributeError: If a part is missing.
        TypeError: If a part is another than looked for.
    """

    def __init__(self, module: Any, call: _Call) -> None:
        attention = module.self_attn
        self._module, self._attention = module, attention
        self._option_names = call.options.keys()
        self._layer_idx: int = attention.layer_idx
        self._attention_options = {
            name: call.attention[name] for name in _ATTENTION_OPTIONS if name in call.attention
        }
        self._window: int | None = self._attention_options.get("sliding_window")
        parts = _find_parts(module, self._attention_options)
        self._kernels = LayerKernels(parts)
        self._settings = [(vars(attention), name) for name in _SETTINGS]
        norms = [norm for _, norm in filter(None, parts.norms)]
        self._settings += [(vars(norm.module), norm.eps_name) for norm in norms]
        self._expected_settings = self._read_settings()
        self._dtype = call.hidden_states.dtype
        self._hooks = _hooks_within(module)
        self._parts = _PartsWatch(module)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        cache = options.get("past_key_values")
        is_served = not args and getattr(type(cache), "update", None) in _UPDATES
        if not is_served or not self.serves(hidden_states, options):
            return type(self._module).forward(self._module, hidden_states, *args, **options)
        return self.run(hidden_states, cache, options)

    def serves(self, hidden_states: torch.Tensor, options: dict[str, Any]) -> bool:
        """Whether `run` takes such a call."""
        if is_traced() or is_transformed():  # then no addresses of memory may be held, or are there
            return False
        if torch.is_autocast_enabled("cpu"):  # then linear layers compute in another dtype
            return False
        if (
            options.keys() != self._option_names
            or hidden_states.dim() != 3
            or _has_listener(self._hooks)
        ):
            return False
        if self._parts.have_changed():
            return False
        attention = self._attention
        if attention.training and getattr(attention, "attention_dropout", 0.0):
            return False
        if self._read_settings() != self._expected_settings:
            return False
        kernels = self._kernels
        head_dim = kernels.head_dim
        cos, sin = options["position_embeddings"]
        num_rows, num_tokens, hidden_size = hidden_states.shape
        return (
            not torch.is_grad_enabled()
            and hidden_size == kernels.hidden_size
            and num_rows * num_tokens > 0
            and cos.shape == sin.shape
            and cos.shape in ((num_rows, num_tokens, head_dim), (1, num_tokens, head_dim))
            and all(
                type(tensor) is torch.Tensor
                and tensor.dtype == self._dtype
                and tensor.device.type == "cpu"
                and tensor.is_contiguous()
                for tensor in (hidden_states, cos, sin)
            )
            and kernels.dtype == self._dtype
        )

    def _read_settings(self) -> list[Any]:
        return [own.get(name) for own, name in self._settings]

    def run(
        self,
        hidden_states: torch.Tensor,
        cache: BatchCache | PagedCache | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """What the layer gives, with keys and values of the pass alone if there is no cache.

        Args:
            hidden_states: ``[num_rows, num_tokens, hidden_size]``.
            cache: Where the new tokens are stored.
            options: The layer's keyword arguments.
        """
        shape = num_rows, *_ = hidden_states.shape
        cos, sin = options["position_embeddings"]
        if num_rows > 1:
            hidden_states, cos, sin = (
                tensor.expand(num_rows, -1, -1).reshape(1, -1, tensor.shape[2]).contiguous()
                for tensor in (hidden_states, cos, sin)
            )
        mask = options["attention_mask"]
        if cache is not None:
            window = find_window(mask, self._window)
            # Where all of this is as in the group's first layer, that one's checks need not be
            # repeated.
            call = (*shape, *self._kernels.sizes, self._dtype, window)
            place = cache.next_place(self._layer_idx, call)
            if place is not None:
                out = self._kernels.run(hidden_states, cos, sin, place, window)
                return out if num_rows == 1 else out.view(shape)
        layer_pass = self._kernels.begin(hidden_states, cos, sin)
        key: torch.Tensor | PagedKV
        value: torch.Tensor | PagedKV
        query, key, value = layer_pass.heads(num_rows)
        if cache is not None:
            key, value = cache.update(key, value, self._layer_idx, call=call)
        attended, _ = attend(self._attention, query, key, value, mask, **self._attention_options)
        return layer_pass.finish(attended).view(shape)


class _PartsWatch:
    """Notices parts of a layer that compute something else than they did.

    Adapters put other modules in their place, and whoever steers a model, or places its weights,
    gives them other forwards.

    Args:
        module: The layer, whose own forward may change.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._modules = [*module.modules()]
        self._children = [part._modules for part in self._modules]
        self._fields = [vars(part) for part in self._modules if part is not module]
        self._expected_children = [dict(own) for own in self._children]
        self._expected_forwards, self._expected_classes = self._forwards(), self._classes()

    def have_changed(self) -> bool:
        return (
            self._children != self._expected_children
            or self._forwards() != self._expected_forwards
            or self._classes() != self._expected_classes
        )

    def _forwards(self) -> list[Any]:
        return [fields.get("forward") for fields in self._fields]

    def _classes(self) -> list[type]:
        return [*map(type, self._modules)]


def _hooks_within(module: torch.nn.Module) -> list[dict[int, Any]]:
    """Where those are who ask to be told of what goes on inside a layer: they may come any time."""
    return hook_tables(*(part for part in module.modules() if part is not module))


def _has_listener(hook_tables: Collection[dict[int, Any]]) -> bool:
    """Whether anybody is among them to whom what goes on matters."""
    # Most tables are empty, and to see that all are takes a tenth of the time.
    return any(hook_tables) and any(
        not is_idle_capture(hook) for table in hook_tables for hook in table.values()
    )


def _find_parts(module: Any, attention_options: dict[str, Any]) -> LayerParts:
    """Of a decoder layer whose parts have the names and the replaced forwards looked for."""
    fused_mlp = vars(module.mlp).get("forward")
    if not isinstance(fused_mlp, FusedMLP):
        raise TypeError(f"mlp: expected a replaced forward, got {fused_mlp}")
    head_dim: int = module.self_attn.head_dim
    around_mlp: tuple[str | None, ...] = (None, "post_attention_layernorm", None)
    if hasattr(module, "pre_feedforward_layernorm"):
        around_mlp = _NORMS_OF_GEMMA
    of_heads = (
        f"self_attn.{name}" if hasattr(module.self_attn, name) else None
        for name in ("q_norm", "k_norm")
    )
    norms = ("input_layernorm", *of_heads, *around_mlp)
    return LayerParts(
        linears=[(name, module.get_submodule(name)) for name in _LINEARS],
        norms=[None if name is None else (name, _find_norm(module, name)) for name in norms],
        head_dim=head_dim,
        activation=fused_mlp.activation,
        sm_scale=attention_options.get("scaling") or head_dim**-0.5,
        soft_cap=attention_options.get("softcap") or 0.0,
    )


def _find_norm(module: torch.nn.Module, name: str) -> FusedNorm:
    forward = vars(module.get_submodule(name)).get("forward")
    if not isinstance(forward, FusedNorm):
        raise TypeError(f"{name}: expected a replaced forward, got {forward}")
    return forward


# ---- trials ----------------------------------------------------------------------------------


@torch.inference_mode()
def _find_forwards(model: torch.nn.Module) -> Forwards:
    layers = [module for module in model.modules() if _may_be_replaced(module)]
    if not layers or not native.is_available:
        return {}
    try:
        calls = _observe(model, layers)
    except _TRIAL_ERRORS as error:
        logger.info("no decoder layer is replaced, a trial pass failed: %s", error)
        return {}
    forwards: Forwards = {}
    for module, call in calls.items():
        try:
            forward = FusedDecoderLayer(module, call)
            if not forward.serves(call.hidden_states, call.options):
                continue
            result = forward.run(call.hidden_states, None, call.options)
        except _TRIAL_ERRORS as error:
            logger.info("%s stays as it is: %s", type(module).__name__, error)
            continue
        if type(call.result) is torch.Tensor and torch.equal(result, call.result):
            forwards[module] = forward
    return forwards


def _may_be_replaced(module: torch.nn.Module) -> bool:
    attention = getattr(module, "self_attn", None)
    return (
        not has_own_forward(module)
        and is_batch_invariant(module)
        and isinstance(attention, torch.nn.Module)
        # Its forward is its class's own: the rotation was put in by `fused_layers`.
        and has_own_forward(attention)
        and _names_in_forward(module) <= _LAYER_NAMES
        and _names_in_forward(attention) <= _ATTENTION_NAMES
        and not _has_listener(_hooks_within(module))
    )


def _names_in_forward(module: torch.nn.Module) -> set[str]:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return set(code.co_names) if code is not None else {"unknown"}


def _observe(model: Any, layers: Iterable[torch.nn.Module]) -> dict[torch.nn.Module, _Call]:
    """A pass over a few tokens, as each of the layers sees it."""
    calls: dict[torch.nn.Module, _Call] = {}
    attention_of: dict[torch.nn.Module, dict[str, Any]] = {}

    def note(module: Any, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        attention = attention_of.get(module.self_attn)
        if len(args) == 1 and attention is not None:
            calls[module] = _Call(args[0], options, attention, result)

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        with observe_attention(attention_of.__setitem__):
            token_ids = torch.arange(_NUM_TRIAL_TOKENS) % model.config.vocab_size
            model(input_ids=token_ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


_patch = ForwardPatch(_find_forwards)
