"""The model a cache was opened for: set to the cache's attention, and watched."""

from __future__ import annotations

import inspect
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


@runtime_checkable
class WatchedSession(Protocol):
    """What a forward pass tells the session it stores into."""

    served_model: ServedModel | None

    def check_step(self, token_ids: torch.Tensor, position_ids: torch.Tensor | None) -> None:
        """Raise ValueError unless the step continues the session's tokens where they stand."""


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
        self._states = self._weight_states()
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._is_closed = False

    def check_weights(self) -> None:
        """Raise ValueError if a weight was written or replaced since the cache was opened."""
        if self._weight_states() != self._states:
            raise ValueError(
                "model: expected the weights the cache was opened with, got changed ones; open"
                " another cache"
            )

    def close(self) -> None:
        """Give the model back the attention it had. May be called again."""
        if not self._is_closed:
            self._is_closed = True
            self._hook.remove()
            uninstall(self._model)

    def _weight_states(self) -> list[tuple[int, int]]:
        # Reading the values would take as long as the digest did. Tensors made in inference mode
        # keep no version; they cannot be written outside of it either.
        return [
            (weight.data_ptr(), -1 if weight.is_inference() else weight._version)
            for weight in self._weights
        ]

    def _before_forward(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        session = given.get("past_key_values")
        if not isinstance(session, WatchedSession) or session.served_model is not self:
            return
        for name in _BEYOND_TOKENS:
            if given.get(name) is not None:
                raise UnsupportedError(
                    f"{name}: expected input_ids alone with a session, got what tokens do not tell"
                )
        if given.get("input_ids") is None:
            raise ValueError("input_ids: expected the session's tokens, got None")
        session.check_step(given["input_ids"], given.get("position_ids"))
