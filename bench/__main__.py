"""Runs one topic's bench: `python -m bench attention --threads 2`."""

import argparse
import importlib
from pathlib import Path

import torch

from bench.harness import describe_machine, print_line, printed_cases

TOPICS = sorted(
    path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py")
)

DRAWN = ("attention", "planner")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("topic", choices=TOPICS)
    parser.add_argument("--case", default="", help="run only cases whose name contains this")
    parser.add_argument("--rounds", type=positive, default=15, help="timed runs of each provider")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
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
    printed_cases.clear()
    bench.main(case_filter=options.case, num_rounds=options.rounds, **plot)
    if not printed_cases:
        parser.error(f"--case: expected a part of a case's name, got {options.case!r}")


def positive(text: str) -> int:
    """The number that an option's text says, if it is above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


if __name__ == "__main__":
    main()
