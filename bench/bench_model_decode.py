"""Decoding with a whole model, SmolLM2-135M in bfloat16: drop-in attention and transformers' own.

Each provider has read the same prompt (transformers' with `sdpa`). A run is some greedy steps of
one token each, which its cache then forgets. transformers' `sdpa` and `eager` use its DynamicCache.
`kvkernels` has the attention alone, `kvkernels_layers` also the other layers of
`kvkernels.nn.fused_model`. All share one copy of the weights.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.harness import figures, print_line, time_alternating
from bench.rates import make_probes, rates_of
from kvkernels import BlockAllocator, KVPool
from kvkernels.nn import PagedGroup, layer_groups

BLOCK_SIZE = 64
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Case:
    name: str
    num_context: int
    num_steps: int = 32


CASES = [Case("smollm2_135m_1x4k", 4096)]

# After all layers two orders of summation in bfloat16 differ by this much; wrong attention by more.
MAX_LOGITS_ERROR = 0.1


def load() -> tuple[Callable[[], Any], torch.Tensor]:
    """A function that makes further models over the same weights, and tokens of English text."""
    from prefixstore.models import load_model, load_tokenizer, prepare_smollm2

    path = prepare_smollm2()
    first = load_model(path, torch.bfloat16)

    def make() -> Any:
        model = load_model(path, torch.bfloat16)
        model.load_state_dict(first.state_dict(), assign=True)
        model.tie_weights()
        return model

    texts = [file.read_text() for file in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))]
    return make, load_tokenizer(path)("\n".join(texts), return_tensors="pt").input_ids[0]


@dataclass
class Decoder:
    """A model and a cache that holds a prompt except its last token."""

    model: Any
    cache: Any
    last: torch.Tensor  # [1, 1]

    @classmethod
    def of_prompt(cls, model: Any, cache: Any, prompt: torch.Tensor) -> "Decoder":
        model(prompt[:, :-1], past_key_values=cache, logits_to_keep=1)
        return cls(model, cache, prompt[:, -1:])

    def first_logits(self) -> torch.Tensor:
        logits = self.model(self.last, past_key_values=self.cache).logits[0, -1]
        self.cache.crop(-1)
        return logits.float()

    def decode(self, num_steps: int) -> list[int]:
        tokens, token = [], self.last
        for _ in range(num_steps):
            logits = self.model(token, past_key_values=self.cache).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(token.item())
        self.cache.crop(-num_steps)
        return tokens


@contextmanager
def open_transformers(
    implementation: str, make: Callable[[], Any], prompt: torch.Tensor, _: int
) -> Iterator[Decoder]:
    from transformers import DynamicCache

    model = make()
    cache = DynamicCache(config=model.config)
    model.set_attn_implementation("sdpa")  # `eager` takes half a minute to read the prompt
    decoder = Decoder.of_prompt(model, cache, prompt)
    model.set_attn_implementation(implementation)
    yield decoder


@contextmanager
def open_paged(
    replaces_layers: bool, make: Callable[[], Any], prompt: torch.Tensor, num_steps: int
) -> Iterator[Decoder]:
    from kvkernels.nn.fused_model import fused_model
    from kvkernels.nn.transformers import PagedCache, paged_attention

    model = make()
    num_blocks = -(-(prompt.shape[1] + num_steps) // BLOCK_SIZE)
    groups = [
        PagedGroup(
            KVPool(spec.layout, num_blocks), BlockAllocator(num_blocks), spec.layers, spec.window
        )
        for spec in layer_groups(model.config, BLOCK_SIZE, torch.bfloat16)
    ]
    replaced = fused_model if replaces_layers else paged_attention
    with replaced(model), PagedCache(groups) as cache:
        yield Decoder.of_prompt(model, cache, prompt)


PROVIDERS: dict[str, Callable[[Callable[[], Any], torch.Tensor, int], Any]] = {
    "transformers_sdpa": partial(open_transformers, "sdpa"),
    "transformers_eager": partial(open_transformers, "eager"),
    "kvkernels": partial(open_paged, False),
    "kvkernels_layers": partial(open_paged, True),
}


def check_logits(decoders: dict[str, Decoder]) -> dict[str, float]:
    """Norm of the difference of the first step's logits from the baseline's, over their norm."""
    logits = {name: decoder.first_logits() for name, decoder in decoders.items()}
    want = logits[next(iter(logits))]
    errors = {name: ((one - want).norm() / want.norm()).item() for name, one in logits.items()}
    for name, error in errors.items():
        if not error <= MAX_LOGITS_ERROR:
            raise RuntimeError(
                f"{name}: expected logits within {MAX_LOGITS_ERROR}, got {error:.3e}"
            )
    return errors


def num_equal(tokens: list[int], want: list[int]) -> int:
    """How many tokens from the start are equal: after a near tie two answers may differ."""
    pairs = enumerate(zip(tokens, want, strict=True))
    return next((step for step, (token, other) in pairs if token != other), len(want))


def num_bytes_read(decoder: Decoder, case: Case) -> int:
    """Bytes read in a run: all weights and the prompt's keys and values in each step."""
    weights = {p.data_ptr(): p.nbytes for p in decoder.model.parameters()}
    specs = layer_groups(decoder.model.config, BLOCK_SIZE, torch.bfloat16)
    kv = case.num_context * sum(spec.layout.block_bytes for spec in specs) // BLOCK_SIZE
    return case.num_steps * (sum(weights.values()) + kv)


def measure(case: Case, num_rounds: int) -> None:
    make, text = load()
    prompt = text.repeat(-(-case.num_context // len(text)))[None, : case.num_context]
    with ExitStack() as stack:
        decoders = {
            name: stack.enter_context(open_provider(make, prompt, case.num_steps))
            for name, open_provider in PROVIDERS.items()
        }
        errors = check_logits(decoders)
        tokens = {name: decoder.decode(case.num_steps) for name, decoder in decoders.items()}
        runs = {
            name: lambda _, decoder=decoder: decoder.decode(case.num_steps)
            for name, decoder in decoders.items()
        }
        seconds = time_alternating(runs, [None], num_rounds, make_probes())
        num_bytes = num_bytes_read(decoders["kvkernels"], case)
    rates, baseline = rates_of(seconds), next(iter(decoders))
    for name in decoders:
        median = statistics.median(seconds[name])
        print_line(
            case=case.name,
            provider=name,
            tokens_per_s=case.num_steps / median,
            times_as_fast_as_baseline=statistics.median(seconds[baseline]) / median,
            num_steps=case.num_steps,
            num_equal_tokens=num_equal(tokens[name], tokens[baseline]),
            logits_error=errors[name],
            **figures(seconds[name], rates, num_bytes),
        )


@torch.inference_mode()
def main(case_filter: str = "", num_rounds: int = 15) -> None:
    for case in CASES:
        if case_filter in case.name:
            measure(case, num_rounds)
