"""The cold-versus-warm check of an engine of one's own; run it: python docs/own_engine.py

The engine here keeps transformers' caches of whole prompts, on the "device" or, once evicted, in a
"memory" tier. Its adapter is all that the check needs.
"""

import copy

import torch
import transformers

from prefixstore.testing import Ability, Answer, ModelReference, Plan, check_engines


class ToyEngine:
    """Goes on from the longest beginning of a prompt that it has computed before."""

    def __init__(self, model, block_size):
        self.model, self.block_size = model, block_size
        self.kept = []  # (salt, tokens, cache, place)

    def find(self, prompt, salt):
        """Whole blocks that are known, the cache that holds them, and where it was."""
        best = (0, None, "device")
        for other_salt, tokens, cache, place in self.kept:
            pairs = enumerate(zip(prompt[:-1], tokens, strict=False))
            length = min(len(prompt) - 1, len(tokens))
            length = next((at for at, (a, b) in pairs if a != b), length)
            length = length // self.block_size * self.block_size
            if other_salt == salt and length > best[0]:
                best = (length, cache, place)
        return best

    @torch.inference_mode()
    def generate(self, prompt, num_new, salt):
        num_reused, known, place = self.find(prompt, salt)
        cache = copy.deepcopy(known) if known else transformers.DynamicCache()
        if known:
            cache.crop(num_reused - cache.get_seq_length())
        step, tokens, logits = list(prompt[num_reused:]), [], []
        for _ in range(num_new):
            out = self.model(torch.tensor([step]), past_key_values=cache, logits_to_keep=1)
            logits.append(out.logits[0, -1])
            step = [int(logits[-1].argmax())]
            tokens += step
        self.kept.append((salt, (*prompt, *tokens[:-1]), cache, "device"))
        return tokens, torch.stack(logits), {place: num_reused}


class ToySubject:
    """The engine, open."""

    def __init__(self, model, setup):
        self.engine = ToyEngine(model, setup.block_size)

    def answer(self, prompts, num_new, salt):
        answers = []
        for prompt in prompts:
            tokens, logits, reused = self.engine.generate(prompt, num_new, salt)
            logprobs = logits.log_softmax(-1)[torch.arange(num_new), tokens]
            answers.append(
                Answer(
                    tokens=tuple(tokens),
                    logprobs=tuple(logprobs.tolist()),
                    first_logits=logits[0].numpy(),
                    reused=reused,
                )
            )
        return answers

    def flush(self):
        pass  # nothing waits to be written

    def evict(self):
        self.engine.kept = [(*one[:3], "memory") for one in self.engine.kept]

    def check(self):
        return []

    def close(self):
        pass


class ToyAdapter:
    name = "toy"
    abilities: frozenset[Ability] = frozenset()

    def __init__(self, model):
        self.model = model

    def open(self, setup):
        return ToySubject(self.model, setup)


def main():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=96,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    prompts = [torch.randint(3, 97, (length,)).tolist() for length in (70, 49, 96)]
    # Its pool has no bound, so it is never pressed.
    states = ("cold", "warm", "evicted", "other salt", "half", "branched", "next turn")
    plan = Plan(tiers=("memory",), states=states, num_new=8)
    report = check_engines([ToyAdapter(model)], ModelReference(model), prompts, plan)
    print(report.to_text())
    assert report.is_good


if __name__ == "__main__":
    main()
