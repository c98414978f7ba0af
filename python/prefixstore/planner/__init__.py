"""Load or recompute, or both at once: decided for each request from measured speeds."""

from prefixstore.planner.contention import ContendedCall, Contention
from prefixstore.planner.costs import PlanInputs
from prefixstore.planner.fronts import LoadAhead, front_budget
from prefixstore.planner.look_ups import LookUpEstimate
from prefixstore.planner.plan import PlanMode, RestorePlan, plan_restore
from prefixstore.planner.planner import POLICIES, Planner, PlannerConfig
from prefixstore.planner.progress import Meeting
from prefixstore.planner.rates import PrefillEstimate, PrefillRate, TierEstimate, TierRate
from prefixstore.planner.stats import MeetingCounts, ModeStats, PlannerStats

__all__ = [
    "POLICIES",
    "ContendedCall",
    "Contention",
    "LoadAhead",
    "LookUpEstimate",
    "Meeting",
    "MeetingCounts",
    "ModeStats",
    "PlanInputs",
    "PlanMode",
    "Planner",
    "PlannerConfig",
    "PlannerStats",
    "PrefillEstimate",
    "PrefillRate",
    "RestorePlan",
    "TierEstimate",
    "TierRate",
    "front_budget",
    "plan_restore",
]
