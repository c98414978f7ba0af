"""What became of one state: are its answers the model's, and was it reached at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prefixstore.testing.adapter import DEVICE, Answer, Tokens
from prefixstore.testing.reference import Scores
from prefixstore.testing.stage import Asked


@dataclass(frozen=True)
class Limits:
    """How far rounding may go: a cache cuts the sums of a forward pass differently.

    Attributes:
        tie: Logits that lie so close are equal: either token is greedy.
        drift: Of a token's log-probability.
    """

    tie: float
    drift: float


@dataclass(frozen=True)
class LossLimits:
    """How far a lossy codec may move answers, on top of rounding.

    Attributes:
        drift: Of the log-probabilities of an answer's tokens, on average; and by how much the model
            may prefer others.
        kl: From the model's own distribution of the first token, in nats.
    """

    drift: float
    kl: float


@dataclass(frozen=True)
class Divergence:
    """The first token of an answer that is not the one it is compared with.

    Attributes:
        prompt: Its number.
        position: Of the token in the answer.
        gap: By how much the model prefers another; None if it was not asked.
        is_tie: Whether that is rounding.
    """

    prompt: int
    position: int
    gap: float | None = None
    is_tie: bool = False


@dataclass(frozen=True)
class Loss:
    """What a lossy codec did to answers, beside those computed without it.

    Attributes:
        positions: For each prompt, equal tokens at the answer's beginning; `num_new` for all.
        num_new: Tokens of an answer.
        max_abs, mean_abs: Distance of the logits of the first token, over prompts and vocabulary;
            None where the engine gives no logits.
        kl: From the model's own distribution to that one, in nats, the mean of the prompts.
        drift: Distance of the log-probabilities of an answer's tokens from the model's, their mean,
            of that answer for which it is largest; None where the engine gives none.
    """

    positions: tuple[int, ...]
    num_new: int
    max_abs: float | None = None
    mean_abs: float | None = None
    kl: float | None = None
    drift: float | None = None

    @property
    def equal_share(self) -> float:
        return sum(one == self.num_new for one in self.positions) / len(self.positions)

    @property
    def median(self) -> float:
        return float(np.median(self.positions))

    @property
    def p10(self) -> float:
        return float(np.quantile(self.positions, 0.1, method="lower"))


@dataclass(frozen=True)
class Cell:
    """One state of one engine, codec and tier.

    Attributes:
        adapter: The engine's name.
        codec: Of the tier's records.
        tier: Its name.
        state: Its name.
        num_answers: Compared.
        num_equal: Of them equal, token for token; after a lossy codec, to those without it.
        divergences: Of the others, where answers must be exact.
        reused_share: Of the prompts' tokens; None if not known.
        max_drift: Largest distance of a token's log-probability from the model's; None if not known
            or not to be exact.
        loss: Where a lossy codec had a part in the answers.
        is_bitwise: Whether every answer had to be, bit for bit, the first one to its prompt.
        faults: What is wrong, a line each.
        skipped: Why it was not run; empty if it was.
    """

    adapter: str
    codec: str
    tier: str
    state: str
    num_answers: int = 0
    num_equal: int = 0
    divergences: tuple[Divergence, ...] = ()
    reused_share: float | None = None
    max_drift: float | None = None
    loss: Loss | None = None
    is_bitwise: bool = False
    faults: tuple[str, ...] = ()
    skipped: str = ""


def find_divergence(number: int, scores: Scores, limits: Limits) -> Divergence | None:
    """Where an answer leaves the greedy one: first where it must not, else at the first tie."""
    wrong = np.flatnonzero(~(scores.gaps <= limits.tie))  # NaN is in no limit
    tied = np.flatnonzero(scores.gaps > 0)
    if len(wrong):
        at = int(wrong[0])
        return Divergence(number, at, float(scores.gaps[at]))
    if len(tied):
        at = int(tied[0])
        return Divergence(number, at, float(scores.gaps[at]), is_tie=True)
    return None


def drift_of(answer: Answer, scores: Scores) -> float | None:
    """Largest distance of a log-probability from the model's; None if it is not known."""
    drifts = _drifts(answer, scores)
    return None if drifts is None else float(drifts.max())


def describe_no_numbers(answer: Answer, number: int, scores: Scores) -> list[str]:
    """A line for each thing that is missing or not finite, and so cannot be compared."""
    faults, num_new = [], len(answer.tokens)
    # A token that is ruled out has a logit of -inf, and may have it.
    is_known = np.isfinite(scores.first_logits.max())
    if not is_known or np.isnan(scores.gaps).any() or np.isnan(scores.logprobs).any():
        faults.append(f"prompt {number}: expected numbers of the model alone, got NaN or infinity")
    if answer.logprobs and len(answer.logprobs) != num_new:
        faults.append(
            f"prompt {number}: expected {num_new} log-probabilities, got {len(answer.logprobs)}"
        )
    elif not np.isfinite(answer.logprobs).all():
        faults.append(f"prompt {number}: expected finite log-probabilities, got {answer.logprobs}")
    first = answer.first_logits
    if first is not None and first.shape != scores.first_logits.shape:
        faults.append(
            f"prompt {number}: expected logits of shape {scores.first_logits.shape}, got"
            f" {first.shape}"
        )
    elif first is not None and not np.isfinite(first.max()):
        faults.append(f"prompt {number}: expected finite logits, got a largest of {first.max()}")
    return faults


