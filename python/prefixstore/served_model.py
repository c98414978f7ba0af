"""The model a cache was opened for: set to the cache's attention, and watched."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from kvkernels.errors import UnsupportedError
from kvkernels.nn.transformers import install, uninstall
from prefixstore.errors import ModelChanged
from prefixstore.module_watch import ModuleWatch
from prefixstore.weight_watch import WeightWatch

# Arguments of a forward pass beside which the tokens tell the keys and values. All others might
# change them, so that one this list does not know is refused and never makes a wrong hit.
_TOLD_BY_TOKENS = frozenset(
    {
        "attention_mask",  # which may hide no token of a session
        "cache_position",
        "input_ids",
        "labels",
        "logits_to_keep",
        "num_logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_ids",  # which are compared
        "return_dict",
        "use_cache",
    }
)

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@runtime_checkable
class WatchedSession(Protocol):
    """What a forward pass tells the session it stores into."""

    served_model: ServedModel | None

    @property
    def has_run(self) -> bool:
        """Whether a forward pass has stored tokens into it."""

    def begin_prompt(self) -> None:
        """The next prompt to be checked is that of a new call of `generate`."""

    def check_prompt(self, token_ids: torch.Tensor, num_new: int) -> None:
        """Raise ValueError unless the session holds the tokens before the last `num_new`."""

    def check_step(self, token_ids: torch.Tensor, position_ids: torch.Tensor | None) -> None:
        """Raise ValueError unless the step continues the session's tokens where they stand."""

    def end_step(self) -> None:
        """The forward pass is over, finished or not."""


