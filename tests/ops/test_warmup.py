"""A warm-up compiles every kernel that calls of a model may launch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvkernels.codecs import CODECS, BlockFormat
from kvkernels.layout import KVLayout

jit = pytest.importorskip("triton.runtime.jit", reason="Triton is only on Linux")
aot = pytest.importorskip("kvkernels.triton_kernels.aot")
codecs_plan = pytest.importorskip("kvkernels.triton_kernels.codecs_plan")
codecs_work = pytest.importorskip("kvkernels.triton_kernels.codecs_work")
launch = pytest.importorskip("kvkernels.triton_kernels.launch")
shapes = pytest.importorskip("kvkernels.triton_kernels.shapes")
warmup = pytest.importorskip("kvkernels.triton_kernels.warmup")

DEVICES = [(8, 108), (9, 132), (10, 148), (12, 170)]
# Query heads per key-value head, key-value heads, head widths, and other options.
MODELS: dict[str, dict[str, Any]] = {
    "llama_2_7b": {"group": 1, "num_kv_heads": 32, "head_dim": 128},
    "llama_3_8b": {"group": 4, "num_kv_heads": 8, "head_dim": 128},
    "llama_3_405b": {"group": 16, "num_kv_heads": 8, "head_dim": 128},
    "qwen_2_5_7b": {"group": 7, "num_kv_heads": 4, "head_dim": 128},
    "glm_4_5": {"group": 12, "num_kv_heads": 8, "head_dim": 128},
    "smollm2": {"group": 3, "num_kv_heads": 3, "head_dim": 64},
    "gemma_3": {"group": 4, "num_kv_heads": 1, "head_dim": 256, "window": 512},
    "gpt_oss": {"group": 8, "num_kv_heads": 8, "head_dim": 64, "window": 128, "rules": ("sinks",)},
    "latent": {"group": 128, "num_kv_heads": 1, "head_dim": 576, "value_dim": 512},
    "one_head_of_codes": {"group": 8, "num_kv_heads": 1, "head_dim": 128, "kinds": ("int4",)},
    "float8": {"group": 4, "num_kv_heads": 8, "head_dim": 128, "is_float8": True},
    "trees": {"group": 4, "num_kv_heads": 8, "head_dim": 128, "rules": ("tree",)},
}
NUM_SEQS = (1, 2, 3, 16, 300, 20000)
NUM_QUERIES = (1, 2, 4, 5, 9, 17, 40, 65, 99, 130, 200, 257, 700, 3000)


@functools.cache
def to_compile(kernel: Any) -> Any:
    """A kernel in the form that is compiled, also where kernels are interpreted."""
    is_interpreted = not isinstance(kernel, jit.JITFunction)
    return jit.JITFunction(kernel.fn, **kernel.kwargs) if is_interpreted else kernel


def variants(launches: Iterable[Any]) -> set[str]:
    """Arguments that are compiled separately when they differ."""
    found = set()
    for one in launches:
        source = aot._source(replace(one, kernel=to_compile(one.kernel)))
        parts = (source.name, one.options, source.signature, source.constants, source.attrs)
        found.add(repr(parts))
    return found


def planned(calls: Iterable[Any], device: Any) -> Iterable[Any]:
    return itertools.chain.from_iterable(shapes.plan(call, device) for call in calls)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_reaches_every_variant_of_a_call(name: str, device: tuple[int, int]) -> None:
    model, target = shapes.Shape("decode", "bf16", **MODELS[name]), launch.Device(*device)
    served = []
    for num_seqs in NUM_SEQS:
        batch = replace(model, num_seqs=num_seqs, has_lse=False)
        if "tree" not in model.rules:
            served.append(batch)
        served += [replace(batch, op="prefill", num_queries=count) for count in NUM_QUERIES]
    warmed = warmup.shapes_of_model(model, target)
    assert variants(planned(served, target)) <= variants(planned(warmed, target))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected a CUDA device to compile for; without one: kvkernels.triton_kernels.aot"),
        (["--heads", "32"], "--heads: expected two numbers, such as 32/8, got 32"),
        (["--heads", "9/4"], "--heads: expected a multiple of the second number, got 9/4"),
    ],
)
def test_refuses_what_it_cannot_compile_for(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["warmup", "--heads", "32/8", "--head-dim", "128", *options])
    with pytest.raises(SystemExit):
        warmup.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num_layers", [1, 32, 33])
def test_reaches_what_codecs_launch(codec: str, num_layers: int) -> None:
    device = launch.Device(9, 132)
    model = shapes.Shape("decode", "bf16", 128, num_kv_heads=8)
    layout = KVLayout(num_layers, 8, 128, model.block_size, torch.bfloat16)
    block_format = BlockFormat(layout, codec)
    row_bytes = max(block_format.payload_bytes, block_format.raw.payload_bytes)

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    sums = empty(7, num_layers, 2, dtype=torch.int64)
    is_good = empty(7, num_layers, dtype=torch.bool)
    launches = []
    for chosen in (None, range(1), range(num_layers)):
        work = codecs_work.Work(
            empty(100, *layout.block_shape, dtype=layout.dtype),
            empty(7, dtype=torch.int64),
            block_format,
            empty(7, row_bytes, dtype=torch.uint8),
            empty(7, dtype=torch.bool),
            device,
            4,
            chosen,
        )
        launches += codecs_plan.plan_sums(work, sums) + codecs_plan.plan_decode(work, is_good)
        if chosen is None:
            launches += codecs_plan.plan_encode(work, sums)
            launches += codecs_plan.plan_encode_raw(work, sums)
    warmed = warmup.shapes_of_model(model, device, [codec])
    assert variants(launches) <= variants(planned(warmed, device))
