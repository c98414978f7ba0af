"""Answers of real models equal the model's own, token for token, in every cache state.

In float32, compared with the model's own attention without a cache. The texts are MT-bench's
questions and the demo's documents.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from prefixstore.demo.prompts import load_documents
from prefixstore.models import load_model, load_tokenizer, prepare_gemma3, prepare_smollm2
from prefixstore.testing import (
    CacheAdapter,
    EngineAdapter,
    ModelReference,
    Plan,
    check_engines,
)
from prefixstore.testing.prompts import cut_prompts
from prefixstore.testing.states import STATES

pytestmark = pytest.mark.model

BLOCK_SIZE = 16
QUESTIONS = Path(__file__).parents[1] / "data" / "mt_bench_question.jsonl"
CHAINED = ("cold", "warm", "evicted", "restarted")


def questions(tokenizer, count, chat):
    """Two-turn chats of MT-bench; every fourth one follows six others in its prompt."""
    lines = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    texts = ["\n\n".join(line["turns"]) for line in lines]
    chosen = []
    for number in range(count):
        text = texts[number * 80 // count]
        if number % 4 == 3:
            text = "\n\n".join([*texts[number : number + 6], text])
        if chat:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        chosen.append(tokenizer(text).input_ids)
    return chosen


def documents(tokenizer, count):
    texts = [document.text for document in load_documents()]
    return cut_prompts(tokenizer, texts, count, BLOCK_SIZE)


def check(adapter, reference, prompts, plan, record_property):
    report = check_engines([adapter], reference, prompts, plan)
    record_property("in_summary", report.to_text())
    assert report.is_good, report.to_text()


@pytest.mark.timeout(1800)
def test_smollm2_answers_many_prompts_alike_in_every_state(record_property):
    path = prepare_smollm2()
    model, tokenizer = load_model(path, torch.float32), load_tokenizer(path)
    prompts = documents(tokenizer, 3) + questions(tokenizer, 12, chat=True)
    reference = ModelReference(model)
    adapter = EngineAdapter(model, tokenizer)
    plan = Plan(tiers=("disk",), states=CHAINED, num_new=12, block_size=BLOCK_SIZE)
    check(adapter, reference, prompts, plan, record_property)
    check(CacheAdapter(model), reference, prompts[2:6], plan, record_property)
    others = tuple(state.name for state in STATES if state.name not in CHAINED[1:])
    # longer than a block: a shorter answer is never preempted
    plan = dataclasses.replace(plan, states=others, num_new=BLOCK_SIZE + 2, num_few=2)
    check(adapter, reference, prompts[:5], plan, record_property)


@pytest.mark.timeout(1800)
def test_gemma3_answers_alike_in_every_state(record_property):
    path = prepare_gemma3()
    model, tokenizer = load_model(path, torch.float32), load_tokenizer(path)
    prompts = documents(tokenizer, 3) + questions(tokenizer, 2, chat=False)
    reference = ModelReference(model)
    plan = Plan(tiers=("disk",), num_new=8, num_few=2, block_size=BLOCK_SIZE)
    check(EngineAdapter(model, tokenizer), reference, prompts, plan, record_property)
    plan = Plan(tiers=("memory",), states=CHAINED, num_new=8, block_size=BLOCK_SIZE)
    check(CacheAdapter(model), reference, prompts[:3], plan, record_property)