class ServedModel:
    """Sees to it that blocks hold the KV of the tokens they are filed under.

    A forward pass with one of the cache's sessions must run on the session's own tokens, at their
    own positions, and on the weights whose digest is part of every block's identity. `generate`
    runs the model on those tokens alone that the session lacks: the ones before are compared too.
    A copy of the model, or what is pickled of it, is served no more.

    Args:
        model: A Hugging Face causal language model. Its attention is set to read the cache's
            pools until `close`.

    Raises:
        UnsupportedError: If its attention cannot be replaced, its positions do not count all
            tokens, or it is one of PEFT's around the model.
    """

    def __init__(self, model: Any) -> None:
        _refuse_wrappers(model)
        _refuse_skipped_tokens(model)
        install(model)
        self._model = model
        self._arguments = _positional_names(model.forward)
        self._watch = ModuleWatch(model)
        self._weights = WeightWatch(model)
        self._with_shift = [
            vars(module) for module in model.modules() if "rope_deltas" in vars(module)
        ]
        self._hooks = (
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        )
        self._is_closed = False
        if hasattr(model, "prepare_inputs_for_generation"):
            model.prepare_inputs_for_generation = _CheckedPrepare(
                self, model.prepare_inputs_for_generation
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_closed, ()  # the model's hooks and methods refer to it

    def check_weights(self) -> None:
        """Raise ValueError if the model computes something else than when the cache was opened."""
        self.check_weights_at_hand()
        self.check_weights_beyond()

    def check_weights_at_hand(self) -> None:
        """The part of `check_weights` that does not wait for what is queued on a GPU."""
        self._check_modules()
        _refuse_change(self._weights.has_changed_at_hand())

    def check_weights_beyond(self) -> None:
        """The other part of `check_weights`: the values that lie on a GPU."""
        _refuse_change(self._weights.has_changed_beyond())

    def close(self) -> None:
        """Give the model back the attention it had. May be called again."""
        if not self._is_closed:
            self._is_closed = True
            for hook in self._hooks:
                hook.remove()
            _unwrap_prepare(self._model)
            uninstall(self._model)

    @property
    def is_closed(self) -> bool:
        """Whether the model is watched no more."""
        return self._is_closed

    def check_prompt(self, token_ids: torch.Tensor, inputs: dict[str, Any]) -> None:
        """Raise ValueError unless `generate` was given the tokens its session holds.

        Args:
            token_ids: `[1, num_tokens]`: the prompt, and what was generated so far. The model
                will be run on the last of them.
            inputs: What else the model is about to get.
        """
        session = self._session_of(inputs)
        if session is None or self._is_closed:
            return
        if inputs.get("is_first_iteration"):  # only transformers 5 says so
            session.begin_prompt()
        num_new = inputs.get("next_sequence_length")  # transformers 5; None: nothing is left out
        if inputs.get("cache_position") is not None:  # 4.57
            num_new = len(inputs["cache_position"])
        session.check_prompt(token_ids, token_ids.shape[-1] if num_new is None else num_new)

    def _check_modules(self) -> None:
        change = self._watch.change()
        if change is not None:
            raise ModelChanged(f"model: {change}; open another cache")

    def _check_shifts(self) -> None:
        """Models for pictures count on from the last one, in a pass that gives no positions."""
        for fields in self._with_shift:
            shift = fields["rope_deltas"]
            if shift is not None and bool(shift.any()):
                raise ValueError(
                    "position_ids: expected positions of a model whose rope_deltas are those of a"
                    " picture, got none; pass them, or set its rope_deltas to None"
                )

    def _session_of(self, given: dict[str, Any]) -> WatchedSession | None:
        session = given.get("past_key_values")
        if isinstance(session, WatchedSession) and session.served_model is self:
            return session
        return None

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a forward pass was given, by name."""
        return dict(zip(self._arguments, args, strict=False)) | kwargs

    @torch.compiler.disable  # which would have to compile what learns of the pass's time
    def _after_forward(
        self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        session = self._session_of(self._named(args, kwargs))
        if session is not None:
            session.end_step()

    @torch.compiler.disable  # which would have to compile a look at every module
    def _before_forward(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._named(args, kwargs)
        session = self._session_of(given)
        if session is None:
            return
        if len(args) > len(self._arguments):
            raise UnsupportedError(
                f"forward: expected arguments by name with a session, got {len(args)} without"
            )
        for name, value in given.items():
            if name not in _TOLD_BY_TOKENS and not _is_nothing(value):
                raise UnsupportedError(
                    f"{name}: expected input_ids alone with a session, got what tokens do not tell"
                )
        if given.get("input_ids") is None:
            raise ValueError("input_ids: expected the session's tokens, got None")
        # In each pass, since what is changed for one call of `generate` is undone before `commit`.
        if session.has_run and given["input_ids"].shape[-1] == 1:
            self._check_modules()  # to compare weights would make small models 3 % slower
        else:
            self.check_weights_at_hand()
        if given.get("position_ids") is None:
            self._check_shifts()
        session.check_step(given["input_ids"], given.get("position_ids"))


class _CheckedPrepare:
    """A model's `prepare_inputs_for_generation`, which sees all tokens before the model sees some.

    `generate` calls it before each forward pass. A class, not a closure: a model may be copied or
    pickled while it is served.
    """

    def __init__(self, served_model: ServedModel, prepare: Callable[..., Any]) -> None:
        self.served_model = served_model
        self.prepare = prepare
        self.__signature__ = inspect.signature(prepare)  # which `generate` reads

    def __reduce__(self) -> tuple[Any, ...]:
        return _CheckedPrepare, (self.served_model, self.prepare)

    def __call__(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.served_model.check_prompt(input_ids, kwargs)
        return self.prepare(input_ids, *args, **kwargs)


def _make_closed() -> ServedModel:
    """One that no session knows."""
    served_model = ServedModel.__new__(ServedModel)
    served_model._is_closed, served_model._arguments = True, ()
    return served_model


def _is_nothing(value: Any) -> bool:
    """Whether an argument says nothing: a switch that is off, or a collection of none."""
    return (
        value is None or value is False or (isinstance(value, Mapping | list | tuple) and not value)
    )


def _positional_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Of the parameters that arguments without a name are for."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(one.name for one in parameters if one.kind in _POSITIONAL)


def _refuse_wrappers(model: Any) -> None:
    """PEFT's own models run the `generate`, or the forward, of the one they hold: past the hooks of
    theirs."""
    if any(hasattr(model, name) for name in ("get_base_model", "merge_and_unload")):
        raise UnsupportedError(
            "model: expected the model within PEFT's, which computes with the adapters, as given by"
            f" get_base_model(), got {type(model).__name__}"
        )


def _refuse_skipped_tokens(model: torch.nn.Module) -> None:
    """RoBERTa and its like give no position to tokens that are the padding token: where a token
    stands depends on which token that is, and on how many of those before are in the pass."""
    for module in model.modules():
        forward = inspect.unwrap(type(module).forward)
        code = getattr(forward, "__code__", None)
        is_embedding = isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag)
        if code is not None and not is_embedding and "padding_idx" in code.co_names:
            raise UnsupportedError(
                "model: expected positions that count every token, got"
                f" {type(module).__name__}, which skips padding tokens"
            )


def _unwrap_prepare(model: Any) -> None:
    """Take off what closed caches put around a model's method; they may close in any order."""
    name = "prepare_inputs_for_generation"
    while (found := vars(model).get(name)) is not None:
        if not isinstance(found, _CheckedPrepare) or not found.served_model.is_closed:
            return
        if getattr(found.prepare, "__func__", None) is getattr(type(model), name, None):
            delattr(model, name)
        else:
            setattr(model, name, found.prepare)


def _refuse_change(has_changed: bool) -> None:
    if has_changed:
        raise ModelChanged(
            "model: expected the weights the cache was opened with, got changed ones; open"
            " another cache"
        )
