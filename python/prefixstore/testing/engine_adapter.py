"""`Engine`, as an engine to be tested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvkernels.nn import batch_invariance
from prefixstore.errors import EngineError
from prefixstore.reuse_report import MissReason
from prefixstore.testing.adapter import Ability, Answer, Setup, Tokens
from prefixstore.testing.cache_adapter import cache_config, flush

if TYPE_CHECKING:
    from prefixstore.engine import Engine, RequestOutput

_DECLINED = (MissReason.LATE, MissReason.CHEAPER, MissReason.UNREACHABLE, MissReason.NO_ROOM)


class EngineAdapter:
    """All prompts at once through `Engine`, whose planner is told to load what tiers hold.

    Args:
        model: A Hugging Face causal language model, in evaluation mode.
        tokenizer: Its tokenizer.
        batch_invariant: See `EngineConfig`; where it holds, answers are compared bit for bit.

    Raises:
        UnsupportedError: If `batch_invariant` is True and cannot be promised for the model.
    """

    name = "engine"

    def __init__(self, model: Any, tokenizer: Any, *, batch_invariant: bool | None = None) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._batch_invariant = _can_be_invariant(model, batch_invariant)
        self.abilities = frozenset({Ability.BATCHES, Ability.PREEMPTS, Ability.CHUNKS})
        if self._batch_invariant:
            self.abilities |= {Ability.BITWISE}

    def open(self, setup: Setup) -> EngineSubject:
        # It brings transformers, which a command's --help does without.
        from prefixstore.engine import Engine, EngineConfig

        config = EngineConfig(
            max_running=setup.max_running,
            max_batch_tokens=setup.max_batch_tokens,
            batch_invariant=self._batch_invariant,
            restore_policy="load",
            audit_share=0.0,  # an audit holds blocks that are to be evicted
        )
        return EngineSubject(Engine.open(self._model, self._tokenizer, config, cache_config(setup)))


class EngineSubject:
    """See `Subject`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def answer(self, prompts: Sequence[Tokens], num_new: int, salt: str) -> list[Answer]:
        from prefixstore.engine import SamplingParams

        sampling = SamplingParams(max_tokens=num_new, temperature=0, ignore_eos=True, logprobs=0)
        return [_answer(one) for one in self._engine.generate(prompts, sampling, salt=salt)]

    def flush(self) -> None:
        flush(self._engine.cache)

    def evict(self) -> None:
        self._engine.cache.evict_pool()

    def check(self) -> list[str]:
        return self._engine.check()

    def close(self) -> None:
        self._engine.close()


def _can_be_invariant(model: Any, wanted: bool | None) -> bool:
    """What an engine of this model will make of its setting."""
    from prefixstore.engine.runner import install_batch_invariance

    is_invariant = install_batch_invariance(model, wanted)
    if is_invariant:
        batch_invariance.uninstall(model)
    return is_invariant


def _answer(output: RequestOutput) -> Answer:
    if output.finish_reason.value != "length":
        raise EngineError(
            f"answer: expected one that ends by its length, got {output.finish_reason.value}:"
            f" {output.error}"
        )
    reuse = output.report.reuse
    return Answer(
        tokens=output.token_ids,
        logprobs=tuple(one.logprob for one in output.logprobs or ()),
        reused=reuse.tokens_by_tier,
        num_declined=sum(reuse.misses.get(reason.value, 0) for reason in _DECLINED),
        num_preemptions=output.report.num_preemptions,
    )
