"""How fast tiers give records and the model computes, learnt from what requests measured.

Nothing here is thread-safe (`Planner` holds one lock around all of it), and nothing reads a clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from prefixstore.planner.log_fit import LogFit

# A tier nobody has asked yet: a good network or a plain disk. A wrong guess costs little either
# way: one that is too high is found out by the first load, which is given up in time, one that is
# too low by the first probe, which nobody waits for (see planner.py).
PRIOR_LATENCY_S = 1e-3
PRIOR_BYTES_PER_S = 1e9
PRIOR_SPREAD = 0.5
# A model nobody has run yet: 5,000 tokens a second, 2 ms for a pass of any length, and attention
# that costs as much as all else at 16k tokens of context (between a model of 0.1 G and one of 8 G
# parameters). One cold prompt replaces it.
PRIOR_PASS_S = 2e-3
PRIOR_TOKEN_S = 2e-4
PRIOR_PAIR_S = PRIOR_TOKEN_S / 16384

# A prediction of the model's time is a guess where its logarithm has more than this standard
# deviation: after a cold prompt it is about 0.1, before one 1.5.
_GUESS_DOUBT = 0.5
_PLAUSIBLE_DOUBTS = 2.0  # standard deviations within which a guess is right

# Growth of a tier's variance (of logarithms): after a minute little is remembered.
_AGING_PER_S = 0.01
_SPREAD_WEIGHT = 0.2
# Calls of a tier nobody has asked yet share one link.
PRIOR_SHARING = 1.0
PRIOR_SHARING_DOUBT = 1.0
_SLOWDOWN_WEIGHT = 0.2
_MAX_SLOWDOWN = 4.0
_SLOWDOWN_ACCIDENT = 1.5  # a single pass this many times slower than predicted may be an accident
_SLOWDOWN_MEMORY_S = 1200.0


@dataclass(frozen=True)
class TierEstimate:
    """How fast a tier is.

    Attributes:
        latency_s: Of a call, however small.
        bytes_per_s: Beyond it.
        spread: Usual relative error of a prediction: 0.1 for 10 %.
        sharing: Beside `n` other calls one takes `1 + sharing * n` times as long.
        sharing_doubt: Standard deviation of its logarithm.
        num_calls: Measured so far; 0 for a guess.
        num_records: In them.
        num_bytes: In them.
        observed_at: When the last one was measured, on the caller's clock; None if never.
    """

    latency_s: float = PRIOR_LATENCY_S
    bytes_per_s: float = PRIOR_BYTES_PER_S
    spread: float = PRIOR_SPREAD
    sharing: float = PRIOR_SHARING
    sharing_doubt: float = PRIOR_SHARING_DOUBT
    num_calls: int = 0
    num_records: int = 0
    num_bytes: int = 0
    observed_at: float | None = None

    def seconds(self, num_bytes: float) -> float:
        """Of one call for so many bytes."""
        return self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True)
class PrefillEstimate:
    """How long the model computes: `pass_s + token_s * n + pair_s * n * (context + n / 2)`.

    Attributes:
        pass_s: Of a forward pass, however short.
        token_s: Of a new token: the model's weights.
        pair_s: Of a new token and a token before it: attention.
        spread: Usual relative error of a prediction.
        num_passes: Measured so far; 0 for a guess.
    """

    pass_s: float = PRIOR_PASS_S
    token_s: float = PRIOR_TOKEN_S
    pair_s: float = PRIOR_PAIR_S
    spread: float = PRIOR_SPREAD
    num_passes: int = 0

    def seconds(self, num_new: int, context: int, chunk_tokens: int) -> float:
        """To compute `num_new` tokens after `context` others, `chunk_tokens` in a pass.

        The sum over passes in closed form: the pairs of all chunks together are those of one pass.
        """
        num_passes = -(-num_new // chunk_tokens)
        pairs = num_new * (context + num_new / 2)
        return self.pass_s * num_passes + self.token_s * num_new + self.pair_s * pairs

    def slowed(self, factor: float) -> PrefillEstimate:
        """The same of a model that takes so many times as long."""
        return replace(
            self,
            pass_s=self.pass_s * factor,
            token_s=self.token_s * factor,
            pair_s=self.pair_s * factor,
        )


class TierRate:
    """Latency and bandwidth of one tier, told apart by calls of different sizes.

    Each call counts for about a third of what is known, and that ages while no call is made.
    """

    def __init__(self) -> None:
        self._fit = LogFit(
            (PRIOR_LATENCY_S, 1 / PRIOR_BYTES_PER_S, PRIOR_SHARING),
            prior_spread=(2.0, 2.0, PRIOR_SHARING_DOUBT),
            noise=0.25,
            drift=0.1,
            terms=((0,), (1,), (0, 2), (1, 2)),
            most=(math.inf, math.inf, 1.0),
        )
        self._spread = PRIOR_SPREAD
        self._num_calls = self._num_records = self._num_bytes = 0
        self._observed_at: float | None = None

    def observe(
        self,
        num_bytes: int,
        seconds: float,
        num_records: int,
        now: float,
        num_beside: float = 0.0,
    ) -> None:
        """A call gave so many bytes in so many seconds, beside so many others on average.

        Raises:
            ValueError: If one of the first three is not above 0, or `num_beside` is negative.
        """
        _check_positive("num_bytes", num_bytes)
        _check_positive("seconds", seconds)
        _check_positive("num_records", num_records)
        _check_not_negative("num_beside", num_beside)
        if self._observed_at is not None:
            self._fit.age(_AGING_PER_S * max(0.0, now - self._observed_at))
        surprise = self._fit.observe(_tier_features(num_bytes, num_beside), seconds)
        if self._num_calls:  # the first call only says how wrong the prior was
            self._spread = _blend_spread(self._spread, surprise)
        self._observed_at = now
        self._num_calls += 1
        self._num_records += num_records
        self._num_bytes += num_bytes

    def observe_given_up(
        self, num_bytes: int, seconds: float, now: float, num_beside: float = 0.0
    ) -> None:
        """A call had not given so many bytes after so many seconds, when nobody wanted them more.

        It says nothing where as much was expected. Else, of what has lasted so long for no known
        reason, it is a fair guess that it lasts as long again.

        Raises:
            ValueError: If one of the first two is not above 0, or `num_beside` is negative.
        """
        _check_positive("num_bytes", num_bytes)
        _check_positive("seconds", seconds)
        _check_not_negative("num_beside", num_beside)
        features = _tier_features(num_bytes, num_beside)
        if seconds > self._fit.predict(features):
            self._spread = _blend_spread(self._spread, self._fit.observe(features, 2 * seconds))
        self._observed_at = now

    def snapshot(self) -> TierEstimate:
        """What is believed of the tier now."""
        latency_s, byte_s, sharing = self._fit.coefficients.tolist()
        return TierEstimate(
            latency_s=latency_s,
            bytes_per_s=1 / byte_s,
            spread=self._spread,
            sharing=sharing,
            sharing_doubt=float(self._fit.doubts[2]),
            num_calls=self._num_calls,
            num_records=self._num_records,
            num_bytes=self._num_bytes,
            observed_at=self._observed_at,
        )


class PrefillRate:
    """Seconds of the model's forward passes."""

    def __init__(self) -> None:
        self._fit = LogFit(
            (PRIOR_PASS_S, PRIOR_TOKEN_S, PRIOR_PAIR_S),
            prior_spread=(1.5, 1.5, 1.5),
            noise=0.1,
            drift=0.02,
        )
        self._spread = PRIOR_SPREAD
        self._num_passes = 0

    def observe(self, num_new: int, context: int, seconds: float) -> None:
        """One pass computed `num_new` tokens after `context` others.

        Raises:
            ValueError: If `num_new` or `seconds` is not above 0, or `context` negative.
        """
        _check_positive("num_new", num_new)
        _check_positive("seconds", seconds)
        _check_not_negative("context", context)
        surprise = self._fit.observe(_prefill_features(num_new, context), seconds)
        if self._num_passes:
            self._spread = _blend_spread(self._spread, surprise)
        self._num_passes += 1

    def snapshot(self) -> PrefillEstimate:
        """What is believed of the model now."""
        pass_s, token_s, pair_s = self._fit.coefficients.tolist()
        return PrefillEstimate(pass_s, token_s, pair_s, self._spread, self._num_passes)

    def slowest(self, num_new: int, context: int) -> PrefillEstimate:
        """As slow a model as is plausible, where too little was measured to predict such a pass.

        A few passes over short prompts say next to nothing of a long one.
        """
        doubt = self._fit.doubt(_prefill_features(num_new, context))
        factor = math.exp(_PLAUSIBLE_DOUBTS * doubt) if doubt > _GUESS_DOUBT else 1.0
        return self.snapshot().slowed(factor)


