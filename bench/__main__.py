"""Runs one topic's bench: `python -m bench attention --threads 2`."""

import argparse
import importlib
from pathlib import Path

import torch

from bench.harness import print_machine

TOPICS = sorted(
    path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py")
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("topic", choices=TOPICS)
    parser.add_argument("--case", default="", help="run only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=15, help="timed runs of each provider")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_machine()
    bench = importlib.import_module(f"bench.bench_{options.topic}")
    bench.main(case_filter=options.case, num_rounds=options.rounds)


if __name__ == "__main__":
    main()
