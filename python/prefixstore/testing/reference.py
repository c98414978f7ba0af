"""What answers are judged by: the model alone, without any cache."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from prefixstore.testing.adapter import Tokens


@dataclass(frozen=True)
class Scores:
    """How an answer looks to the model alone, each token after the prompt and those before it.

    Attributes:
        gaps: `[num_new]`, float32: the best logit less that of the answer's token; 0 where it is
            the greedy one.
        logprobs: `[num_new]`, float32: of the answer's tokens.
        first_logits: `[vocab_size]`, float32: after the prompt.
    """

    gaps: np.ndarray
    logprobs: np.ndarray
    first_logits: np.ndarray = field(repr=False)

    def of_first(self, num_new: int) -> Scores:
        """Of the answer's beginning."""
        return Scores(self.gaps[:num_new], self.logprobs[:num_new], self.first_logits)


class Reference(Protocol):
    """Judges answers; never while an engine is open."""

    def score(self, prompt: Tokens, answer: Tokens) -> Scores: ...


class ModelReference:
    """A Hugging Face model, with the attention that it has by itself.

    One pass over prompt and answer says of every token whether it is the greedy one: cheaper than
    generating, independent of any cache, and what follows a tie is judged too. The beginning of an
    answer that was judged takes none.

    Args:
        model: In evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._known: defaultdict[Tokens, dict[Tokens, Scores]] = defaultdict(dict)  # by prompt

    def score(self, prompt: Tokens, answer: Tokens) -> Scores:
        known = self._known[prompt]
        for other, scores in known.items():
            if other[: len(answer)] == answer:
                return scores.of_first(len(answer))
        known[answer] = self._compute(prompt, answer)
        return known[answer]

    @torch.inference_mode()
    def _compute(self, prompt: Tokens, answer: Tokens) -> Scores:
        device = self._model.device
        ids = torch.tensor([[*prompt, *answer]], device=device)
        # The last token's logits choose what would follow it.
        out = self._model(ids, use_cache=False, logits_to_keep=len(answer) + 1)
        logits = out.logits[0, :-1].float()  # [num_new, vocab_size]
        chosen = torch.tensor(answer, device=device)[:, None]
        gaps = logits.max(-1).values - logits.gather(1, chosen)[:, 0]
        logprobs = logits.log_softmax(-1).gather(1, chosen)[:, 0]
        return Scores(gaps.cpu().numpy(), logprobs.cpu().numpy(), logits[0].cpu().numpy().copy())