def describe_wrong_answer(asked: Asked, number: int, scores: Scores, limits: Limits) -> list[str]:
    """A line for each way in which an answer is not the model's."""
    faults = describe_no_numbers(asked.answer, number, scores)
    if faults:
        return faults
    divergence = find_divergence(number, scores, limits)
    if divergence is not None and not divergence.is_tie:
        faults.append(
            f"prompt {number}: expected the greedy token at {divergence.position} of the answer,"
            f" got one whose logit is {divergence.gap:.2g} lower"
        )
    drift = drift_of(asked.answer, scores)
    if drift is not None and not drift <= limits.drift:
        faults.append(
            f"prompt {number}: expected log-probabilities within {limits.drift:g} of the model's,"
            f" got one {drift:.2g} off"
        )
    return faults


def describe_too_much_loss(
    asked: Asked, number: int, scores: Scores, limits: Limits, loss: LossLimits
) -> list[str]:
    """A line for each way in which an answer is further from the model's than a codec may move it.

    Whatever the engine tells: of tokens alone the model says how much it prefers others.
    """
    faults = describe_no_numbers(asked.answer, number, scores)
    if faults:
        return faults
    most, gap, drifts = limits.drift + loss.drift, scores.gaps.mean(), _drifts(asked.answer, scores)
    if not gap <= most:
        faults.append(
            f"prompt {number}: expected tokens whose logits are at most {most:g} below the greedy"
            f" ones' on average, got {gap:.2g}"
        )
    if drifts is not None and not drifts.mean() <= most:
        faults.append(
            f"prompt {number}: expected log-probabilities within {most:g} of the model's on"
            f" average, got {drifts.mean():.2g}"
        )
    if asked.answer.first_logits is not None:
        # To first order KL is half the mean square of what log-probabilities are moved by.
        most = limits.drift**2 + loss.kl
        kl = _kl(scores.first_logits, asked.answer.first_logits)
        if not kl <= most:
            faults.append(
                f"prompt {number}: expected a first token within {most:g} nats of the model's"
                f" distribution, got {kl:.2g}"
            )
    return faults


def describe_wrong_reuse(asked: Asked, number: int) -> list[str]:
    """A line for each way in which a prompt was reused as it should not have been."""
    answer, faults = asked.answer, []
    if answer.reused is None:
        return []
    reused, on_device = sum(answer.reused.values()), answer.reused.get(DEVICE, 0)
    if reused + answer.num_declined < asked.at_least:
        faults.append(
            f"prompt {number}: expected {asked.at_least} tokens to be reused, got {reused}"
        )
    if reused > asked.at_most:
        faults.append(
            f"prompt {number}: expected at most {asked.at_most} tokens to be known, got {reused}"
            " reused"
        )
    if on_device > asked.at_most_device:
        faults.append(
            f"prompt {number}: expected at most {asked.at_most_device} tokens on the device, got"
            f" {on_device}"
        )
    return faults


def describe_other_bits(asked: Asked, number: int, first: Answer) -> list[str]:
    """A line if an answer is not, bit for bit, the first one to its prompt."""
    answer = asked.answer
    if (answer.tokens, answer.logprobs) == (first.tokens, first.logprobs):
        return []
    return [f"prompt {number}: expected the bits of the cold answer, got others"]


def reused_share(asked: Sequence[Asked]) -> float | None:
    """Of all prompts' tokens; None if somebody does not know."""
    reused: list[Mapping[str, int]] = [
        one.answer.reused for one in asked if one.answer.reused is not None
    ]
    if len(reused) < len(asked):
        return None
    return sum(sum(one.values()) for one in reused) / sum(len(one.prompt) for one in asked)


def measure_loss(
    asked: Sequence[Asked], exact: Mapping[Tokens, Answer], scores: Sequence[Scores]
) -> Loss:
    """How far answers are from those without loss.

    Args:
        asked: With a lossy codec.
        exact: The answers without, by prompt.
        scores: What the model says of each of `asked`.
    """
    positions = tuple(_num_equal(one.answer.tokens, exact[one.prompt].tokens) for one in asked)
    num_new = len(asked[0].answer.tokens)
    pairs = [
        (one.answer.first_logits, own.first_logits)
        for one, own in zip(asked, scores, strict=True)
        if one.answer.first_logits is not None
        and one.answer.first_logits.shape == own.first_logits.shape
    ]
    drifts = [_drifts(one.answer, own) for one, own in zip(asked, scores, strict=True)]
    drift = max((float(one.mean()) for one in drifts if one is not None), default=None)
    if not pairs:
        return Loss(positions, num_new, drift=drift)
    distances = [_distances(got, own) for got, own in pairs]
    return Loss(
        positions,
        num_new,
        drift=drift,
        max_abs=float(max(one.max() for one in distances)),
        mean_abs=float(np.mean([one.mean() for one in distances])),
        kl=float(np.mean([_kl(own, got) for got, own in pairs])),
    )


def _num_equal(left: Tokens, right: Tokens) -> int:
    pairs = zip(left, right, strict=True)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), len(left))


def _drifts(answer: Answer, scores: Scores) -> np.ndarray | None:
    """Distance of each token's log-probability from the model's."""
    if len(answer.logprobs) != len(scores.logprobs):
        return None
    return np.abs(np.array(answer.logprobs) - scores.logprobs)


def _distances(got: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Of logits, but of tokens that the model rules out."""
    is_possible = own > -np.inf
    return np.abs(got[is_possible] - own[is_possible])


def _kl(own: np.ndarray, other: np.ndarray) -> float:
    is_possible = own > -np.inf  # what has no probability adds nothing
    own_log, other_log = _log_softmax(own)[is_possible], _log_softmax(other)[is_possible]
    return float((np.exp(own_log) * (own_log - other_log)).sum())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
