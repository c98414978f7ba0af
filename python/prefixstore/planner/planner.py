"""What an engine holds: it learns speeds from what was measured, and plans with them."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prefixstore.planner.costs import PlanInputs
from prefixstore.planner.look_ups import LookUpRate
from prefixstore.planner.plan import RestorePlan, plan_probe, plan_restore, unmeasured_tiers
from prefixstore.planner.prefix import plan_prefix
from prefixstore.planner.rates import PrefillEstimate, PrefillRate, Slowdown, TierEstimate, TierRate
from prefixstore.planner.stats import MeetingCounts, PlanCounts, PlannerStats

# Passes beside a load measure its slowdown once this many passes without a load are known. Before
# that they measure the model's speed, still better than the guess it starts with.
_NUM_KNOWN_PASSES = 5


POLICIES = ("planned", "load", "recompute")
# The policy "load" waits for everything that is loaded, so computing must look endless. Endless by
# the token, not by the pass: the rest of the prompt takes one pass whatever is loaded.
_ENDLESS_PREFILL = PrefillEstimate(pass_s=0.0, token_s=1e6, pair_s=0.0)


@dataclass(frozen=True)
class PlannerConfig:
    """What a planner goes by.

    Attributes:
        margin_s: Seconds that loading must save, or nothing is loaded.
        margin_ratio: Share of the time of computing all that it must save.
        probe_interval_s: A tier from which nothing was loaded for so long is measured again by the
            next request that finds blocks there and loads none of them.
        probe_blocks: So many blocks are loaded for that.
        policy: "planned"; or "load" or "recompute", to do always that with what tiers hold. What
            was predicted then says nothing.
    """

    margin_s: float = 2e-4
    margin_ratio: float = 0.03
    probe_interval_s: float = 10.0
    probe_blocks: int = 4
    policy: str = "planned"

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy: expected one of {POLICIES}, got {self.policy!r}")
        for name in ("margin_s", "margin_ratio", "probe_interval_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.probe_blocks < 1:
            raise ValueError(f"probe_blocks: expected 1 or more, got {self.probe_blocks}")


class Planner:
    """Plans restores. Thread-safe; reads no clock: `now` is on any clock that does not jump.

    Args:
        tier_names: Of the store, fastest first.
        block_size: Tokens in a block.
        chunk_tokens: Prompt tokens in one forward pass.
        has_windows: Whether some layer group has a sliding window, see `PlanInputs`.
        layered_tiers: Those that single layers can be loaded from, beside a forward pass.
        restore_bytes_per_s: See `PlanInputs`.
        config: Margins and probes.
    """

    def __init__(
        self,
        tier_names: Sequence[str],
        block_size: int,
        chunk_tokens: int,
        *,
        has_windows: bool = False,
        layered_tiers: Collection[str] = (),
        restore_bytes_per_s: float = float("inf"),
        config: PlannerConfig | None = None,
    ) -> None:
        self._config = config if config is not None else PlannerConfig()
        self._names = tuple(tier_names)
        self._numbers: dict[str | None, int] = {name: i for i, name in enumerate(self._names)}
        self._numbers[None] = -1  # as in `PlanInputs.tiers`
        self._block_size = block_size
        self._chunk_tokens = chunk_tokens
        self._has_windows = has_windows
        self._restore_bytes_per_s = restore_bytes_per_s
        # Only the policy "planned" computes beside layers: "load" is a baseline to measure against.
        is_planned = self._config.policy == "planned"
        self._is_layered = [is_planned and name in layered_tiers for name in self._names]
        self._lock = threading.Lock()
        self._tiers = {name: TierRate() for name in self._names}
        self._probed_at: dict[int, float] = {}
        self._prefill = PrefillRate()
        self._slowdown = Slowdown()
        self._look_ups = LookUpRate()
        self._counts = PlanCounts()

    # ---- measurements ------------------------------------------------------------------------

    def observe_prefill(
        self, num_new: int, context: int, seconds: float, *, is_loading: bool = False
    ) -> None:
        """A forward pass computed `num_new` tokens of prompts after `context` others.

        Args:
            num_new: In the pass.
            context: Before them.
            seconds: That it took.
            is_loading: Records were loaded during all of it: then it says how much that slows it.
                A pass beside which they were loaded for a part of it is better left out.
        """
        with self._lock:
            known = self._prefill.snapshot()
            if not is_loading:
                self._prefill.observe(num_new, context, seconds)
            elif known.num_passes < _NUM_KNOWN_PASSES:
                self._prefill.observe(num_new, context, seconds / self._slowdown.factor)
            else:
                self._slowdown.observe(known.seconds(num_new, context, num_new), seconds)

    def observe_load(
        self,
        tier: str,
        num_bytes: int,
        num_records: int,
        seconds: float,
        now: float,
        *,
        is_computing: bool = False,
        num_beside: float = 0.0,
    ) -> None:
        """A call of `tier` gave so many records of so many bytes in all.

        Args:
            tier: Its name.
            num_bytes: Of the records that came.
            num_records: That came.
            seconds: That it took, verified and in their blocks.
            now: When it was over.
            is_computing: The model computed during all of it.
            num_beside: Other calls of `tier` that were under way, on average over it.
        """
        with self._lock:
            undisturbed_s = seconds / self._slowdown.factor if is_computing else seconds
            self._rate(tier).observe(num_bytes, undisturbed_s, num_records, now, num_beside)

    def observe_given_up(
        self, tier: str, num_bytes: int, seconds: float, now: float, *, num_beside: float = 0.0
    ) -> None:
        """A call of `tier` was given up after so many seconds; it would have taken longer."""
        with self._lock:
            self._rate(tier).observe_given_up(num_bytes, seconds, now, num_beside)

    def observe_look_up(self, seconds: float, saved_share: float) -> None:
        """Tiers said what they hold of a prompt.

        Args:
            seconds: Until all had answered.
            saved_share: Of the time of computing the prompt, what loading that saves, or would have
                saved: of an answer that came too late, see `saved_share`.
        """
        with self._lock:
            self._look_ups.observe(seconds, saved_share)

    def observe_look_up_left(self) -> None:
        """A look-up was not waited for any longer."""
        with self._lock:
            self._look_ups.observe_left()

    def look_up_patience_s(self, prefill_s: float) -> float:
        """How long a look-up is worth being waited for before a prompt is computed that takes
        `prefill_s`; 0 if nothing is known of look-ups, or they bring less than they take.
        """
        with self._lock:
            return self._look_ups.snapshot().patience_s(prefill_s)

    def tiers(self) -> Mapping[str, TierEstimate]:
        """What is believed of each tier now."""
        with self._lock:
            return {name: rate.snapshot() for name, rate in self._tiers.items()}

    def finished(self, plan: RestorePlan, measured_s: float, counts: MeetingCounts) -> None:
        """A plan was carried out: all tokens of the prompt are computed.

        Args:
            plan: From `plan`.
            measured_s: Seconds from its start.
            counts: Of its `Meeting`.

        Raises:
            ValueError: If `measured_s` is negative.
        """
        if not measured_s >= 0:
            raise ValueError(f"measured_s: expected 0 or more, got {measured_s}")
        with self._lock:
            self._counts.add_finished(plan, measured_s, counts)

    def prefill_s(self, num_new: int, context: int) -> float:
        """Expected seconds to compute `num_new` tokens of a prompt after `context` others."""
        with self._lock:
            return self._prefill_estimate().seconds(num_new, context, self._chunk_tokens)

    def slowest_prefill_s(self, num_new: int, context: int) -> float:
        """The same, or as long as is plausible where too little was measured to expect anything."""
        with self._lock:
            estimate = self._slowest_prefill(num_new, context)
            return estimate.seconds(num_new, context, self._chunk_tokens)

    # ---- plans -------------------------------------------------------------------------------

    def plan(
        self,
        num_tokens: int,
        num_device_blocks: int,
        tiers: Sequence[str | None],
        record_bytes: Sequence[int] | np.ndarray,
        now: float,
        *,
        deadline_s: float = float("inf"),
    ) -> RestorePlan:
        """Load or recompute what is not on the device.

        Args:
            num_tokens: Of the prompt.
            num_device_blocks: Whole blocks at its start that are on the device.
            tiers: For each block that follows the tier that holds it, or None.
            record_bytes: For each of them the bytes to be read, all layer groups together.
            now: When.
            deadline_s: Seconds after which the store gives nothing any more.

        Raises:
            ValueError: If these disagree or a tier is unknown.
        """
        with self._lock:
            self._slowdown.age(now)
            inputs = self._inputs(num_tokens, num_device_blocks, tiers, record_bytes, deadline_s)
            return self._with_probe(plan_restore(inputs), now)

    def plan_prefix(
        self,
        num_tokens: int,
        num_device_blocks: int,
        tiers: Sequence[str | None],
        record_bytes: Sequence[int] | np.ndarray,
        now: float,
        *,
        deadline_s: float = float("inf"),
    ) -> RestorePlan:
        """As `plan`, for who loads a whole prefix before anything is computed, see prefix.py.

        A guess of the model's speed keeps nothing from being loaded: whoever asks once, after a
        restart, would lose all that was stored to it.
        """
        with self._lock:
            plan = self._plan_prefix(num_tokens, num_device_blocks, tiers, record_bytes, deadline_s)
            return self._with_probe(plan, now)

    def saved_share(
        self,
        num_tokens: int,
        num_device_blocks: int,
        tiers: Sequence[str | None],
        record_bytes: Sequence[int] | np.ndarray,
        *,
        deadline_s: float = float("inf"),
    ) -> float:
        """What `plan_prefix` would save, as a share of computing all; nothing is planned."""
        with self._lock:
            return self._plan_prefix(
                num_tokens, num_device_blocks, tiers, record_bytes, deadline_s
            ).saved_share

    def _plan_prefix(
        self,
        num_tokens: int,
        num_device_blocks: int,
        tiers: Sequence[str | None],
        record_bytes: Sequence[int] | np.ndarray,
        deadline_s: float,
    ) -> RestorePlan:
        context = num_device_blocks * self._block_size
        if self._config.policy == "load":  # whatever is believed of the tiers
            deadline_s = float("inf")
        inputs = self._inputs(num_tokens, num_device_blocks, tiers, record_bytes, deadline_s)
        return plan_prefix(
            replace(
                inputs,
                prefill=self._slowest_prefill(num_tokens - context, context),
                slowdown=1.0,
                has_windows=True,  # as little can be computed between loaded blocks
                is_layered=(),
            )
        )

    def _inputs(
        self,
        num_tokens: int,
        num_device_blocks: int,
        tiers: Sequence[str | None],
        record_bytes: Sequence[int] | np.ndarray,
        deadline_s: float,
    ) -> PlanInputs:
        try:
            numbers = [self._numbers[name] for name in tiers]
        except KeyError as error:
            raise ValueError(
                f"tiers: expected names of {self._names} or None, got {error.args[0]!r}"
            ) from None
        if self._config.policy == "recompute":
            numbers = [-1] * len(numbers)
        waits_for_loads = self._config.policy == "load"
        return PlanInputs(
            num_tokens=num_tokens,
            block_size=self._block_size,
            num_device_blocks=num_device_blocks,
            tiers=np.array(numbers, dtype=np.int64),
            record_bytes=np.asarray(record_bytes, dtype=np.int64),
            estimates=[self._tiers[name].snapshot() for name in self._names],
            prefill=self._prefill_estimate(),
            chunk_tokens=self._chunk_tokens,
            slowdown=self._slowdown.factor,
            has_windows=self._has_windows,
            margin_s=0.0 if waits_for_loads else self._config.margin_s,
            margin_ratio=0.0 if waits_for_loads else self._config.margin_ratio,
            deadline_s=deadline_s,
            is_layered=self._is_layered,
            restore_bytes_per_s=self._restore_bytes_per_s,
        )

    def _with_probe(self, plan: RestorePlan, now: float) -> RestorePlan:
        """The plan, with a probe if one is due; counted."""
        due = next((one for one in unmeasured_tiers(plan) if self._is_due(one, now)), None)
        if due is not None:
            self._probed_at[due] = now
            plan = plan_probe(plan, due, self._config.probe_blocks)
        self._counts.add_plan(plan)
        return plan

    def _is_due(self, tier: int, now: float) -> bool:
        """Whether a tier is to be measured again."""
        observed_at = self._tiers[self._names[tier]].snapshot().observed_at
        times = (observed_at, self._probed_at.get(tier))
        return all(at is None or now - at >= self._config.probe_interval_s for at in times)

    # ---- counters ----------------------------------------------------------------------------

    def stats(self) -> PlannerStats:
        """What it chose, how right it was, and what it believes."""
        with self._lock:
            tiers = {name: rate.snapshot() for name, rate in self._tiers.items()}
            return self._counts.stats(
                *(tiers, self._prefill.snapshot(), self._slowdown.factor),
                self._look_ups.snapshot(),
            )

    def _prefill_estimate(self) -> PrefillEstimate:
        return _ENDLESS_PREFILL if self._config.policy == "load" else self._prefill.snapshot()

    def _slowest_prefill(self, num_new: int, context: int) -> PrefillEstimate:
        if self._config.policy == "load":
            return _ENDLESS_PREFILL
        return self._prefill.slowest(num_new, context)

    def _rate(self, tier: str) -> TierRate:
        rate = self._tiers.get(tier)
        if rate is None:
            raise ValueError(f"tier: expected one of {self._names}, got {tier!r}")
        return rate
