"""What batch invariance costs whole models, and which layers lack it by default.

The cases time a forward pass in bfloat16 with kvkernels' attention: prompts of one sequence, and
decode steps of several. The baseline has PyTorch's layers and attention as it is by default;
"fused" is what an engine runs on a CPU: batch-invariant layers, with norms, rotations and gates in
one pass each. Case "layers" times nothing: it reports which layers give a token other bits with
another number of tokens or of threads.
"""

import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bench.harness import print_line, spread, time_alternating
from kvkernels import BlockAllocator, KVPool
from kvkernels.nn import PagedGroup, layer_groups

BLOCK_SIZE = 64
MODELS = ("smollm2", "gemma3")


@dataclass(frozen=True)
class Case:
    name: str
    batch_size: int
    num_context: int
    num_new: int


CASES = [
    Case("prefill_512", 1, 0, 512),
    Case("prefill_2k", 1, 0, 2048),
    Case("decode_1x1k", 1, 1024, 1),
    Case("decode_8x1k", 8, 1024, 1),
    Case("decode_16x1k", 16, 1024, 1),
]
# Each layer is tried with these numbers of tokens, out of NUM_TOKENS.
TRIED = (1, 2, 3, 5, 8, 16, 17, 33, 64, 100, 512)
NUM_TOKENS = 513

# After all layers, two orders of summation in bfloat16 differ by this much.
MAX_LOGITS_ERROR = 0.1


def load(name: str, dtype: torch.dtype) -> Any:
    from prefixstore import models

    return models.load_model(getattr(models, f"prepare_{name}")(), dtype)


@dataclass
class Runner:
    """A model, and a cache that holds a context."""

    model: Any
    cache: Any
    tokens: torch.Tensor  # [batch_size, num_new]

    def run(self) -> torch.Tensor:
        """Return each sequence's last logits; afterwards the cache forgets the new tokens."""
        logits = self.model(self.tokens, past_key_values=self.cache, logits_to_keep=1).logits
        self.cache.crop(-self.tokens.shape[1])
        return logits[:, -1].float()


@contextmanager
def open_runner(model: Any, case: Case) -> Iterator[Runner]:
    from kvkernels.nn.transformers import PagedCache, paged_attention

    num_tokens = case.num_context + case.num_new
    num_blocks = case.batch_size * -(-num_tokens // BLOCK_SIZE)
    groups = [
        PagedGroup(
            KVPool(spec.layout, num_blocks), BlockAllocator(num_blocks), spec.layers, spec.window
        )
        for spec in layer_groups(model.config, BLOCK_SIZE, model.dtype)
    ]
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch_size, num_tokens)
    tokens = torch.randint(3, model.config.vocab_size, shape, generator=generator)
    with paged_attention(model), PagedCache(groups, batch_size=case.batch_size) as cache:
        if case.num_context:
            context = tokens[:, : case.num_context]
            model(context, past_key_values=cache, logits_to_keep=1)
        yield Runner(model, cache, tokens[:, case.num_context :])


def make_models(model: Any) -> dict[str, Any]:
    """A model for each provider, since installing would take a good part of a decode step."""
    from kvkernels.nn import batch_invariance, fused_layers

    models = {"default": model, "batch_invariant": copy.deepcopy(model)}
    models["fused"] = copy.deepcopy(model)
    fused_layers.install(models["fused"])
    for name in ("batch_invariant", "fused"):
        batch_invariance.install(models[name])
    return models


def measure(model_name: str, model: Any, case: Case, num_rounds: int) -> None:
    with ExitStack() as stack:
        runners = {
            name: stack.enter_context(open_runner(own_model, case))
            for name, own_model in make_models(model).items()
        }
        logits = {name: runner.run() for name, runner in runners.items()}
        want = logits["default"]
        errors = {name: ((got - want).norm() / want.norm()).item() for name, got in logits.items()}
        if not max(errors.values()) <= MAX_LOGITS_ERROR:
            raise RuntimeError(f"logits: expected within {MAX_LOGITS_ERROR}, got {errors}")
        runs = {name: lambda _, runner=runner: runner.run() for name, runner in runners.items()}
        seconds = time_alternating(runs, [None], num_rounds)
    # Other work on the machine only ever adds time.
    best = {name: min(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print_line(
            case=f"{model_name}_{case.name}",
            provider=name,
            time_to_default=statistics.median(values) / statistics.median(seconds["default"]),
            best_time_to_default=best[name] / best["default"],
            logits_error=errors[name],
            **spread(values),
        )


@dataclass
class Layer:
    """A layer and the arguments that the model called it with."""

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def on_tokens(self, begin: int, end: int) -> list[torch.Tensor]:
        """Its output for some of the tokens."""
        args = [narrow_tokens(arg, begin, end) for arg in self.args]
        kwargs = {name: narrow_tokens(arg, begin, end) for name, arg in self.kwargs.items()}
        result = self.module(*args, **kwargs)
        return list(result) if isinstance(result, tuple) else [result]

    def differs_at(self) -> list[int]:
        """Numbers of tokens with which some token gets other bits than with all of them."""
        whole = self.on_tokens(0, NUM_TOKENS)
        return [
            count
            for count in TRIED
            if not all(
                torch.equal(part, narrow_tokens(all_tokens, begin, begin + count))
                for begin in (0, 7, NUM_TOKENS - count)
                if begin + count <= NUM_TOKENS
                for part, all_tokens in zip(
                    self.on_tokens(begin, begin + count), whole, strict=True
                )
            )
        ]


def narrow_tokens(value: Any, begin: int, end: int) -> Any:
    """Tokens [begin, end) of a tensor, along the dimension of length NUM_TOKENS."""
    if not isinstance(value, torch.Tensor) or NUM_TOKENS not in value.shape:
        return value
    return value.narrow(value.shape.index(NUM_TOKENS), begin, end - begin).clone()


def find_layers(model: Any) -> dict[str, Layer]:
    """The layers of the model's first block and those outside of blocks, as they were called."""
    found: dict[str, Layer] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.setdefault(name, Layer(module, args, kwargs))

        return hook

    handles = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if not list(module.children()) and ("layers." not in name or "layers.0." in name)
    ]
    model(torch.arange(3, 3 + NUM_TOKENS)[None])
    for handle in handles:
        handle.remove()
    return found


def print_layers(model_name: str, model: Any, threads: tuple[int, ...] = (1, 2)) -> None:
    before = torch.get_num_threads()
    for name, layer in find_layers(model).items():
        differs = {}
        for num_threads in threads:
            torch.set_num_threads(num_threads)
            differs[str(num_threads)] = layer.differs_at()
        print_line(
            case=f"{model_name}_layers",
            dtype=str(model.dtype),
            layer=name,
            differs_at_by_threads=differs,
        )
    torch.set_num_threads(before)


@torch.inference_mode()
def main(case_filter: str = "", num_rounds: int = 15) -> None:
    for model_name in MODELS:
        for dtype in (torch.bfloat16, torch.float32):
            if case_filter in f"{model_name}_layers":
                print_layers(model_name, load(model_name, dtype))
        for case in CASES:
            if case_filter in f"{model_name}_{case.name}":
                measure(model_name, load(model_name, torch.bfloat16), case, num_rounds)
