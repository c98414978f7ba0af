"""An engine for the dashboard whose figures a test chooses: a real cache, made-up requests."""

import time
from types import SimpleNamespace

from prefixstore.engine import EngineConfig, EngineStats, RequestReport, RequestTimes
from prefixstore.planner import Planner
from prefixstore.reuse_report import ReuseReport

TABLES = ("num_finished", "hit_tokens", "miss_tokens")
NUMBERS = ("num_submitted", "num_refused", "num_running", "num_queued", "num_preemptions")
NUMBERS += ("num_steps", "step_s", "model_s", "prompt_tokens", "computed_tokens", "output_tokens")
NUMBERS += ("num_audits", "audited_blocks", "num_quarantined")


class WatchedEngine:
    """The parts of an `Engine` that the dashboard reads.

    A real one takes minutes to get a history, a slow request or a queue; test_dashboard_engine.py
    tests one.

    Attributes:
        given: Fields of `EngineStats` by name.
        reports: What `recent` returns.
    """

    def __init__(self, model, cache):
        self.model = model
        self.cache = cache
        self.config = EngineConfig()
        self.max_model_len = 2048
        self.tokenizer = SimpleNamespace(decode=lambda ids: "".join(chr(65 + i % 26) for i in ids))
        self.planner = Planner(("memory", "disk"), cache.config.block_size, 512, has_windows=False)
        self.given = {**dict.fromkeys(NUMBERS, 0), **{name: {} for name in TABLES}}
        self.reports = []

    def stats(self):
        return EngineStats(
            **{"planner": self.planner.stats(), "cache": self.cache.stats(), **self.given}
        )

    def recent(self):
        return list(self.reports)

    def serve(self, report):
        """Count a request, as an engine does."""
        self.reports = [*self.reports, report][-256:]
        self.given["prompt_tokens"] += report.reuse.num_prompt_tokens
        self.given["output_tokens"] += report.num_output_tokens
        for name, table in (
            ("hit_tokens", report.reuse.tokens_by_tier),
            ("miss_tokens", report.reuse.misses),
        ):
            counts = self.given[name]
            for key, num_tokens in table.items():
                counts[key] = counts.get(key, 0) + num_tokens


def make_report(number=0, tiers=None, computed=7000, ttft_s=5.0, tenant="", **times):
    """A report with this time to first token; other times by name."""
    tiers = tiers or {}
    num_tokens = sum(tiers.values()) + computed
    shares = {"queue_s": 0.01, "lookup_s": 0.02, "compute_s": 0.9}
    defaults = {name: share * ttft_s for name, share in shares.items()}
    return RequestReport(
        request_id=f"cmpl-{number:06x}",
        tenant=tenant,
        reuse=ReuseReport(num_tokens, tiers, computed, 0.01, {"new": computed}),
        times=RequestTimes(time.time(), ttft_s=ttft_s, **{**defaults, "decode_s": 1.2, **times}),
        num_output_tokens=32,
        plan="both" if tiers else "none",
        saved_s=4.0 if tiers else 0.0,
    )
