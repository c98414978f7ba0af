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
are, and serves what an engine does: passes of a `BatchCache`. All others, and a pass whose tensors
or arguments are others than in the trial, go through the layer's own forward.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from kvkernels import native
from kvkernels.nn.batch_invariance import is_batch_invariant
from kvkernels.nn.forward_patch import ForwardPatch, Forwards, has_own_forward
from kvkernels.nn.fused_layers import FusedMLP, FusedNorm
from kvkernels.nn.paged_kv import PagedKV
from kvkernels.nn.transformers import SlidingMask, attend, observe_attention
from kvkernels.nn.transformers_batch import BatchCache
from kvkernels.ops import linear, rms_norm
from kvkernels.scoring import Scoring

logger = logging.getLogger(__name__)

_NUM_TRIAL_TOKENS = 16
# What an attention layer may hand to its attention function, and a replaced one hands on.
_ATTENTION_OPTIONS = ("scaling", "sliding_window", "softcap")

# All that the forwards of the layers above refer to. What refers to anything else may do something
# that a trial of a few tokens does not show, such as scaling queries from some position on.
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

# Of a module, by name. A bias may be None; a weight is there, or the trial had failed.
Parameters = dict[str, Any]


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


class _Linears:
    """Linear layers of one input; their weights are looked up where the modules keep them."""

    def __init__(self, *modules: torch.nn.Linear) -> None:
        self._parameters: list[Parameters] = [module._parameters for module in modules]

    def __call__(self, input: torch.Tensor) -> list[torch.Tensor]:
        layers = [(own["weight"], own["bias"]) for own in self._parameters]
        if all(weight.dtype == input.dtype for weight, _ in layers):
            return native.linear_layers(input, layers)
        return [linear(input, *layer) for layer in layers]  # names what is wrong


class _Norm:
    """A norm whose weight is looked up where the module keeps it."""

    def __init__(self, norm: FusedNorm) -> None:
        self._parameters: Parameters = norm.module._parameters
        self._eps, self._is_offset = norm.eps, norm.is_offset

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        weight = self._parameters["weight"]
        if weight.dtype == input.dtype and len(weight) == input.shape[-1]:
            return native.rms_norm(input, weight, self._eps, self._is_offset)
        # Names what is wrong.
        return rms_norm(input, weight, self._eps, is_offset=self._is_offset)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._parameters["weight"].dtype
        return dtype


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
        attention, mlp = module.self_attn, module.mlp
        fused_mlp = vars(mlp).get("forward")
        if not isinstance(fused_mlp, FusedMLP):
            raise TypeError(f"mlp: expected a replaced forward, got {fused_mlp}")
        self._module, self._attention = module, attention
        self._option_names = call.options.keys()
        self._dtype = call.hidden_states.dtype
        self._layer_idx: int = attention.layer_idx
        self._head_dim: int = attention.head_dim
        self._attention_options = {
            name: call.attention[name] for name in _ATTENTION_OPTIONS if name in call.attention
        }
        self._scale: float = self._attention_options.get("scaling") or self._head_dim**-0.5
        self._window: int | None = self._attention_options.get("sliding_window")
        self._soft_cap: float = self._attention_options.get("softcap") or 0.0
        self._projections = _Linears(attention.q_proj, attention.k_proj, attention.v_proj)
        self._query_norm, self._key_norm = (
            _norm(getattr(attention, name)) if hasattr(attention, name) else None
            for name in ("q_norm", "k_norm")
        )
        self._out = _Linears(attention.o_proj)
        self._gates, self._down = _Linears(mlp.gate_proj, mlp.up_proj), _Linears(mlp.down_proj)
        self._activation = fused_mlp.activation
        self._first_norm = _norm(module.input_layernorm)
        self._second_norm = _norm(module.post_attention_layernorm)
        self._attention_norm: _Norm | None = None
        self._mlp_norm: _Norm | None = None
        if hasattr(module, "pre_feedforward_layernorm"):
            self._attention_norm = self._second_norm
            self._second_norm = _norm(module.pre_feedforward_layernorm)
            self._mlp_norm = _norm(module.post_feedforward_layernorm)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        cache = options.get("past_key_values")
        if args or type(cache) is not BatchCache or not self._serves(hidden_states, options):
            return type(self._module).forward(self._module, hidden_states, *args, **options)
        return self.run(hidden_states, cache, options)

    def _serves(self, hidden_states: torch.Tensor, options: dict[str, Any]) -> bool:
        if options.keys() != self._option_names or hidden_states.dim() != 3:
            return False
        cos, sin = options["position_embeddings"]
        angles = (1, hidden_states.shape[1], self._head_dim)
        return (
            not torch.is_grad_enabled()
            and hidden_states.shape[0] == 1
            and cos.shape == sin.shape == angles
            and all(
                type(tensor) is torch.Tensor
                and tensor.dtype == self._dtype
                and tensor.device.type == "cpu"
                and tensor.is_contiguous()
                for tensor in (hidden_states, cos, sin)
            )
            and self._first_norm.dtype == self._dtype
        )

    def run(
        self, hidden_states: torch.Tensor, cache: BatchCache | None, options: dict[str, Any]
    ) -> torch.Tensor:
        """What the layer gives, with keys and values of the pass alone if there is no cache.

        Args:
            hidden_states: ``[1, num_tokens, hidden_size]``.
            cache: Where the new tokens are stored.
            options: The layer's keyword arguments.
        """
        heads = (*hidden_states.shape[:2], -1, self._head_dim)
        projected = self._projections(self._first_norm(hidden_states))
        query, key, value = (states.view(heads) for states in projected)
        if self._query_norm is not None:
            query = self._query_norm(query)
        if self._key_norm is not None:
            key = self._key_norm(key)
        cos, sin = options["position_embeddings"]
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        x = self._attend(query, key, value, cache, options["attention_mask"])
        (x,) = self._out(x.view(*hidden_states.shape[:2], -1))
        if self._attention_norm is not None:
            x = self._attention_norm(x)
        hidden_states = hidden_states + x
        gate, up = self._gates(self._second_norm(hidden_states))
        (x,) = self._down(native.gated_activation(gate, up, self._activation))
        if self._mlp_norm is not None:
            x = self._mlp_norm(x)
        return hidden_states + x

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: BatchCache | None,
        mask: Any,
    ) -> torch.Tensor:
        """``[1, num_tokens, num_heads, head_dim]`` of attention, as all that comes in."""
        window = mask.window if isinstance(mask, SlidingMask) else self._window
        if cache is None or not (mask is None or isinstance(mask, SlidingMask)):
            handles: tuple[Any, Any] = (key.transpose(1, 2), value.transpose(1, 2))
        elif (
            place := cache.next_place(self._layer_idx, _describe(query, key, window))
        ) is not None:
            return self._attend_place(query[0], key[0], value[0], place, window)[None]
        else:
            handles = cache.update(key.transpose(1, 2), value.transpose(1, 2), self._layer_idx)
        query = query.transpose(1, 2)
        return attend(self._attention, query, *handles, mask, **self._attention_options)[0]

    def _attend_place(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        place: PagedKV,
        window: int | None,
    ) -> torch.Tensor:
        batch, caches = place.batch, (place.key_cache, place.value_cache)
        native.store_kv(key, value, *caches, batch.slot_mapping)
        scoring = Scoring(self._scale, True, window or 0, self._soft_cap)
        return native.paged_attention(
            *(query, *caches, batch.block_table, batch.seq_lens),
            batch.cu_seqlens_q,
            scoring,
            return_lse=False,
            batch_invariant=True,
        )[0]


