"""Continuous batching over a prefix cache."""

from prefixstore.engine.config import EngineConfig
from prefixstore.engine.engine import Engine
from prefixstore.engine.handle import RequestHandle
from prefixstore.engine.outputs import (
    FinishReason,
    OutputDelta,
    RequestOutput,
    RequestReport,
    RequestTimes,
    TokenLogprob,
)
from prefixstore.engine.sampling import SamplingParams
from prefixstore.engine.stats import EngineStats

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineStats",
    "FinishReason",
    "OutputDelta",
    "RequestHandle",
    "RequestOutput",
    "RequestReport",
    "RequestTimes",
    "SamplingParams",
    "TokenLogprob",
]
