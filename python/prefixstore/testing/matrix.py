"""Every state of every engine, codec and tier, each compared with the model alone."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from prefixstore.errors import ConfigError
from prefixstore.record_layout import LOSSLESS
from prefixstore.testing.adapter import Ability, Adapter, Answer, Tokens
from prefixstore.testing.cells import (
    Cell,
    describe_other_bits,
    describe_too_much_loss,
    describe_wrong_answer,
    describe_wrong_reuse,
    drift_of,
    find_divergence,
    measure_loss,
    reused_share,
)
from prefixstore.testing.plan import LOSS_LIMITS, Plan, Run, make_setup, plan_runs
from prefixstore.testing.reference import Reference
from prefixstore.testing.report import Report
from prefixstore.testing.stage import Asked, Stage
from prefixstore.testing.states import State

Advance = Callable[[str], None]
Outcome = list[tuple[State, list[Asked]]]


def check_engines(
    adapters: Sequence[Adapter],
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    plan: Plan | None = None,
    advance: Advance = lambda what: None,
) -> Report:
    """Check that greedy answers are the model's, however a prompt reaches it.

    Args:
        adapters: The engines.
        reference: The model alone; asked while no engine is open.
        prompts: Token ids; two or more, each of two blocks or more. The first `Plan.num_few` should
            be different in length.
        plan: What is checked.
        advance: Called with what comes next, `num_steps` times.

    Raises:
        ConfigError: If the prompts are too few or too short, or a setting is out of range.
    """
    plan = plan if plan is not None else Plan()
    tokens = [tuple(int(one) for one in prompt) for prompt in prompts]
    _check_prompts(tokens, plan)
    started = time.perf_counter()
    judge = _Judge(reference, plan)
    cells = []
    for run in plan_runs(adapters, plan, tokens):
        cells += _skipped(run)
        if run.states:
            outcome, faults = _run(run, plan, tokens, advance)
            cells += judge.cells(run, outcome)
            cells += _recount(run, faults)
    return Report(
        cells=tuple(cells),
        num_prompts=len(tokens),
        prompt_tokens=sum(map(len, tokens)),
        num_new=plan.num_new,
        block_size=plan.block_size,
        seconds=time.perf_counter() - started,
    )


def num_steps(adapters: Sequence[Adapter], plan: Plan, prompts: Sequence[Sequence[int]]) -> int:
    """How often `check_engines` calls `advance`."""
    tokens = [tuple(prompt) for prompt in prompts]
    return sum(len(run.states) for run in plan_runs(adapters, plan, tokens))


def _run(
    run: Run, plan: Plan, prompts: Sequence[Tokens], advance: Advance
) -> tuple[Outcome, list[str]]:
    """What was asked in each state, and what the engine says is wrong with itself."""
    with tempfile.TemporaryDirectory(prefix="kvkernels-check-") as folder:
        setup = make_setup(run, plan, prompts, Path(folder))
        with closing(Stage(run.adapter, setup, prompts, plan.num_few, plan.num_new)) as stage:
            outcome = []
            for state in run.states:
                advance(f"{run.adapter.name} {run.codec} {run.tier_name}: {state.name}")
                outcome.append((state, state.run(stage)))
            return outcome, stage.check()


class _Judge:
    """Compares what was asked with the model; remembers exact answers for those with loss."""

    def __init__(self, reference: Reference, plan: Plan) -> None:
        self._reference = reference
        self._plan = plan
        # By engine: of each prompt the first exact answer.
        self._exact: defaultdict[str, dict[Tokens, Answer]] = defaultdict(dict)

    def cells(self, run: Run, outcome: Outcome) -> Iterator[Cell]:
        for state, asked in outcome:
            if state.is_restored and run.codec not in LOSSLESS:
                yield self._lossy(run, state, asked)
            else:
                yield self._exact_cell(run, state, asked)

    def _exact_cell(self, run: Run, state: State, asked: Sequence[Asked]) -> Cell:
        limits = self._plan.limits
        exact = self._exact[run.adapter.name]
        is_bitwise = Ability.BITWISE in run.adapter.abilities
        faults, divergences, drifts = self._reached(state, asked), [], []
        for number, one in enumerate(asked):
            scores = self._reference.score(one.prompt, one.answer.tokens)
            faults += describe_wrong_answer(one, number, scores, limits)
            faults += describe_wrong_reuse(one, number)
            first = exact.setdefault(one.prompt, one.answer)
            if is_bitwise:
                faults += describe_other_bits(one, number, first)
            divergences.append(find_divergence(number, scores, limits))
            drifts.append(drift_of(one.answer, scores))
        known = [one for one in drifts if one is not None]
        return Cell(
            *(run.adapter.name, run.codec, run.tier_name, state.name, len(asked)),
            num_equal=divergences.count(None),
            divergences=tuple(one for one in divergences if one is not None),
            reused_share=reused_share(asked),
            max_drift=max(known, default=None),
            is_bitwise=is_bitwise,
            faults=tuple(faults),
        )

    def _lossy(self, run: Run, state: State, asked: Sequence[Asked]) -> Cell:
        exact = self._exact[run.adapter.name]
        scores = [self._reference.score(one.prompt, one.answer.tokens) for one in asked]
        loss = measure_loss(asked, exact, scores)
        faults = self._reached(state, asked)
        limits = self._plan.limits, LOSS_LIMITS[run.codec]
        for number, (one, own) in enumerate(zip(asked, scores, strict=True)):
            faults += describe_too_much_loss(one, number, own, *limits)
            faults += describe_wrong_reuse(one, number)
        return Cell(
            *(run.adapter.name, run.codec, run.tier_name, state.name, len(asked)),
            num_equal=sum(one == loss.num_new for one in loss.positions),
            reused_share=reused_share(asked),
            loss=loss,
            faults=tuple(faults),
        )

    @staticmethod
    def _reached(state: State, asked: Sequence[Asked]) -> list[str]:
        """A line if a state was not what it is called, and so shows nothing."""
        missed = state.missed(asked)
        return [f"expected the state {state.name!r}, but {missed}"] if missed else []


def _skipped(run: Run) -> list[Cell]:
    return [
        Cell(run.adapter.name, run.codec, run.tier_name, state, skipped=why)
        for state, why in run.skipped.items()
    ]


def _recount(run: Run, faults: Sequence[str]) -> list[Cell]:
    """A cell for what an engine found wrong with itself."""
    if not faults:
        return []
    state = f"recount, {run.opening.value}"
    return [Cell(run.adapter.name, run.codec, run.tier_name, state, faults=tuple(faults))]


def _check_prompts(prompts: Sequence[Tokens], plan: Plan) -> None:
    if len(prompts) < 2:
        raise ConfigError(f"prompts: expected 2 or more, got {len(prompts)}")
    shortest = min(map(len, prompts))
    if shortest < 2 * plan.block_size:
        raise ConfigError(
            f"prompts: expected {2 * plan.block_size} tokens or more in each, got {shortest}"
        )
