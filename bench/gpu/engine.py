"""Times the engine on models with random weights: first tokens, decode steps, and decode steps
during evictions. The set-up is in engine_setup.py.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch

from bench.gpu.engine_setup import (
    BLOCK_SIZE,
    CASES,
    Case,
    answer,
    check_source,
    empty_device_cache,
    empty_pool,
    make_model,
    make_prompt,
    open_engine,
    warnings_of,
)
from kvkernels import BlockFormat, KVPool
from kvkernels.transfer import BlockTransfer
from prefixstore.engine import Engine, RequestOutput
from prefixstore.engine.decode_graphs import NUM_FORWARD_PASSES

CODECS = ("raw", "l12", "q8", "q4")
LOSSLESS = ("raw", "l12")
NUM_PROGRAMS = (4, 12, None)

Row = dict[str, Any]


# ---- first tokens ----------------------------------------------------------------------------


def check_answers(case: Case, model: Any, codec: str) -> Row:
    """Check that a restored prompt gets the same answer, bit for bit, as from the pool.

    Not compared with the computed prompt: it went through passes of other lengths, so without
    batch invariance its last bits differ, and sooner or later its answer.
    """
    prompt = make_prompt(case, case.prompt_lens[0], 0)
    with open_engine(case, model, codec) as engine:
        computed, pooled = (answer(engine, [prompt], 16, logprobs=1)[0] for _ in range(2))
        empty_pool(engine)
        (restored,) = answer(engine, [prompt], 16, logprobs=1)
        is_invariant = engine.is_batch_invariant
    for output, tier in ((computed, None), (pooled, "device"), (restored, "memory")):
        check_source(output, tier)
    alike = (pooled, restored, computed) if is_invariant else (pooled, restored)
    for output in alike:
        if (output.token_ids, output.logprobs) != (pooled.token_ids, pooled.logprobs):
            raise AssertionError(f"expected {pooled.logprobs}, got {output.logprobs}")
    pairs = list(zip(computed.token_ids, restored.token_ids, strict=True))
    num_equal = next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))
    return {"num_new": len(pairs), "num_equal_to_computed": num_equal, "is_exact": True}


def check_graphs(case: Case, model: Any) -> Row:
    """Check that replayed passes give the bits of the model's own passes of the same shapes."""
    prompts = [make_prompt(case, case.context + 1, 0)]
    with open_engine(case, model) as engine:
        answer(engine, prompts, 1)  # so that all but the last token is cached
        (run,) = answer(engine, prompts, NUM_FORWARD_PASSES, logprobs=1)
        (replayed,) = answer(engine, prompts, NUM_FORWARD_PASSES + 1, logprobs=1)
        shapes = _graph_shapes(engine)
    assert run.logprobs is not None and replayed.logprobs is not None
    if run.logprobs != replayed.logprobs[:-1]:
        raise AssertionError(f"expected {run.logprobs}, got {replayed.logprobs}")
    return {"num_new": NUM_FORWARD_PASSES, "is_exact": True, "graph_shapes": shapes}


def _graph_shapes(engine: Engine) -> str:
    return " ".join(f"{shape.num_seqs}x{shape.num_blocks}" for shape in engine.graph_shapes)


