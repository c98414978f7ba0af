"""Compare paged_attention with PyTorch's attention over contiguous tensors, and with peers."""

import json
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.attention_cases import CASES, SCALING, Case, make_inputs
from bench.attention_providers import PROVIDERS, Call, Provider
from bench.harness import (
    check_agreement,
    describe_machine,
    figures,
    make_cold,
    print_line,
    time_alternating,
)
from bench.peers import installed_peers, missing_packages
from bench.rates import make_probes, rates_of

Row = dict[str, Any]
Calls = dict[str, Call]

# fp16 and bfloat16 hold 3 or 2 decimal digits, so two orders of summation differ by this much.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}


def prepare(case: Case, providers: Mapping[str, Provider]) -> Calls:
    """For each provider its call on the given inputs."""
    inputs = make_inputs(case)
    return {name: provider.prepare(case, inputs) for name, provider in providers.items()}


def run_provider(name: str) -> Callable[[Calls], torch.Tensor]:
    return lambda calls: calls[name]()


def check_outputs(case: Case, providers: Mapping[str, Provider], calls: Calls) -> None:
    baseline = next(iter(providers))
    want = calls[baseline]().clone()
    for name, provider in providers.items():
        tolerance = max(TOLERANCES[case.dtype], provider.tolerance)
        check_agreement({baseline: [want], name: [calls[name]()]}, baseline, tolerance)


def measure(case: Case, providers: Mapping[str, Provider], num_rounds: int) -> list[Row]:
    """Print and return a row for each provider that serves the case; the first is the baseline."""
    providers = {name: one for name, one in providers.items() if one.serves(case)}
    # Each run follows an untimed one of its provider: of the smallest pools, too, twice the cache.
    num_kv_bytes = min(one.num_kv_bytes(case) for one in providers.values())
    inputs = make_cold(partial(prepare, case, providers), num_kv_bytes)
    check_outputs(case, providers, inputs[0])
    runs = {name: run_provider(name) for name in providers}
    with_own_threads = [name for name, one in providers.items() if one.has_own_threads]
    probes = make_probes(case.dtype)
    seconds = time_alternating(runs, inputs, num_rounds, probes, with_own_threads)
    rates = rates_of(seconds)
    baseline = statistics.median(seconds[next(iter(providers))])
    rows = []
    for name, provider in providers.items():
        num_bytes = provider.num_bytes(case)
        row = {
            "case": case.name,
            "provider": name,
            "form": provider.form,
            "dtype": str(provider.dtype_in(case)).removeprefix("torch."),
            "times_as_fast_as_baseline": baseline / statistics.median(seconds[name]),
            "flops_per_byte": case.num_flops / num_bytes,
            **figures(seconds[name], rates, num_bytes, case.num_flops),
        }
        print_line(**row)
        rows.append(row)
    return rows


def measure_scaling(num_rounds: int) -> dict[str, list[Row]]:
    """Rows of each series of SCALING."""
    providers = {name: one for name, one in PROVIDERS.items() if name != "sdpa_gathered"}
    return {
        series: [
            {"num_seqs": case.num_seqs, "seq_len": case.seq_len, **row}
            for case in cases
            for row in measure(case, providers, num_rounds)
        ]
        for series, cases in SCALING.items()
    }


def save(path: Path, rows: Any) -> None:
    text = json.dumps({**describe_machine(), "rows": rows}, indent=1)
    path.write_text(text + "\n")


@torch.inference_mode()
def main(case_filter: str = "", num_rounds: int = 15, plot_dir: Path | None = None) -> None:
    if missing := missing_packages():
        print_line(left_out="providers of packages that are not installed", packages=missing)
    providers = PROVIDERS | installed_peers()
    cases = [case for case in CASES if case_filter in case.name]
    rows = [row for case in cases for row in measure(case, providers, num_rounds)]
    if plot_dir is None:
        return
    from bench.attention_plots import plot_roofline, plot_scaling

    plot_dir.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    if rows:
        save(plot_dir / "roofline.json", rows)
        plot_roofline(rows, machine, plot_dir / "roofline.png")
    scaling = measure_scaling(num_rounds)
    save(plot_dir / "scaling.json", scaling)
    plot_scaling(scaling, machine, plot_dir / "scaling.png")
