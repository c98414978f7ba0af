"""The model a cache was opened for: set to the cache's attention, and watched."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from kvkernels.errors import UnsupportedError
from kvkernels.nn.transformers import install, uninstall

# Arguments that change keys and values without a trace in the token ids.
_BEYOND_TOKENS = (
    "inputs_embeds",
    "input_features",
    "input_values",
    "pixel_values",
    "pixel_values_videos",
)

_SAMPLE_SIZE = 16  # values of a weight that are compared


@runtime_checkable
class WatchedSession(Protocol):
    """What a forward pass tells the session it stores into."""

    served_model: ServedModel | None

    def check_step(self, token_ids: torch.Tensor, position_ids: torch.Tensor | None) -> None:
        """Raise ValueError unless the step continues the session's tokens where they stand."""

    def end_step(self) -> None:
        """The forward pass is over, finished or not."""


class ServedModel:
    """Sees to it that blocks hold the KV of the tokens they are filed under.

    A forward pass with one of the cache's sessions must run on the session's own tokens, at their
    own positions, and on the weights whose digest is part of every block's identity.

    Args:
        model: A Hugging Face causal language model. Its attention is set to read the cache's
            pools until `close`.

    Raises:
        UnsupportedError: If its attention cannot be replaced.
    """

    def __init__(self, model: Any) -> None:
        install(model)
        self._model = model
        self._arguments = tuple(inspect.signature(model.forward).parameters)
        self._weights = tuple(model.state_dict(keep_vars=True).values())
        self._samples = _weight_samples(self._weights)
        self._states = self._weight_states()
        self._hooks = (
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        )
        self._is_closed = False

    def check_weights(self) -> None:
        """Raise ValueError if a weight was written or replaced since the cache was opened."""
        before, now = self._states, self._weight_states()
        if before[0] != now[0] or not all(map(torch.equal, before[1], now[1])):
            raise ValueError(
                "model: expected the weights the cache was opened with, got changed ones; open"
                " another cache"
            )

    def close(self) -> None:
        """Give the model back the attention it had. May be called again."""
        if not self._is_closed:
            self._is_closed = True
            for hook in self._hooks:
                hook.remove()
            uninstall(self._model)

    def _weight_states(self) -> tuple[list[tuple[int, int]], list[torch.Tensor]]:
        """Where each weight lies, how often it was written, and a few of its bytes.

        Reading all values would take as long as the digest did. Writing through `.data`, as
        merging an adapter does, leaves no other trace than the values.
        """
        written = [
            # Tensors made in inference mode keep no version.
            (weight.data_ptr(), -1 if weight.is_inference() else weight._version)
            for weight in self._weights
        ]
        return written, [torch.cat(samples) for samples in self._samples]

    def _session_of(self, given: dict[str, Any]) -> WatchedSession | None:
        session = given.get("past_key_values")
        if isinstance(session, WatchedSession) and session.served_model is self:
            return session
        return None

    def _after_forward(
        self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        session = self._session_of(dict(zip(self._arguments, args, strict=False)) | kwargs)
        if session is not None:
            session.end_step()

    def _before_forward(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        session = self._session_of(given)
        if session is None:
            return
        for name in _BEYOND_TOKENS:
            if given.get(name) is not None:
                raise UnsupportedError(
                    f"{name}: expected input_ids alone with a session, got what tokens do not tell"
                )
        if given.get("input_ids") is None:
            raise ValueError("input_ids: expected the session's tokens, got None")
        session.check_step(given["input_ids"], given.get("position_ids"))


def _weight_samples(weights: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Views of some bytes in the middle of each weight, by device."""
    samples: dict[torch.device, list[torch.Tensor]] = {}
    for weight in weights:
        if weight.is_contiguous() and weight.numel():
            flat = weight.detach().view(-1)
            middle = flat.numel() // 2
            view = flat[middle : middle + _SAMPLE_SIZE].view(torch.uint8)
            samples.setdefault(weight.device, []).append(view)
    return list(samples.values())