def time_first_token(case: Case, model: Any, num_tokens: int, codec: str | None) -> Row:
    """Milliseconds until the first token: computed, found in the pool, restored from the tier."""
    prompt = make_prompt(case, num_tokens, 0)
    ttft_ms: dict[str, list[float]] = {"computed": [], "device": []}
    with open_engine(case, model, codec) as engine:

        def measure(source: str, tokens: list[int], tier: str | None) -> RequestOutput:
            (output,) = answer(engine, [tokens], 1)
            check_source(output, tier)
            ttft_ms.setdefault(source, []).append(1e3 * output.report.times.ttft_s)
            return output

        for seed in range(case.num_rounds, -1, -1):  # the last one is `prompt`
            empty_pool(engine)
            measure("computed", make_prompt(case, num_tokens, seed), None)
        for _ in range(case.num_rounds + 1):
            measure("device", prompt, "device")
        loads_s = []
        for _ in range(case.num_rounds + 1 if codec else 0):
            empty_pool(engine)
            read_bytes = _read_bytes(engine)
            output = measure("restored", prompt, "memory")
            record_bytes = _read_bytes(engine) - read_bytes
            loads_s.append(output.report.times.load_s)
        block_bytes = engine.cache.blocks.device.groups[0].pool.layout.block_bytes
    # The first of each is left out: it compiled kernels.
    row: Row = {f"{name}_ms": statistics.median(times[1:]) for name, times in ttft_ms.items()}
    row["computed_to_device"] = row["computed_ms"] / row["device_ms"]
    if codec:
        load_s = statistics.median(loads_s[1:])
        kv_bytes = (num_tokens - 1) // BLOCK_SIZE * block_bytes
        row |= {
            "computed_to_restored": row["computed_ms"] / row["restored_ms"],
            "load_ms": 1e3 * load_s,
            "record_bytes": record_bytes,
            "kv_bytes": kv_bytes,
            "record_gbytes_per_s": record_bytes / load_s / 1e9,
            "kv_gbytes_per_s": kv_bytes / load_s / 1e9,
        }
    return row


def _read_bytes(engine: Engine) -> int:
    stats = engine.cache.tier_stats()["memory"]
    assert stats is not None
    return stats.read_bytes


# ---- decode steps ----------------------------------------------------------------------------


def time_decode(case: Case, model: Any, num_seqs: int, cuda_graphs: bool) -> Row:
    """Milliseconds of a decode step, and those of the engine outside the model's forward pass.

    The model's time is that of all steps, including the first few without the whole batch: a short
    answer would be over before it is known that the last prompt is in the batch.
    """
    prompts = [make_prompt(case, case.context + 1, seed) for seed in range(num_seqs)]
    with (
        warnings_of("prefixstore") as warnings,
        open_engine(case, model, cuda_graphs=cuda_graphs) as engine,
    ):
        _warm_up(engine, prompts)
        before = engine.stats()
        outputs = answer(engine, prompts, case.num_new)
        after = engine.stats()
        shapes = _graph_shapes(engine)
    step_ms = _step_ms(outputs)
    num_steps = after.num_steps - before.num_steps
    model_ms = 1e3 * (after.model_s - before.model_s) / num_steps
    return {
        "step_ms": step_ms,
        "model_ms": model_ms,
        "engine_ms": step_ms - model_ms,
        "tokens_per_s": 1e3 * num_seqs / step_ms,
        "graph_shapes": shapes,
        **({"warnings": " | ".join(warnings)} if warnings else {}),
    }


def _warm_up(engine: Engine, prompts: Sequence[list[int]]) -> None:
    """Get every prompt but its last token into the pool, and decode passes recorded."""
    answer(engine, prompts, 4)
    num_passes = 2 * NUM_FORWARD_PASSES if engine.config.cuda_graphs else 0
    answer(engine, prompts, num_passes + 4)  # the first passes lack some prompts


def _step_ms(outputs: Sequence[RequestOutput]) -> float:
    """Milliseconds between two tokens of the answer whose prompt was submitted last.

    Earlier steps share the Python interpreter with the thread that submits.
    """
    last = outputs[-1]
    return 1e3 * last.report.times.decode_s / (len(last.token_ids) - 1)


@torch.inference_mode()
def time_generate(case: Case, model: Any) -> Row:
    """Milliseconds of a step of transformers' own `generate`: a growing cache, PyTorch's attention.

    The time of a long answer less that of a short one, so that the prompt's cancels out.
    """
    ids = torch.tensor([make_prompt(case, case.context, 0)], device=model.device)
    lengths = (2, 2 + case.num_new)

    def generate_s(num_new: int) -> float:
        _synchronize(model.device)
        begin = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=num_new,
            max_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
        )
        _synchronize(model.device)
        return time.perf_counter() - begin

    generate_s(lengths[0])
    short_s, long_s = (
        statistics.median(generate_s(length) for _ in range(case.num_rounds)) for length in lengths
    )
    return {"step_ms": 1e3 * (long_s - short_s) / case.num_new}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- decode steps during evictions -----------------------------------------------------------


