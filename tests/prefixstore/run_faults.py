"""Breaks tiers while requests go on, and prints the requests' results.

python tests/prefixstore/run_faults.py [--seconds 10] [--only redis] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from fault_playing import Result, play
from fault_scenarios import LOAD_TIMEOUT_S, SCENARIOS, Unavailable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="How long each fault lasts.")
    parser.add_argument("--only", default="", help="Scenarios whose name has this in it.")
    parser.add_argument("--json", type=Path, help="Write the figures there.")
    arguments = parser.parse_args()
    logging.getLogger("prefixstore").setLevel(logging.CRITICAL)
    # As a server does: else some request waits 0.2 s for a garbage collection that walks through
    # PyTorch, and not for a tier.
    gc.collect()
    gc.freeze()
    results: dict[str, object] = {}
    is_good = True
    for name, scenario in SCENARIOS.items():
        if arguments.only not in name:
            continue
        with tempfile.TemporaryDirectory(prefix="kvf") as directory:
            try:
                result = play(scenario, Path(directory) / "d", arguments.seconds, grace_s=0)
            except Unavailable as error:
                print(f"{name}: not played: {error}", flush=True)
                results[name] = str(error)
                continue
        print(describe(name, result), flush=True)
        results[name] = asdict(result)
        is_good &= result.is_good
    print(f"requests are to wait at most {LOAD_TIMEOUT_S} s for the tiers")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(0 if is_good else 1)


def describe(name: str, result: Result) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in result.reasons.items() if count)
    return (
        f"{name}: {result.num_requests} requests, {result.num_failed} failed, {result.num_wrong}"
        f" wrong; hits {result.hit_share:.0%} before, {result.fault_hit_share:.0%} during,"
        f" {result.after_hit_share:.0%} after; longest wait {result.longest_s * 1000:.0f} ms;"
        f" {reasons}{'' if result.is_good else '; NOT GOOD: ' + '; '.join(result.problems)}"
    )


if __name__ == "__main__":
    main()
