"""Learns positive coefficients of a sum from measured totals, one measurement at a time.

    seconds = exp(p[0]) * features[0] + exp(p[1]) * features[1] + ...

where a term may also be a product of several coefficients and its feature. An extended Kalman
filter over the logarithms `p`: coefficients stay positive, errors are relative (10 % of a
millisecond counts like 10 % of a second), and what the measurements do not tell apart keeps its
value: a hundred short calls do not wipe out what was learnt of long ones, as they would in least
squares with forgetting.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

# Chi-square of a measurement. Above the first bound it may be an accident; above the second, if the
# measurement before was no better, things have changed.
_ACCIDENT = 4.0
_CHANGE = 9.0
_NUM_ITERATIONS = 6  # a surprise of a factor of ten needs about three
_LEAST_STEP = 1e-3


class LogFit:
    """Coefficients and how sure they are. Not thread-safe.

    Args:
        prior: Coefficients before the first measurement, all above 0.
        prior_spread: Their standard deviations, of logarithms; also the most that these grow to.
        noise: Standard deviation of one measurement's logarithm.
        drift: How far the logarithms wander between two measurements, standard deviation.
        terms: Which coefficients each feature is multiplied with; None for one each, in order.
        most: That each coefficient can be; None for no limit.
    """

    def __init__(
        self,
        prior: Sequence[float],
        *,
        prior_spread: Sequence[float],
        noise: float,
        drift: float,
        terms: Sequence[Sequence[int]] | None = None,
        most: Sequence[float] | None = None,
    ) -> None:
        self._logs = np.log(np.asarray(prior, dtype=np.float64))
        self._max_variance = np.square(np.asarray(prior_spread, dtype=np.float64))
        self._covariance = np.diag(self._max_variance)
        self._exponents = np.eye(len(prior))  # [num_features, num_coefficients]
        if terms is not None:
            self._exponents = np.zeros((len(terms), len(prior)))
            for number, term in enumerate(terms):
                self._exponents[number, list(term)] = 1.0
        self._most = np.log(np.full(len(prior), np.inf) if most is None else np.asarray(most))
        self._noise = noise**2
        self._drift = drift**2
        self._last_surprise = 0.0
        self._num_observed = 0

    @property
    def coefficients(self) -> np.ndarray:
        """`[num_coefficients]` float64."""
        return np.exp(self._logs)

    @property
    def doubts(self) -> np.ndarray:
        """Standard deviations of their logarithms, `[num_coefficients]` float64."""
        return np.sqrt(self._covariance.diagonal())

    def predict(self, features: np.ndarray) -> float:
        """The total for `features`, `[num_features]` float64."""
        return float(self._parts(self._logs, features).sum())

    def doubt(self, features: np.ndarray) -> float:
        """Standard deviation of the logarithm of the total for `features`, as far as is known."""
        gradient = self._gradient(self._parts(self._logs, features))
        return math.sqrt(float(gradient @ self._covariance @ gradient))

    def age(self, variance: float) -> None:
        """Be less sure: time went by."""
        self._grow(variance)

    def observe(self, features: np.ndarray, seconds: float) -> float:
        """Learn from one measurement.

        What took far longer than is plausible may be an accident (a busy machine), so the first
        such surprise counts as a measurement with that much noise. A second one on the same side is
        a change, and makes what was known before count less. Nothing is faster by accident.

        Args:
            features: `[num_features]` float64, 0 or more; some above 0.
            seconds: The measured total, above 0.

        Returns:
            The logarithm of measured over predicted seconds.
        """
        surprise = math.log(seconds / self.predict(features))
        noise = self._noise
        step, implausible = self._explain(features, seconds, noise)
        if implausible <= _ACCIDENT:
            self._last_surprise = 0.0
        else:
            is_repeated = surprise * self._last_surprise > 0
            self._last_surprise = surprise
            if is_repeated and implausible > _CHANGE:
                self._grow(surprise**2)
                step, _ = self._explain(features, seconds, noise)
            elif surprise > 0 and not is_repeated and self._num_observed:
                noise = surprise**2
                step, _ = self._explain(features, seconds, noise)
        self._move(features, step, noise)
        self._grow(self._drift)
        self._num_observed += 1
        return surprise

    def _explain(
        self, features: np.ndarray, seconds: float, noise: float
    ) -> tuple[np.ndarray, float]:
        """The most likely change of the logarithms, and how implausible it is.

        Gauss-Newton steps, halved where they overshoot. The sum's logarithm is not linear and a
        coefficient that mattered little so far has next to no gradient, so they begin where the
        change of one coefficient alone would explain most, if that is better than no change.

        Returns:
            The change, `[num_features]`, and a chi-square: about 1 for what happens all the time.
        """
        # The change is `root @ z`, where z is a priori independent with variance 1.
        root = np.linalg.cholesky(self._covariance)
        log_seconds = math.log(seconds)

        def look(z: np.ndarray) -> tuple[float, np.ndarray, float]:
            """How implausible; the gradient of the total's logarithm; what is missing."""
            parts = self._parts(self._logs + root @ z, features)
            error = log_seconds - math.log(parts.sum())
            return float(z @ z + error**2 / noise), root.T @ self._gradient(parts), error

        z = min(self._starts(root, features, seconds), key=lambda z: look(z)[0])
        cost, gradient, error = look(z)
        for _ in range(_NUM_ITERATIONS):
            step = gradient * ((error + gradient @ z) / (gradient @ gradient + noise)) - z
            while (there := look(z + step))[0] > cost and np.abs(step).max() > _LEAST_STEP:
                step = step / 2
            z = z + step
            cost, gradient, error = there
        return root @ z, cost

    def _starts(
        self, root: np.ndarray, features: np.ndarray, seconds: float
    ) -> Iterator[np.ndarray]:
        """No change, and for each coefficient what it would have to be if it alone were wrong."""
        yield np.zeros(len(root))
        parts = self._parts(self._logs, features)
        own = parts @ self._exponents  # of the terms that each coefficient is in
        needed = seconds - (parts.sum() - own)
        for j in np.flatnonzero((needed > 0) & (own > 0)):
            yield root[j] * (math.log(needed[j] / own[j]) / self._covariance[j, j])

    def _move(self, features: np.ndarray, step: np.ndarray, noise: float) -> None:
        self._logs = np.minimum(self._logs + step, self._most)
        gradient = self._gradient(self._parts(self._logs, features))
        spread = self._covariance @ gradient
        self._covariance = self._covariance - np.outer(spread, spread) / (gradient @ spread + noise)

    def _grow(self, variance: float) -> None:
        grown = self._covariance + np.eye(len(self._logs)) * variance
        shrink = np.sqrt(np.minimum(1.0, self._max_variance / grown.diagonal()))
        self._covariance = grown * np.outer(shrink, shrink)

    def _parts(self, logs: np.ndarray, features: np.ndarray) -> np.ndarray:
        """The terms of the sum, `[num_features]`."""
        return np.exp(self._exponents @ logs) * features

    def _gradient(self, parts: np.ndarray) -> np.ndarray:
        """Of the sum's logarithm by those of the coefficients, `[num_coefficients]`."""
        return parts @ self._exponents / parts.sum()
