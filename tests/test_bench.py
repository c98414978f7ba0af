"""The benches run: every case is checked there before it is timed. Nothing here looks at times."""

import json

import pytest

from bench import bench_index, bench_record, bench_tiers


def lines(captured):
    return [json.loads(line) for line in captured.out.splitlines()]


def test_index_bench(monkeypatch, capsys):
    monkeypatch.setattr(
        bench_index,
        "CASES",
        {
            "no shared tokens": bench_index.Workload(200, 64, 0, 1, 64),
            "shared tokens": bench_index.Workload(40, 256, 128, 4, 16),
        },
    )
    bench_index.main("", num_rounds=1)
    cases = {line["case"] for line in lines(capsys.readouterr())}
    assert {"memory, no shared tokens", "match, shared tokens", "insert, shared tokens"} <= cases
    bench_index.main("no such case", num_rounds=1)
    assert lines(capsys.readouterr()) == []


def test_index_bench_refuses_providers_that_disagree():
    workload = bench_index.Workload(8, 128, 64, 2, 16)
    indexes = {name: make(16) for name, make in bench_index.PROVIDERS.items()}
    prompts = workload.prompts()
    for index in indexes.values():
        bench_index.fill(index, workload, prompts)
    indexes["dict of sha256"].ids.popitem()
    with pytest.raises(SystemExit, match="providers disagree on a prompt of 128 tokens"):
        bench_index.check_agreement(indexes, prompts)


@pytest.mark.parametrize(
    ("bench", "case", "baselines"),
    [
        (bench_record, "gemma3_270m", {"copy"}),
        (bench_tiers, "_small", {"copy", "plain_file"}),
    ],
    ids=["record", "tiers"],
)
def test_benches_of_the_store(bench, case, baselines, capsys):
    bench.main(case, num_rounds=1)
    told = lines(capsys.readouterr())
    providers = {line["provider"] for line in told}
    assert all(case in line["case"] for line in told)
    assert baselines | {"kvkernels"} <= providers
    bench.main("no such case", num_rounds=1)
    assert lines(capsys.readouterr()) == []
