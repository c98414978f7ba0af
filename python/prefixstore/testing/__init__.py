"""Check that an engine's answers do not depend on what its cache holds."""

from prefixstore.testing.adapter import DEVICE, Ability, Adapter, Answer, Setup, Subject, Tokens
from prefixstore.testing.cache_adapter import CacheAdapter
from prefixstore.testing.cells import Cell, Divergence, Limits, Loss, LossLimits
from prefixstore.testing.engine_adapter import EngineAdapter
from prefixstore.testing.matrix import check_engines, num_steps
from prefixstore.testing.plan import (
    BFLOAT16_LIMITS,
    FLOAT16_LIMITS,
    FLOAT32_LIMITS,
    LOSS_LIMITS,
    Plan,
)
from prefixstore.testing.reference import ModelReference, Reference, Scores
from prefixstore.testing.report import Report, Table

__all__ = [
    "BFLOAT16_LIMITS",
    "DEVICE",
    "FLOAT16_LIMITS",
    "FLOAT32_LIMITS",
    "LOSS_LIMITS",
    "Ability",
    "Adapter",
    "Answer",
    "CacheAdapter",
    "Cell",
    "Divergence",
    "EngineAdapter",
    "Limits",
    "Loss",
    "LossLimits",
    "ModelReference",
    "Plan",
    "Reference",
    "Report",
    "Scores",
    "Setup",
    "Subject",
    "Table",
    "Tokens",
    "check_engines",
    "num_steps",
]
