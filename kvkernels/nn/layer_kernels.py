"""A decoder layer's kernels in two calls of C++, up to its attention and from there on, or in one.

A call from Python takes as long as many a kernel of a small model, and a layer has a dozen of them.
The weights stay where the layer's modules keep them, and are looked up for every pass: a model may
be given others at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvkernels import native, native_layers
from kvkernels.checks import (
    address_of,
    check_device,
    check_dtype,
    check_last_stride,
    check_shape,
)
from kvkernels.nn.fused_layers import FusedNorm
from kvkernels.nn.paged_kv import PagedKV
from kvkernels.threads import num_threads

# Up to so many tokens a call of its own for each part of a layer would be noticed, and what lies
# between the parts is small enough for a thread to keep the memory.
_FEW_TOKENS = 64


@dataclass(frozen=True)
class LayerParts:
    """What a decoder layer is made of.

    Attributes:
        linears: Names and linear layers: those that make queries, keys and values, the one behind
            the attention, gate, up and down.
        norms: Names and norms: of what comes in, of queries, of keys, of what the attention adds,
            of what the gate sees, of what the gate's branch adds; None for those it lacks.
        head_dim: Width of a head.
        activation: Of the gate, see `kvkernels.gated_activation`.
        sm_scale: Multiplies scores before softmax.
        soft_cap: Bounds scaled scores; 0 for none.
    """

    linears: Sequence[tuple[str, torch.nn.Linear]]
    norms: Sequence[tuple[str, FusedNorm] | None]
    head_dim: int
    activation: str
    sm_scale: float
    soft_cap: float


class LayerKernels:
    """Runs a decoder layer's kernels, its attention aside, on whatever weights its modules have.

    Args:
        parts: Of a layer on the CPU.

    Raises:
        ValueError: If the shapes of the layer's weights do not fit each other.
    """

    def __init__(self, parts: LayerParts) -> None:
        self._parts = parts
        linears = [linear for _, linear in parts.linears]
        norms = [norm.module for norm in self._norms]
        query, key, gate = (linears[i].weight.shape for i in (0, 1, 4))
        self.sizes = (
            *(query[1], query[0] // parts.head_dim, key[0] // parts.head_dim),
            *(parts.head_dim, gate[0]),
        )
        self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim, _ = self.sizes
        # The dictionaries that hold the parameters, to see whether one was replaced: weights,
        # biases, norms, in the order of `parts`.
        self._places: list[tuple[dict[str, Any], str]] = [
            *((linear._parameters, "weight") for linear in linears),
            *((linear._parameters, "bias") for linear in linears),
            *((norm._parameters, "weight") for norm in norms),
        ]
        self._of_first_norm: dict[str, Any] = norms[0]._parameters
        self._bind(self._parameters())

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights now."""
        dtype: torch.dtype = self._of_first_norm["weight"].dtype
        return dtype

    def begin(self, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> LayerPass:
        """Make queries, keys and values.

        Args:
            hidden_states: ``[1, num_tokens, hidden_size]``, contiguous, of the weights' dtype.
            cos: ``[1, num_tokens, head_dim]``, likewise.
            sin: Like `cos`.

        Raises:
            ValueError: If the layer's modules have been given weights that do not fit.
        """
        return LayerPass(self, self._current_layer(), hidden_states, cos, sin)

    def run(
        self,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        place: PagedKV,
        window: int | None,
    ) -> torch.Tensor:
        """`begin`, and the pass's `attend_and_finish`."""
        if native.reads_tensors and hidden_states.shape[1] <= _FEW_TOKENS:
            batch = place.batch
            out: torch.Tensor | None = self._current_layer().run_tensors(
                *(hidden_states, cos, sin, place.key_cache, place.value_cache),
                *(batch.block_table, batch.seq_lens, batch.cu_seqlens_q, batch.slot_mapping),
                *(window or 0, native.isa(), num_threads()),
            )
            if out is not None:
                return out
        return self.begin(hidden_states, cos, sin).attend_and_finish(place, window)

    def _current_layer(self) -> Any:
        parameters = self._parameters()
        if _identify(parameters) != self._identities:
            self._bind(parameters)
        return self._layer

    def _parameters(self) -> list[torch.Tensor | None]:
        return [own[name] for own, name in self._places]

    @property
    def _norms(self) -> list[FusedNorm]:
        return [norm for _, norm in filter(None, self._parts.norms)]

    def _bind(self, parameters: list[torch.Tensor | None]) -> None:
        addresses = self._addresses(parameters)
        num_linears = len(self._parts.linears)
        of_norms = iter(addresses[2 * num_linears :])
        weights = [weight for weight in parameters[:num_linears] if weight is not None]
        self._layer = native_layers.decoder_layer(
            self.sizes,
            [
                (0, 0.0, False)
                if named is None
                else (next(of_norms), named[1].eps, named[1].is_offset)
                for named in self._parts.norms
            ],
            [
                (addresses[i], addresses[num_linears + i], weight.shape[0], weight.stride(0))
                for i, weight in enumerate(weights)
            ],
            self._parts.activation,
            (self._parts.sm_scale, self._parts.soft_cap),
            self.dtype,
        )
        self._identities = _identify(parameters)
        # Keep the parameters and their storages alive: otherwise a new object could get the same
        # `id`, or another tensor the same memory, unnoticed.
        self._held = [(one, one.detach()) for one in parameters if one is not None]

    def _addresses(self, parameters: list[torch.Tensor | None]) -> list[int]:
        """Where each parameter lies, 0 for none.

        Raises:
            ValueError: If one has not the shape, dtype and strides that the kernels rely on.
        """
        hidden, num_heads, num_kv_heads, head_dim, intermediate = self.sizes
        heads, kv_heads = num_heads * head_dim, num_kv_heads * head_dim
        shapes = [
            *((heads, hidden), (kv_heads, hidden), (kv_heads, hidden), (hidden, heads)),
            *((intermediate, hidden), (intermediate, hidden), (hidden, intermediate)),
        ]
        of_norms = [(hidden,), (head_dim,), (head_dim,), (hidden,), (hidden,), (hidden,)]
        linears = [name for name, _ in self._parts.linears]
        expected: list[tuple[str, tuple[int, ...]]] = [
            *((f"{name}.weight", shape) for name, shape in zip(linears, shapes, strict=True)),
            *((f"{name}.bias", shape[:1]) for name, shape in zip(linears, shapes, strict=True)),
            *(
                (f"{named[0]}.weight", shape)
                for named, shape in zip(self._parts.norms, of_norms, strict=True)
                if named is not None
            ),
        ]
        addresses = []
        for (name, shape), tensor in zip(expected, parameters, strict=True):
            if tensor is not None:
                check_shape(name, tensor, shape)
                check_dtype(name, tensor, self.dtype)
                check_device(name, tensor, torch.device("cpu"))
                check_last_stride(name, tensor)
                addresses.append(address_of(name, tensor))
            elif name.endswith(".bias"):
                addresses.append(0)
            else:
                raise ValueError(f"{name}: expected a tensor, got None")
        return addresses


def _identify(parameters: list[torch.Tensor | None]) -> list[Any]:
    """What is other once a parameter is another one, lies elsewhere, or has other strides."""
    tensors = [tensor for tensor in parameters if tensor is not None]
    places = map(torch.Tensor.data_ptr, tensors)
    return [*map(id, parameters), *places, *map(torch.Tensor.stride, tensors)]


class LayerPass:
    """Some tokens on their way through a layer, with queries, keys and values made.

    Args:
        kernels: The layer's.
        layer: With the weights that it has now.
        hidden_states: See `LayerKernels.begin`.
        cos: See there.
        sin: See there.
    """

    def __init__(
        self,
        kernels: LayerKernels,
        layer: Any,
        hidden_states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> None:
        self._kernels, self._layer = kernels, layer
        self._hidden_states, self._out = hidden_states, hidden_states.new_empty(hidden_states.shape)
        self._num_tokens = num_tokens = hidden_states.shape[1]
        # Ends of the buffers for queries, keys, values and attention's output; a plane is one head
        # of all tokens.
        plane = num_tokens * kernels.head_dim
        self._bounds = (
            kernels.num_heads * plane,
            (kernels.num_heads + kernels.num_kv_heads) * plane,
            (kernels.num_heads + 2 * kernels.num_kv_heads) * plane,
            2 * (kernels.num_heads + kernels.num_kv_heads) * plane,
        )
        size = self._bounds[-1] + num_tokens * layer.workspace_size
        # One allocation for all of them: none outlives the pass.
        self._memory = hidden_states.new_empty(size)
        start, item = self._memory.data_ptr(), self._memory.element_size()
        key, value, attended, workspace = (start + bound * item for bound in self._bounds)
        self._angles = (cos, sin)  # kept, as C++ has their addresses until the pass ends
        self._pointers = (
            *(hidden_states.data_ptr(), self._out.data_ptr(), cos.data_ptr(), sin.data_ptr()),
            *(start, key, value, attended, workspace),
        )
        layer.project_heads(self._pointers, num_tokens, native.isa(), num_threads())

    def heads(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value, with the tokens in so many rows.

        Returns:
            ``[num_rows, num_heads or num_kv_heads, num_tokens, head_dim]`` each.
        """
        query_end, key_end, value_end, _ = self._bounds
        bounds = ((0, query_end), (query_end, key_end), (key_end, value_end))
        shape = (num_rows, self._num_tokens // num_rows, -1, self._kernels.head_dim)
        query, key, value = (
            self._memory[begin:end].view(shape).transpose(1, 2) for begin, end in bounds
        )
        return query, key, value

    def attend_and_finish(self, place: PagedKV, window: int | None) -> torch.Tensor:
        """Store keys and values, attend to all of their sequences, and do the rest of the layer.

        Args:
            place: Checked, as `LayerStore.next_place` gives it.
            window: A token sees itself and so many tokens before it, less one; None for all.

        Returns:
            ``[1, num_tokens, hidden_size]``: what the layer gives.

        Raises:
            ValueError: If a value inside an index tensor is out of range.
        """
        key_cache, value_cache, batch = place.key_cache, place.value_cache, place.batch
        table, bounds = batch.block_table, batch.cu_seqlens_q
        self._layer.attend_and_finish(
            self._pointers,
            self._num_tokens,
            (
                *(key_cache.data_ptr(), value_cache.data_ptr(), table.data_ptr()),
                batch.seq_lens.data_ptr(),
                0 if bounds is None else bounds.data_ptr(),
                batch.slot_mapping.data_ptr(),
            ),
            (
                *(key_cache.shape[0], key_cache.shape[2], *table.shape),
                *(table.stride(0), batch.slot_mapping.stride(0)),
            ),
            key_cache.stride()[:3],
            value_cache.stride()[:3],
            window or 0,
            native.isa(),
            num_threads(),
        )
        return self._out

    def finish(self, attended: torch.Tensor) -> torch.Tensor:
        """The rest of the layer, after an attention of the caller's.

        Args:
            attended: ``[num_rows, num_tokens, num_heads, head_dim]``, contiguous.

        Returns:
            ``[1, num_tokens, hidden_size]``: what the layer gives.
        """
        pointers = (*self._pointers[:7], attended.data_ptr(), self._pointers[8])
        self._layer.finish_layer(pointers, self._num_tokens, native.isa(), num_threads())
        return self._out
