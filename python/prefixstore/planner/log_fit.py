"""Learns positive coefficients of a sum from measured totals, one measurement at a time.

    seconds = exp(p[0]) * features[0] + exp(p[1]) * features[1] + ...

An extended Kalman filter over the logarithms `p`: coefficients stay positive, errors are relative
(10 % of a millisecond counts like 10 % of a second), and what the measurements do not tell apart
keeps its value: a hundred short calls do not wipe out what was learnt of long ones, as they would
in least squares with forgetting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_OUTLIER_SIGMAS = 3.0
_NUM_ITERATIONS = 4  # of the linearisation; a surprise of a factor of ten needs about three


class LogFit:
    """Coefficients and how sure they are. Not thread-safe.

    Args:
        prior: Coefficients before the first measurement, all above 0.
        prior_spread: Their standard deviation, of logarithms; also the most that it grows to.
        noise: Standard deviation of one measurement's logarithm.
        drift: How far the logarithms wander between two measurements, standard deviation.
    """

    def __init__(
        self, prior: Sequence[float], *, prior_spread: float, noise: float, drift: float
    ) -> None:
        self._logs = np.log(np.asarray(prior, dtype=np.float64))
        self._covariance = np.eye(len(prior)) * prior_spread**2
        self._max_variance = prior_spread**2
        self._noise = noise**2
        self._drift = drift**2
        self._last_surprise = 0.0

    @property
    def coefficients(self) -> np.ndarray:
        """`[num_features]` float64."""
        return np.exp(self._logs)

    def predict(self, features: np.ndarray) -> float:
        """The total for `features`, `[num_features]` float64."""
        return float(self.coefficients @ features)

    def age(self, variance: float) -> None:
        """Be less sure: time went by."""
        self._grow(variance)

    def observe(self, features: np.ndarray, seconds: float) -> float:
        """Learn from one measurement.

        One surprise is taken for an accident and moves the coefficients only as far as the largest
        plausible error; a second one on the same side is taken for a change and is believed.

        Args:
            features: `[num_features]` float64, not negative, not all 0.
            seconds: The measured total, above 0.

        Returns:
            The logarithm of measured over predicted seconds.
        """
        surprise = math.log(seconds / self.predict(features))
        limit = _OUTLIER_SIGMAS * self._deviation(features)
        believed = surprise
        if abs(surprise) > limit:
            if surprise * self._last_surprise > 0:
                self._grow(surprise**2)
            else:
                believed = math.copysign(limit, surprise)
            self._last_surprise = surprise
        else:
            self._last_surprise = 0.0
        self._update(features, math.log(self.predict(features)) + believed)
        self._grow(self._drift)
        return surprise

    def _update(self, features: np.ndarray, log_seconds: float) -> None:
        logs = self._logs
        for _ in range(_NUM_ITERATIONS):
            parts = np.exp(logs) * features
            shares = parts / parts.sum()  # the gradient of the total's logarithm
            spread = self._covariance @ shares
            gain = spread / (shares @ spread + self._noise)
            error = log_seconds - math.log(parts.sum()) - shares @ (self._logs - logs)
            logs = self._logs + gain * error
        self._logs = logs
        self._covariance = self._covariance - np.outer(gain, spread)

    def _deviation(self, features: np.ndarray) -> float:
        """Standard deviation of the next measurement's logarithm."""
        parts = self.coefficients * features
        shares = parts / parts.sum()
        return math.sqrt(shares @ self._covariance @ shares + self._noise)

    def _grow(self, variance: float) -> None:
        grown = self._covariance + np.eye(len(self._logs)) * variance
        shrink = np.sqrt(np.minimum(1.0, self._max_variance / grown.diagonal()))
        self._covariance = grown * np.outer(shrink, shrink)
