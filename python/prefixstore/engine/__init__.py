"""Continuous batching over a prefix cache."""

from prefixstore.engine.config import EngineConfig
from prefixstore.engine.outputs import (
    FinishReason,
    OutputDelta,
    RequestOutput,
    RequestReport,
    RequestTimes,
    TokenLogprob,
)
from prefixstore.engine.sampling import SamplingParams

__all__ = [
    "EngineConfig",
    "FinishReason",
    "OutputDelta",
    "RequestOutput",
    "RequestReport",
    "RequestTimes",
    "SamplingParams",
    "TokenLogprob",
]
