"""Answers of many requests at once, against transformers' `generate`, one after another.

Each round runs the same prompts both ways. `overhead_ms` is the time per step outside the
model: scheduling, sampling, publishing blocks, delivering tokens.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.harness import print_line
from prefixstore.demo.prompts import load_questions
from prefixstore.engine import Engine, SamplingParams
from prefixstore.models import load_model, load_tokenizer, prepare_smollm2


@dataclass(frozen=True)
class Case:
    """Requests that are submitted at once, all of one length."""

    num_requests: int
    prompt_tokens: int
    new_tokens: int

    @property
    def name(self) -> str:
        return f"engine_{self.num_requests}x{self.prompt_tokens}+{self.new_tokens}"


CASES = (Case(1, 128, 64), Case(8, 128, 64), Case(16, 128, 64), Case(16, 512, 64))


def make_prompts(tokenizer: Any, case: Case) -> list[list[int]]:
    """Real questions without common beginnings, cut to the case's length."""
    text = " ".join(question.text for question in load_questions())
    tokens = tokenizer(text * 8).input_ids
    step = len(tokens) // 8 // case.num_requests
    return [tokens[i * step : i * step + case.prompt_tokens] for i in range(case.num_requests)]


@torch.inference_mode()
def run_sequential(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
    """Seconds that transformers takes to answer one prompt after another."""
    started = time.perf_counter()
    for prompt in prompts:
        model.generate(
            torch.tensor([prompt]),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return time.perf_counter() - started


def run_case(case: Case, models: dict[str, Any], tokenizer: Any, num_rounds: int) -> None:
    prompts = make_prompts(tokenizer, case)
    sampling = SamplingParams(max_tokens=case.new_tokens, temperature=0, ignore_eos=True)
    run_sequential(models["transformers"], prompts[:1], 4)
    sequential, batched, overheads, in_model = [], [], [], []
    # No reuse, because `generate` has none either.
    with Engine.open(
        models["engine"], tokenizer, reuses_prefixes=False, memory_bytes=0, pool_tokens=32768
    ) as engine:
        engine.generate(prompts[:1], sampling)
        for _ in range(num_rounds):
            sequential.append(run_sequential(models["transformers"], prompts, case.new_tokens))
            before = engine.stats()
            started = time.perf_counter()
            engine.generate(prompts, sampling)
            batched.append(time.perf_counter() - started)
            after = engine.stats()
            steps = after.num_steps - before.num_steps
            model_s = after.model_s - before.model_s
            in_model.append(model_s / steps * 1e3)
            overheads.append((after.step_s - before.step_s - model_s) / steps * 1e3)
    num_tokens = case.num_requests * case.new_tokens
    ratios = sorted(a / b for a, b in zip(sequential, batched, strict=True))
    print_line(
        case=case.name,
        engine_tokens_per_s=num_tokens / statistics.median(batched),
        sequential_tokens_per_s=num_tokens / statistics.median(sequential),
        ratio=statistics.median(ratios),
        ratio_low=ratios[0],
        ratio_high=ratios[-1],
        model_ms_per_step=statistics.median(in_model),
        overhead_ms_per_step=statistics.median(overheads),
    )


def main(case_filter: str = "", num_rounds: int = 5) -> None:
    path = prepare_smollm2()
    models = {name: load_model(path, torch.bfloat16) for name in ("engine", "transformers")}
    models["transformers"].set_attn_implementation("sdpa")
    tokenizer = load_tokenizer(path)
    for case in CASES:
        if case_filter in case.name:
            run_case(case, models, tokenizer, num_rounds)