def _describe(query: torch.Tensor, key: torch.Tensor, window: int | None) -> tuple[Any, ...]:
    """What may differ from layer to layer in a call; the values are like the keys."""
    return query.shape, key.shape, key.dtype, window


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``[1, num_tokens, num_heads, head_dim]``, rotated."""
    out = states.new_empty(states.shape)
    native.rotary_embedding(states.transpose(1, 2), cos, sin, out.transpose(1, 2))
    return out


def _norm(module: torch.nn.Module) -> _Norm:
    forward = vars(module).get("forward")
    if not isinstance(forward, FusedNorm):
        raise TypeError(f"norm: expected a replaced forward, got {forward}")
    return _Norm(forward)


# ---- trials ----------------------------------------------------------------------------------


@torch.inference_mode()
def _find_forwards(model: torch.nn.Module) -> Forwards:
    layers = [module for module in model.modules() if _may_be_replaced(module)]
    if not layers or not native.is_available:
        return {}
    forwards: Forwards = {}
    for module, call in _observe(model, layers).items():
        try:
            forward = FusedDecoderLayer(module, call)
            result = forward.run(call.hidden_states, None, call.options)
        except (AttributeError, TypeError, KeyError, ValueError, RuntimeError) as error:
            # It consists of other parts, or wants something else of them.
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
        # The rotation is `fused_layers`' own.
        and has_own_forward(attention)
        and _names_in_forward(module) <= _LAYER_NAMES
        and _names_in_forward(attention) <= _ATTENTION_NAMES
        # Somebody may have asked to be told of what goes on inside.
        and not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    )


def _names_in_forward(module: torch.nn.Module) -> set[str]:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return set(code.co_names) if code is not None else {"unknown"}


def _observe(
    model: torch.nn.Module, layers: Iterable[torch.nn.Module]
) -> dict[torch.nn.Module, _Call]:
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
            model(input_ids=torch.arange(_NUM_TRIAL_TOKENS)[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


_patch = ForwardPatch(_find_forwards)