def time_beside_evictions(case: Case, model: Any) -> Row:
    """How much slower a batch decodes during evictions, by how many programs those may use.

    Blocks of the pool are evicted over and over, in use or not: a writer that never rests.
    """
    num_seqs = sorted(case.batches)[len(case.batches) // 2]
    prompts = [make_prompt(case, case.context + 1, seed) for seed in range(num_seqs)]
    row: Row = {"num_seqs": num_seqs}
    with open_engine(case, model) as engine:
        _warm_up(engine, prompts)
        pool = engine.cache.blocks.device.groups[0].pool
        row["alone_ms"] = _step_ms(answer(engine, prompts, case.num_new))
        for num_programs in NUM_PROGRAMS:
            name = f"programs_{num_programs or 'all'}"
            with _evicting(pool, num_programs) as evicted_bytes:
                begin, num_before = time.perf_counter(), evicted_bytes()
                step_ms = _step_ms(answer(engine, prompts, case.num_new))
                num_bytes, seconds = evicted_bytes() - num_before, time.perf_counter() - begin
            row[f"{name}_ms"] = step_ms
            row[f"{name}_to_alone"] = step_ms / row["alone_ms"]
            row[f"{name}_gbytes_per_s"] = num_bytes / seconds / 1e9
        row["alone_again_ms"] = _step_ms(answer(engine, prompts, case.num_new))
    return row


@contextmanager
def _evicting(pool: KVPool, num_programs: int | None) -> Iterator[Callable[[], int]]:
    """Evict blocks in a thread; yields a function that returns the pool bytes evicted so far.

    An error of the thread is raised at the end.
    """
    num_blocks = min(16, pool.num_blocks)
    transfer = BlockTransfer(pool, num_slots=num_blocks, num_programs=num_programs)
    block_format, ids = BlockFormat(pool.layout, "q4"), torch.arange(num_blocks)
    is_over, num_evictions = threading.Event(), 0

    def evict_once() -> None:
        with transfer.evict(ids, block_format, transfer.mark()) as eviction:
            eviction.wait()

    def evict_all_the_time() -> None:
        nonlocal num_evictions
        while not is_over.is_set():
            evict_once()
            num_evictions += 1

    with closing(transfer), ThreadPoolExecutor(1, "bench-evictions") as threads:
        evict_once()  # compiles
        evicting = threads.submit(evict_all_the_time)
        try:
            yield lambda: num_evictions * num_blocks * pool.layout.block_bytes
        finally:
            is_over.set()
        evicting.result()  # raises the thread's error


# ---- all of it -------------------------------------------------------------------------------


def engine_cases(
    device: torch.device | str = "cuda", cases: Sequence[Case] = CASES
) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Names and what to run; a model is loaded at its first row, one at a time."""
    models: dict[str, Any] = {}

    def run(case: Case, work: Callable[..., Row], *args: Any) -> Row:
        if case.name not in models:
            models.clear()
            empty_device_cache()
            models[case.name] = make_model(case, torch.device(device))
        return work(case, models[case.name], *args)

    for case in cases:
        for codec in LOSSLESS:
            yield f"{case.name}_exact_{codec}", partial(run, case, check_answers, codec)
        yield f"{case.name}_exact_graphs", partial(run, case, check_graphs)
        for num_seqs in case.batches:
            name = f"{case.name}_decode_{num_seqs}"
            yield name, partial(run, case, time_decode, num_seqs, True)
            yield f"{name}_eager", partial(run, case, time_decode, num_seqs, False)
        yield f"{case.name}_generate", partial(run, case, time_generate)
        for num_tokens, codec in product(case.prompt_lens, (None, *CODECS)):
            name = f"{case.name}_ttft_{num_tokens}_{codec or 'off'}"
            yield name, partial(run, case, time_first_token, num_tokens, codec)
        yield f"{case.name}_evictions", partial(run, case, time_beside_evictions)
