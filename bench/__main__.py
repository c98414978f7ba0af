"""Runs one topic's bench: `python -m bench attention --threads 2`."""

import argparse
import importlib
from pathlib import Path

import torch

from bench.harness import describe_machine, print_line

TOPICS = sorted(
    path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py")
)

DRAWN = ("attention", "planner")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("topic", choices=TOPICS)
    parser.add_argument("--case", default="", help="run only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=15, help="timed runs of each provider")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--plot", type=Path, metavar="DIR", help="attention, planner: draw into this folder"
    )
    options = parser.parse_args()
    if options.plot is not None and options.topic not in DRAWN:
        parser.error(f"--plot: only {' and '.join(DRAWN)} draw")
    torch.set_num_threads(options.threads)
    print_line(**describe_machine())
    bench = importlib.import_module(f"bench.bench_{options.topic}")
    plot = {} if options.plot is None else {"plot_dir": options.plot}
    bench.main(case_filter=options.case, num_rounds=options.rounds, **plot)


if __name__ == "__main__":
    main()