class Slowdown:
    """How many times longer computing takes while records are loaded.

    On a CPU, decoding records takes cores and memory bandwidth from the model; on a GPU nearly
    nothing is lost. Loading is taken to suffer as much as computing does.

    From 2 on no plan does both, so nothing is measured that could bring it down again. That time
    does, and both is tried again.
    """

    def __init__(self, prior: float = 1.1) -> None:
        self._prior_log = self._log = math.log(prior)
        self._was_accident = False
        self._aged_at: float | None = None

    @property
    def factor(self) -> float:
        """How many times as long a pass takes beside a load as alone."""
        return math.exp(self._log)

    def observe(self, alone_s: float, beside_s: float) -> None:
        """A pass that takes `alone_s` by itself, as predicted, took `beside_s` beside a load."""
        log = min(max(math.log(beside_s / alone_s), 0.0), math.log(_MAX_SLOWDOWN))
        is_accident = log - self._log > math.log(_SLOWDOWN_ACCIDENT)
        if not is_accident or self._was_accident:  # two in a row are a change
            self._log += _SLOWDOWN_WEIGHT * (log - self._log)
        self._was_accident = is_accident

    def age(self, now: float) -> None:
        """What is known counts less, and the guess more, with the time since the last call."""
        if self._aged_at is not None:
            kept = math.exp(-max(0.0, now - self._aged_at) / _SLOWDOWN_MEMORY_S)
            self._log = self._prior_log + kept * (self._log - self._prior_log)
        self._aged_at = now


def _tier_features(num_bytes: int, num_beside: float) -> np.ndarray:
    return np.array([1.0, num_bytes, num_beside, num_beside * num_bytes])


def _prefill_features(num_new: int, context: int) -> np.ndarray:
    return np.array([1.0, num_new, num_new * (context + num_new / 2)])


def _blend_spread(spread: float, surprise: float) -> float:
    # at most 1: a single stall must not make every later deadline long
    return spread + _SPREAD_WEIGHT * (min(abs(surprise), 1.0) - spread)


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: expected more than 0, got {value}")


def _check_not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name}: expected 0 or more, got {value}")
